"""The causal decoder: Llama, Mistral, Qwen2 and Phi-3 as settings of one stack, run by `lax.scan` over layer indices."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from lsg_jax.activations import ACTIVATIONS
from lsg_jax.config import TextConfig
from lsg_jax.errors import InputError
from lsg_jax.model.attention import CausalAttention, LayerCache, rope_angles, take_rows
from lsg_jax.model.layers import Linear, RMSNorm, layer_at, stack_layers
from lsg_jax.model.splash_attention import SAVED
from lsg_jax.sharding import ROWS, constrain
from lsg_jax.types import UNCHANGED, Intervention, KVCache, LayerChange, LayerView, Sequence


class GatedMLP(nnx.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs, dtype: Any):
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.activation = config.hidden_act
        self.gate_proj = Linear((width,), (inner,), bias=bias, rngs=rngs, dtype=dtype)
        self.up_proj = Linear((width,), (inner,), bias=bias, rngs=rngs, dtype=dtype)
        self.down_proj = Linear((inner,), (width,), bias=bias, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        gate, up = checkpoint_name(self.gate_proj(x), "mlp"), checkpoint_name(self.up_proj(x), "mlp")
        return self.down_proj(ACTIVATIONS[self.activation](gate) * up)


class DecoderLayer(nnx.Module):
    """Pre-norm decoder layer."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs, dtype: Any, mesh: Mesh | None = None):
        self.input_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.attention = CausalAttention(config, rngs=rngs, dtype=dtype, mesh=mesh)
        self.post_attention_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.mlp = GatedMLP(config, rngs=rngs, dtype=dtype)

    def __call__(
        self, x: jax.Array, rope: Any, mask: jax.Array, *, rows: jax.Array | None = None, **attention: Any
    ) -> tuple[jax.Array, Any, Any]:
        """x [B, T, D] -> (x, keys and values or cache, attention weights); keywords as CausalAttention takes them."""
        x, kept, weights = self.attend(x, rope, mask, rows=rows, **attention)
        return self.feed(x), kept, weights

    def attend(
        self, x: jax.Array, rope: Any, mask: jax.Array, *, rows: jax.Array | None = None, **attention: Any
    ) -> tuple[jax.Array, Any, Any]:
        """x plus the output of the attention."""
        out, kept, weights = self.attention(self.input_norm(x), rope, mask, rows=rows, **attention)
        return (x if rows is None else take_rows(x, rows)) + checkpoint_name(out, "attention_out"), kept, weights

    def feed(self, x: jax.Array) -> jax.Array:
        """x plus the output of the MLP."""
        return x + self.mlp(self.post_attention_norm(x))


@flax.struct.dataclass
class DecoderOutput:
    """Outputs of a pass over the layers.

    Attributes:
        hidden: [B, T, D], or [B, A, D] with `rows`: output of the last layer that ran, before the final norm.
        key, value: [L, B, K, T + room, H], or None unless `keep_kv`.
        ratios: float32 [L - first changed layer, B, G], or None without key gating.
        sinks: bool [L, B, T], the sinks that an intervention reports for the cache, False below its first layer; or None.
        observed: results of the observer, stacked over the L layers, or None.
    """

    hidden: jax.Array
    key: jax.Array | None
    value: jax.Array | None
    ratios: jax.Array | None
    sinks: jax.Array | None
    observed: Any


KeysAndValues = tuple[jax.Array, jax.Array]
"""Keys and values of all layers, [L, B, K, S, H] each."""


class LayerOutput(NamedTuple):
    """Outputs of one layer: x [B, T, D] or [B, A, D], the updated keys and values, attention weights, and what was changed."""

    x: jax.Array
    kv: KeysAndValues | None
    weights: jax.Array | None
    change: LayerChange


@dataclass(frozen=True)
class LayerRunner:
    """Runs single decoder layers, over whole sequences or over the next token of each row.

    Attributes:
        decoder: the stack that the layers are sliced from.
        rope: cos and sin of the query positions.
        mask: bool [B, T, S], keys that each query may attend to.
        intervention: what is done in the layers, if anything.
        slot: int32 [], cache slot of the one token of each row; None for whole sequences.
    """

    decoder: LanguageModel
    rope: tuple[jax.Array, jax.Array]
    mask: jax.Array
    intervention: Intervention | None = None
    slot: jax.Array | None = None

    def layer(self, index: jax.Array) -> DecoderLayer:
        """One layer out of the stack; `index` int32 [] may be traced."""
        graphdef, stacked = nnx.split(self.decoder.layers)
        return nnx.merge(graphdef, layer_at(stacked, index))

    def __call__(
        self,
        index: jax.Array,
        x: jax.Array,
        *,
        kv: KeysAndValues | None = None,
        inputs: Any = None,
        rows: jax.Array | None = None,
        return_weights: bool = False,
    ) -> LayerOutput:
        """Runs layer `index` on x [B, T, D].

        Args:
            kv: where the layer's keys and values are written, in place under jit; None to drop them.
            inputs: the layer's scan inputs of the intervention (`Intervention.per_layer`); None leaves the layer unchanged.
            rows: int32 [B, A], positions whose output is wanted; None for all.
        """
        unchanged = self.intervention is None or inputs is None
        change = UNCHANGED if unchanged else self.intervention.layer(inputs, x)  # type: ignore[union-attr]
        attention: dict[str, Any] = {"change": change, "rows": rows, "return_weights": return_weights}
        if self.slot is not None:
            assert kv is not None
            attention["cache"] = LayerCache(*kv, index, self.slot)
        y, new, weights = self.layer(index)(x, self.rope, self.mask, **attention)
        if isinstance(new, LayerCache):
            kv = new.key, new.value
        elif kv is not None:
            kv = _write_layer(kv, index, new)
        return LayerOutput(y, kv, weights, change)


class LanguageModel(nnx.Module):
    """Token embeddings, decoder layers, final norm and output head (tied to the embeddings where the config says so).

    On a mesh the residual stream is sharded along `data` and `fsdp` by rows, and along `tensor` by positions. Without
    that constraint XLA keeps all rows on every device and splits D, and memory and transfers grow with the mesh.
    """

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs, dtype: Any, mesh: Mesh | None = None):
        self.config = config
        self.mesh = mesh
        self.embed_tokens = nnx.Param(
            (0.02 * jax.random.normal(rngs.params(), (config.vocab_size, config.hidden_size))).astype(dtype)
        )
        self.layers = stack_layers(
            lambda r: DecoderLayer(config, rngs=r, dtype=dtype, mesh=mesh), rngs.params(), config.num_layers
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        if not config.tied_embeddings:
            self.lm_head = Linear((config.hidden_size,), (config.vocab_size,), bias=False, rngs=rngs, dtype=dtype)

    def embed(self, input_ids: jax.Array) -> jax.Array:
        """int32 [B, T] -> [B, T, D]."""
        return self.by_rows(jnp.take(self.embed_tokens[...], input_ids, axis=0, mode="clip"))

    def by_rows(self, x: jax.Array) -> jax.Array:
        """Shards a residual stream [B, T, D] over the mesh."""
        return constrain(x, self.mesh, ROWS, "tensor")

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Final norm and head: [..., D] -> float32 [..., V]."""
        # bfloat16 logits would round away the differences between close candidates
        return jnp.einsum("...D,DV->...V", *self.head_inputs(hidden), preferred_element_type=jnp.float32)

    def head_inputs(self, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The factors of the logits: [..., D] after the final norm, and the head [D, V]."""
        head = self.embed_tokens[...].T if self.config.tied_embeddings else self.lm_head.kernel[...]
        return self.norm(hidden), head

    def check_length(self, length: int) -> None:
        """Raises InputError for a sequence that the decoder would not treat as the original model does."""
        c = self.config
        if c.sliding_window is not None and length > c.sliding_window:
            raise InputError(
                f"{length} tokens exceed the sliding window of {c.sliding_window}, which is not supported: shorten the sequence"
            )

    def runner(self, sequence: Sequence, intervention: Intervention | None = None) -> LayerRunner:
        """Runs layers over whole sequences, causally; padding may be on either side."""
        rope = rope_angles(sequence.positions, self.config.rope, self.config.head_dim)
        return LayerRunner(self, rope, causal_mask(sequence.valid), intervention)

    def __call__(
        self,
        sequence: Sequence,
        intervention: Intervention | None = None,
        *,
        rows: jax.Array | None = None,
        stop: int | None = None,
        differentiate: bool = False,
        keep_kv: bool = False,
        room: int = 0,
        remat: str = "none",
        observe: Callable[[LayerView], Any] | None = None,
        observe_attention: bool = False,
    ) -> DecoderOutput:
        """Runs the layers over whole sequences: one scan below the first layer that the intervention changes, one from it on.

        With `rows`, the last layer computes only keys and values elsewhere, unless that would not pay (`_last_layer_apart`).

        Args:
            rows: int32 [B, A], positions whose output is wanted; None for all.
            stop: the number of layers to run; None for all.
            differentiate: inputs or weights are trained, so the backward pass goes through every layer. Otherwise it stops at
                the first changed layer, and only the intervention's `per_layer` gets a gradient.
            keep_kv: return keys and values, with `room` empty positions after them.
            remat: what the forward pass keeps of a layer for the backward pass (TrainConfig).
            observe: called with a LayerView in each layer; its results are stacked.
        """
        self.check_length(sequence.x.shape[1])
        runner, stop = self.runner(sequence, intervention), self.config.num_layers if stop is None else stop
        last_apart = rows is not None and _last_layer_apart(stop, rows.shape[1])
        scanned = stop - 1 if last_apart else stop
        first = stop if intervention is None else min(stop, intervention.first_layer)

        def body(carry: tuple[jax.Array, Any], xs: tuple[jax.Array, Any], rows: jax.Array | None = None) -> tuple[Any, Any]:
            (x, kv), (index, inputs) = carry, xs
            x = checkpoint_name(self.by_rows(x), "layer_input")
            out = runner(index, x, kv=kv, inputs=inputs, rows=rows, return_weights=observe_attention and rows is None)
            seen = observe(LayerView(hidden=x, attention=out.weights, ratios=out.change.ratios)) if observe else None
            return (out.x, out.kv), (out.change.ratios, out.change.sinks if keep_kv else None, seen)

        # prevent_cse is not needed: a scan already keeps the recomputation apart from the forward pass
        step = jax.checkpoint(body, policy=REMAT[remat], prevent_cse=False)
        inputs = lambda start, stop: intervention.per_layer(start, stop) if intervention and start >= first else None
        carry, parts = (sequence.x, self._empty_kv(sequence.x, room) if keep_kv else None), []
        for start, end in ((0, min(first, scanned)), (first, scanned)):
            if start < end:
                carry, part = jax.lax.scan(step, carry, (jnp.arange(start, end), inputs(start, end)))
                parts.append(part)
            if end == first and not differentiate:
                carry = jax.lax.stop_gradient(carry)
        if last_apart:
            of_last = jax.tree.map(lambda leaf: leaf[0], inputs(scanned, stop))
            carry, part = body(carry, (jnp.int32(scanned), of_last), rows)
            parts.append(jax.tree.map(lambda leaf: leaf[None], part))
        (x, kv), (ratios, sinks, observed) = carry, map(_concatenate, zip(*parts, strict=True))
        if sinks is not None:
            sinks = jnp.pad(sinks, ((stop - len(sinks), 0), (0, 0), (0, 0)))
        x = take_rows(x, rows) if rows is not None and not last_apart else x
        key, value = kv or (None, None)
        return DecoderOutput(x, key, value, ratios, sinks, observed)

    def _empty_kv(self, x: jax.Array, room: int) -> KeysAndValues:
        """Zeros for the keys and values of all layers on x [B, T, D], which the layers fill in place."""
        c = self.config
        shape = (c.num_layers, x.shape[0], c.num_kv_heads, x.shape[1] + room, c.head_dim)
        empty = lambda: constrain(jnp.zeros(shape, x.dtype), self.mesh, None, ROWS, "tensor")
        return empty(), empty()

    def resume(
        self, sequence: Sequence, cache: KVCache, intervention: Intervention, start: jax.Array, *, rows: jax.Array
    ) -> tuple[jax.Array, KVCache]:
        """`__call__` from layer `start` on, which may be traced: one compiled program for every start. Not differentiable.

        Args:
            sequence: its x [B, T, D] is the residual stream that enters layer `start`.
            cache: of S >= T slots; the prompt's keys and values in the layers from `start` on are overwritten.
            start: int32 [], in 0..L-1.
            rows: int32 [B, A], positions whose output is wanted.

        Returns:
            hidden [B, A, D] before the final norm, and the cache.
        """
        runner, last = self.runner(sequence, intervention), self.config.num_layers - 1
        inputs = intervention.per_layer(0, last + 1)

        def body(index: jax.Array, carry: tuple[jax.Array, KeysAndValues], rows: jax.Array | None = None) -> tuple[Any, Any]:
            out = runner(index, carry[0], kv=carry[1], inputs=layer_at(inputs, index), rows=rows)
            return out.x, out.kv

        carry = jax.lax.fori_loop(start, last, body, (sequence.x, (cache.key, cache.value)))
        hidden, (key, value) = body(jnp.int32(last), carry, rows)
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
        rope = rope_angles(position[:, None], self.config.rope, self.config.head_dim)
        valid = jax.lax.dynamic_update_slice_in_dim(cache.valid, jnp.ones_like(cache.valid[:, :1]), slot, axis=1)
        runner, num_layers = LayerRunner(self, rope, valid[:, None, :], intervention, slot), self.config.num_layers

        def body(carry: tuple[jax.Array, KeysAndValues], xs: tuple[jax.Array, Any]) -> tuple[Any, Any]:
            out = runner(xs[0], carry[0], kv=carry[1], inputs=xs[1])
            return (out.x, out.kv), out.change.sinks

        inputs = None if intervention is None else intervention.per_layer(0, num_layers)
        carry = self.embed(token[:, None]), (cache.key, cache.value)
        (x, (key, value)), sinks = jax.lax.scan(body, carry, (jnp.arange(num_layers), inputs))
        if sinks is not None:
            sinks = jax.lax.dynamic_update_slice_in_dim(cache.sinks, sinks, slot, axis=2)
        return x[:, 0], KVCache(key=key, value=value, valid=valid, sinks=sinks)


def _last_layer_apart(num_layers: int, rows: int) -> bool:
    """Whether the last layer is compiled apart from the scan, for the wanted rows only.

    That saves most of one layer's work. For many rows it takes a third of the compile time, which a deep model's run of some
    hundred steps would not get back.
    """
    return rows == 1 or num_layers <= 16


def _write_layer(kv: KeysAndValues, index: jax.Array, new: KeysAndValues) -> KeysAndValues:
    """Writes keys and values [B, K, T, H] of one layer into those of all [L, B, K, S, H], in place under jit."""
    put = lambda of_all, of_layer: jax.lax.dynamic_update_slice(of_all, of_layer[None], (index, 0, 0, 0, 0))
    return put(kv[0], new[0]), put(kv[1], new[1])


def _concatenate(parts: Iterable[Any]) -> Any:
    """Concatenates the outputs of the layer ranges along the layer axis, leaving out ranges without an output."""
    given = [part for part in parts if part is not None]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *given) if given else None


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
    """Saves everything but the layer's weights: slicing them again beats a second copy of the stack."""
    return primitive.name not in ("dynamic_slice", "squeeze", "reshape")


_saved = jax.checkpoint_policies.save_only_these_names
REMAT: dict[str, Any] = {
    "none": _keep_activations,
    "dots": _saved("mlp", "qkv", "attention_out", SAVED),
    "mlp": _saved("mlp"),
    "full": None,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["layer_input"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
"""Which residuals of a layer the forward pass saves, from the fastest to the smallest in memory (TrainConfig)."""
