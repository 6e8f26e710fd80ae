"""The causal decoder: Llama, Mistral, Qwen2 and Phi-3 as settings of one stack, run by `lax.scan` over layer indices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx

from lsg_jax.activations import ACTIVATIONS
from lsg_jax.config import TextConfig
from lsg_jax.errors import InputError
from lsg_jax.model.attention import CausalAttention, LayerCache, rope_angles, take_rows
from lsg_jax.model.layers import Linear, RMSNorm, layer_at, stack_layers
from lsg_jax.types import UNCHANGED, Array, Intervention, KVCache, LayerView


class GatedMLP(nnx.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs, dtype: Any):
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.activation = config.hidden_act
        self.gate_proj = Linear((width,), (inner,), bias=bias, rngs=rngs, dtype=dtype)
        self.up_proj = Linear((width,), (inner,), bias=bias, rngs=rngs, dtype=dtype)
        self.down_proj = Linear((inner,), (width,), bias=bias, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(ACTIVATIONS[self.activation](self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nnx.Module):
    """Pre-norm decoder layer."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs, dtype: Any):
        self.input_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.attention = CausalAttention(config, rngs=rngs, dtype=dtype)
        self.post_attention_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.mlp = GatedMLP(config, rngs=rngs, dtype=dtype)

    def __call__(
        self, x: jax.Array, rope: Any, mask: jax.Array, *, rows: jax.Array | None = None, **attention: Any
    ) -> tuple[jax.Array, Any, Any]:
        """x [B, T, D] -> (x, keys and values or cache, attention weights); keywords as CausalAttention takes them."""
        out, kept, weights = self.attention(self.input_norm(x), rope, mask, rows=rows, **attention)
        x = (x if rows is None else take_rows(x, rows)) + out
        return x + self.mlp(self.post_attention_norm(x)), kept, weights


@flax.struct.dataclass
class DecoderOutput:
    """What a run over the layers leaves.

    Attributes:
        hidden: [B, T, D], or [B, A, D] where only some rows were wanted; output of the last layer, before the final norm.
        key, value: [L, B, K, T, H], or None unless `keep_kv`.
        ratios: float32 [L - first changed layer, B, G], or None without key gating.
        sinks: bool [L, B, T], what KVCache keeps of an intervention that asks for it, False below its first layer; or None.
        observed: what the observer returned, stacked over the L layers, or None.
    """

    hidden: Array
    key: Array
    value: Array
    ratios: Array
    sinks: Array
    observed: Any


class LanguageModel(nnx.Module):
    """Token embeddings, decoder layers, final norm and output head (tied to the embeddings where the config says so)."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs, dtype: Any):
        self.config = config
        self.embed_tokens = nnx.Param(
            (0.02 * jax.random.normal(rngs.params(), (config.vocab_size, config.hidden_size))).astype(dtype)
        )
        self.layers = stack_layers(lambda r: DecoderLayer(config, rngs=r, dtype=dtype), rngs.params(), config.num_layers)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        if not config.tied_embeddings:
            self.lm_head = Linear((config.hidden_size,), (config.vocab_size,), bias=False, rngs=rngs, dtype=dtype)

    def embed(self, input_ids: jax.Array) -> jax.Array:
        """int32 [B, T] -> [B, T, D]."""
        return jnp.take(self.embed_tokens[...], input_ids, axis=0, mode="clip")

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Final norm and head: [..., D] -> float32 [..., V]."""
        head = self.embed_tokens[...].T if self.config.tied_embeddings else self.lm_head.kernel[...]
        # bfloat16 logits would round away what tells close candidates apart
        return jnp.einsum("...D,DV->...V", self.norm(hidden), head, preferred_element_type=jnp.float32)

    def check_length(self, length: int) -> None:
        """Raises InputError for a sequence that the decoder would not treat as the original model does."""
        c = self.config
        if c.sliding_window is not None and length > c.sliding_window:
            raise InputError(
                f"{length} tokens exceed the sliding window of {c.sliding_window}, which is not supported: shorten the sequence"
            )

    def __call__(
        self,
        x: jax.Array,
        valid: jax.Array,
        intervention: Intervention | None = None,
        *,
        start: int = 0,
        differentiate: bool = False,
        rows: jax.Array | None = None,
        keep_kv: bool = False,
        remat: str = "none",
        observe: Callable[[LayerView], Any] | None = None,
        observe_attention: bool = False,
    ) -> DecoderOutput:
        """Runs all layers over whole sequences, causally; padding may be on either side.

        Layers below the first that the intervention changes run in a scan of their own that is not differentiated. With `rows`,
        the last layer computes nothing but keys and values elsewhere.

        Args:
            x: merged embeddings [B, T, D], or the residual stream that enters layer `start`.
            valid: bool [B, T], unpadded tokens.
            intervention: what is done in the layers, if anything.
            start: layers below it are left out, of the results as well.
            differentiate: `x` depends on what is trained, so that no layer may be left out of the backward pass.
            rows: int32 [B, A], positions whose output is wanted; None for all.
            remat: `full` recomputes each layer in the backward pass, `none` keeps its activations.
            observe: called with a LayerView in each layer; its results come back stacked.
        """
        self.check_length(x.shape[1])
        num_layers = self.config.num_layers
        rope = rope_angles(token_positions(valid), self.config.rope, self.config.head_dim)
        mask = causal_mask(valid)
        graphdef, stacked = nnx.split(self.layers)

        def body(x: jax.Array, index: jax.Array, walked: Any, rows: jax.Array | None = None) -> tuple[jax.Array, Any]:
            change = UNCHANGED if intervention is None or walked is None else intervention.layer(walked, x)
            layer = nnx.merge(graphdef, layer_at(stacked, index))
            y, (key, value), weights = layer(
                x, rope, mask, change=change, rows=rows, return_weights=observe_attention and rows is None
            )
            seen = observe(LayerView(hidden=x, attention=weights, ratios=change.ratios)) if observe else None
            return y, ((key, value) if keep_kv else None, change.ratios, seen, change.sinks if keep_kv else None)

        def run(x: jax.Array, start: int, stop: int, walked: Any) -> tuple[jax.Array, Any]:
            # a scan already keeps the recomputation apart from the forward pass
            step = jax.checkpoint(body, policy=_REMAT[remat], prevent_cse=False)
            return jax.lax.scan(lambda c, xs: step(c, *xs), x, (jnp.arange(start, stop), walked))

        first = num_layers if intervention is None else max(intervention.first_layer, start)
        scanned = num_layers if rows is None else num_layers - 1
        parts = []
        if first > start:
            if scanned > start:
                x, part = run(x, start, min(first, scanned), None)
                parts.append(part)
            x = x if differentiate else jax.lax.stop_gradient(x)
        if intervention is not None and first < scanned:
            x, part = run(x, first, scanned, intervention.per_layer(first, scanned))
            parts.append(part)
        if rows is not None:
            last = None if intervention is None else jax.tree.map(lambda v: v[0], intervention.per_layer(scanned, num_layers))
            x, part = body(x, jnp.int32(scanned), last, rows)
            parts.append(jax.tree.map(lambda v: v[None], part))
        kv = jax.tree.map(lambda *p: jnp.concatenate(p), *(p[0] for p in parts))
        observed = jax.tree.map(lambda *p: jnp.concatenate(p), *(p[2] for p in parts))
        key, value = kv or (None, None)
        ratios, sinks = _join([p[1] for p in parts]), _join([p[3] for p in parts])
        if sinks is not None:
            sinks = jnp.pad(sinks, ((num_layers - start - len(sinks), 0), (0, 0), (0, 0)))
        return DecoderOutput(hidden=x, key=key, value=value, ratios=ratios, sinks=sinks, observed=observed)

    def resume(
        self, x: jax.Array, cache: KVCache, intervention: Intervention, start: jax.Array, *, rows: jax.Array
    ) -> tuple[jax.Array, KVCache]:
        """`__call__` from layer `start` on, which may be traced: one compiled program for every start. Not differentiable.

        Args:
            x: [B, T, D], the residual stream that enters layer `start`.
            cache: of S >= T slots; what it holds of the prompt [B, T] in the layers from `start` on is written anew.
            start: int32 [], in 0..L-1.
            rows: int32 [B, A], positions whose output is wanted.

        Returns:
            hidden [B, A, D] before the final norm, and the cache.
        """
        valid = cache.valid[:, : x.shape[1]]
        rope = rope_angles(token_positions(valid), self.config.rope, self.config.head_dim)
        mask = causal_mask(valid)
        last = self.config.num_layers - 1
        graphdef, stacked = nnx.split(self.layers)
        walked = intervention.per_layer(0, last + 1)

        def body(index: jax.Array, carry: tuple, rows: jax.Array | None = None) -> tuple:
            x, *buffers = carry
            change = intervention.layer(layer_at(walked, index), x)
            y, kept, _ = nnx.merge(graphdef, layer_at(stacked, index))(x, rope, mask, change=change, rows=rows)
            put = lambda buffer, new: jax.lax.dynamic_update_slice(buffer, new[None], (index, 0, 0, 0, 0))
            return y, *map(put, buffers, kept)

        carry = jax.lax.fori_loop(start, last, body, (x, cache.key, cache.value))
        hidden, key, value = body(jnp.int32(last), carry, rows)
        return hidden, cache.replace(key=key, value=value)  # type: ignore[attr-defined]

    def decode(
        self,
        token: jax.Array,
        position: jax.Array,
        slot: jax.Array,
        cache: KVCache,
        intervention: Intervention | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """One step for every row.

        Args:
            token: int32 [B].
            position: int32 [B], rotary position of the token.
            slot: int32 [], cache slot to write.
            intervention: what is done in the layers to the one token of each row; scaled keys are in the cache already.

        Returns:
            hidden [B, D] before the final norm, and the cache with the slot filled.
        """
        x = self.embed(token[:, None])
        rope = rope_angles(position[:, None], self.config.rope, self.config.head_dim)
        valid = jax.lax.dynamic_update_slice_in_dim(cache.valid, jnp.ones_like(cache.valid[:, :1]), slot, axis=1)
        graphdef, stacked = nnx.split(self.layers)

        num_layers = self.config.num_layers
        walked = None if intervention is None else intervention.per_layer(0, num_layers)

        def body(carry: tuple[jax.Array, jax.Array, jax.Array], xs: tuple[jax.Array, Any]) -> tuple[Any, Any]:
            x, key, value = carry
            index, walked = xs
            change = UNCHANGED if intervention is None else intervention.layer(walked, x)
            layer = nnx.merge(graphdef, layer_at(stacked, index))
            x, kept, _ = layer(x, rope, valid[:, None, :], change=change, cache=LayerCache(key, value, index, slot))
            return (x, kept.key, kept.value), change.sinks

        (x, key, value), sinks = jax.lax.scan(body, (x, cache.key, cache.value), (jnp.arange(num_layers), walked))
        if sinks is not None:
            sinks = jax.lax.dynamic_update_slice_in_dim(cache.sinks, sinks, slot, axis=2)
        return x[:, 0], KVCache(key=key, value=value, valid=valid, sinks=sinks)


def _join(parts: list[Any]) -> jax.Array | None:
    """What runs over some of the layers gave, one behind the other; a run that gave nothing does not count."""
    given = [part for part in parts if part is not None]
    return jnp.concatenate(given) if given else None


def token_positions(valid: jax.Array) -> jax.Array:
    """Rotary positions that count unpadded tokens only: bool [B, T] -> int32 [B, T]."""
    return jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0).astype(jnp.int32)


def causal_mask(valid: jax.Array) -> jax.Array:
    """Which keys a query may attend to: bool [B, T] -> bool [B, T, T].

    For a left-padded row of three tokens (valid = 0 1 1):

        0 0 0
        0 1 0
        0 1 1
    """
    length = valid.shape[1]
    return jnp.tril(jnp.ones((length, length), bool)) & valid[:, None, :]


def _keep_activations(primitive: Any, *_: Any, **__: Any) -> bool:
    """Saves everything but the layer's weights, which are sliced out of the stack again instead of being stacked twice."""
    return primitive.name not in ("dynamic_slice", "squeeze", "reshape")


_REMAT: dict[str, Any] = {"full": None, "none": _keep_activations}
