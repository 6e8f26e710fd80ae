"""LoRA (Hu et al., arXiv 2106.09685) at one decoder layer: W x + (alpha / r) B A x in the four projections of its attention.

The paper holds a gate against it at rank 8, where both have about as many parameters.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx

from lsg_jax.config import LoraConfig, TextConfig
from lsg_jax.gating.gate import GateParam
from lsg_jax.types import LayerChange

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


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

    def at_layer(self, method: LoraConfig, num_layers: int) -> LowRankChange:
        """The intervention that adds the update in layer `method.layer` of `num_layers`."""
        factors = {name: (getattr(self, f"{name}_a")[...], getattr(self, f"{name}_b")[...]) for name in PROJECTIONS}
        layers = jnp.arange(num_layers)
        scale = jnp.where(layers == method.layer, method.alpha / method.rank, 0.0)
        return LowRankChange(factors=factors, scale=scale, first_layer=method.layer)


@flax.struct.dataclass
class LowRankChange:
    """Adds low-rank updates in one decoder layer, for all tokens and for rows without an image as well.

    Attributes:
        factors: projection name -> (A float32 [*in, r], B float32 [r, *out]).
        scale: float32 [L], alpha / r at the layer and 0 at the others, where a scan computes the small product for nothing.
        first_layer: the layer, static.
    """

    factors: dict[str, tuple[jax.Array, jax.Array]]
    scale: jax.Array
    first_layer: int = flax.struct.field(pytree_node=False)

    def per_layer(self, start: int, stop: int) -> tuple[Any, jax.Array]:
        """What a scan over the layers from `start` to `stop` walks along."""
        copies = jax.tree.map(lambda factor: jnp.broadcast_to(factor, (stop - start, *factor.shape)), self.factors)
        return copies, self.scale[start:stop]

    def layer(self, walked: tuple[Any, jax.Array], hidden: jax.Array) -> LayerChange:
        """The updates of one layer; `walked` is its part of `per_layer`."""
        factors, scale = walked
        return LayerChange(low_rank={name: functools.partial(_update, pair, scale) for name, pair in factors.items()})


def check_lora(method: LoraConfig, *, num_layers: int) -> None:
    """Raises ValueError for a layer that a decoder of `num_layers` layers does not have, or an alpha that is no number."""
    if not 0 <= method.layer < num_layers:
        raise ValueError(f"lora.layer: layer {method.layer} does not exist, the model has layers 0 to {num_layers - 1}")
    if not math.isfinite(method.alpha):
        raise ValueError(f"lora.alpha is {method.alpha}: it must be a number")


def _update(factors: tuple[jax.Array, jax.Array], scale: jax.Array, x: jax.Array) -> jax.Array:
    """scale * B A x in float32, [B, T, *in] -> [B, T, *out] in the dtype of x."""
    down, up = factors
    exact: Any = functools.partial(jnp.tensordot, precision=jax.lax.Precision.HIGHEST)  # a TPU would round float32 to bfloat16
    inner = exact(x.astype(jnp.float32), down, axes=down.ndim - 1)
    return (scale * exact(inner, up, axes=1)).astype(x.dtype)
