"""Pixels as Hugging Face's image processors return them -> the images of a batch: their patches and their layouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lsg_jax.config import ModelConfig
from lsg_jax.data.images import to_patches
from lsg_jax.data.layout import ImageSize, VisualLayout, lay_out, layout_of_tiles, native_layout, split_layout
from lsg_jax.data.native import from_hf_patches
from lsg_jax.errors import InputError

Runs = list[list[tuple[int, int]]]
"""For each row, (start, stop) of its image tokens that follow each other."""


@dataclass(frozen=True)
class Images:
    """The images of all rows, in order.

    Attributes:
        patches: float32 [tiles, P, values] of each image; [patches, values] of a native one, in the order of `pixel_values`.
        layouts: of each.
    """

    patches: list[NDArray[np.float32]]
    layouts: list[VisualLayout]


def read_images(
    config: ModelConfig,
    ids: NDArray[np.int32],
    is_image: NDArray[np.bool_],
    pixel_values: Any,
    *,
    image_sizes: Any = None,
    batch_num_images: Any = None,
    image_grid_thw: Any = None,
    pixel_attention_mask: Any = None,
) -> Images:
    """Checks arrays of pixels, in any of the shapes of `model_inputs.make_batch`.

    Args:
        ids: int [B, T]. is_image: bool [B, T], the positions of image tokens.

    Raises:
        InputError: a shape does not fit the model, or the number of tiles does not fit the image tokens.
    """
    kind = config.image.kind
    if image_grid_thw is not None and kind != "native":
        raise InputError(f"image_grid_thw: a model of the family {config.family} takes images without it; leave it out")
    if pixel_attention_mask is not None and kind != "split":
        raise InputError(f"pixel_attention_mask: a model of the family {config.family} takes images without it; leave it out")
    if kind == "native":
        grids = native_grids(image_grid_thw, config)
        return Images(native_images(pixel_values, grids, config), [native_layout(grid, config) for grid in grids])
    if kind not in ("tiles", "split"):
        return _whole_images(config, pixel_values, image_sizes, batch_num_images)
    tiles = to_patches(tiles_of(pixel_values, config, pixel_attention_mask), config.vision.patch_size)
    if image_sizes is not None:
        layouts = [lay_out(size, config) for size in sizes_of(image_sizes, None)]
    else:
        layouts = _split_layouts(ids, is_image, config) if kind == "split" else _tiles_layouts(is_image, config)
    ends = np.cumsum([0, *(layout.tiles for layout in layouts)]).tolist()
    if ends[-1] != len(tiles):
        raise InputError(f"pixel_values have {len(tiles)} tiles, the images of all rows have {ends[-1]}")
    return Images([tiles[start:stop] for start, stop in pairwise(ends)], layouts)


def _whole_images(config: ModelConfig, pixel_values: Any, image_sizes: Any, batch_num_images: Any) -> Images:
    """Images of which each has an axis of its own: squares, and those of `anyres` with their tiles."""
    tiles = to_tiles(pixel_values, config)
    side = config.vision.image_size
    if image_sizes is not None:
        sizes = sizes_of(image_sizes, len(tiles))
    elif config.image.canvases:
        raise InputError("image_sizes are needed, as the processor returns them: an image's tokens depend on its size")
    else:
        sizes = [(side, side)] * len(tiles)
    alone = _alone(len(tiles), batch_num_images)
    layouts = [lay_out(size, config, alone=single) for size, single in zip(sizes, alone, strict=True)]
    if layouts and tiles.shape[1] < (most := max(layout.tiles for layout in layouts)):
        raise InputError(f"pixel_values have {tiles.shape[1]} tiles an image, images of these image_sizes have up to {most}")
    patches = to_patches(tiles, config.vision.patch_size)
    return Images([each[: layout.tiles] for each, layout in zip(patches, layouts, strict=True)], layouts)


def to_tiles(pixel_values: Any, config: ModelConfig) -> NDArray[np.float32]:
    """Pixels as the family's HF image processor returns them -> float32 [images, S, H, W, C].

    Args:
        pixel_values: [images, C, H, W]; [images, S, C, H, W] for a model with canvases, or one that splits images, where S may
            hold tiles of zeros that are none; and [tiles, C, H, W] for one with grids of tiles.
    """
    pixels = np.asarray(pixel_values, np.float32)
    tiled = config.image.kind in ("anyres", "split")
    side, channels = config.vision.image_size, config.vision.num_channels
    if pixels.ndim != 4 + tiled or pixels.shape[-3:] != (channels, side, side):
        first = "tiles" if config.image.kind == "tiles" else "images, tiles" if tiled else "images"
        raise InputError(f"pixel_values must be [{first}, {channels}, {side}, {side}], got {list(pixels.shape)}")
    return np.moveaxis(pixels if tiled else pixels[:, None], 2, -1)


def tiles_of(pixel_values: Any, config: ModelConfig, pixel_attention_mask: Any = None) -> NDArray[np.float32]:
    """float32 [tiles, H, W, C], the tiles of all images after each other, without the empty ones of SmolVLM's processor.

    Raises:
        InputError: a mask of another shape, or one that has padding within a tile.
    """
    tiles = to_tiles(pixel_values, config)
    shape = (*tiles.shape[:2], *tiles.shape[2:4])
    flat = tiles.reshape(-1, *tiles.shape[2:])
    if config.image.kind != "split" or not len(flat):
        return flat
    real = np.asarray(flat.any((1, 2, 3)))
    if not real.any():
        real[0] = True  # as transformers has it
    if pixel_attention_mask is not None:
        mask = np.asarray(pixel_attention_mask).astype(bool)
        if mask.shape != shape:
            raise InputError(f"pixel_attention_mask is {list(mask.shape)}, pixel_values need {list(shape)}")
        if not mask.reshape(-1, *shape[2:])[real].all():
            raise InputError("pixel_attention_mask: padding within a tile is not supported; let the processor split images")
    return flat[real]


def _alone(count: int, batch_num_images: Any) -> list[bool]:
    """Whether each image is the only one of its row."""
    if batch_num_images is None:
        return [True] * count
    numbers = [int(number) for number in np.asarray(batch_num_images).ravel()]
    if sum(numbers) != count:
        raise InputError(f"batch_num_images are {numbers}, {sum(numbers)} in all, but there are {count} images")
    return [number == 1 for number in numbers for _ in range(number)]


def sizes_of(image_sizes: Any, count: int | None) -> list[ImageSize]:
    """(width, height) of each image; `count` of them, None for any number."""
    sizes = np.asarray(image_sizes, int)
    count = len(sizes) if count is None and sizes.ndim else count
    if sizes.shape != (count, 2) or (sizes < 1).any():
        raise InputError(f"image_sizes must be [{count}, 2], height and width of each image")
    return [(width, height) for height, width in sizes.tolist()]


# ------------------------------------------------------------------------------------------------------------ images of one row


def _runs(is_image: NDArray[np.bool_]) -> Runs:
    edges = np.diff(np.pad(is_image.astype(np.int8), ((0, 0), (1, 1))))
    both = [(np.flatnonzero(row == 1).tolist(), np.flatnonzero(row == -1).tolist()) for row in edges]
    return [list(zip(starts, stops, strict=True)) for starts, stops in both]


def _tiles_layouts(is_image: NDArray[np.bool_], config: ModelConfig) -> list[VisualLayout]:
    """One image for each run of image tokens (InternVL). What grid its tiles are of is not known, so its boxes are NaN."""
    return [_unknown(_tiles_of_run(row, run, config), config) for row, runs in enumerate(_runs(is_image)) for run in runs]


def _tiles_of_run(row: int, run: tuple[int, int], config: ModelConfig) -> int:
    tiles, rest = divmod(run[1] - run[0], config.tokens_per_tile)
    if rest:
        raise InputError(
            f"row {row} has {run[1] - run[0]} image tokens in a row, no multiple of the {config.tokens_per_tile} of a tile"
        )
    return tiles


def _unknown(tiles: int, config: ModelConfig) -> VisualLayout:
    return layout_of_tiles(np.full((tiles * config.tokens_per_tile, 4), np.nan), config)


def _split_layouts(ids: NDArray[np.int32], is_image: NDArray[np.bool_], config: ModelConfig) -> list[VisualLayout]:
    """The images of all rows, from the separators between their tiles (SmolVLM).

    Each tile is a run of image tokens behind two separators, the first of which is always the same; a newline comes before
    these where a row of tiles begins. An image ends where the first separator follows, and not another tile of its row. Without
    such separators each run of tokens is taken for an image of an unknown grid.
    """
    layouts = []
    runs_of_rows = _runs(is_image)
    if any(_tiles_of_run(row, run, config) != 1 for row, runs in enumerate(runs_of_rows) for run in runs):
        return _tiles_layouts(is_image, config)
    for row, runs in enumerate(runs_of_rows):
        tiles_in_rows = [0]
        for number, (start, stop) in enumerate(runs):
            tiles_in_rows[-1] += 1
            following = ids[row, stop : runs[number + 1][0] if number + 1 < len(runs) else None]
            separator = ids[row, start - 2] if start >= 2 else -1
            if number + 1 == len(runs) or (following[0] == separator and len(following) > 2):
                layouts.append(_of_rows(tiles_in_rows, config))
                tiles_in_rows = [0]
            elif following[0] != separator:
                tiles_in_rows.append(0)
    return layouts


def _of_rows(tiles_in_rows: Sequence[int], config: ModelConfig) -> VisualLayout:
    """The layout of an image of these numbers of tiles in its rows, the last of which is the whole image."""
    *rows, whole = tiles_in_rows
    if whole == 1 and not rows:
        return split_layout((1, 1), config)
    if whole == 1 and len(set(rows)) == 1:
        return split_layout((rows[0], len(rows)), config)
    return _unknown(sum(tiles_in_rows), config)


# ---------------------------------------------------------------------------------------------------------------- native images


def native_images(pixel_values: Any, grids: Sequence[tuple[int, int]], config: ModelConfig) -> list[NDArray[np.float32]]:
    """The patches [n, values] of each image, from [patches, channel frame row column] of all."""
    pixels = np.asarray(pixel_values, np.float32)
    values = config.vision.patch_values
    if pixels.ndim != 2 or pixels.shape[1] != values:
        raise InputError(f"pixel_values must be [patches, {values}], got {list(pixels.shape)}")
    ends = np.cumsum([0, *(rows * columns for rows, columns in grids)]).tolist()
    if ends[-1] != len(pixels):
        raise InputError(f"pixel_values have {len(pixels)} patches, image_grid_thw {ends[-1]}")
    patches = from_hf_patches(pixels, config)
    return [patches[start:stop] for start, stop in pairwise(ends)]


def native_grids(image_grid_thw: Any, config: ModelConfig) -> list[tuple[int, int]]:
    """Rows and columns of patches of each image.

    Raises:
        InputError: it is missing, of another shape, or of videos.
    """
    if image_grid_thw is None:
        raise InputError("image_grid_thw is needed, as the processor returns it: an image's tokens depend on its size")
    grids = np.asarray(image_grid_thw, int)
    if grids.ndim != 2 or grids.shape[1] != 3 or (grids < 1).any() or (grids[:, 1:] % config.merge).any():
        raise InputError(f"image_grid_thw must be [images, 3], frames, and rows and columns in multiples of {config.merge}")
    if (grids[:, 0] != 1).any():
        raise InputError("image_grid_thw: an image has 1 frame; videos are not supported for this family")
    return [(rows, columns) for _, rows, columns in grids.tolist()]
