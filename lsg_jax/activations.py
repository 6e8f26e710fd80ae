"""Activation functions by the names of config.Activation, and the core of layer norm."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp


def gelu_exact(x: jax.Array) -> jax.Array:
    """x Phi(x), computed in float32, as in PyTorch; any shape.

    jax.nn.gelu uses erfc. The TPU compiler unrolls its branches into the surrounding matrix products, which compiles slowly.
    """
    wide = x.astype(jnp.float32)
    return (0.5 * wide * (1 + jax.lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=True),  # the tanh form
    "gelu_exact": gelu_exact,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
}


def standardise(x: jax.Array, eps: float) -> jax.Array:
    """(x - mean) / sqrt(variance + eps) over the last axis, in float32; any shape.

    The variance is the mean of (x - mean)^2. E[x^2] - E[x]^2, as in jax.nn.standardize, loses digits to a massive activation.
    """
    x = x.astype(jnp.float32)
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps)
