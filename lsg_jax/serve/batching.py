"""Which questions are answered together, in which shapes: few of them, so that few programs are compiled."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lsg_jax.data.processor import Processor
from lsg_jax.serve.programs import Choosing
from lsg_jax.serve.question import Question
from lsg_jax.types import Batch
from lsg_jax.vlm import PROMPT_BUCKET

ROOMS = (16, 64, 256)
"""Tokens of an answer that a cache has room for; beyond, the most that the server gives."""

ROW_STEP = 2
"""Numbers of rows are 1 and its multiples by this, up to the largest batch."""


class Shape(NamedTuple):
    """What the questions of a batch have in common, beside the model.

    Attributes:
        tiles, patches: of each row (`Encoded`); 0 for text only.
        length: tokens that prompts are padded to.
        room: tokens that an answer may have.
    """

    tiles: int
    patches: int
    length: int
    room: int


def shape_of(question: Question, max_new_tokens: int) -> Shape:
    """The shape of a question, on which only its own length and limit have an influence."""
    encoded = question.encoded
    room = next((room for room in ROOMS if room >= question.max_tokens), max_new_tokens)
    shown = (encoded.tiles, encoded.patches) if question.pixels is not None else (0, 0)
    return Shape(*shown, padded_length(len(encoded.ids)), min(room, max_new_tokens))


def padded_length(tokens: int) -> int:
    """`tokens` rounded up: to a multiple of 64 up to 512, and then to one of four lengths between powers of two."""
    step = max(PROMPT_BUCKET, 1 << max((tokens - 1).bit_length() - 3, 0))
    return -(-tokens // step) * step


def row_counts(most: int) -> list[int]:
    """Numbers of rows of batches, ascending; the last is `most`."""
    counts = [1]
    while counts[-1] * ROW_STEP < most:
        counts.append(counts[-1] * ROW_STEP)
    return counts if most == 1 else [*counts, most]


def rows_for(questions: int, most: int, *, of: int = 1) -> int:
    """The smallest number of rows that holds so many questions, in multiples of `of`."""
    count = next(count for count in row_counts(most) if count >= questions)
    return -(-count // of) * of


def make_batch(processor: Processor, questions: Sequence[Question], shape: Shape, rows: int) -> tuple[Batch, Choosing]:
    """The questions, and then the first one again until there are so many rows."""
    filled = [*questions, *([questions[0]] * (rows - len(questions)))]
    batch = processor.collate(
        [each.encoded for each in filled],
        [each.pixels for each in filled],
        max_length=shape.length,
        max_answer_tokens=1,
        padding_side="left",
    )
    if not shape.tiles:
        batch = batch.without_images()
    # the answer slots are not used, and would only add shapes to compile
    batch = dataclasses.replace(batch, answer_index=None, answer_target=None, row_id=None)
    seeds = np.array([each.seed % (1 << 64) for each in filled], np.uint64)
    return batch, Choosing(
        temperature=np.array([each.temperature for each in filled], np.float32),
        top_p=np.array([each.top_p for each in filled], np.float32),
        key=np.stack([seeds >> np.uint64(32), seeds & np.uint64((1 << 32) - 1)], axis=1).astype(np.uint32),
        limit=np.array([each.max_tokens if i < len(questions) else 0 for i, each in enumerate(filled)], np.int32),
    )
