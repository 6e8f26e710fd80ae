"""Edits of attention scores that depend on their query and key alone, as PAI and VAF make them."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from lsg_jax.types import KVCache, LayerChange


@flax.struct.dataclass
class ScoreEdit:
    """S + change S, or S + change |S|, for the scores S of some queries in some layers.

    Attributes:
        change: float32 [B, S], of each key.
        queries: bool [B, T], queries that are edited.
        layers: first layer and the end, exclusive, static.
        num_layers: of the model, static.
        absolute: whether |S| is added, static.
    """

    change: jax.Array
    queries: jax.Array
    layers: tuple[int, int] = flax.struct.field(pytree_node=False)
    num_layers: int = flax.struct.field(pytree_node=False)
    absolute: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def first_layer(self) -> int:
        return self.layers[0]

    @property
    def last_layer(self) -> int:
        return self.layers[1] - 1

    def per_layer(self, start: int, stop: int) -> jax.Array:
        """bool [stop - start], layers that are edited."""
        number = jnp.arange(self.num_layers)[start:stop]
        return (number >= self.layers[0]) & (number < self.layers[1])

    def layer(self, inputs: jax.Array, hidden: jax.Array) -> LayerChange:
        """The edit of one layer; `inputs` is its slice of `per_layer`."""

        def edit(scores: jax.Array, queries: jax.Array | None) -> jax.Array:
            among = chosen_queries(self.queries, queries) & inputs
            change = jnp.where(among[:, None, :, None], self.change[:, None, None, : scores.shape[-1]], 0.0)
            return scores + change * (jnp.abs(scores) if self.absolute else scores)

        return LayerChange(edit_scores=edit)

    def while_decoding(self, cache: KVCache, slot: jax.Array) -> ScoreEdit:
        """The same for the next token of each row."""
        room = cache.valid.shape[1] - self.change.shape[1]
        return self.replace(  # type: ignore[attr-defined, no-any-return]
            change=jnp.pad(self.change, ((0, 0), (0, room))), queries=jnp.ones_like(self.queries[:, :1])
        )


def chosen_queries(mask: jax.Array, queries: jax.Array | None) -> jax.Array:
    """bool [B, A], the mask bool [B, T] at the positions int32 [B, A] that an edit is given, or at all."""
    return mask if queries is None else jnp.take_along_axis(mask, queries, axis=1)
