"""A tokenized example and its pixels -> one row of a batch, and stacked rows -> a `Batch`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np

from lsg_jax.config import ModelConfig
from lsg_jax.data.encoded import Encoded
from lsg_jax.data.images import to_patches
from lsg_jax.data.layout import VisualLayout
from lsg_jax.data.native import native_fields, native_patches, patch_bucket, place_patches
from lsg_jax.data.placing import place_images
from lsg_jax.errors import InputError
from lsg_jax.types import IGNORE, Batch, VisualInput

Pixels: TypeAlias = "np.ndarray | list[np.ndarray]"
"""The images of one example: their tiles, uint8 [S, size, size, 3]; or native images, uint8 [height, width, 3] each."""

VISUAL_FIELDS = ("patches", "used", "place", "table", "table_weight")


def pad_row(
    encoded: Encoded,
    shown: Pixels | None,
    layouts: Sequence[VisualLayout],
    model: ModelConfig,
    *,
    max_length: int,
    max_answer_tokens: int,
    padding_side: Literal["left", "right"],
    row_id: int,
    tiles: int | None,
    patches: int | None,
) -> dict[str, np.ndarray]:
    """The fields of `Batch` for one example, without the batch axis, and those of `VisualInput` for its images.

    Args:
        shown: the pixels of its images; None for a text.
        layouts: of its images; none for a text.
        tiles: what S is padded to; None for `encoded.tiles`.
        patches: what P of a native tower is filled up to; None for `encoded.patches`.

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
    images = shown_patches(shown, layouts, model)
    if sum(map(len, images)) != encoded.num_tiles and not model.vision.native:
        raise InputError(f"{sum(map(len, images))} tiles for a prompt whose images have {encoded.num_tiles}")
    patches = patches_of(patches or encoded.patches, model)
    start = 0 if padding_side == "right" else max_length - length
    input_ids = np.full(max_length, model.pad_token_id, np.int32)
    input_ids[start : start + length] = encoded.ids
    positions = np.arange(max_length)
    valid = (positions >= start) & (positions < start + length)
    answer_index = np.zeros(max_answer_tokens, np.int32)
    answer_target = np.full(max_answer_tokens, IGNORE, np.int32)
    answer_index[: len(targets)] = start + answered - 1  # whose hidden state predicts it
    answer_target[: len(targets)] = targets
    end, words = start + encoded.num_prompt, encoded.words
    read = {} if words is None else {"words": np.pad(words, (end - len(words), max_length - end))}
    return {
        "input_ids": input_ids,
        "attention_mask": valid,
        **visual_fields(images, layouts, model, tiles=tiles or encoded.tiles, patches=patches),
        **place_images(valid, valid & (input_ids == model.image_token_id), layouts, model, patches),
        "gate_position": np.asarray(start + encoded.num_prompt - 1, np.int32),
        "answer_index": answer_index,
        "answer_target": answer_target,
        "row_id": np.asarray(row_id, np.int32),
        **read,
    }


def patches_of(patches: int, model: ModelConfig) -> int:
    """P of a batch, of which the largest image fills up `patches`."""
    return patch_bucket(patches, model) if model.vision.native else model.vision.num_patches


def shown_patches(shown: Pixels | None, layouts: Sequence[VisualLayout], model: ModelConfig) -> list[np.ndarray]:
    """The patches of each image of one example, as `visual_fields` takes them; none for a text.

    Raises:
        InputError: a native image has not the size of its layout.
    """
    if shown is None or not layouts:
        return []
    if not model.vision.native:
        return [to_patches(np.asarray(shown), model.vision.patch_size)]
    made = [native_patches(image, model) for image in shown]
    found, due = [len(patches) for patches in made], [len(layout) * model.merge**2 for layout in layouts]
    if found != due:
        raise InputError(f"images of {found} patches for a prompt whose images have {due}")
    return made


def visual_fields(
    images: Sequence[np.ndarray], layouts: Sequence[VisualLayout], model: ModelConfig, *, tiles: int, patches: int
) -> dict[str, np.ndarray]:
    """The fields of `VisualInput` of one row, filled up with zeros to `tiles` (S) of `patches` (P) each.

    Args:
        images: [tiles, P, values] each, in the order of the row; or [patches, values] of native images, in the order of Hugging
            Face's `pixel_values`.
    """
    if model.vision.native:
        grids = [layout.grid for layout in layouts if layout.grid is not None]
        placed = place_patches(list(images), grids, tiles, patches, model)
        return {"patches": placed, **native_fields(grids, tiles, patches, model)}
    dtype = images[0].dtype if images else np.uint8
    padded = np.zeros((tiles, patches, model.vision.patch_values), dtype)
    at = 0
    for image in images:
        padded[at : at + len(image)] = image
        at += len(image)
    return {"patches": padded}


def to_batch(fields: dict[str, np.ndarray]) -> Batch:
    """A `Batch` of stacked rows that `pad_row` returned."""
    visual = {name: value for name, value in fields.items() if name in VISUAL_FIELDS}
    others = {name: value for name, value in fields.items() if name not in VISUAL_FIELDS}
    return Batch(images=VisualInput(**visual), **others)
