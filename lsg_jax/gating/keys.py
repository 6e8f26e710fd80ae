"""Key gating as pure functions: Attn(Q, diag(s) K, V) with one scalar per token group (arXiv 2604.03316)."""

from __future__ import annotations

import functools
import operator

import jax
import jax.numpy as jnp

from lsg_jax.config import Grouping
from lsg_jax.types import SinkMasks

GROUPS: dict[Grouping, tuple[str, ...]] = {
    "v_sink_rest": ("v_sink", "rest"),
    "l_sink_rest": ("l_sink", "rest"),
    "three": ("v_sink", "l_sink", "ordinary"),
}
"""Names of the token groups of each grouping, in the order of their coefficients. `rest` is every other visual token."""


def group_members(masks: SinkMasks, grouping: Grouping) -> jax.Array:
    """Membership of each token in the groups of a grouping.

    Returns:
        bool [B, T, G], in the order of GROUPS. Text tokens are in no group.
    """
    if grouping not in GROUPS:
        raise ValueError(f"unknown grouping {grouping}")
    by_name = {"v_sink": masks.v_sink, "l_sink": masks.l_sink, "ordinary": masks.ordinary}
    others = [mask for name, mask in by_name.items() if name not in GROUPS[grouping]]
    by_name["rest"] = functools.reduce(operator.or_, others, jnp.zeros_like(masks.v_sink))
    return jnp.stack([by_name[name] for name in GROUPS[grouping]], axis=-1)


def key_scale(coefficients: jax.Array, members: jax.Array) -> jax.Array:
    """The factor of each key: the coefficient of its group, and exactly 1 for a token in no group.

    Args:
        coefficients: float32 [B, G].
        members: bool [B, T, G], at most one group per token.

    Returns:
        float32 [B, T].
    """
    scale = jnp.where(members, coefficients[:, None, :], 0.0).sum(-1)
    return jnp.where(members.any(-1), scale, 1.0)


def scale_keys(key: jax.Array, scale: jax.Array) -> jax.Array:
    """Multiplies keys [B, S, K, H] by scale [B, S]; one factor per key, so it commutes with rotary embedding."""
    return (key * scale[:, :, None, None]).astype(key.dtype)
