"""Building blocks of the frozen stack: linear maps over any axes, norms, stacking of equal layers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from lsg_jax.activations import standardise
from lsg_jax.config import Weights

Module = TypeVar("Module", bound=nnx.Module)


LARGEST = 127
"""Of an int8 weight: the range is symmetric, without -128."""


class Linear(nnx.Module):
    """y = x · kernel + bias over the trailing axes: kernel [*in_shape, *out_shape], so heads need no reshapes.

    With int8 weights y = (x · kernel) * kernel_scale + bias: kernel int8, kernel_scale float32 [*out_shape], one for each
    output channel. The scale is applied to the product, so that no kernel is held at full precision.
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        out_shape: tuple[int, ...],
        *,
        bias: bool,
        rngs: nnx.Rngs,
        dtype: Any,
        weights: Weights = "float",
    ):
        shape, fan_in = (*in_shape, *out_shape), math.prod(in_shape)
        self.kernel_scale: nnx.Param[jax.Array] | None
        if weights == "int8":
            self.kernel = nnx.Param(jax.random.randint(rngs.params(), shape, -LARGEST, LARGEST + 1, jnp.int8))
            scale = math.sqrt(3 / fan_in) / LARGEST  # uniform values up to b have a deviation of b / sqrt(3)
            self.kernel_scale = nnx.Param(jnp.full(out_shape, scale, jnp.float32))
        else:
            init = jax.random.normal(rngs.params(), shape, dtype) / math.sqrt(fan_in)
            self.kernel, self.kernel_scale = nnx.Param(init.astype(dtype)), None
        self.bias = nnx.Param(jnp.zeros(out_shape, dtype)) if bias else None
        self.in_axes = len(in_shape)

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.kernel_scale is None:
            y = jnp.tensordot(x, self.kernel[...], axes=self.in_axes)
        else:
            y = jnp.tensordot(x, self.kernel[...].astype(x.dtype), axes=self.in_axes)
            y = (y.astype(jnp.float32) * self.kernel_scale[...]).astype(x.dtype)
        return y if self.bias is None else y + self.bias[...]


class LayerNorm(nnx.Module):
    """Layer norm over the last axis, computed in float32."""

    def __init__(self, width: int, *, eps: float, dtype: Any):
        self.scale = nnx.Param(jnp.ones((width,), dtype))
        self.bias = nnx.Param(jnp.zeros((width,), dtype))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        y = standardise(x, self.eps)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square norm, computed in float32 and scaled in the input's dtype, as the Llama family does.

    With `offset` it is multiplied by 1 + scale, in float32, as Gemma does.
    """

    def __init__(self, width: int, *, eps: float, dtype: Any, offset: bool = False):
        self.scale = nnx.Param(jnp.zeros((width,), dtype) if offset else jnp.ones((width,), dtype))
        self.eps = eps
        self.offset = offset

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        if self.offset:
            return (y * (1.0 + self.scale[...].astype(jnp.float32))).astype(x.dtype)
        return y.astype(x.dtype) * self.scale[...]


def stack_layers(make: Callable[[nnx.Rngs], Module], key: jax.Array, count: int) -> Module:
    """`count` layers of one kind as a single module whose parameters have a leading layer axis."""
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    state = jax.vmap(lambda k: nnx.state(make(nnx.Rngs(k))))(jax.random.split(key, count))
    stacked: Module = nnx.merge(graphdef, state)
    return stacked


def layer_at(stacked: Any, index: jax.Array) -> Any:
    """One layer's parameters out of a stacked tree.

    The scans run over layer indices and slice here: `weights[lo:hi]` as scan inputs would copy that part of the model.
    """
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), stacked)
