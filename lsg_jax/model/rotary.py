"""Rotary positions: one for each token, or its frame, row and column (M-RoPE)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from lsg_jax.config import RopeConfig


def rope_frequencies(config: RopeConfig, head_dim: int) -> jax.Array:
    """Angles per position, float32 [R / 2] for R rotated dimensions."""
    rotary_dim = config.rotary_dim or head_dim
    frequency = config.theta ** -(jnp.arange(0, rotary_dim, 2, dtype=jnp.float32) / rotary_dim)
    if config.kind == "linear":
        return frequency / config.factor
    if config.kind == "llama3":  # long wavelengths are stretched, short ones kept, those between interpolated
        turns = config.original_max_positions * frequency / (2 * jnp.pi)
        smooth = (turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
        smooth = jnp.clip(smooth, 0.0, 1.0)
        return (1 - smooth) * frequency / config.factor + smooth * frequency
    return frequency


def frequency_axes(config: RopeConfig, head_dim: int) -> np.ndarray:
    """Which of frame, row and column (0, 1, 2) each frequency turns with: int [R / 2].

    For sections 2, 1, 1 that is 0 0 1 2 one after the other. Interleaved the three take turns until the rows and columns have
    their share, and the frame has the rest: 0 1 2 0.
    """
    if not config.interleaved:
        return np.repeat(np.arange(len(config.sections)) % 3, config.sections)
    number = np.arange((config.rotary_dim or head_dim) // 2)
    turn = number % 3
    return np.where(number < 3 * np.array(config.sections)[turn], turn, 0)


def rope_angles(positions: jax.Array, config: RopeConfig, head_dim: int) -> tuple[jax.Array, jax.Array]:
    """cos and sin for positions int32 [B, T] or [B, T, 3]: float32 [B, T, 1, R / 2] each."""
    if positions.ndim == 2:
        turning = positions[..., None]
    elif config.sections:
        turning = positions[..., frequency_axes(config, head_dim)]
    else:
        raise ValueError("positions of frame, row and column need rope.sections")
    angles = turning.astype(jnp.float32) * rope_frequencies(config, head_dim)
    return jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]


def apply_rope(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the first R dimensions of x [B, T, N, H] by halves (the layout of Hugging Face weights)."""
    cos, sin = rope
    half = cos.shape[-1]
    first, second, rest = jnp.split(x.astype(jnp.float32), [half, 2 * half], axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1).astype(x.dtype)


def token_positions(valid: jax.Array) -> jax.Array:
    """Rotary positions that count unpadded tokens only: bool [B, T] -> int32 [B, T]."""
    return jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0).astype(jnp.int32)


def position_offset(positions: jax.Array, valid: jax.Array) -> jax.Array | None:
    """What the position after a sequence is beyond its number of tokens, as KVCache has it.

    An image of M-RoPE has more tokens than positions; the text behind it goes on from the highest position.

    Args:
        positions: int32 [B, T] or [B, T, 3].
        valid: bool [B, T].

    Returns:
        int32 [B]; None where positions count tokens.
    """
    if positions.ndim == 2:
        return None
    highest = jnp.where(valid[..., None], positions, -1).max((1, 2))
    return (highest + 1 - valid.sum(1)).astype(jnp.int32)
