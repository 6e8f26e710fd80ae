"""The training step of LLaVA-1.5-7B at its true size, as shapes: nothing is allocated."""

import functools

import jax
import jax.numpy as jnp

from lsg_jax.config import GateConfig, ImageConfig, ModelConfig, RopeConfig, SinkConfig, TextConfig, TrainConfig, VisionConfig
from lsg_jax.methods.gates import Gates
from lsg_jax.methods.method_model import abstract_model
from lsg_jax.train.step import init_state, train_step
from lsg_jax.types import Batch, VisualInput

LAYERS, ROWS, TOKENS, ANSWER = 32, 64, 1024, 256

CONFIG = ModelConfig(
    vision=VisionConfig(
        family="clip",
        image_size=336,
        patch_size=14,
        hidden_size=1024,
        intermediate_size=4096,
        num_layers=24,
        num_heads=16,
        layer_norm_eps=1e-5,
        hidden_act="quick_gelu",
    ),
    text=TextConfig(
        family="llama",
        vocab_size=32064,
        hidden_size=4096,
        intermediate_size=11008,
        num_layers=LAYERS,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        rms_norm_eps=1e-5,
        rope=RopeConfig(theta=1e4),
        max_positions=4096,
    ),
    feature_layers=(-2,),
    feature_select="default",
    image_token_id=32000,
    eos_token_ids=(2,),
    pad_token_id=0,
    image=ImageConfig(size=336, aspect="pad", mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)),
    sinks=SinkConfig(vit_dims=(650,)),
)


def abstract_step(gate, remat="full"):
    """`train_step` with these gates, and the (state, frozen, batch) that it takes: bfloat16, 64 rows of 1,024 tokens."""
    graphdef, frozen = abstract_model(CONFIG, Gates(gate), dtype=jnp.bfloat16)
    gates = frozen.pop("trained")
    settings = {"config": TrainConfig(remat=remat), "total_steps": 100, "independent": gate.independent}
    state = jax.eval_shape(lambda gates: init_state(gates, frozen, **settings), gates)
    rows = lambda dtype, *shape: jax.ShapeDtypeStruct((ROWS, *shape), dtype)
    batch = Batch(
        input_ids=rows(jnp.int32, TOKENS),
        attention_mask=rows(jnp.bool_, TOKENS),
        images=VisualInput(rows(jnp.uint8, 1, 576, 14 * 14 * 3)),
        source=rows(jnp.int32, TOKENS, 1),
        gate_position=rows(jnp.int32),
        answer_index=rows(jnp.int32, ANSWER),
        answer_target=rows(jnp.int32, ANSWER),
        row_id=rows(jnp.int32),
    )
    return functools.partial(train_step, graphdef=graphdef, **settings), (state, frozen, batch)


def alone(layer):
    return GateConfig(layers=(layer,))


def each(layers):
    return GateConfig(layers=tuple(layers), independent=True)
