"""Multi-head attention with grouped keys, rotary positions, key norms and scales, and a static-shape cache."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec

from lsg_jax.config import TextConfig
from lsg_jax.gating.keys import scale_keys
from lsg_jax.model.cudnn_attention import cudnn_attention, why_not_cudnn
from lsg_jax.model.layers import Linear, RMSNorm
from lsg_jax.model.rotary import apply_rope
from lsg_jax.model.scope import Scope
from lsg_jax.model.splash_attention import splash_attention, why_plain
from lsg_jax.sharding import ROWS, fitting_spec
from lsg_jax.types import UNCHANGED, LayerChange

QUERY_BLOCKS, SHORTEST_BLOCK = 4, 32
"""More blocks save more work, up to a half, but in smaller matrix products."""


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    *,
    scale: float | None = None,
    return_weights: bool = False,
    edit_scores: Callable[[jax.Array], jax.Array] | None = None,
    edit: Callable[[jax.Array], jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """softmax(scale Q K^T) V, softmax in float32.

    Args:
        query: [B, T, N, H].
        key, value: [B, K, S, H], heads before positions for the matrix products; N is a multiple of K.
        mask: bool [B, T, S], True where a query may look; None for everywhere. A row without keys gives the mean of the values.
        scale: of the logits; None for 1 / sqrt(H).
        edit_scores: changes the scaled logits float32 [B, N, T, S] before the mask and the softmax.
        edit: changes the attention weights float32 [B, N, T, S] before they are used.

    Returns:
        [B, T, N, H], and the weights float32 [B, N, T, S] if asked for.
    """
    batch, length, heads, width = query.shape
    kv_heads, keys = key.shape[1:3]
    groups = heads // kv_heads
    # of a single query XLA makes sums in float32: with rows and heads in one axis it would first write all values in float32
    batches = (batch, kv_heads) if length == 1 else (batch * kv_heads,)
    flat = lambda x: x.reshape(*batches, -1, x.shape[-1])
    scale = width**-0.5 if scale is None else scale
    grouped = (query * scale).reshape(batch, length, kv_heads, groups, width).transpose(0, 2, 3, 1, 4)
    logits = jnp.einsum("...TH,...SH->...TS", flat(grouped), flat(key), preferred_element_type=jnp.float32)
    if edit_scores is not None:
        logits = edit_scores(logits.reshape(batch, heads, length, keys))
    logits = logits.reshape(batch, kv_heads, groups, length, keys)
    if mask is not None:
        logits = jnp.where(mask[:, None, None], logits, jnp.finfo(logits.dtype).min)
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
    total = weights.sum(-1, keepdims=True)
    if edit is not None:
        edited = edit((weights / total).reshape(batch, heads, length, keys))
        weights, total = edited.reshape(weights.shape), jnp.ones_like(total)
    # dividing [T, H] instead of [T, S] saves a pass over the weights, and another one in the backward pass
    out = jnp.einsum("...TS,...SH->...TH", flat(weights).astype(value.dtype), flat(value), preferred_element_type=jnp.float32)
    out = out.reshape(batch, kv_heads, groups, length, width) / total
    out = out.transpose(0, 3, 1, 2, 4).reshape(query.shape).astype(query.dtype)
    return out, (weights / total).reshape(batch, heads, length, keys) if return_weights else None


def attend_causally(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    scope: Scope,
    *,
    scale: float | None = None,
    change: LayerChange = UNCHANGED,
    mesh: Mesh | None = None,
) -> jax.Array:
    """`attend` for T = S, under the mask of a layer of whole sequences.

    On a TPU a kernel computes it, unless `why_plain` says otherwise, and on an NVIDIA GPU one of cuDNN, unless `why_not_cudnn`
    does. Elsewhere, and where attention is edited, it runs on blocks of queries, each with the keys up to its end, which saves
    three eighths of the work. Outputs of padded queries may differ. Of `change`, only the edits are made here.
    """
    in_blocks = functools.partial(_attend_in_blocks, scale=scale, causal=scope.causal)
    if change.edits(None):
        return in_blocks(query, key, value, scope.mask, change=change)
    windows, width = any(scope.windows), query.shape[-1]
    if why_not_cudnn(query.dtype, width, mesh, causal=scope.causal, window=windows, gaps=scope.gaps) is None:
        return by_heads(functools.partial(cudnn_attention, scale=scale), query, key, value, scope.mask, mesh)
    if why_plain(width, mesh, causal=scope.causal, window_with_gaps=scope.gaps and windows) is not None:
        return by_heads(in_blocks, query, key, value, scope.mask, mesh)
    kernels = [
        functools.partial(by_heads, functools.partial(splash_attention, window=window, scale=scale), mesh=mesh)
        for window in scope.windows
    ]
    if len(set(scope.windows)) == 1:
        return kernels[0](query, key, value, scope.mask)
    out: jax.Array = jax.lax.switch(scope.kind, kernels, query, key, value, scope.mask)
    return out


def attention_path(config: TextConfig, mesh: Mesh | None) -> str:
    """Which way attention over whole sequences is computed: "kernel", or "plain" with the reason."""
    reason = why_plain(config.head_dim, mesh, causal=not config.images_see_themselves)
    return "kernel" if reason is None else f"plain, since {reason}"


def by_heads(
    attention: Callable[..., jax.Array],
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    mesh: Mesh | None,
) -> jax.Array:
    """Attention (query, key, value, mask) -> out on each device for its own rows and heads.

    XLA, left to partition `attend`, would send the cache of all heads to every device for each token.
    """
    if mesh is None or mesh.size == 1:
        return attention(query, key, value, mask)
    rows = fitting_spec(query.shape[:1], (ROWS,), mesh)[0]
    tensor = mesh.shape["tensor"]
    heads = "tensor" if query.shape[2] % tensor == key.shape[1] % tensor == 0 else None
    queries, keys = PartitionSpec(rows, None, heads), PartitionSpec(rows, heads)
    specs = (queries, keys, keys, PartitionSpec(rows))
    return jax.shard_map(attention, mesh=mesh, in_specs=specs, out_specs=queries, check_vma=False)(query, key, value, mask)


def received_by_head(
    query: jax.Array, key: jax.Array, mask: jax.Array, watched: jax.Array, *, scale: float | None = None, causal: bool = True
) -> jax.Array:
    """The attention on each key summed over the watched queries behind it, by head: float32 [B, N, T].

    Args:
        query, key, mask, scale: as `attend` takes them, for T = S.
        watched: bool [B, T].
        causal: no query sees a later key.
    """
    length = query.shape[1]
    total = jnp.zeros((query.shape[0], query.shape[2], length), jnp.float32)
    for start, stop in _blocks(length):
        end = stop if causal else length
        seen = key[:, :, :end]
        weights = attend(query[:, start:stop], seen, seen, mask[:, start:stop, :end], scale=scale, return_weights=True)[1]
        behind = jnp.arange(start, stop)[:, None] > jnp.arange(end)
        counted = (watched[:, start:stop, None] & behind).astype(jnp.float32)
        total = total.at[..., :end].add(jnp.einsum("BNTS,BTS->BNS", weights, counted))
    return total


def _blocks(length: int) -> list[tuple[int, int]]:
    """First and last query, exclusive, of each block."""
    block = max(-(-length // QUERY_BLOCKS), SHORTEST_BLOCK)
    return [(start, min(start + block, length)) for start in range(0, length, block)]


def _attend_in_blocks(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    *,
    scale: float | None = None,
    causal: bool = True,
    change: LayerChange = UNCHANGED,
) -> jax.Array:
    length, parts = query.shape[1], []
    for start, stop in _blocks(length):
        queries = jnp.broadcast_to(jnp.arange(start, stop), (query.shape[0], stop - start))
        end = stop if causal else length
        keys, values, seen = key[:, :, :end], value[:, :, :end], mask[:, start:stop, :end]
        parts.append(attend(query[:, start:stop], keys, values, seen, scale=scale, **change.edits(queries))[0])
    return jnp.concatenate(parts, axis=1)


@jax.custom_vjp
def take_rows(x: jax.Array, rows: jax.Array) -> jax.Array:
    """x [B, T, ...] at positions rows int32 [B, A] -> [B, A, ...]."""
    return jnp.take_along_axis(x, rows.reshape(*rows.shape, *[1] * (x.ndim - 2)), axis=1)


def _put_rows(rows_and_length: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, None]:
    rows, positions = rows_and_length
    # a small product: the scatter that JAX would make of it takes a TPU's compiler far longer
    chosen = (rows[:, :, None] == positions).astype(gradient.dtype)
    return jnp.einsum("BAT,BA...->BT...", chosen, gradient), None


take_rows.defvjp(lambda x, rows: (take_rows(x, rows), (rows, jnp.arange(x.shape[1]))), _put_rows)


@flax.struct.dataclass
class LayerCache:
    """One layer's view of the key-value cache of the whole stack, and the slot that is written next.

    Attributes:
        key, value: [L, B, K, S, H].
        layer, slot: int32 [].
    """

    key: jax.Array
    value: jax.Array
    layer: jax.Array
    slot: jax.Array

    def append(self, key: jax.Array, value: jax.Array) -> LayerCache:
        """Writes keys and values [B, K, 1, H] of this layer at the slot, in place under jit."""
        start = (self.layer, 0, 0, self.slot, 0)
        return self.replace(  # type: ignore[attr-defined, no-any-return]
            key=jax.lax.dynamic_update_slice(self.key, key[None], start),
            value=jax.lax.dynamic_update_slice(self.value, value[None], start),
        )

    def read(self) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, K, S, H] of this layer."""
        take = lambda x: jax.lax.dynamic_index_in_dim(x, self.layer, keepdims=False)
        return take(self.key), take(self.value)


class CausalAttention(nnx.Module):
    """Self-attention of a decoder layer."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs, dtype: Any, mesh: Mesh | None = None):
        width, heads, kv_heads, head = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        self.mesh = mesh
        self.num_heads = heads
        self.scale = config.query_scale
        linear = functools.partial(Linear, rngs=rngs, dtype=dtype, weights=config.weights)
        self.q_proj = linear((width,), (heads, head), bias=config.qkv_bias)
        self.k_proj = linear((width,), (kv_heads, head), bias=config.qkv_bias)
        self.v_proj = linear((width,), (kv_heads, head), bias=config.qkv_bias)
        self.o_proj = linear((heads, head), (width,), bias=config.out_bias)
        norm = functools.partial(RMSNorm, head, eps=config.rms_norm_eps, dtype=dtype, offset=config.norm_offset)
        self.q_norm = norm() if config.qk_norm else None
        self.k_norm = norm() if config.qk_norm else None

    def __call__(
        self,
        x: jax.Array,
        scope: Scope,
        *,
        change: LayerChange = UNCHANGED,
        cache: LayerCache | None = None,
        rows: jax.Array | None = None,
        return_weights: bool | jax.Array = False,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | LayerCache, jax.Array | None]:
        """x [B, T, D] -> (output [B, T, D], keys and values or the updated cache, attention weights or None).

        With `rows` int32 [B, A], the output is for the queries at these positions only: [B, A, D]. Weights are those of the
        queries of the output; where `return_weights` is int32 [B, A], those of the queries at these positions.
        """

        def project(name: str, x: jax.Array) -> jax.Array:
            y: jax.Array = getattr(self, name)(x)
            return y + change.low_rank[name](x) if name in change.low_rank else y

        kept_for_backward = functools.partial(checkpoint_name, name="qkv")

        def turned(y: jax.Array, norm: RMSNorm | None, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
            if norm is not None:
                return apply_rope(norm(kept_for_backward(y)), rope)  # the way back through the norm needs its input
            kept: jax.Array = kept_for_backward(apply_rope(y, rope))
            return kept

        rope, mask = scope.rope, scope.mask
        key, value = turned(project("k_proj", x), self.k_norm, rope), kept_for_backward(project("v_proj", x))
        if change.key_scale is not None:
            key = scale_keys(key, change.key_scale)
        key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
        query_of = lambda x, rope: turned(project("q_proj", x), self.q_norm, rope)
        if change.watched is not None and cache is None:
            seen_by = functools.partial(received_by_head, scale=self.scale, causal=scope.causal)
            change = change.with_received(seen_by(query_of(x, rope), key, mask, change.watched))
        if rows is not None:
            x, mask = take_rows(x, rows), take_rows(mask, rows)
            rope = take_rows(rope[0], rows), take_rows(rope[1], rows)
        query = query_of(x, rope)
        kept: tuple[jax.Array, jax.Array] | LayerCache = (key, value)
        if cache is not None:
            kept = cache = cache.append(key, value)
            key, value = cache.read()
        scaled, weights = functools.partial(attend, scale=self.scale), None
        if not isinstance(return_weights, bool):
            chosen = take_rows(query, return_weights), key, value, take_rows(mask, return_weights)
            weights = scaled(*chosen, return_weights=True, **change.edits(return_weights))[1]
            return_weights = False
        if cache is None and rows is None and not return_weights:
            out = attend_causally(query, key, value, scope, scale=self.scale, change=change, mesh=self.mesh)
        elif not change.edits(rows) and not return_weights:
            out = by_heads(lambda *qkvm: scaled(*qkvm)[0], query, key, value, mask, self.mesh)
        else:
            out, seen = scaled(query, key, value, mask, return_weights=return_weights, **change.edits(rows))
            weights = seen if weights is None else weights
        if change.head_gate is not None:
            out = (out * change.head_gate(x)[..., None]).astype(out.dtype)
        return project("o_proj", out), kept, weights
