"""GIFT, gaze shift-guided cross-modal fusion (Qi et al., arXiv 2510.22067): an untrained edit of attention weights.

At one layer, whose attention is looked at first, the saliency of a visual token is the mean rise of its attention from one
token to the next, where that is a content word of the question. In other layers the last token of the prompt and each
generated one attend more to salient tokens, and as much more to the question.

As in the released code (amazon-science/GIFT): half of the heads each time, one factor of the question from all of them, the
edit of the prompt's last token and of none before it. Two things differ. Content words there are nouns, verbs, adjectives,
adverbs and numbers of a tagger (spaCy), here all that are no English function words (data/words.py). And the question is found
there by counting the tokens of the template, here in the text; where only token ids are given, it is all from the last image
to the end of the prompt, every token content. Several images of a row count as one set of patches.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

import flax.struct
import jax
import jax.numpy as jnp

from lsg_jax.config import ModelConfig
from lsg_jax.config.ranges import Range, Table
from lsg_jax.errors import ConfigError
from lsg_jax.methods.method import Method
from lsg_jax.methods.method_model import MethodModel
from lsg_jax.types import CONTENT, QUESTION, Batch, KVCache, LayerChange, Sequence

BLOCK = 64  # the attention weights of all queries of an image in tiles would be gigabytes


@dataclass(frozen=True)
class GiftConfig(Table, name="gift"):
    """GIFT (arXiv 2510.22067): more attention to visual tokens that the question's words draw attention to. Not trained.

    The defaults are those of LLaVA-1.5-7B. 13B: 10, 14 to 20; Qwen2-VL-7B: 14, 5 to 18, alpha 4.

    Attributes:
        saliency_layer: decoder layer whose attention makes the saliency, 0-based.
        first_layer: first decoder layer that is edited.
        last_layer: last decoder layer that is edited.
        alpha: attention is multiplied by 1 to exp(alpha); 0 does nothing.
    """

    saliency_layer: Annotated[int, Range("[0, 1e4]")] = 11
    first_layer: Annotated[int, Range("[0, 1e4]")] = 12
    last_layer: Annotated[int, Range("[0, 1e4]")] = 22
    alpha: Annotated[float, Range("[0, 50]")] = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.first_layer > self.last_layer:
            raise ConfigError(f"gift.first_layer is {self.first_layer}, behind gift.last_layer {self.last_layer}")


def rise_of(weights: jax.Array, content: jax.Array) -> jax.Array:
    """The positive rise A[t] - A[t - 1] of attention, summed over content words t.

    Args:
        weights: float32 [B, N, A + 1, T], of a query and the A behind it.
        content: bool [B, A], which of these are tokens of content words.

    Returns:
        float32 [B, N, T].
    """
    rise = jnp.maximum(weights[:, :, 1:] - weights[:, :, :-1], 0.0)
    return jnp.where(content[:, None, :, None], rise, 0.0).sum(2)


def saliency_map(rise: jax.Array, *, visual: jax.Array, words: jax.Array, alpha: float) -> jax.Array:
    """How much more attention each visual token is to get.

    The rise is averaged over content words and over the half of the heads in which it is largest. Of these means, one for each
    visual token, outliers are clipped at 3 deviations; then they are scaled to [0, alpha], and the exponential is taken.

    Args:
        rise: float32 [B, N, T], as `rise_of` has it, of all content words.
        visual: bool [B, T], visual tokens.
        words: int32 [B], number of tokens of content words.

    Returns:
        float32 [B, T], 1 for text, and for all tokens of a row without a rise.
    """
    rise = jnp.where(visual[:, None], rise, 0.0)
    chosen = larger_half(rise.sum(-1))
    rise = jnp.where(chosen[..., None], rise, 0.0).sum(1) / jnp.maximum(chosen.sum(1) * words, 1)[:, None]
    count = visual.sum(1, keepdims=True)
    mean = rise.sum(1, keepdims=True) / jnp.maximum(count, 1)
    squares = jnp.where(visual, (rise - mean) ** 2, 0.0).sum(1, keepdims=True)
    reach = 3.0 * jnp.sqrt(squares / jnp.maximum(count - 1, 1))
    rise = jnp.clip(rise, mean - reach, mean + reach)
    low = jnp.where(visual, rise, jnp.inf).min(1, keepdims=True)
    span = jnp.where(visual, rise, -jnp.inf).max(1, keepdims=True) - low
    scaled = jnp.where(visual & (span > 0), (rise - low) / jnp.where(span > 0, span, 1.0), 0.0)
    return jnp.exp(alpha * scaled)


def larger_half(scores: jax.Array) -> jax.Array:
    """bool [B, N, ...], the N // 2 heads of largest score [B, N, ...]."""
    order = jnp.argsort(-scores, axis=1)
    return jnp.argsort(order, axis=1) < scores.shape[1] // 2


def boost(weights: jax.Array, *, saliency: jax.Array, visual: jax.Array, question: jax.Array, queries: jax.Array) -> jax.Array:
    """Moves attention to salient visual tokens and to the question.

    For each query: in the half of the heads with most attention on visual tokens, that is multiplied by the saliency. It is
    now r times as much, over these heads together; and in the half of the heads with most attention on the question, that is
    multiplied by r. Then the weights are divided by their sum.

    Args:
        weights: float32 [B, N, A, S], rows sum to 1.
        saliency: float32 [B, S].
        visual: bool [B, S], keys that are visual tokens.
        question: bool [B, S], keys that are tokens of the question.
        queries: bool [B, A], queries that are edited.

    Returns:
        float32 [B, N, A, S], rows sum to 1.
    """
    keys = lambda values: values[:, None, None]
    on = lambda mask: jnp.where(keys(mask), weights, 0.0).sum(-1)
    on_visual = on(visual)
    looking, reading = larger_half(on_visual), larger_half(on(question))
    looked = jnp.where(looking[..., None] & keys(visual), weights * keys(saliency), weights)
    over_heads = lambda mass: jnp.where(looking, mass, 0.0).sum(1, keepdims=True)
    before, after = over_heads(on_visual), over_heads(jnp.where(keys(visual), looked, 0.0).sum(-1))
    ratio = jnp.where(before > 0, after / jnp.where(before > 0, before, 1.0), 1.0)[..., None]
    edited = jnp.where(reading[..., None] & keys(question), looked * ratio, looked)
    return jnp.where(queries[:, None, :, None], edited / edited.sum(-1, keepdims=True), weights)


@flax.struct.dataclass
class GazeShift:
    """GIFT in the decoder layers, over a whole sequence, or for one token that attends to a cache.

    Attributes:
        visual: bool [B, S], keys that are visual tokens.
        question: bool [B, S], keys that are tokens of the question.
        queries: bool [B, T], queries that are edited.
        enabled: bool [L], layers that are edited.
        first_layer: the lowest of them, static.
        saliency: float32 [B, S]; None where it is in the cache.
        cached: float32 [L, B, S], the saliency as the cache keeps it; None where the tokens of the sequence are the keys.
    """

    visual: jax.Array
    question: jax.Array
    queries: jax.Array
    enabled: jax.Array
    first_layer: int = flax.struct.field(pytree_node=False)
    saliency: Any = None
    cached: Any = None

    last_layer = None

    def per_layer(self, start: int, stop: int) -> Any:
        """Scan inputs of the layers from `start` to `stop`."""
        return jax.tree.map(lambda leaf: leaf[start:stop], (self.enabled, self.cached))

    def layer(self, inputs: Any, hidden: jax.Array) -> LayerChange:
        """The edit of one layer; `inputs` is its slice of `per_layer`."""
        enabled, cached = inputs
        saliency = self.saliency if cached is None else cached

        def edit(weights: jax.Array, queries: jax.Array | None) -> jax.Array:
            among = self.queries if queries is None else jnp.take_along_axis(self.queries, queries, axis=1)
            seen = lambda keys: keys[:, : weights.shape[-1]]
            return boost(
                weights,
                saliency=seen(saliency),
                visual=seen(self.visual),
                question=seen(self.question),
                queries=among & enabled,
            )

        # a generated token is none that attention is moved to
        return LayerChange(edit=edit, kept=saliency if cached is None else jnp.ones(hidden.shape[:2], jnp.float32))

    def while_decoding(self, cache: KVCache, slot: jax.Array) -> GazeShift:
        """The same for the next token of each row."""
        room = ((0, 0), (0, cache.valid.shape[1] - self.visual.shape[1]))
        return self.replace(  # type: ignore[attr-defined, no-any-return]
            visual=jnp.pad(self.visual, room),
            question=jnp.pad(self.question, room),
            queries=self.visual.any(axis=1, keepdims=True),
            cached=cache.kept,
        )


@dataclass(frozen=True)
class Gift(Method):
    """GIFT: attention goes to what the question's words look at."""

    settings: GiftConfig = field(default_factory=GiftConfig)

    Settings = GiftConfig
    reads_words = True

    def for_model(self, config: ModelConfig) -> Gift:
        """Refuses layers that the decoder does not have."""
        last = config.text.num_layers - 1
        for name in ("saliency_layer", "last_layer"):
            if (layer := getattr(self.settings, name)) > last:
                raise ConfigError(f"gift.{name}: layer {layer} does not exist, the model has layers 0 to {last}")
        return self

    def intervention(self, model: MethodModel, batch: Batch, sequence: Sequence) -> GazeShift | None:
        """Edited attention; None for a batch without images."""
        if sequence.visual is None or self.settings.alpha == 0:
            return None
        settings, visual = self.settings, sequence.visual.mask
        layers, position = jnp.arange(model.config.text.num_layers), jnp.arange(visual.shape[1])
        last = jnp.asarray(batch.gate_position)[:, None]
        after_image = jnp.cumsum(visual[:, ::-1], axis=1)[:, ::-1] == 0
        read = sequence.valid & after_image & visual.any(axis=1, keepdims=True)
        words = jnp.where(position <= last, CONTENT if batch.words is None else jnp.asarray(batch.words), 0) * read
        saliency = None
        if sequence.x is not None:
            content = words == CONTENT
            rise = rise_at_layer(model, sequence, content, settings.saliency_layer)
            saliency = saliency_map(rise, visual=visual, words=content.sum(1), alpha=settings.alpha)
        return GazeShift(
            visual=visual,
            question=words >= QUESTION,
            queries=read & (position >= last),
            enabled=(layers >= settings.first_layer) & (layers <= settings.last_layer),
            first_layer=settings.first_layer,
            saliency=saliency,
        )


def rise_at_layer(model: MethodModel, sequence: Sequence, content: jax.Array, layer: int) -> jax.Array:
    """`rise_of` all content words bool [B, T] at one layer of the unchanged decoder: float32 [B, N, T].

    No layer above it is run. Its attention is computed for `BLOCK` queries at a time.
    """
    decoder, (rows, length) = model.language_model, content.shape
    hidden = decoder(sequence, stop=layer).hidden if layer else sequence.x
    runner = decoder.runner(sequence)

    def add(total: jax.Array, start: jax.Array) -> tuple[jax.Array, None]:
        queries = start + jnp.arange(-1, BLOCK)
        here = jnp.broadcast_to(jnp.clip(queries, 0, length - 1), (rows, BLOCK + 1))
        weights = runner(jnp.int32(layer), hidden, return_weights=here).weights
        assert weights is not None
        read = jnp.take_along_axis(content, here, axis=1) & (queries < length)
        return total + rise_of(weights, read[:, 1:]), None

    nothing = jnp.zeros((rows, model.config.text.num_heads, length), jnp.float32)
    return jax.lax.scan(add, nothing, jnp.arange(0, length, BLOCK))[0]
