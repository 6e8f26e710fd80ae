"""A layer of a vision transformer. What CLIP, SigLIP, InternViT and the native towers of Qwen-VL differ in are settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx

from lsg_jax.activations import ACTIVATIONS
from lsg_jax.config import VisionConfig
from lsg_jax.model.attention import attend
from lsg_jax.model.layers import LayerNorm, Linear, RMSNorm
from lsg_jax.model.rotary import apply_rope
from lsg_jax.sinks.attention import received_attention

MOST_QUERIES = 1024
"""Queries of a native image at once: the attention weights of all queries of a large image would be gigabytes."""

QK_NORM_EPS = 1e-6
"""InternViT's; its configuration does not state it."""


@dataclass(frozen=True)
class Registers:
    """Tokens that a tower of squares appends to the patches, and MLP neurons whose activation they take over.

    Attributes:
        neurons: pairs of layer and neuron.
        count: number of tokens.
    """

    neurons: tuple[tuple[int, ...], ...]
    count: int


@flax.struct.dataclass
class Surroundings:
    """What the layers know of the patches. `used` and `rope` are of a native tower, the rest of one of squares; else None.

    Attributes:
        used: bool [B, P], patches that may be attended to.
        rope: cos and sin of the rotary angles, float32 [B, P, 1, H / 2] each.
        moved: bool [L, F], neurons of each layer whose activation goes to the registers; [F] of one layer.
        registers: the number of appended tokens, static.
    """

    used: jax.Array | None = None
    rope: tuple[jax.Array, jax.Array] | None = None
    moved: jax.Array | None = None
    registers: int = flax.struct.field(pytree_node=False, default=0)

    def of_layer(self, layer: jax.Array | int) -> Surroundings:
        """Those of one layer, which may be traced."""
        if self.moved is None:
            return self
        return self.replace(moved=self.moved[layer])  # type: ignore[attr-defined, no-any-return]


@flax.struct.dataclass
class Received:
    """The attention that each position receives in a layer.

    Attributes:
        mean: float32 [B, T], averaged over heads and over the positions that are used.
        of_class: float32 [B, T], that of the class token, softmax(q k^T / sqrt(D)) over the whole width: all heads as one. None
            in a tower without class token.
    """

    mean: jax.Array
    of_class: jax.Array | None = None


def make_norm(config: VisionConfig, *, dtype: Any) -> LayerNorm | RMSNorm:
    """The norm of the tower's layers."""
    make = RMSNorm if config.norm == "rms" else LayerNorm
    return make(config.hidden_size, eps=config.layer_norm_eps, dtype=dtype)


class VisionAttention(nnx.Module):
    """Self-attention over the patches of an image, or within its windows."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, dtype: Any):
        width, heads = config.hidden_size, (config.num_heads, config.head_dim)
        self.window = config.window_patches
        self.has_class_token = config.has_class_token
        self.q_proj = Linear((width,), heads, bias=config.qkv_bias, rngs=rngs, dtype=dtype)
        self.k_proj = Linear((width,), heads, bias=config.qkv_bias, rngs=rngs, dtype=dtype)
        self.v_proj = Linear((width,), heads, bias=config.qkv_bias, rngs=rngs, dtype=dtype)
        self.out_proj = Linear(heads, (width,), bias=True, rngs=rngs, dtype=dtype)
        self.q_norm = RMSNorm(width, eps=QK_NORM_EPS, dtype=dtype) if config.qk_norm else None
        self.k_norm = RMSNorm(width, eps=QK_NORM_EPS, dtype=dtype) if config.qk_norm else None

    def __call__(
        self, x: jax.Array, around: Surroundings, *, windowed: bool = False, receive: bool = False
    ) -> tuple[jax.Array, Received | None]:
        """x [B, T, D] -> [B, T, D], and with `receive` the attention that each position receives.

        Args:
            windowed: whether positions attend within their window only; windows follow each other along T.
        """
        key, value, query = self.k_proj(x), self.v_proj(x), self.q_proj(x)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = _over_heads(self.q_norm, query), _over_heads(self.k_norm, key)
        if around.rope is not None:
            query, key = apply_rope(query, around.rope), apply_rope(key, around.rope)
        used, of_class = around.used, None
        if receive and self.has_class_token:
            scores = jnp.einsum("BNH,BTNH->BT", query[:, 0], key, preferred_element_type=jnp.float32)
            of_class = jax.nn.softmax(scores * x.shape[-1] ** -0.5)
        if windowed:
            by_window = lambda y: y.reshape(-1, self.window, *y.shape[2:])
            query, key, value, used = by_window(query), by_window(key), by_window(value), by_window(used)
        key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
        mask = None if used is None else used[:, None]
        if not receive and mask is not None and (blocks := _blocks(query.shape[1])) > 1:
            by_block = query.reshape(query.shape[0], blocks, -1, *query.shape[2:]).swapaxes(0, 1)
            out = jax.lax.map(lambda part: attend(part, key, value, mask)[0], by_block).swapaxes(0, 1)
            return self.out_proj(out.reshape(query.shape)), None
        out, weights = attend(query, key, value, mask, return_weights=receive)
        out = self.out_proj(out.reshape(*x.shape[:2], *out.shape[2:]))
        if weights is None:
            return out, None
        patches = jnp.arange(weights.shape[2]) < weights.shape[2] - around.registers
        queries = jnp.broadcast_to(patches, weights.shape[::2]) if used is None else used
        received = received_attention(weights, queries)
        if windowed:  # a mean over the queries of the window -> over those of the image
            share = queries.sum(-1, keepdims=True).reshape(len(x), -1, 1)
            share = share / jnp.maximum(share.sum(1, keepdims=True), 1)
            received = (received.reshape(len(x), -1, self.window) * share).reshape(x.shape[:2])
        return out, Received(received, of_class)


def _over_heads(norm: RMSNorm, x: jax.Array) -> jax.Array:
    """A norm of all heads together: [B, T, N, H]."""
    return norm(x.reshape(*x.shape[:2], -1)).reshape(x.shape)


def _blocks(queries: int) -> int:
    """The least number of equal blocks of at most MOST_QUERIES."""
    blocks = -(-queries // MOST_QUERIES)
    while queries % blocks:
        blocks += 1
    return blocks


class VisionLayer(nnx.Module):
    """Pre-norm encoder layer."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, dtype: Any):
        width, inner = config.hidden_size, config.intermediate_size
        self.activation = config.hidden_act
        self.gated = config.gated_mlp
        self.first_patch = int(config.has_class_token)
        self.layer_norm1 = make_norm(config, dtype=dtype)
        self.attention = VisionAttention(config, rngs=rngs, dtype=dtype)
        self.layer_norm2 = make_norm(config, dtype=dtype)
        if self.gated:
            self.gate_proj = Linear((width,), (inner,), bias=True, rngs=rngs, dtype=dtype)
            self.up_proj = Linear((width,), (inner,), bias=True, rngs=rngs, dtype=dtype)
            self.down_proj = Linear((inner,), (width,), bias=True, rngs=rngs, dtype=dtype)
        else:
            self.fc1 = Linear((width,), (inner,), bias=True, rngs=rngs, dtype=dtype)
            self.fc2 = Linear((inner,), (width,), bias=True, rngs=rngs, dtype=dtype)
        self.layer_scale1 = nnx.Param(jnp.ones((width,), dtype)) if config.layer_scale else None
        self.layer_scale2 = nnx.Param(jnp.ones((width,), dtype)) if config.layer_scale else None

    def __call__(
        self, x: jax.Array, around: Surroundings, *, windowed: bool = False, receive: bool = False
    ) -> tuple[jax.Array, Received | None]:
        """x [B, T, D] -> [B, T, D]; see VisionAttention."""
        x, received = self.attend(x, around, windowed=windowed, receive=receive)
        neurons = self.neurons(x)
        if around.moved is not None:
            neurons = to_registers(neurons, around.moved, first_patch=self.first_patch, count=around.registers)
        return self.feed(x, neurons), received

    def attend(self, x: jax.Array, around: Surroundings, **attention: bool) -> tuple[jax.Array, Received | None]:
        """x plus the output of the attention, and what VisionAttention returns besides; keywords as it takes them."""
        out, received = self.attention(self.layer_norm1(x), around, **attention)
        return x + (out if self.layer_scale1 is None else self.layer_scale1[...] * out), received

    def neurons(self, x: jax.Array) -> jax.Array:
        """The activations of the MLP's neurons: [B, T, D] -> [B, T, F]."""
        act, x = ACTIVATIONS[self.activation], self.layer_norm2(x)
        return act(self.gate_proj(x)) * self.up_proj(x) if self.gated else act(self.fc1(x))

    def feed(self, x: jax.Array, neurons: jax.Array) -> jax.Array:
        """x plus the output of the MLP."""
        out = self.down_proj(neurons) if self.gated else self.fc2(neurons)
        return x + (out if self.layer_scale2 is None else self.layer_scale2[...] * out)


def to_registers(neurons: jax.Array, moved: jax.Array, *, first_patch: int, count: int) -> jax.Array:
    """Gives the largest activation of a neuron, with its sign, to the registers, and 0 to the patches.

    Args:
        neurons: [B, T, F], the class token first if there is one, the registers last.
        moved: bool [F], neurons for which this is done.
        first_patch: position of the first patch; what is before it keeps its activation.
        count: number of registers.

    Returns:
        [B, T, F].
    """
    position = jnp.arange(neurons.shape[1])[:, None]
    high, low = neurons.max(1, keepdims=True), neurons.min(1, keepdims=True)
    given = jnp.where(position < len(position) - count, 0, jnp.where(high > -low, high, low))
    return jnp.where(moved & (position >= first_patch), given, neurons)


def axial_rope(place: jax.Array, theta: float, head_dim: int) -> tuple[jax.Array, jax.Array]:
    """cos and sin for rows and columns int32 [B, P, 2]: float32 [B, P, 1, H / 2], the angles of rows first.

    Rows and columns turn the same H / 4 frequencies.
    """
    frequency = theta ** -(jnp.arange(0, head_dim // 2, 2, dtype=jnp.float32) / (head_dim // 2))
    angles = place[..., None].astype(jnp.float32) * frequency
    angles = angles.reshape(*place.shape[:2], 1, -1)
    return jnp.cos(angles), jnp.sin(angles)
