"""The causal decoder: Llama, Mistral, Qwen2 and Phi-3 as settings of one stack, run by `lax.scan` over layer indices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
from lsg_jax.model.layer_scan import differentiated_from
from lsg_jax.model.layers import Linear, RMSNorm, layer_at, stack_layers
from lsg_jax.model.splash_attention import SAVED
from lsg_jax.sharding import ROWS, constrain
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
        """The first half: x with the output of the attention added."""
        out, kept, weights = self.attention(self.input_norm(x), rope, mask, rows=rows, **attention)
        return (x if rows is None else take_rows(x, rows)) + checkpoint_name(out, "attention_out"), kept, weights

    def feed(self, x: jax.Array) -> jax.Array:
        """The second half, with the output of the MLP."""
        return x + self.mlp(self.post_attention_norm(x))


@flax.struct.dataclass
class DecoderOutput:
    """What a run over the layers leaves.

    Attributes:
        hidden: [B, T, D], or [B, A, D] where only some rows were wanted; output of the last layer, before the final norm.
        key, value: [L, B, K, T + room, H], or None unless `keep_kv`.
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
    """Token embeddings, decoder layers, final norm and output head (tied to the embeddings where the config says so).

    On a mesh the residual stream lies along `data` and `fsdp` by rows, and along `tensor` by positions. Left to itself, XLA
    keeps all rows on every device and splits D, as the embeddings are, and memory and transfers grow with the mesh.
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
        """Lays a residual stream [B, T, D] out over the mesh."""
        return constrain(x, self.mesh, ROWS, "tensor")

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Final norm and head: [..., D] -> float32 [..., V]."""
        # bfloat16 logits would round away what tells close candidates apart
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

    def __call__(
        self,
        x: jax.Array,
        valid: jax.Array,
        intervention: Intervention | None = None,
        *,
        differentiate: bool = False,
        rows: jax.Array | None = None,
        keep_kv: bool = False,
        room: int = 0,
        remat: str = "none",
        observe: Callable[[LayerView], Any] | None = None,
        observe_attention: bool = False,
    ) -> DecoderOutput:
        """Runs all layers over whole sequences, causally; padding may be on either side.

        Layers below the first that the intervention changes are not differentiated (`layer_scan`), and without a gradient run
        in a scan of their own. With `rows`, the last layer computes nothing but keys and values elsewhere, unless that would
        not pay (`_last_layer_apart`).

        Args:
            x: merged embeddings [B, T, D].
            valid: bool [B, T], unpadded tokens.
            intervention: what is done in the layers, if anything.
            differentiate: `x` or weights are trained: no layer is left out of the backward pass. Otherwise only what the
                intervention hands to the layers (`per_layer`) gets a gradient.
            rows: int32 [B, A], positions whose output is wanted; None for all.
            room: empty positions behind the keys and values that are kept.
            remat: what of a layer is kept for the backward pass (TrainConfig).
            observe: called with a LayerView in each layer; its results come back stacked.
        """
        self.check_length(x.shape[1])
        num_layers = self.config.num_layers
        first = num_layers if intervention is None else intervention.first_layer
        apart = rows is not None and _last_layer_apart(num_layers, rows.shape[1])
        scanned = num_layers - 1 if apart else num_layers
        run_layer = self.over(valid)

        def body(carry: tuple[jax.Array, Any], index: jax.Array, walked: Any, rows: jax.Array | None = None) -> tuple[Any, Any]:
            x, kv = carry
            x = checkpoint_name(self.by_rows(x), "layer_input")
            change = UNCHANGED if intervention is None or walked is None else intervention.layer(walked, x)
            y, new, weights = run_layer(x, index, change=change, rows=rows, return_weights=observe_attention and rows is None)
            seen = observe(LayerView(hidden=x, attention=weights, ratios=change.ratios)) if observe else None
            if keep_kv:
                kv = _write_layer(kv, index, new)
            return (y, kv), (change.ratios, seen, change.sinks if keep_kv else None)

        # a scan already keeps the recomputation apart from the forward pass
        step = jax.checkpoint(body, policy=REMAT[remat], prevent_cse=False)

        def run(carry: tuple[jax.Array, Any], start: int, stop: int, walked: Any) -> tuple[Any, Any]:
            return jax.lax.scan(lambda c, xs: step(c, *xs), carry, (jnp.arange(start, stop), walked))

        def run_split(walked: Any, carry: tuple[jax.Array, Any]) -> tuple[Any, Any]:
            carry, _ = run(carry, 0, first, None)
            return run(carry, first, scanned, jax.tree.map(lambda leaf: leaf[first:], walked))

        carry, parts = (x, self._empty_kv(x, room) if keep_kv else None), []
        one_body = 0 < first < scanned and not (differentiate or keep_kv or observe or remat == "offload")
        if intervention is not None and one_body:
            walked = intervention.per_layer(0, scanned)
            carry, part = differentiated_from(first, run_split, lambda w, c, index: step(c, index, w), walked, carry)
            parts.append(part)
        else:
            if first > 0:
                if scanned > 0:
                    carry, part = run(carry, 0, min(first, scanned), None)
                    parts.append(part)
                carry = carry if differentiate else jax.lax.stop_gradient(carry)
            if intervention is not None and first < scanned:
                carry, part = run(carry, first, scanned, intervention.per_layer(first, scanned))
                parts.append(part)
        if apart:
            last = None if intervention is None else jax.tree.map(lambda v: v[0], intervention.per_layer(scanned, num_layers))
            carry, part = body(carry, jnp.int32(scanned), last, rows)
            parts.append(jax.tree.map(lambda v: v[None], part))
        x, kv = carry
        if rows is not None and not apart:
            x = take_rows(x, rows)
        observed = jax.tree.map(lambda *p: jnp.concatenate(p), *(p[1] for p in parts))
        ratios, sinks = _join([p[0] for p in parts]), _join([p[2] for p in parts])
        if sinks is not None:
            sinks = jnp.pad(sinks, ((num_layers - len(sinks), 0), (0, 0), (0, 0)))
        key, value = kv or (None, None)
        return DecoderOutput(hidden=x, key=key, value=value, ratios=ratios, sinks=sinks, observed=observed)

    def _empty_kv(self, x: jax.Array, room: int) -> tuple[jax.Array, jax.Array]:
        """Keys and values of all layers for x [B, T, D], zeros, which the layers fill in place."""
        c = self.config
        shape = (c.num_layers, x.shape[0], c.num_kv_heads, x.shape[1] + room, c.head_dim)
        empty = lambda: constrain(jnp.zeros(shape, x.dtype), self.mesh, None, ROWS, "tensor")
        return empty(), empty()

    def over(self, valid: jax.Array, part: str = "__call__") -> Callable[..., tuple[jax.Array, Any, Any]]:
        """A function that runs one layer over whole sequences whose tokens `valid` bool [B, T] are unpadded.

        It takes x [B, T, D], the layer's index int32 [], which may be traced, and the keywords of `CausalAttention`, and
        returns what `DecoderLayer` does, or its method `attend`.
        """
        rope = rope_angles(token_positions(valid), self.config.rope, self.config.head_dim)
        mask = causal_mask(valid)

        def run_layer(x: jax.Array, index: jax.Array, **attention: Any) -> tuple[jax.Array, Any, Any]:
            return getattr(self.layer(index), part)(x, rope, mask, **attention)

        return run_layer

    def layer(self, index: jax.Array) -> DecoderLayer:
        """One layer out of the stack; `index` int32 [] may be traced."""
        graphdef, stacked = nnx.split(self.layers)
        return nnx.merge(graphdef, layer_at(stacked, index))

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
        run_layer = self.over(cache.valid[:, : x.shape[1]])
        last = self.config.num_layers - 1
        walked = intervention.per_layer(0, last + 1)

        def body(index: jax.Array, carry: tuple, rows: jax.Array | None = None) -> tuple:
            x, *kv = carry
            change = intervention.layer(layer_at(walked, index), x)
            y, new, _ = run_layer(x, index, change=change, rows=rows)
            return y, *_write_layer(kv, index, new)

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


def _last_layer_apart(num_layers: int, rows: int) -> bool:
    """Whether the last layer is a program of its own, for the rows that are wanted.

    It saves most of one layer's work. But it is the one part that compiles beside the scan, and for many rows that takes a
    third of the whole compile time, more than a deep model's run of some hundred steps would get back.
    """
    return rows == 1 or num_layers <= 16


def _write_layer(kv: Any, index: jax.Array, new: Any) -> tuple[jax.Array, ...]:
    """Writes keys and values [B, K, T, H] of one layer into those of all [L, B, K, S, H], in place under jit."""
    put = lambda of_all, of_layer: jax.lax.dynamic_update_slice(of_all, of_layer[None], (index, 0, 0, 0, 0))
    return tuple(map(put, kv, new))


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
"""What of a layer is kept for the backward pass, from the fastest to the smallest in memory (TrainConfig)."""
