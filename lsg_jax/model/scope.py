"""What a decoder layer may look at: masks, sliding windows and rotary angles, for layers of one or of several kinds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from lsg_jax.config import RopeConfig, TextConfig
from lsg_jax.model.rotary import rope_angles
from lsg_jax.types import Sequence

Kind = tuple[int | None, RopeConfig]
"""Sliding window of a layer, None for none, and its rotary embedding."""


@flax.struct.dataclass
class Scope:
    """What the queries of a decoder layer see.

    Attributes:
        rope: cos and sin of the query positions, float32 [B, T, 1, R / 2] each.
        mask: bool [B, T, S], keys that each query may attend to.
        kind: int32 [], which of `windows` the layer has; None before `of_layer`, and where all layers are of one kind.
        windows: the sliding window of each kind of layer, None for none. Static.
        kinds: the kind of each layer; None where all are of one kind. Static.
        causal: no query sees a later key. Static.
        gaps: tokens that are left out may lie between others (Sequence). Static.

    Where layers differ, `rope` and `mask` have a leading axis of kinds, until `of_layer` picks one.
    """

    rope: Any
    mask: jax.Array
    kind: jax.Array | None = None
    windows: tuple[int | None, ...] = flax.struct.field(pytree_node=False, default=(None,))
    kinds: tuple[int, ...] | None = flax.struct.field(pytree_node=False, default=None)
    causal: bool = flax.struct.field(pytree_node=False, default=True)
    gaps: bool = flax.struct.field(pytree_node=False, default=False)

    def of_layer(self, layer: jax.Array) -> Scope:
        """The scope of one layer, int32 [], which may be traced."""
        if self.kinds is None:
            return self
        kind = jnp.array(self.kinds)[layer]
        # a slice, and not `where`: the policy "none" of remat keeps every other result for the backward pass
        pick = lambda leaf, axes: leaf if leaf.ndim == axes else jax.lax.dynamic_index_in_dim(leaf, kind, keepdims=False)
        cos, sin = self.rope
        return self.replace(  # type: ignore[attr-defined, no-any-return]
            rope=(pick(cos, 4), pick(sin, 4)), mask=pick(self.mask, 3), kind=kind, kinds=None
        )


def layer_kinds(config: TextConfig, length: int) -> tuple[Kind, ...]:
    """The kind of each layer, for sequences of `length` keys; a window that is no shorter than them is none."""
    window = config.sliding_window
    layers = range(config.num_layers)
    sliding = set(() if window is None else layers if config.sliding_layers is None else config.sliding_layers)
    bites = window is not None and window < length
    local = (window if bites else None, config.sliding_rope or config.rope)
    return tuple(local if layer in sliding else (None, config.rope) for layer in layers)


def sequence_scope(config: TextConfig, sequence: Sequence) -> Scope:
    """The scope of whole sequences; padding may be on either side."""
    valid, block = sequence.valid, sequence.block
    angles = lambda rope: rope_angles(sequence.positions, rope, config.head_dim)
    scope = _by_kind(layer_kinds(config, valid.shape[1]), angles, lambda window: causal_mask(valid, block=block, window=window))
    return scope.replace(causal=block is None, gaps=sequence.gaps)  # type: ignore[attr-defined, no-any-return]


def token_scope(config: TextConfig, position: jax.Array, valid: jax.Array) -> Scope:
    """The scope of the newest token of each row, on a cache.

    Args:
        position: int32 [B], its rotary position.
        valid: bool [B, S], slots that are filled, its own among them and the last.
    """
    counted = jnp.cumsum(valid, axis=1)

    def mask(window: int | None) -> jax.Array:
        near = valid if window is None else valid & (counted > counted[:, -1:] - window)
        return near[:, None]

    angles = lambda rope: rope_angles(position[:, None], rope, config.head_dim)
    return _by_kind(layer_kinds(config, valid.shape[1]), angles, mask)


def _by_kind(
    of_layers: tuple[Kind, ...], angles: Callable[[RopeConfig], Any], mask: Callable[[int | None], jax.Array]
) -> Scope:
    """Makes and stacks what differs between the kinds."""
    found = tuple(dict.fromkeys(of_layers))
    windows, ropes = zip(*found, strict=True)

    def stacked(make: Callable[[Any], Any], settings: tuple[Any, ...]) -> Any:
        if len(set(settings)) == 1:
            return make(settings[0])
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(make, settings))

    kinds = None if len(found) == 1 else tuple(map(found.index, of_layers))
    return Scope(rope=stacked(angles, ropes), mask=stacked(mask, windows), windows=windows, kinds=kinds)


def causal_mask(valid: jax.Array, *, block: jax.Array | None = None, window: int | None = None) -> jax.Array:
    """Which keys a query may attend to.

    For a left-padded row of three tokens (valid = 0 1 1):

        0 0 0
        0 1 0
        0 1 1

    Args:
        valid: bool [B, T].
        block: int32 [B, T], number of the image whose tokens see each other in both directions, -1 for text.
        window: tokens that a query sees, itself included, counted without padding. It ends at the query: of its own image a
            query also sees what lies beyond, as in Gemma 3 of transformers.

    Returns:
        bool [B, T, T].
    """
    length = valid.shape[1]
    seen = jnp.tril(jnp.ones((length, length), bool))
    if block is not None:
        block = jnp.asarray(block)
        seen = seen | ((block[:, :, None] == block[:, None]) & (block >= 0)[:, None])
    if window is not None:
        counted = jnp.cumsum(valid, axis=1)
        seen = seen & (counted[:, None] > counted[:, :, None] - window)
    return seen & valid[:, None, :]
