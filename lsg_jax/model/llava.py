"""The whole stack: image -> vision tower -> projector -> merged sequence -> language model, with gates on the way."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, get_args

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from lsg_jax.baselines.diysink import DiySink, QuestionWeights, check_diysink, mean_question, sink_patches, taking_part
from lsg_jax.baselines.lora import LowRankUpdate, check_lora
from lsg_jax.baselines.sink_front import check_sink_front, sinks_to_front
from lsg_jax.baselines.var import attention_redistribution, check_var
from lsg_jax.config import (
    DiySinkConfig,
    FixedConfig,
    FullConfig,
    GateConfig,
    LoraConfig,
    MethodConfig,
    ModelConfig,
    Part,
    SinkFrontConfig,
    VarConfig,
)
from lsg_jax.gating.gate import KeyScaling, SinkGate, expand_gates
from lsg_jax.model.language_model import DecoderOutput, LanguageModel
from lsg_jax.model.layers import stack_layers
from lsg_jax.model.projector import Projector
from lsg_jax.model.vision_tower import VisionTower
from lsg_jax.sinks.attention import received_attention
from lsg_jax.sinks.criteria import sink_mask
from lsg_jax.types import Array, Batch, Intervention, LayerView, VisualTokens


@flax.struct.dataclass
class MergedSequence:
    """Text embeddings with the projected image patches in their places.

    Attributes:
        x: [B, T, D]; None where only the tokens are asked about.
        valid: bool [B, T], tokens that take part; those of the batch unless a method drops some.
        visual: where the patches are, and which of them are V-sinks; None for a batch without images.
    """

    x: Array
    valid: Array
    visual: VisualTokens | None


class Llava(nnx.Module):
    """A LLaVA-style model.

    Args:
        gate: adds gates at `gate.layers`.
        method: what is done to the model instead, one of the baselines.
        mesh: the devices over which activations are laid out; None for one device.

    What training changes, gates or the parameters of a baseline, lies below `gates`; all else is frozen.

    Raises:
        ValueError: a gated layer that does not exist, or L-sink groups with a criterion that needs attention weights.
    """

    def __init__(
        self,
        config: ModelConfig,
        gate: GateConfig | None = None,
        *,
        method: MethodConfig | None = None,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        mesh: Mesh | None = None,
    ):
        self.config = config
        self.mesh = mesh
        self.gate_config = gate
        self.method = method
        self.vision_tower = VisionTower(config.vision, rngs=rngs, dtype=dtype, mesh=mesh)
        self.projector = Projector(config, rngs=rngs, dtype=dtype)
        self.language_model = LanguageModel(config.text, rngs=rngs, dtype=dtype, mesh=mesh)
        self.gates: Any
        if gate is not None:
            check_gate(gate, config)
            self.gates = make_gates(config, gate, rngs.gates())
        elif isinstance(method, LoraConfig | DiySinkConfig):
            self.gates = make_baseline(config, method, rngs.gates())

    def image_features(self, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Features before the projector, and the V-sinks among them.

        Args:
            pixels: [B, H, W, C], uint8 or already normalised float32.

        Returns:
            features [B, P, Dv] (several feature layers side by side), V-sink mask bool [B, P].
        """
        if pixels.dtype == jnp.uint8:
            image = self.config.image
            pixels = (pixels.astype(jnp.float32) / 255.0 - jnp.array(image.mean)) / jnp.array(image.std)
        sinks = self.config.sinks
        states, weights = self.vision_tower(pixels, self.config.feature_layers, return_weights=sinks.criterion == "attention")
        if self.config.feature_select == "default":
            states = [state[:, 1:] for state in states]
        features = jnp.concatenate(states, axis=-1)
        everywhere = jnp.ones(features.shape[:2], bool)
        received = None
        if weights is not None:
            received = received_attention(weights, jnp.ones(weights.shape[::2], bool))[:, -features.shape[1] :]
        elif sinks.criterion == "attention":
            raise ValueError("criterion attention needs a vision feature layer above the embeddings")
        mask = lambda: sink_mask(
            sinks.criterion,
            features,
            dims=sinks.vit_dims,
            tau=sinks.vit_tau,
            massive_ratio=sinks.massive_ratio,
            valid=everywhere,
            received=received,
        )
        # an ungated model must also run where nobody has said what a sink is
        return features, mask() if sinks.knows_v_sinks else jnp.zeros_like(everywhere)

    def merge(self, batch: Batch) -> MergedSequence:
        """Puts projected patch i of a row's image at the row's i-th image token.

        Sink-to-the-front reorders the patches first; DIYSink has projectors of its own and drops what `batch.route` leaves out.
        """
        x = self.language_model.embed(batch.input_ids)
        if batch.pixels is None:
            return MergedSequence(x=x, valid=jnp.asarray(batch.attention_mask), visual=None)
        features, v_sink = self.image_features(batch.pixels)
        if isinstance(self.method, SinkFrontConfig):
            features, v_sink = sinks_to_front(features, v_sink, self.method)
        is_image = (batch.input_ids == self.config.image_token_id) & batch.attention_mask
        index = jnp.clip(jnp.cumsum(is_image, axis=1) - 1, 0, features.shape[1] - 1)
        valid, visual = jnp.asarray(batch.attention_mask), is_image
        if isinstance(self.method, DiySinkConfig):
            is_sink = sink_patches(features, self.method.tau)
            text = valid & ~is_image & (jnp.arange(x.shape[1]) <= batch.gate_position[:, None])
            patches = self.gates(features, is_sink, mean_question(x, text))
            if batch.route is not None:
                visual = is_image & jnp.take_along_axis(taking_part(is_sink, batch.route), index, axis=1)
                valid = valid & (visual | ~is_image)
        else:
            patches = self.projector(features)
        x = jnp.where(is_image[..., None], jnp.take_along_axis(patches, index[..., None], axis=1).astype(x.dtype), x)
        v_sink = visual & jnp.take_along_axis(v_sink, index, axis=1)
        return MergedSequence(x=x, valid=valid, visual=VisualTokens(mask=visual, v_sink=v_sink))

    def intervention(self, batch: Batch, merged: MergedSequence) -> Intervention | None:
        """What the model's gates or its method do in the decoder layers; None for nothing."""
        if isinstance(self.method, LoraConfig):
            return self.gates.at_layer(self.method, self.config.text.num_layers)
        visual = merged.visual
        if visual is None:  # nothing to scale
            return None
        if self.gate_config is not None and self.gate_config.layers:
            source, enabled, gate = expand_gates(self.gates, self.gate_config, self.config.text.num_layers)
            return self._scaling(batch, visual, self.gate_config, source, enabled, gate)
        if isinstance(self.method, VarConfig):
            dims, num_layers = self.config.sinks.llm_dims, self.config.text.num_layers
            return attention_redistribution(
                self.method, visual=visual.mask, valid=merged.valid, dims=dims, num_layers=num_layers
            )
        if isinstance(self.method, FixedConfig):
            layers = jnp.arange(self.config.text.num_layers)
            coefficients = jnp.broadcast_to(
                jnp.array(self.method.coefficients, jnp.float32), (len(layers), len(self.method.coefficients))
            )
            gate_config = GateConfig(layers=self.method.layers, grouping=self.method.grouping)
            return self.fixed_scaling(batch, visual, coefficients, jnp.isin(layers, jnp.array(self.method.layers)), gate_config)
        return None

    def fixed_scaling(
        self, batch: Batch, visual: VisualTokens, coefficients: jax.Array, enabled: jax.Array, gate: GateConfig
    ) -> KeyScaling:
        """Key scales from given coefficients float32 [L, G] at the layers `enabled` bool [L]: the oracle of the paper."""
        return self._scaling(batch, visual, gate, coefficients, enabled, None)

    def __call__(
        self,
        batch: Batch,
        *,
        merged: MergedSequence | None = None,
        rows: jax.Array | None = None,
        keep_kv: bool = False,
        room: int = 0,
        remat: str = "none",
        observe: Callable[[LayerView], Any] | None = None,
        observe_attention: bool = False,
    ) -> DecoderOutput:
        """Runs a batch through the stack; keywords as LanguageModel takes them.

        `merged` reuses a sequence that `merge` gave for the same batch.
        """
        merged = merged or self.merge(batch)
        return self.language_model(
            merged.x,
            merged.valid,
            self.intervention(batch, merged),
            differentiate=isinstance(self.method, DiySinkConfig | FullConfig),  # what comes before the layers is trained
            rows=rows,
            keep_kv=keep_kv,
            room=room,
            remat=remat,
            observe=observe,
            observe_attention=observe_attention,
        )

    def _scaling(
        self, batch: Batch, visual: VisualTokens, gate: GateConfig, source: Any, enabled: jax.Array, graphdef: Any
    ) -> KeyScaling:
        return KeyScaling(
            source=source,
            enabled=enabled,
            visual=visual,
            gate_position=jnp.asarray(batch.gate_position),
            valid=jnp.asarray(batch.attention_mask),
            first_layer=min(gate.layers),
            config=gate,
            sinks=self.config.sinks,
            gate=graphdef,
        )


def make_gates(config: ModelConfig, gate: GateConfig, key: jax.Array) -> SinkGate:
    """Fresh gates for the layers of `gate`, stacked in their order."""
    return stack_layers(lambda r: SinkGate(config.text.hidden_size, gate, rngs=r), key, len(gate.layers))


def make_baseline(config: ModelConfig, method: LoraConfig | DiySinkConfig, key: jax.Array) -> LowRankUpdate | DiySink:
    """What a baseline trains, float32 and random; `initial_parameters` has the values that training starts from."""
    rngs = nnx.Rngs(key)
    if isinstance(method, LoraConfig):
        return LowRankUpdate(config.text, method, rngs=rngs)
    weights = QuestionWeights(config.text.hidden_size, method.width, rngs=rngs) if method.routing == "mlp" else None
    sinks, others = (Projector(config, rngs=rngs, dtype=jnp.float32) for _ in range(2))
    return DiySink(sinks, others, weights)


def initial_parameters(
    config: ModelConfig, gate: GateConfig | None, method: MethodConfig | None, params: dict, key: jax.Array
) -> dict:
    """What is trained, before the first step, a nested dict of float32 arrays of its own; `join_trained` says where it belongs.

    Args:
        gate, method: one of the two; a method that is trained.
        params: of the backbone, from which DIYSink's projectors and the parts of FullConfig start.
    """
    if gate is not None:
        return nnx.to_pure_dict(nnx.state(make_gates(config, gate, key)))
    copy = functools.partial(jax.tree.map, lambda leaf: jnp.array(leaf, jnp.float32, copy=True))
    if isinstance(method, FullConfig):
        return {part: copy(params[part]) for part in method.parts}
    assert isinstance(method, LoraConfig | DiySinkConfig)
    parameters = nnx.to_pure_dict(nnx.state(make_baseline(config, method, key)))
    if isinstance(method, DiySinkConfig):
        for name in ("sink_projector", "other_projector"):
            parameters[name] = copy(params["projector"])
    return parameters


def abstract_model(
    config: ModelConfig,
    gate: GateConfig | None = None,
    *,
    method: MethodConfig | None = None,
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
) -> tuple[Any, dict]:
    """The model's graph definition and its parameters as a nested dict of ShapeDtypeStruct; allocates nothing."""
    graphdef, state = _traced(config, gate, method, jnp.dtype(dtype), mesh)
    return graphdef, nnx.to_pure_dict(state)


@functools.cache  # tracing takes a good part of a second, and a study opens the same model under many gates
def _traced(
    config: ModelConfig, gate: GateConfig | None, method: MethodConfig | None, dtype: Any, mesh: Mesh | None
) -> tuple[Any, Any]:
    return nnx.split(nnx.eval_shape(lambda: Llava(config, gate, method=method, rngs=nnx.Rngs(0), dtype=dtype, mesh=mesh)))


def assemble(graphdef: Any, frozen: dict, trained: dict | None = None) -> Llava:
    """The model around given parameters; `trained` as in `join_trained`."""
    return nnx.merge(graphdef, join_trained(frozen, trained))


def join_trained(frozen: Any, trained: Any) -> dict:
    """The model's tree of parameters, or of what there is for each of them.

    Args:
        trained: the subtree "gates" of gates and baselines, or whole parts of the model (FullConfig), which then take the place
            of those in `frozen`; None for a model that is not trained.
    """
    if trained is None:
        return frozen
    return {**frozen, **(trained if trained.keys() <= set(get_args(Part)) else {"gates": trained})}


def check_gate(gate: GateConfig, config: ModelConfig, *, name: str = "gate") -> None:
    """Raises ValueError for a gate configuration that the model cannot carry; `name` is the table that holds it."""
    layers, sinks = config.text.num_layers, config.sinks
    if not gate.layers:
        raise ValueError(f"{name}.layers is empty: name the decoder layers, for example [10]")
    if bad := [layer for layer in gate.layers if not 0 <= layer < layers]:
        raise ValueError(f"{name}.layers: layer {bad[0]} does not exist, the model has layers 0 to {layers - 1}")
    if list(gate.layers) != sorted(set(gate.layers)):
        raise ValueError(f"{name}.layers must ascend and name no layer twice: {list(gate.layers)}")
    if gate.grouping != "l_sink_rest" and not sinks.knows_v_sinks:
        raise ValueError("no V-sink dimensions are known for this model: set sinks.vit_dims, or another sinks.criterion")
    if gate.grouping != "v_sink_rest":
        if sinks.llm_criterion == "attention":
            raise ValueError("sinks.llm_criterion attention is only known after the keys are scaled: choose another for gating")
        if not sinks.knows_l_sinks:
            raise ValueError(
                "no L-sink dimensions are known for this model: set sinks.llm_dims, or another sinks.llm_criterion"
            )


def check_method(method: MethodConfig, config: ModelConfig) -> None:
    """Raises ValueError for a method that the model cannot carry."""
    if isinstance(method, LoraConfig):
        check_lora(method, num_layers=config.text.num_layers)
    if isinstance(method, DiySinkConfig):
        check_diysink(method)
    if isinstance(method, VarConfig):
        check_var(method, dims=config.sinks.llm_dims, num_layers=config.text.num_layers)
    if isinstance(method, SinkFrontConfig):
        check_sink_front(method)
    if isinstance(method, FixedConfig):
        gate = GateConfig(layers=method.layers, grouping=method.grouping)
        check_gate(gate, config, name="fixed")
        if len(method.coefficients) != gate.num_groups:
            groups = gate.num_groups
            raise ValueError(
                f"fixed.coefficients: {len(method.coefficients)} given, grouping {method.grouping} has {groups} groups"
            )
        if not all(math.isfinite(c) for c in method.coefficients):
            raise ValueError(f"fixed.coefficients must be finite: {list(method.coefficients)}")
