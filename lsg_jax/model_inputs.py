"""Raw arrays, as Hugging Face processors return them -> a `Batch`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lsg_jax.config import ModelConfig
from lsg_jax.data.images import to_patches
from lsg_jax.data.layout import VisualLayout, lay_out_video, tile_bucket
from lsg_jax.data.native import arrange
from lsg_jax.data.pixel_arrays import Images, read_images, to_tiles
from lsg_jax.data.placing import place_images, place_text
from lsg_jax.data.rows import patches_of, visual_fields
from lsg_jax.errors import InputError
from lsg_jax.model.generate import last_token
from lsg_jax.types import Batch, VisualInput


def make_batch(
    config: ModelConfig,
    input_ids: Any,
    pixel_values: Any = None,
    attention_mask: Any = None,
    gate_position: Any = None,
    *,
    image_sizes: Any = None,
    batch_num_images: Any = None,
    pixel_values_videos: Any = None,
    image_grid_thw: Any = None,
    video_grid_thw: Any = None,
    pixel_attention_mask: Any = None,
    token_type_ids: Any = None,
    mm_token_type_ids: Any = None,
    num_crops: Any = None,
) -> tuple[Batch, list[list[VisualLayout]]]:
    """Checks raw arrays, and makes a Batch of them.

    Args:
        input_ids: int [B, T], with as many image tokens as the images of the row have.
        pixel_values: the images of all rows in order, as `pixel_arrays.to_tiles` takes them, or [patches, C frames h w] of
            native ones; None for text only. A model of square images also takes one for each row, whether it has image tokens
            or not.
        attention_mask: [B, T], true for tokens that take part; None for all.
        gate_position: int [B]; None for the last token of each row.
        image_sizes: int [images, 2], height and width of the original images in pixels; needed for LLaVA-NeXT and OneVision.
            None takes images for squares as large as the vision tower's. Without it, boxes of InternVL's tokens are NaN.
        batch_num_images: int [rows with images], the number of images of each; None takes each image for the only one of its
            row. It matters to OneVision alone (`lay_out`).
        pixel_values_videos: [videos, frames, C, H, W] in place of images, for a model that takes videos (OneVision).
        image_grid_thw: int [images, 3], frames (1), rows and columns of patches; needed for native images.
        pixel_attention_mask: [B, S, H, W], true for pixels that are no padding (SmolVLM); whole tiles only.
        token_type_ids, mm_token_type_ids, num_crops: what processors return besides; the image tokens say the same.

    Returns:
        The batch, and the layouts of each row's images.

    Raises:
        InputError: shapes do not fit, or the image tokens of a row are not those of its images.
    """
    batch = _text(config, input_ids, attention_mask, gate_position)
    if pixel_values_videos is not None or video_grid_thw is not None:
        return _with_videos(batch, pixel_values, pixel_values_videos, config)
    if num_crops is not None and np.any(num_crops):
        raise InputError("num_crops: crops of pan-and-scan are not supported; call the processor with do_pan_and_scan=False")
    is_image = is_visual(batch, config)
    if pixel_values is None:
        return _without_images(batch, is_image, config), [[] for _ in is_image]
    images = read_images(
        config,
        batch.input_ids,
        is_image,
        pixel_values,
        image_sizes=image_sizes,
        batch_num_images=batch_num_images,
        image_grid_thw=image_grid_thw,
        pixel_attention_mask=pixel_attention_mask,
    )
    return _with_images(batch, images, config, one_a_row=config.image.kind == "square")


def _text(config: ModelConfig, input_ids: Any, attention_mask: Any, gate_position: Any) -> Batch:
    """The fields of text, checked."""
    try:
        ids = np.asarray(input_ids, np.int32)
        found = str(list(ids.shape))
    except (TypeError, ValueError):  # texts, images, rows of several lengths
        ids, found = np.zeros(0, np.int32), type(input_ids).__name__
    if ids.ndim != 2 or ids.size == 0:
        where = "a Hugging Face processor returns them: processor(images=..., text=..., return_tensors='np')"
        raise InputError(f"input_ids must be token ids [B, T], not {found}; {where}; vlm.generate takes images and texts")
    mask = np.ones(ids.shape, bool) if attention_mask is None else np.asarray(attention_mask).astype(bool)
    if mask.shape != ids.shape:
        raise InputError(f"attention_mask is {list(mask.shape)}, input_ids are {list(ids.shape)}")
    if not mask.any(1).all():
        raise InputError(f"row {int(np.argmin(mask.any(1)))} is all padding")
    known = np.isin(ids, [config.image_token_id, config.video_token_id or 0]) | (ids < config.text.vocab_size)
    if outside := ids[(ids < 0) | ~known].tolist():
        raise InputError(f"token {outside[0]} is outside the vocabulary of {config.text.vocab_size}")
    position = last_token(mask) if gate_position is None else np.asarray(gate_position, np.int32)
    return Batch(input_ids=ids, attention_mask=mask, gate_position=np.broadcast_to(position, ids.shape[:1]))


def _without_images(batch: Batch, is_image: np.ndarray, config: ModelConfig) -> Batch:
    """The batch of text alone, with the positions that its model needs."""
    if is_image.any():
        row = int(np.argmax(is_image.any(1)))
        raise InputError(f"row {row} has {is_image[row].sum()} image tokens, but there is no image")
    placed = [place_text(valid, image, [], config) for valid, image in zip(batch.attention_mask, is_image, strict=True)]
    return batch.replace(**_stacked(placed))  # type: ignore[attr-defined]


def is_visual(batch: Batch, config: ModelConfig) -> np.ndarray:
    """bool [B, T], the positions of image and video tokens."""
    tokens = [config.image_token_id] if config.video_token_id is None else [config.image_token_id, config.video_token_id]
    return np.isin(batch.input_ids, tokens) & batch.attention_mask


def _with_videos(batch: Batch, images: Any, videos: Any, config: ModelConfig) -> tuple[Batch, list[list[VisualLayout]]]:
    """The rest of `make_batch` for videos."""
    if config.video_token_id is None or config.image.kind != "anyres" or videos is None:
        raise InputError(f"pixel_values_videos: a model of the family {config.family} takes no video")
    if images is not None:
        raise InputError("pixel_values beside pixel_values_videos: give images or videos, in calls of their own")
    frames = to_tiles(videos, config)
    layouts = [lay_out_video(frames.shape[1], config)] * len(frames)
    patches = to_patches(frames, config.vision.patch_size)
    return _with_images(batch, Images(list(patches), layouts), config, one_a_row=False)


def _with_images(
    batch: Batch, images: Images, config: ModelConfig, *, one_a_row: bool
) -> tuple[Batch, list[list[VisualLayout]]]:
    """The batch with its images, and the layouts of each row."""
    is_image = is_visual(batch, config)
    numbers = images_by_row(is_image, images.layouts, one_a_row=one_a_row)
    by_row = [list(row.values()) for row in numbers]
    tiles = tile_bucket(max(sum(layout.tiles for layout in layouts) for layouts in by_row))
    lengths = [arrange(layout.grid, config).length for layout in images.layouts if layout.grid]
    patches = patches_of(max(lengths, default=0), config)
    visual, placed = [], []
    for row, layouts in enumerate(by_row):
        shown = [images.patches[number] for number in numbers[row]]
        visual.append(visual_fields(shown, layouts, config, tiles=tiles, patches=patches))
        placed.append(place_images(batch.attention_mask[row], is_image[row], layouts, config, patches))
    return batch.replace(images=VisualInput(**_stacked(visual)), **_stacked(placed)), by_row  # type: ignore[attr-defined]


def _stacked(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def images_by_row(is_image: np.ndarray, layouts: Sequence[VisualLayout], *, one_a_row: bool) -> list[dict[int, VisualLayout]]:
    """The images of each row, in order: number of the image -> its layout.

    Args:
        is_image: bool [B, T], image tokens.
        layouts: of all images, which go to the rows in order.
        one_a_row: the images may also be one for each row, whether it has image tokens or not.

    Raises:
        InputError: the tokens of a row are not those of its next images, or an image is left over.
    """
    tokens = is_image.sum(1).tolist()
    fits = lambda: all(count in (0, len(layout)) for count, layout in zip(tokens, layouts, strict=True))
    if one_a_row and len(layouts) == len(tokens) and fits():
        return [{row: layouts[row]} if count else {} for row, count in enumerate(tokens)]
    rows: list[dict[int, VisualLayout]] = []
    at = 0
    for row, count in enumerate(tokens):
        images: dict[int, VisualLayout] = {}
        while count > 0 and at < len(layouts):
            count -= len(layouts[at])
            images[at] = layouts[at]
            at += 1
        if count:
            held = [len(layout) for layout in images.values()] or "none left"
            raise InputError(f"row {row} has {tokens[row]} image tokens, the tokens of its images are {held}")
        rows.append(images)
    if at < len(layouts):
        raise InputError(f"{len(layouts)} images, but the image tokens of all rows are those of {at}")
    return rows
