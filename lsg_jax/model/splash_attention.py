"""Causal attention on a TPU: JAX's splash attention, a Pallas kernel that never holds the [T, S] weights."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

LANES = 128  # of a TPU's vector unit: lengths and head widths come in multiples of it
BLOCKS = (512, 384, 256, 128)  # queries or keys at a time, the first that divides the length
SAVED = "attention"
"""Checkpoint name of the kernel's output and log-sum-exp: kept, the backward pass does not run the kernel again."""


def runs_splash(width: int, mesh: Mesh | None) -> bool:
    """Whether causal attention with heads of this width goes through the kernel: on a TPU, if they fit it."""
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    return platform == "tpu" and width % LANES == 0


def splash_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """softmax(Q K^T / sqrt(H)) V on one device, each query attending to valid keys up to its own position.

    Outputs of queries that are not valid are undefined.

    Args:
        query: [B, T, N, H].
        key, value: [B, K, T, H].
        mask: bool [B, T, T], causal; only its diagonal is used, where a valid token sees itself.
        interpret: run the kernel's program without a TPU, for tests.

    Returns:
        [B, T, N, H].
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    length, width = query.shape[1], query.shape[-1]
    room = -length % LANES
    along_time = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, room), (0, 0)))
    queries, keys, values = map(along_time, ((query * width**-0.5).swapaxes(1, 2), key, value))
    valid = jnp.diagonal(mask, axis1=1, axis2=2).astype(jnp.int32)
    segments = jnp.pad(valid, ((0, 0), (0, room)))  # only tokens of one segment see each other
    kernel = _kernel(queries.shape[1], queries.shape[2], interpret)
    out = jax.vmap(kernel)(queries, keys, values, splash.SegmentIds(segments, segments))
    return out[:, :, :length].swapaxes(1, 2)


def _kernel(heads: int, length: int, interpret: bool) -> Callable[..., jax.Array]:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    block = next(size for size in BLOCKS if length % size == 0)
    blocks = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        use_fused_bwd_kernel=True,  # computes the scores once for both gradients
    )
    kernel: Callable[..., jax.Array] = splash.make_splash_mha(
        mask=splash.MultiHeadMask([splash.CausalMask((length, length))] * heads),
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=SAVED,
        interpret=interpret,
    )
    return kernel
