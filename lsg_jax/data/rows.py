"""A tokenized example and its pixels -> one row of a batch, and stacked rows -> a `Batch`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from lsg_jax.config import ModelConfig
from lsg_jax.data.encoded import Encoded
from lsg_jax.data.images import to_patches
from lsg_jax.data.layout import VisualLayout, place_sources
from lsg_jax.errors import InputError
from lsg_jax.types import IGNORE, Batch, VisualInput


def pad_row(
    encoded: Encoded,
    shown: np.ndarray,
    layouts: Sequence[VisualLayout],
    model: ModelConfig,
    *,
    max_length: int,
    max_answer_tokens: int,
    padding_side: Literal["left", "right"],
    row_id: int,
    tiles: int | None,
) -> dict[str, np.ndarray]:
    """The fields of `Batch` for one example, without the batch axis; `patches` for its images.

    Args:
        shown: uint8 [S, size, size, 3], the tiles of its images; a blank one for a text.
        layouts: of its images; none for a text.
        tiles: what S is padded to; None for `encoded.tiles`.

    Raises:
        InputError: as `Processor.row`.
    """
    length = len(encoded.ids)
    answered = encoded.answered
    targets = encoded.ids[answered]
    if length > max_length or len(targets) > max_answer_tokens:
        raise InputError(
            f"example of {length} tokens ({len(targets)} of them answer) exceeds {max_length} ({max_answer_tokens})"
        )
    if (found := (encoded.ids == model.image_token_id).sum()) != (count := sum(map(len, layouts))):
        raise InputError(f"{found} image tokens in a prompt whose images have {count}")
    if layouts and len(shown) != encoded.num_tiles:
        raise InputError(f"{len(shown)} tiles for a prompt whose images have {encoded.num_tiles}")
    start = 0 if padding_side == "right" else max_length - length
    input_ids = np.full(max_length, model.pad_token_id, np.int32)
    input_ids[start : start + length] = encoded.ids
    positions = np.arange(max_length)
    valid = (positions >= start) & (positions < start + length)
    room = (tiles or encoded.tiles) - len(shown)
    answer_index = np.zeros(max_answer_tokens, np.int32)
    answer_target = np.full(max_answer_tokens, IGNORE, np.int32)
    answer_index[: len(targets)] = start + answered - 1  # whose hidden state predicts it
    answer_target[: len(targets)] = targets
    return {
        "input_ids": input_ids,
        "attention_mask": valid,
        "patches": np.pad(to_patches(shown, model.vision.patch_size), ((0, room), (0, 0), (0, 0))),
        **place_sources(valid & (input_ids == model.image_token_id), layouts, model),
        "gate_position": np.asarray(start + encoded.num_prompt - 1, np.int32),
        "answer_index": answer_index,
        "answer_target": answer_target,
        "row_id": np.asarray(row_id, np.int32),
    }


def to_batch(fields: dict[str, np.ndarray]) -> Batch:
    """A `Batch` of stacked rows that `pad_row` returned."""
    fields = dict(fields)
    return Batch(images=VisualInput(fields.pop("patches")), **fields)
