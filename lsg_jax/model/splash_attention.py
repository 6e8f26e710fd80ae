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


def why_plain(width: int, mesh: Mesh | None, *, causal: bool = True, window_with_gaps: bool = False) -> str | None:
    """Why attention with heads of this width does not go through the kernel; None where it does.

    Args:
        causal: no query sees a later key.
        window_with_gaps: a sliding window, in a sequence in which tokens that are left out lie between others.
    """
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    if platform != "tpu":
        return f"the kernel is for TPUs, this is a {platform}"
    if width % LANES:
        return f"heads of width {width} are no multiple of {LANES}"
    if not causal:
        return "tokens of one image see each other in both directions, the kernel is causal"
    if window_with_gaps:
        return "the sliding window counts tokens among others that are left out, the kernel's counts all"
    return None


def splash_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    *,
    window: int | None = None,
    scale: float | None = None,
    interpret: bool = False,
) -> jax.Array:
    """softmax(scale Q K^T) V on one device, each query attending to valid keys up to its own position.

    Outputs of queries that are not valid are undefined.

    Args:
        query: [B, T, N, H].
        key, value: [B, K, T, H].
        mask: bool [B, T, T], causal; only its diagonal is used, where a valid token sees itself.
        window: positions that a query sees, itself included; None for all up to it.
        scale: of the logits; None for 1 / sqrt(H).
        interpret: run the kernel's program without a TPU, for tests.

    Returns:
        [B, T, N, H].
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    length, width = query.shape[1], query.shape[-1]
    room = -length % LANES
    along_time = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, room), (0, 0)))
    scale = width**-0.5 if scale is None else scale
    queries, keys, values = map(along_time, ((query * scale).swapaxes(1, 2), key, value))
    valid = jnp.diagonal(mask, axis1=1, axis2=2).astype(jnp.int32)
    segments = jnp.pad(valid, ((0, 0), (0, room)))  # only tokens of one segment see each other
    kernel = _kernel(queries.shape[1], queries.shape[2], window, interpret)
    out = jax.vmap(kernel)(queries, keys, values, splash.SegmentIds(segments, segments))
    return out[:, :, :length].swapaxes(1, 2)


def _kernel(heads: int, length: int, window: int | None, interpret: bool) -> Callable[..., jax.Array]:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    block = next(size for size in BLOCKS if length % size == 0)
    blocks = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        use_fused_bwd_kernel=True,  # computes the scores once for both gradients
    )
    shape = (length, length)
    visible = splash.CausalMask(shape) if window is None else splash.LocalMask(shape, (window - 1, 0), 0)
    kernel: Callable[..., jax.Array] = splash.make_splash_mha(
        mask=splash.MultiHeadMask([visible] * heads),
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=SAVED,
        interpret=interpret,
    )
    return kernel
