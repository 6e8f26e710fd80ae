"""Logits of a token from two passes, and which tokens the first pass leaves to choose among."""

from __future__ import annotations

import math

import flax.struct
import jax
import jax.numpy as jnp

from lsg_jax.types import Sequence

CUT = 1e4
"""Logits that a token below the cut-off loses. Its probability is 0 in float32, and log likelihoods stay finite."""


@flax.struct.dataclass
class Contrasted:
    """Contrasted logits of a token.

    Attributes:
        free: float32 [..., V], before the cut-off.
        above: float32 [..., V], by how much the logits of the first pass exceed the cut-off; tokens below 0 are cut.
    """

    free: jax.Array
    above: jax.Array

    @property
    def logits(self) -> jax.Array:
        """float32 [..., V], those that a token is chosen by."""
        return jnp.where(self.above < 0, self.free - CUT, self.free)

    def where(self, rows: jax.Array, logits: jax.Array) -> Contrasted:
        """The same in the rows bool [...], and in the others `logits` [..., V], none cut."""
        rows = rows[..., None]
        return Contrasted(jnp.where(rows, self.free, logits), jnp.where(rows, self.above, jnp.inf))

    def margin(self, token: jax.Array) -> jax.Array:
        """float32 [...], the smallest error in `free` or `above` that might lead to another choice than `token` int32 [...].

        Another token must reach it in `free` and not be cut; or it must be cut itself.
        """
        at_token = lambda x: jnp.take_along_axis(x, token[..., None], axis=-1)
        needed = jnp.maximum(at_token(self.free) - self.free, -self.above)
        needed = jnp.where(jnp.arange(needed.shape[-1]) == token[..., None], self.above, needed)
        return needed.min(-1)


def contrast(logits: jax.Array, others: jax.Array, *, weight: float, cutoff: float) -> Contrasted:
    """(1 + weight) logits - weight others, among tokens at least `cutoff` times as probable as the first pass's best.

    Args:
        logits, others: float32 [..., V], of the first and of the second pass.
        cutoff: in [0, 1]; 0 keeps all tokens.
    """
    lowest = logits.max(-1, keepdims=True) + (math.log(cutoff) if cutoff else -jnp.inf)
    return Contrasted((1.0 + weight) * logits - weight * others, logits - lowest)


def contrasted_positions(sequence: Sequence, other: Sequence, prompt_end: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Which positions have their logits contrasted, and with those of which position of the other sequence.

    These are the tokens of both sequences in rows with an image. The end of the prompt is one of them also where the other
    sequence leaves it out, as of a prompt that ends in an image: what follows is then predicted by the last token before it
    that the other one has. A row whose prompt has no token in the other sequence is left as it is.

    Args:
        prompt_end: int32 [B], index of the last token of each prompt.

    Returns:
        bool [B, T], and int32 [B, T].
    """
    assert sequence.visual is not None
    places, end = jnp.arange(sequence.valid.shape[1]), jnp.asarray(prompt_end)[:, None]
    read = (other.valid & (places <= end)).any(axis=1, keepdims=True) & sequence.visual.mask.any(axis=1, keepdims=True)
    where = sequence.valid & (other.valid | (places == end)) & read
    return where, jax.lax.cummax(jnp.where(other.valid, places, 0), axis=1)
