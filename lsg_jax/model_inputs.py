"""Raw arrays, as Hugging Face processors return them -> a `Batch`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lsg_jax.config import ModelConfig
from lsg_jax.data.images import to_patches
from lsg_jax.data.layout import ImageSize, VisualLayout, lay_out, lay_out_video, place_sources, tile_bucket
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
) -> tuple[Batch, list[list[VisualLayout]]]:
    """Checks raw arrays, and makes a Batch of them.

    Args:
        input_ids: int [B, T], with as many image tokens as the images of the row have.
        pixel_values: as `to_tiles` takes them, the images of all rows in order; None for text only. A model without tiles also
            takes one image for each row, whether it has image tokens or not.
        attention_mask: [B, T], true for tokens that take part; None for all.
        gate_position: int [B]; None for the last token of each row.
        image_sizes: int [images, 2], height and width of the original images in pixels; needed for a model with tiles. None
            takes images for squares as large as the vision tower's.
        batch_num_images: int [rows with images], the number of images of each; None takes each image for the only one of its
            row. It matters to OneVision alone (`lay_out`).
        pixel_values_videos: [videos, frames, C, H, W] in place of images, for a model that takes videos (OneVision).

    Returns:
        The batch, and the layouts of each row's images.

    Raises:
        InputError: shapes do not fit, or the image tokens of a row are not those of its images.
    """
    ids = np.asarray(input_ids, np.int32)
    if ids.ndim != 2 or ids.size == 0:
        raise InputError(f"input_ids must be [B, T] and not empty, got {list(ids.shape)}")
    mask = np.ones(ids.shape, bool) if attention_mask is None else np.asarray(attention_mask).astype(bool)
    if mask.shape != ids.shape:
        raise InputError(f"attention_mask is {list(mask.shape)}, input_ids are {list(ids.shape)}")
    if not mask.any(1).all():
        raise InputError(f"row {int(np.argmin(mask.any(1)))} is all padding")
    known = np.isin(ids, [config.image_token_id, config.video_token_id or 0]) | (ids < config.text.vocab_size)
    if outside := ids[(ids < 0) | ~known].tolist():
        raise InputError(f"token {outside[0]} is outside the vocabulary of {config.text.vocab_size}")
    position = last_token(mask) if gate_position is None else np.asarray(gate_position, np.int32)
    batch = Batch(input_ids=ids, attention_mask=mask, gate_position=np.broadcast_to(position, ids.shape[:1]))
    if pixel_values_videos is not None:
        return _with_videos(batch, pixel_values, pixel_values_videos, config)
    is_image = is_visual(batch, config)
    if pixel_values is None:
        if is_image.any():
            row = int(np.argmax(is_image.any(1)))
            raise InputError(f"row {row} has {is_image[row].sum()} image tokens, but there is no image")
        return batch, [[] for _ in ids]
    tiles = to_tiles(pixel_values, config)
    alone = _alone(len(tiles), batch_num_images)
    sizes = _image_sizes(len(tiles), image_sizes, config)
    layouts = [lay_out(size, config, alone=single) for size, single in zip(sizes, alone, strict=True)]
    if layouts and tiles.shape[1] < (most := max(layout.tiles for layout in layouts)):
        raise InputError(f"pixel_values have {tiles.shape[1]} tiles an image, images of these image_sizes have up to {most}")
    rows = images_by_row(is_image, layouts, one_a_row=not config.image.canvases)
    return batch.replace(**_images(tiles, rows, is_image, config)), [list(row.values()) for row in rows]  # type: ignore[attr-defined]


def is_visual(batch: Batch, config: ModelConfig) -> np.ndarray:
    """bool [B, T], the positions of image and video tokens."""
    tokens = [config.image_token_id] if config.video_token_id is None else [config.image_token_id, config.video_token_id]
    return np.isin(batch.input_ids, tokens) & batch.attention_mask


def _with_videos(batch: Batch, images: Any, videos: Any, config: ModelConfig) -> tuple[Batch, list[list[VisualLayout]]]:
    """The rest of `make_batch` for videos."""
    if config.video_token_id is None:
        raise InputError(f"pixel_values_videos: a model of the family {config.family} takes no video")
    if images is not None:
        raise InputError("pixel_values beside pixel_values_videos: give images or videos, in calls of their own")
    frames = to_tiles(videos, config)
    layouts = [lay_out_video(frames.shape[1], config)] * len(frames)
    rows = images_by_row(is_visual(batch, config), layouts, one_a_row=False)
    images = _images(frames, rows, is_visual(batch, config), config)
    return batch.replace(**images), [list(row.values()) for row in rows]  # type: ignore[attr-defined]


def _images(
    tiles: np.ndarray, rows: Sequence[dict[int, VisualLayout]], is_image: np.ndarray, config: ModelConfig
) -> dict[str, Any]:
    """`images`, `source` and `weight` of a batch."""
    patches = to_patches(tiles, config.vision.patch_size)
    room = tile_bucket(max(sum(layout.tiles for layout in row.values()) for row in rows))
    padded = np.zeros((len(rows), room, *patches.shape[2:]), patches.dtype)
    for row, images in enumerate(rows):
        if images:
            shown = np.concatenate([patches[image, : layout.tiles] for image, layout in images.items()])
            padded[row, : len(shown)] = shown
    placed = [place_sources(where, list(row.values()), config) for where, row in zip(is_image, rows, strict=True)]
    return {"images": VisualInput(padded), **{name: np.stack([row[name] for row in placed]) for name in placed[0]}}


def _alone(count: int, batch_num_images: Any) -> list[bool]:
    """Whether each image is the only one of its row."""
    if batch_num_images is None:
        return [True] * count
    numbers = [int(number) for number in np.asarray(batch_num_images).ravel()]
    if sum(numbers) != count:
        raise InputError(f"batch_num_images are {numbers}, {sum(numbers)} in all, but there are {count} images")
    return [number == 1 for number in numbers for _ in range(number)]


def _image_sizes(count: int, image_sizes: Any, config: ModelConfig) -> list[ImageSize]:
    """(width, height) of each image."""
    if image_sizes is None:
        if config.image.canvases:
            raise InputError("image_sizes are needed, as the processor returns them: an image's tokens depend on its size")
        return [(config.vision.image_size, config.vision.image_size)] * count
    sizes = np.asarray(image_sizes, int)
    if sizes.shape != (count, 2) or (sizes < 1).any():
        raise InputError(f"image_sizes must be [{count}, 2], height and width of each image")
    return [(width, height) for height, width in sizes.tolist()]


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


def to_tiles(pixel_values: Any, config: ModelConfig) -> np.ndarray:
    """Pixels as the family's HF image processor returns them -> float32 [images, S, H, W, C].

    Args:
        pixel_values: [images, C, H, W], or [images, S, C, H, W] for a model with tiles.
    """
    pixels = np.asarray(pixel_values, np.float32)
    side, channels, tiled = config.vision.image_size, config.vision.num_channels, bool(config.image.canvases)
    if pixels.ndim != 4 + tiled or pixels.shape[-3:] != (channels, side, side):
        wanted = f"[images, {'tiles, ' if tiled else ''}{channels}, {side}, {side}]"
        raise InputError(f"pixel_values must be {wanted}, got {list(pixels.shape)}")
    return np.moveaxis(pixels if tiled else pixels[:, None], 2, -1)
