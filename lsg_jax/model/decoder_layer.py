"""One decoder layer, and what runs single layers out of the stack."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from lsg_jax.activations import ACTIVATIONS
from lsg_jax.config import TextConfig
from lsg_jax.model.attention import CausalAttention, LayerCache, take_rows
from lsg_jax.model.layers import Linear, RMSNorm, layer_at
from lsg_jax.model.scope import Scope
from lsg_jax.types import UNCHANGED, Intervention, LayerChange


class GatedMLP(nnx.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs, dtype: Any):
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.activation = config.hidden_act
        linear = functools.partial(Linear, bias=bias, rngs=rngs, dtype=dtype, weights=config.weights)
        self.gate_proj = linear((width,), (inner,))
        self.up_proj = linear((width,), (inner,))
        self.down_proj = linear((inner,), (width,))

    def __call__(self, x: jax.Array) -> jax.Array:
        gate, up = checkpoint_name(self.gate_proj(x), "mlp"), checkpoint_name(self.up_proj(x), "mlp")
        return self.down_proj(ACTIVATIONS[self.activation](gate) * up)


class DecoderLayer(nnx.Module):
    """Pre-norm decoder layer; with sandwich norms what attention and MLP add is normed too (Gemma 3)."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs, dtype: Any, mesh: Mesh | None = None):
        width, eps, offset = config.hidden_size, config.rms_norm_eps, config.norm_offset
        norm = functools.partial(RMSNorm, width, eps=eps, dtype=dtype, offset=offset)
        self.input_norm = norm()
        self.attention = CausalAttention(config, rngs=rngs, dtype=dtype, mesh=mesh)
        self.attention_out_norm = norm() if config.sandwich_norms else None
        self.post_attention_norm = norm()
        self.mlp = GatedMLP(config, rngs=rngs, dtype=dtype)
        self.mlp_out_norm = norm() if config.sandwich_norms else None

    def __call__(
        self, x: jax.Array, scope: Scope, *, rows: jax.Array | None = None, **attention: Any
    ) -> tuple[jax.Array, Any, Any]:
        """x [B, T, D] -> (x, keys and values or cache, attention weights); keywords as CausalAttention takes them."""
        x, kept, weights = self.attend(x, scope, rows=rows, **attention)
        return self.feed(x), kept, weights

    def attend(
        self, x: jax.Array, scope: Scope, *, rows: jax.Array | None = None, **attention: Any
    ) -> tuple[jax.Array, Any, Any]:
        """x plus the output of the attention."""
        out, kept, weights = self.attention(self.input_norm(x), scope, rows=rows, **attention)
        out = checkpoint_name(out, "attention_out")
        if self.attention_out_norm is not None:
            out = self.attention_out_norm(out)
        return (x if rows is None else take_rows(x, rows)) + out, kept, weights

    def feed(self, x: jax.Array) -> jax.Array:
        """x plus the output of the MLP."""
        out = self.mlp(self.post_attention_norm(x))
        if self.mlp_out_norm is not None:  # the way back through the norm needs its input
            out = self.mlp_out_norm(checkpoint_name(out, "mlp"))
        return x + out


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
        layers: the stack that they are sliced from.
        scope: what the queries of each layer see.
        intervention: what is done in the layers, if anything.
        slot: int32 [], cache slot of the one token of each row; None for whole sequences.
        added: [n, B, T, D], what is added to the outputs of the first n layers; None for nothing.
    """

    layers: DecoderLayer
    scope: Scope
    intervention: Intervention | None = None
    slot: jax.Array | None = None
    added: jax.Array | None = None

    def layer(self, index: jax.Array) -> DecoderLayer:
        """One layer out of the stack; `index` int32 [] may be traced."""
        graphdef, stacked = nnx.split(self.layers)
        return nnx.merge(graphdef, layer_at(stacked, index))

    def __call__(
        self,
        index: jax.Array,
        x: jax.Array,
        *,
        kv: KeysAndValues | None = None,
        inputs: Any = None,
        rows: jax.Array | None = None,
        return_weights: bool | jax.Array = False,
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
        y, new, weights = self.layer(index)(x, self.scope.of_layer(index), **attention)
        if isinstance(new, LayerCache):
            kv = new.key, new.value
        elif kv is not None:
            kv = _write_layer(kv, index, new)
        return LayerOutput(self._with_added(index, y, rows), kv, weights, change)

    def attend(self, index: jax.Array, x: jax.Array) -> jax.Array:
        """The first half of an unchanged layer over whole sequences: x [B, T, D] plus the output of its attention."""
        return self.layer(index).attend(x, self.scope.of_layer(index))[0]

    def feed(self, index: jax.Array, x: jax.Array) -> jax.Array:
        """The second half: x [B, T, D] plus the output of the MLP, and what is added after the layer."""
        return self._with_added(index, self.layer(index).feed(x))

    def _with_added(self, index: jax.Array, x: jax.Array, rows: jax.Array | None = None) -> jax.Array:
        if self.added is None:
            return x
        last = len(self.added) - 1
        added = layer_at(self.added, jnp.minimum(index, last))
        added = added if rows is None else take_rows(added, rows)
        return x + jnp.where(index <= last, added, 0).astype(x.dtype)


def _write_layer(kv: KeysAndValues, index: jax.Array, new: KeysAndValues) -> KeysAndValues:
    """Writes keys and values [B, K, T, H] of one layer into those of all [L, B, K, S, H], in place under jit."""
    put = lambda of_all, of_layer: jax.lax.dynamic_update_slice(of_all, of_layer[None], (index, 0, 0, 0, 0))
    return put(kv[0], new[0]), put(kv[1], new[1])
