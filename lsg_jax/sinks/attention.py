"""Statistics of attention: how much of it each token or group of tokens receives."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def received_attention(weights: jax.Array, queries: jax.Array) -> jax.Array:
    """Attention that each key receives, averaged over heads and queries.

    Args:
        weights: float32 [B, N, T, S], attention weights; rows sum to 1.
        queries: bool [B, T], queries to average over.

    Returns:
        float32 [B, S]; sums to 1 over S, or to 0 in a row without queries.
    """
    count = jnp.maximum(queries.sum(-1), 1)[:, None]
    return jnp.einsum("BNTS,BT->BS", weights, queries.astype(weights.dtype)) / (count * weights.shape[1])


def group_mass(weights: jax.Array, queries: jax.Array, groups: jax.Array) -> jax.Array:
    """Attention that each group of keys receives, by head, averaged over queries.

    Args:
        weights: float32 [B, N, T, S], attention weights; rows sum to 1.
        queries: bool [B, T], queries to average over.
        groups: bool [B, S, G], group membership of each key.

    Returns:
        float32 [B, N, G].
    """
    count = jnp.maximum(queries.sum(-1), 1)[:, None, None]
    return jnp.einsum("BNTS,BT,BSG->BNG", weights, queries.astype(weights.dtype), groups.astype(weights.dtype)) / count
