"""Causal attention on an NVIDIA GPU: cuDNN's fused kernel, called through `jax.nn.dot_product_attention`."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

OLDEST, WIDE = (
    8.0,
    9.0,
)  # compute capability of Ampere, from which there is a kernel, and of Hopper, from which heads may be wide
WIDTH, WIDTH_OF_WIDE = 128, 256  # largest widths of heads
UNIT = 8  # widths of heads come in multiples of it


def why_not_cudnn(
    dtype: Any, width: int, mesh: Mesh | None, *, causal: bool = True, window: bool = False, gaps: bool = False
) -> str | None:
    """Why attention with queries of this dtype and heads of this width does not go through cuDNN; None where it does.

    Args:
        causal: no query sees a later key.
        window: some layer has a sliding window that is shorter than the sequence.
        gaps: tokens that are left out may lie between others.
    """
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    if device.platform != "gpu" or "cuda" not in device.client.platform_version:
        return f"cuDNN is for NVIDIA GPUs, this is a {device.platform}"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN computes in bfloat16 and float16, not in {jnp.dtype(dtype)}"
    if (capability := float(device.compute_capability)) < OLDEST:
        return f"cuDNN has a kernel from compute capability {OLDEST} on, this GPU has {capability}"
    largest = WIDTH_OF_WIDE if capability >= WIDE else WIDTH
    if width % UNIT or width > largest:
        return f"heads of width {width} are no multiple of {UNIT} up to {largest}"
    if not causal:
        return "tokens of one image see each other in both directions, the kernel is causal"
    if window:
        return "a layer has a sliding window"
    if gaps:
        return "tokens are left out between others, the kernel knows padding at the ends only"
    return None


def cudnn_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    *,
    scale: float | None = None,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """softmax(scale Q K^T) V on one device, each query attending to valid keys up to its own position.

    The kernel takes padding behind a row alone, so rows are rotated until their first valid token leads.

    Args:
        query: [B, T, N, H].
        key, value: [B, K, T, H].
        mask: bool [B, T, T], causal; only its diagonal is used, where a valid token sees itself. The valid tokens of a row are
            adjacent.
        scale: of the logits; None for 1 / sqrt(H).
        implementation: "xla" computes the same without a GPU, for tests.

    Returns:
        [B, T, N, H], 0 for queries that are not valid.
    """
    valid = jnp.diagonal(mask, axis1=1, axis2=2)
    places = jnp.arange(valid.shape[1])
    start = jnp.argmax(valid, axis=1)[:, None]
    rotated = lambda x, shift: jnp.take_along_axis(x, ((places + shift) % len(places))[..., None, None], axis=1)
    queries, keys, values = (rotated(x, start) for x in (query, key.swapaxes(1, 2), value.swapaxes(1, 2)))
    lengths = jnp.maximum(valid.sum(1, dtype=jnp.int32), 1)
    out = jax.nn.dot_product_attention(
        queries,
        keys,
        values,
        scale=scale,
        is_causal=True,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        implementation=implementation,
    )
    return jnp.where(valid[..., None, None], rotated(out, -start), 0)
