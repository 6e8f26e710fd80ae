"""LoRA (Hu et al., arXiv 2106.09685) at one decoder layer: W x + (alpha / r) B A x in the four projections of its attention.

The paper compares a gate with rank 8, where both have about as many parameters.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import Annotated, Any

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx

from lsg_jax.config import ModelConfig, TextConfig
from lsg_jax.config.ranges import Range, Table
from lsg_jax.gating.gate import GateParam
from lsg_jax.methods.method import Method, check_layer
from lsg_jax.methods.method_model import MethodModel
from lsg_jax.types import Batch, KVCache, LayerChange, Sequence

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class LoraConfig(Table, name="lora"):
    """LoRA at one decoder layer, on the projections of its attention. Rank 8 at D = 4096 has 262,144 parameters, as a gate.

    Attributes:
        layer: the decoder layer, 0-based.
        rank: rank of the update of each projection.
        alpha: the update is multiplied by alpha / rank.
    """

    layer: Annotated[int, Range("[0, 1e4]")] = 10
    rank: Annotated[int, Range("[1, 1e6]")] = 8
    alpha: Annotated[float, Range("(0, 1e6]")] = 16.0


class LowRankUpdate(nnx.Module):
    """A and B of each projection, float32 whatever the backbone's dtype.

    `<projection>_a` is [*in, r] and `<projection>_b` [r, *out], with the axes of the projection's own kernel. A is gaussian
    with variance 1 / fan-in, B zero: the untrained update changes nothing. Where heads and key-value heads are D wide in all,
    that makes 8 r D parameters; grouped keys have fewer.
    """

    def __init__(self, config: TextConfig, method: LoraConfig, *, rngs: nnx.Rngs):
        width, head = (config.hidden_size,), config.head_dim
        heads, kv_heads = (config.num_heads, head), (config.num_kv_heads, head)
        shapes = {"q_proj": (width, heads), "k_proj": (width, kv_heads), "v_proj": (width, kv_heads), "o_proj": (heads, width)}
        for name, (in_shape, out_shape) in shapes.items():
            scale = 1 / math.sqrt(math.prod(in_shape))
            setattr(self, f"{name}_a", GateParam(scale * jax.random.normal(rngs.params(), (*in_shape, method.rank))))
            setattr(self, f"{name}_b", GateParam(jnp.zeros((method.rank, *out_shape))))


@dataclass(frozen=True)
class Lora(Method):
    """A low-rank update of the attention of one decoder layer."""

    settings: LoraConfig = field(default_factory=LoraConfig)

    Settings = LoraConfig
    trains = True

    def for_model(self, config: ModelConfig) -> Lora:
        """Refuses a layer that the decoder does not have."""
        check_layer(self.settings.layer, config, "lora.layer")
        return self

    def module(self, config: ModelConfig, key: jax.Array) -> LowRankUpdate:
        """A and B of each projection, random A."""
        return LowRankUpdate(config.text, self.settings, rngs=nnx.Rngs(key))

    def intervention(self, model: MethodModel, batch: Batch, sequence: Sequence) -> LowRankChange:
        """The update at its layer, also for rows without an image."""
        trained, settings = model.trained, self.settings
        factors = {name: (getattr(trained, f"{name}_a")[...], getattr(trained, f"{name}_b")[...]) for name in PROJECTIONS}
        at_layer = jnp.arange(model.config.text.num_layers) == settings.layer
        scale = jnp.where(at_layer, settings.alpha / settings.rank, 0.0)
        return LowRankChange(factors=factors, scale=scale, first_layer=settings.layer)


@flax.struct.dataclass
class LowRankChange:
    """Adds low-rank updates in one decoder layer, for all tokens and for rows without an image as well.

    Attributes:
        factors: projection name -> (A float32 [*in, r], B float32 [r, *out]).
        scale: float32 [L], alpha / r at the layer and 0 at the others, where the scan multiplies the low-rank product by 0.
        first_layer: the layer, static.
    """

    factors: dict[str, tuple[jax.Array, jax.Array]]
    scale: jax.Array
    first_layer: int = flax.struct.field(pytree_node=False)

    last_layer = None

    def per_layer(self, start: int, stop: int) -> tuple[Any, jax.Array]:
        """Scan inputs of the layers from `start` to `stop`."""
        copies = jax.tree.map(lambda factor: jnp.broadcast_to(factor, (stop - start, *factor.shape)), self.factors)
        return copies, self.scale[start:stop]

    def layer(self, inputs: tuple[Any, jax.Array], hidden: jax.Array) -> LayerChange:
        """The updates of one layer; `inputs` is its slice of `per_layer`."""
        factors, scale = inputs
        return LayerChange(low_rank={name: functools.partial(_update, pair, scale) for name, pair in factors.items()})

    def while_decoding(self, cache: KVCache, slot: jax.Array) -> LowRankChange:
        """The same updates."""
        return self


def _update(factors: tuple[jax.Array, jax.Array], scale: jax.Array, x: jax.Array) -> jax.Array:
    """scale * B A x in float32, [B, T, *in] -> [B, T, *out] in the dtype of x."""
    down, up = factors
    exact: Any = functools.partial(jnp.tensordot, precision=jax.lax.Precision.HIGHEST)  # a TPU would round float32 to bfloat16
    inner = exact(x.astype(jnp.float32), down, axes=down.ndim - 1)
    update: jax.Array = (scale * exact(inner, up, axes=1)).astype(x.dtype)
    return update
