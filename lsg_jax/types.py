"""Pytrees that cross module borders, with shapes and units on every field.

Shape letters, used as suffixes where a shape is not plain:

    B batch      T query position   S key position   N attention heads   K key-value heads
    H head width D model width      F mlp width      V vocabulary        P patches (image tokens)
    L layers     G token groups     A answer slots   C channels
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, TypeAlias, TypedDict

import flax.struct
import jax

Array: TypeAlias = Any
"""jax.Array on devices, numpy.ndarray on the host."""

IGNORE = -100
"""Label value of a position that carries no loss (the convention of Hugging Face)."""

NO_SOURCE = -1
"""In `Batch.source`: no connector output, for text and for padding along K."""

NEWLINE = -2
"""In `Batch.source`: the model's newline embedding, which ends a row of patches. It is no visual token."""

QUESTION, CONTENT = 1, 2
"""In `Batch.words`: a token of the question, and one of a content word of it; 0 for every other token."""


@flax.struct.dataclass
class VisualInput:
    """The images of a batch, cut into patches on the host.

    Attributes:
        patches: [B, S, P, h w C], S images or tiles a row of P patches each, row by row; within a patch pixel rows, columns,
            channels. uint8 as decoded, or float32 normalised by the processor's mean and std. Zeros for a row without an image.
            One flat last axis, since a TPU pads short ones.
        used: bool [B, S, P], False for patches that fill up a native image to P, or a window; None where all are used.
        place: int32 [B, S, P, 2], row and column of each patch in its image; None but for a native tower.
        table: int32 [B, S, P, 4] and
        table_weight: float32 [B, S, P, 4], the entries of the tower's table of positions that each patch interpolates; None but
            for a native tower with a table.

    A native image is one of the S; its patches come in squares of `ModelConfig.merge`, and these window by window, each window
    filled up to its full size.
    """

    patches: Array
    used: Array = None
    place: Array = None
    table: Array = None
    table_weight: Array = None


@flax.struct.dataclass
class Batch:
    """Examples of one fixed shape. Rows may be padded on either side.

    Attributes:
        input_ids: int32 [B, T], one image token per visual token, as Hugging Face processors write them.
        attention_mask: bool [B, T], False on padding.
        gate_position: int32 [B], index of the last prompt token, where the gates read.
        images: None for text only.
        source: int32 [B, T, K], the connector's outputs behind each position, counted over the tiles of the row's images
            (VisualLayout); `NO_SOURCE` for text, `NEWLINE` for the end of a row of patches. None without `images`.
        weight: float32 [B, T, K], their weights; None for weights of 1.
        positions: int32 [B, T, 3], frame, row and column that the rotary embedding takes (M-RoPE); None where it counts tokens.
        block: int32 [B, T], number of the image that each position shows, -1 for text; None where attention is causal.
        answer_index: int32 [B, A], index whose hidden state predicts answer slot a; 0 where unused.
        answer_target: int32 [B, A], token to predict; -100 where unused.
        row_id: int32 [B], position of the record in its data set, for error messages; -1 where unknown.
        words: int8 [B, T], `QUESTION` and `CONTENT` for the tokens of the question after the last image, 0 elsewhere; None
            unless the method reads them (Method.reads_words).
        route: int32 [B], parsed from the replies to the method's first questions (Method.first_questions); None without any.
    """

    input_ids: Array
    attention_mask: Array
    gate_position: Array
    images: VisualInput | None = None
    source: Array = None
    weight: Array = None
    positions: Array = None
    block: Array = None
    answer_index: Array = None
    answer_target: Array = None
    row_id: Array = None
    words: Array = None
    route: Array = None

    def without_images(self) -> Batch:
        """The batch for programs that run on a cache, or for text only."""
        return self.replace(images=None, source=None, weight=None, block=None)  # type: ignore[attr-defined]


@flax.struct.dataclass
class Sequence:
    """What the decoder runs on: embeddings of text and visual tokens, and what says who attends to whom.

    Attributes:
        x: [B, T, D]; None where only the masks are needed.
        valid: bool [B, T], tokens that take part.
        positions: int32 [B, T], rotary positions, or [B, T, 3] of frame, row and column (M-RoPE); None where x is.
        visual: the visual tokens; None for a batch without images.
        block: int32 [B, T], number of the image whose tokens see each other in both directions, -1 for text; None where
            attention is causal.
        added: [n, B, T, D], what is added to the outputs of the first n layers (deepstack); None for nothing.
        gaps: whether tokens that do not take part may lie between those that do. Static.
        class_attention: float32 [B, S, P], the attention of the vision tower's class token on the P patches of each of the S
            images of a row; None unless it was asked for.
    """

    x: Array
    valid: Array
    positions: Array = None
    visual: VisualTokens | None = None
    block: Array = None
    added: Array = None
    gaps: bool = flax.struct.field(pytree_node=False, default=False)
    class_attention: Array = None


@flax.struct.dataclass
class KVCache:
    """Keys and values of the positions seen so far, of static size S; visual keys are stored already scaled.

    Attributes:
        key: [L, B, K, S, H], after rotary embedding and gating.
        value: [L, B, K, S, H].
        valid: bool [B, S], slots that may be attended to.
        kept: [L, B, S], what an intervention keeps of each token and layer for later queries (LayerChange); None without one.
        offset: int32 [B], what the rotary position of a new token is beyond the number of tokens before it (M-RoPE: an image
            has more tokens than positions); None for 0.
    """

    key: Array
    value: Array
    valid: Array
    kept: Array = None
    offset: Array = None


class Edits(TypedDict, total=False):
    """Keywords of `model.attention.attend`: functions of scores and of weights float32 [B, N, T, S]."""

    edit_scores: Callable[[Array], Array]
    edit: Callable[[Array], Array]


@dataclass(frozen=True)
class LayerChange:
    """What is done to the attention of one decoder layer; the default does nothing.

    Attributes:
        key_scale: float32 [B, T], the factor of each key, before the softmax.
        ratios: float32 [B, G], the gate ratios that `key_scale` came from, for observers.
        edit_scores: attention scores float32 [B, N, A, S] on the first S keys, before the mask and the softmax, and `queries`,
            the positions of their queries int32 [B, A] or None for all -> scores.
        edit: the same for the weights after the softmax.
        watched: bool [B, T], queries whose attention `edit` depends on: over whole sequences it is also given `received`
            float32 [B, N, T], the attention on each key summed over the watched queries behind it, by head.
        kept: [B, T], of each token, for `while_decoding`: the cache keeps it.
        head_gate: normed input [B, A, D] -> float32 [B, A, N], the factors of the heads' outputs.
        low_rank: projection name (`q_proj`, `k_proj`, `v_proj`, `o_proj`) -> function whose output is
            added to the projection's.
    """

    key_scale: Array = None
    ratios: Array = None
    edit_scores: Callable[..., Array] | None = None
    edit: Callable[..., Array] | None = None
    watched: Array = None
    kept: Array = None
    head_gate: Callable[[Array], Array] | None = None
    low_rank: Mapping[str, Callable[[Array], Array]] = field(default_factory=dict)

    def edits(self, queries: Array | None) -> Edits:
        """`edit_scores` and `edit`, where there are any, for the queries at these positions."""
        found: Edits = {}
        if self.edit_scores is not None:
            found["edit_scores"] = partial(self.edit_scores, queries=queries)
        if self.edit is not None:
            found["edit"] = partial(self.edit, queries=queries)
        return found

    def with_received(self, received: Array) -> LayerChange:
        """The same with what `edit` depends on filled in."""
        assert self.edit is not None
        return replace(self, edit=partial(self.edit, received=received), watched=None)


UNCHANGED = LayerChange()


class Intervention(Protocol):
    """What is done in the decoder layers: key scales of gates or of fixed coefficients, edited attention, low-rank updates.

    Attributes:
        first_layer: the lowest layer that it changes, static.
        last_layer: the highest, static; None for the model's last, and where it gives `ratios` or `kept`.
    """

    @property
    def first_layer(self) -> int: ...

    @property
    def last_layer(self) -> int | None: ...

    def per_layer(self, start: int, stop: int) -> Any:
        """Scan inputs of the layers from `start` to `stop`: a pytree of arrays with a leading layer axis.

        What is trained reaches the layers only through it.
        """

    def layer(self, inputs: Any, hidden: Array) -> LayerChange:
        """The change of the layer that `hidden` [B, T, D] enters; `inputs` is its slice of `per_layer`."""

    def while_decoding(self, cache: KVCache, slot: jax.Array) -> Intervention | None:
        """What is done to the next token of each row, which goes into `slot` int32 [] of the cache; None for nothing.

        Keys of the prompt that it scaled are in the cache already.
        """


@flax.struct.dataclass
class LayerView:
    """What an observer sees of one decoder layer.

    Attributes:
        hidden: [B, T, D], the residual stream that enters the layer (HF `hidden_states[l]`).
        attention: float32 [B, N, T, S], attention weights, or [B, N, A, S] of chosen queries; None unless they were asked for.
        ratios: float32 [B, G], gate ratios of the layer; None below the lowest gated layer.
    """

    hidden: Array
    attention: Array = None
    ratios: Array = None


@flax.struct.dataclass
class VisualTokens:
    """Which positions of a sequence are visual tokens, and which of those the ViT made sinks.

    Attributes:
        mask: bool [B, T].
        v_sink: bool [B, T], a subset of `mask`.
        box: float32 [B, T, 4], x0, y0, x1, y1 of each token in units of the original image's sides; None on devices.
    """

    mask: Array
    v_sink: Array
    box: Array = None


@flax.struct.dataclass
class SinkMasks:
    """The three groups of visual tokens at one layer; disjoint, and together all visual tokens.

    Attributes:
        v_sink: bool [B, T].
        l_sink: bool [B, T], visual tokens that became sinks in the language model and are no V-sinks.
        ordinary: bool [B, T].
    """

    v_sink: Array
    l_sink: Array
    ordinary: Array


@flax.struct.dataclass
class TrainState:
    """All that a training run changes. Of n independent gates, `opt_state` and `skipped` have a leading axis of n.

    Of several seeds that are trained together, all but `step` have an axis of them in front.

    Attributes:
        trained: parameters of the gates or of another trained method, float32, a nested dict.
        opt_state: the optax state; holds slots for trained leaves only.
        step: int32 [], optimiser steps taken, skipped ones included.
        skipped: int32 [], steps in a row that were skipped for a non-finite loss or gradient.
    """

    trained: Any
    opt_state: Any
    step: Array
    skipped: Array
