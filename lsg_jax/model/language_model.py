"""The decoder: Llama, Mistral, Qwen, Phi-3 and Gemma as settings of one stack, run by `lax.scan` over layer indices."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from lsg_jax.config import TextConfig
from lsg_jax.model.attention import take_rows
from lsg_jax.model.decoder_layer import DecoderLayer, KeysAndValues, LayerRunner
from lsg_jax.model.layers import Linear, RMSNorm, layer_at, stack_layers
from lsg_jax.model.scope import sequence_scope, token_scope
from lsg_jax.model.splash_attention import SAVED
from lsg_jax.sharding import ROWS, constrain
from lsg_jax.types import Intervention, KVCache, LayerView, Sequence


@flax.struct.dataclass
class DecoderOutput:
    """Outputs of a pass over the layers.

    Attributes:
        hidden: [B, T, D], or [B, A, D] with `rows`: output of the last layer that ran, before the final norm.
        key, value: [L, B, K, T + room, H], or None unless `keep_kv`.
        ratios: float32 [L - first changed layer, B, G], or None without key gating.
        kept: [L, B, T], what an intervention keeps for the cache (LayerChange), 0 below its first layer; or None.
        observed: results of the observer, stacked over the L layers, or None.
    """

    hidden: jax.Array
    key: jax.Array | None
    value: jax.Array | None
    ratios: jax.Array | None
    kept: jax.Array | None
    observed: Any


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
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype, offset=config.norm_offset)
        if not config.tied_embeddings:
            self.lm_head = Linear((config.hidden_size,), (config.vocab_size,), bias=False, rngs=rngs, dtype=dtype)

    def embed(self, input_ids: jax.Array) -> jax.Array:
        """int32 [B, T] -> [B, T, D]."""
        table = self.embed_tokens[...]
        x = jnp.take(table, input_ids, axis=0, mode="clip")
        if self.config.scaled_embeddings:  # the factor is rounded to the dtype of the weights, as in the original
            x = x * jnp.asarray(self.config.hidden_size**0.5, table.dtype)
        return self.by_rows(x)

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

    def runner(self, sequence: Sequence, intervention: Intervention | None = None) -> LayerRunner:
        """Runs layers over whole sequences; padding may be on either side."""
        added = None if sequence.added is None else constrain(sequence.added, self.mesh, None, ROWS, "tensor")
        return LayerRunner(self.layers, sequence_scope(self.config, sequence), intervention, added=added)

    def __call__(
        self,
        sequence: Sequence,
        intervention: Intervention | None = None,
        *,
        rows: jax.Array | None = None,
        start: int = 0,
        stop: int | None = None,
        differentiate: bool = False,
        keep_kv: bool = False,
        room: int = 0,
        kv: KeysAndValues | None = None,
        remat: str = "none",
        observe: Callable[[LayerView], Any] | None = None,
        observe_attention: bool | jax.Array = False,
    ) -> DecoderOutput:
        """Runs the layers over whole sequences: one scan below those that the intervention changes, one of them, one above.

        With `rows`, the last layer computes only keys and values elsewhere, unless that would not pay (`_last_layer_apart`).

        Args:
            rows: int32 [B, A], positions whose output is wanted; None for all.
            start, stop: the layers to run, `stop` excluded, None for all from `start` on, which `sequence.x` enters.
            differentiate: inputs or weights are trained, so the backward pass goes through every layer. Otherwise it stops at
                the first changed layer, and only the intervention's `per_layer` gets a gradient.
            keep_kv: return keys and values, with `room` empty positions after them, in `kv` if layers ran before.
            remat: what the forward pass keeps of a layer for the backward pass (TrainConfig).
            observe: called with a LayerView in each layer; its results are stacked.
            observe_attention: whether it sees the attention weights of all queries; int32 [B, A] for those at these positions.
        """
        runner, stop = self.runner(sequence, intervention), self.config.num_layers if stop is None else stop
        last_apart = rows is not None and _last_layer_apart(stop, rows.shape[1])
        scanned = stop - 1 if last_apart else stop
        first, above = _changed_layers(intervention, start, stop)

        def body(carry: tuple[jax.Array, Any], xs: tuple[jax.Array, Any], rows: jax.Array | None = None) -> tuple[Any, Any]:
            (x, kv), (index, inputs) = carry, xs
            x = checkpoint_name(self.by_rows(x), "layer_input")
            out = runner(index, x, kv=kv, inputs=inputs, rows=rows, return_weights=rows is None and observe_attention)
            seen = observe(LayerView(hidden=x, attention=out.weights, ratios=out.change.ratios)) if observe else None
            return (out.x, out.kv), (out.change.ratios, out.change.kept if keep_kv else None, seen)

        # prevent_cse is not needed: a scan already keeps the recomputation apart from the forward pass
        step = jax.checkpoint(body, policy=REMAT[remat], prevent_cse=False)
        inputs = lambda begin, end: intervention.per_layer(begin, end) if intervention and first <= begin < above else None
        carry, parts = (sequence.x, self.empty_kv(sequence.x, room) if keep_kv and kv is None else kv), []
        for begin, end in ((start, min(first, scanned)), (first, min(above, scanned)), (above, scanned)):
            if begin < end:
                carry, part = jax.lax.scan(step, carry, (jnp.arange(begin, end), inputs(begin, end)))
                parts.append(part)
            if end == first and not differentiate:
                carry = jax.lax.stop_gradient(carry)
        if last_apart:
            carry, part = body(carry, (jnp.int32(scanned), jax.tree.map(lambda leaf: leaf[0], inputs(scanned, stop))), rows)
            parts.append(jax.tree.map(lambda leaf: leaf[None], part))
        (x, kv), (ratios, kept, observed) = carry, map(_concatenate, zip(*parts, strict=True))
        kept = None if kept is None else jnp.pad(kept, ((first, stop - first - len(kept)), (0, 0), (0, 0)))
        x = take_rows(x, rows) if rows is not None and not last_apart else x
        key, value = kv or (None, None)
        return DecoderOutput(x, key, value, ratios, kept, observed)

    def empty_kv(self, x: jax.Array, room: int) -> KeysAndValues:
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
        valid = jax.lax.dynamic_update_slice_in_dim(cache.valid, jnp.ones_like(cache.valid[:, :1]), slot, axis=1)
        scope, num_layers = token_scope(self.config, position, valid), self.config.num_layers
        runner = LayerRunner(self.layers, scope, intervention, slot)

        def body(carry: tuple[jax.Array, KeysAndValues], xs: tuple[jax.Array, Any]) -> tuple[Any, Any]:
            out = runner(xs[0], carry[0], kv=carry[1], inputs=xs[1])
            return (out.x, out.kv), out.change.kept

        inputs = None if intervention is None else intervention.per_layer(0, num_layers)
        carry = self.embed(token[:, None]), (cache.key, cache.value)
        (x, (key, value)), kept = jax.lax.scan(body, carry, (jnp.arange(num_layers), inputs))
        if kept is not None:
            kept = jax.lax.dynamic_update_slice_in_dim(cache.kept, kept, slot, axis=2)
        return x[:, 0], cache.replace(key=key, value=value, valid=valid, kept=kept)  # type: ignore[attr-defined]


def _changed_layers(intervention: Intervention | None, start: int, stop: int) -> tuple[int, int]:
    """Of the layers from `start` up to before `stop` the first that is changed, and the first above all that are."""
    if intervention is None:
        return stop, stop
    first, last = max(start, min(stop, intervention.first_layer)), intervention.last_layer
    return first, stop if last is None else max(first, min(stop, last + 1))


def _last_layer_apart(num_layers: int, rows: int) -> bool:
    """Whether the last layer is compiled apart from the scan, for the wanted rows only.

    That saves most of one layer's work. For many rows it takes a third of the compile time, which a deep model's run of some
    hundred steps would not get back.
    """
    return rows == 1 or num_layers <= 16


def _concatenate(parts: Iterable[Any]) -> Any:
    """Concatenates the outputs of the layer ranges along the layer axis, leaving out ranges without an output."""
    given = [part for part in parts if part is not None]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *given) if given else None


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
