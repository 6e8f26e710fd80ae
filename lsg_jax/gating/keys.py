"""Key gating, pure: Attn(Q, diag(s) K, V) with one scalar a token group (paper.md, "Key gating")."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lsg_jax.types import SinkMasks

GROUPS = {"v_sink_rest": ("v_sink", "rest"), "l_sink_rest": ("l_sink", "rest"), "three": ("v_sink", "l_sink", "ordinary")}
"""Names of the token groups of each grouping, in the order of their coefficients."""


def group_members(masks: SinkMasks, grouping: str) -> jax.Array:
    """Membership of each token in the groups of a grouping (config.Grouping).

    Returns:
        bool [B, T, G]: `v_sink_rest` (V-sink, others), `l_sink_rest` (L-sink, others), `three` (V-sink, L-sink, ordinary).
        Text tokens are in no group.
    """
    if grouping == "v_sink_rest":
        groups = [masks.v_sink, masks.l_sink | masks.ordinary]
    elif grouping == "l_sink_rest":
        groups = [masks.l_sink, masks.v_sink | masks.ordinary]
    elif grouping == "three":
        groups = [masks.v_sink, masks.l_sink, masks.ordinary]
    else:
        raise ValueError(f"unknown grouping {grouping}")
    return jnp.stack(groups, axis=-1)


def key_scale(coefficients: jax.Array, members: jax.Array) -> jax.Array:
    """The factor of each key: its group's coefficient, and exactly 1 for tokens in no group.

    Args:
        coefficients: float32 [B, G].
        members: bool [B, T, G], at most one group a token.

    Returns:
        float32 [B, T].
    """
    scale = jnp.where(members, coefficients[:, None, :], 0.0).sum(-1)
    return jnp.where(members.any(-1), scale, 1.0)


def scale_keys(key: jax.Array, scale: jax.Array) -> jax.Array:
    """Multiplies keys [B, S, K, H] by scale [B, S]; the same factor for all heads, so it commutes with rotary embedding."""
    return (key * scale[:, :, None, None]).astype(key.dtype)
