"""Images of their native size (Qwen-VL): what they are resized to, and how their patches are arranged for the vision tower.

The connector makes one token of each square of `merge` x `merge` patches. So the tower takes patches square by square, row by
row in a square. With windows, the squares come window by window, and each window is filled up to its full size. Merging and
attention within windows are then a reshape.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lsg_jax.config import ModelConfig
from lsg_jax.errors import InputError

Grid = tuple[int, int]
"""Rows and columns of patches of an image."""

MAX_ASPECT = 200
"""Largest ratio of an image's sides (Qwen-VL)."""

SMALLEST_BUCKET = 64
"""Fewest patches that an image is filled up to, at least; see `patch_bucket`."""


def native_size(image_size: tuple[int, int], config: ModelConfig) -> tuple[int, int]:
    """(width, height) that an image is resized to: multiples of a square of patches, about as many pixels as allowed.

    Raises:
        InputError: one side is more than 200 times the other.
    """
    width, height = image_size
    if max(image_size) > MAX_ASPECT * min(image_size):
        raise InputError(
            f"an image of {width} x {height} pixels is too thin: this model takes aspects of up to {MAX_ASPECT}:1; crop it"
        )
    unit, image = config.vision.patch_size * config.merge, config.image
    new_width, new_height = round(width / unit) * unit, round(height / unit) * unit
    if new_width * new_height > image.max_pixels:
        shrink = math.sqrt(height * width / image.max_pixels)
        new_width, new_height = (max(unit, math.floor(side / shrink / unit) * unit) for side in image_size)
    elif new_width * new_height < image.min_pixels:
        grow = math.sqrt(image.min_pixels / (height * width))
        new_width, new_height = (math.ceil(side * grow / unit) * unit for side in image_size)
    return new_width, new_height


def native_grid(image_size: tuple[int, int], config: ModelConfig) -> Grid:
    """Rows and columns of patches of an image of (width, height) pixels. Errors as of `native_size`."""
    width, height = native_size(image_size, config)
    return height // config.vision.patch_size, width // config.vision.patch_size


@dataclass(frozen=True, eq=False)
class Arrangement:
    """Where the patches of a grid stand in the input of the tower, in the order of Hugging Face's `pixel_values`.

    That order is square by square, without windows.

    Attributes:
        index: int32 [n], the position of each patch.
        group: int32 [n / merge^2], the position of each square, in units of squares; squares are numbered row by row.
        place: int32 [n, 2], row and column of each patch.
        length: number of positions, those that fill up windows included.
    """

    index: NDArray[np.int32]
    group: NDArray[np.int32]
    place: NDArray[np.int32]
    length: int


@functools.lru_cache(maxsize=64)
def _arranged(grid: Grid, merge: int, window: int) -> Arrangement:
    """`window` is the side of a window in squares; 0 for none."""
    down, across = grid[0] // merge, grid[1] // merge
    row, column = (axis.ravel() for axis in np.meshgrid(np.arange(down), np.arange(across), indexing="ij"))
    group, squares = row * across + column, down * across
    if window:
        windows = -(-across // window)
        group = (row // window * windows + column // window) * window**2 + row % window * window + column % window
        squares = -(-down // window) * windows * window**2
    inner = np.arange(merge**2)
    index = group[:, None] * merge**2 + inner
    place = np.stack([row[:, None] * merge + inner // merge, column[:, None] * merge + inner % merge], -1)
    arrays = [each.astype(np.int32) for each in (index.ravel(), group, place.reshape(-1, 2))]
    for array in arrays:
        array.setflags(write=False)
    return Arrangement(arrays[0], arrays[1], arrays[2], squares * merge**2)


def arrange(grid: Grid, config: ModelConfig) -> Arrangement:
    """Where the patches of a grid stand in the input of the tower."""
    return _arranged(grid, config.merge, _window(config))


def _window(config: ModelConfig) -> int:
    """Side of a window in squares of patches, rounded down; 0 without windows."""
    size = config.vision.window_size
    return 0 if size is None else size // config.merge // config.vision.patch_size


def patch_bucket(patches: int, config: ModelConfig) -> int:
    """`patches` rounded up to one of few sizes, so that few shapes compile: powers of two, and one and a half times them.

    Each is a multiple of a window, or of a square of patches.
    """
    unit = (max(1, _window(config)) * config.merge) ** 2
    smallest = -(-SMALLEST_BUCKET // unit) * unit
    power = smallest
    while power < patches:
        if patches <= power * 3 // 2 and power > smallest:
            return power * 3 // 2
        power *= 2
    return power


def native_fields(grids: list[Grid], images: int, patches: int, config: ModelConfig) -> dict[str, NDArray]:
    """The fields of `VisualInput` of one row, beside its patches: `used`, `place`, and `table` and `table_weight` of a tower
    with a table of positions.

    Args:
        grids: of the row's images; at most `images`, which is S.
        patches: P, what each image is filled up to.
    """
    used = np.zeros((images, patches), bool)
    place = np.zeros((images, patches, 2), np.int32)
    for number, grid in enumerate(grids):
        arranged = arrange(grid, config)
        used[number, arranged.index] = True
        place[number, arranged.index] = arranged.place
    if config.vision.table_side is None:
        return {"used": used, "place": place}
    table = np.zeros((images, patches, 4), np.int32)
    weight = np.zeros((images, patches, 4), np.float32)
    for number, grid in enumerate(grids):
        index = arrange(grid, config).index
        table[number, index], weight[number, index] = _interpolated(place[number, index], grid, config.vision.table_side)
    return {"used": used, "place": place, "table": table, "table_weight": weight}


def _interpolated(place: NDArray[np.int32], grid: Grid, side: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Entries [n, 4] of a table of `side` x `side` that patches interpolate bilinearly, and their weights (Qwen3-VL).

    The corners of the grid are those of the table.
    """
    taps, shares = [], []
    for axis in (0, 1):
        at = place[:, axis].astype(np.float32) * np.float32(side - 1) / np.float32(max(grid[axis] - 1, 1))
        low = np.floor(at)
        share = at - low
        taps.append(np.minimum(low.astype(np.int64)[:, None] + np.arange(2), side - 1))
        shares.append(np.stack([1 - share, 1 - np.abs(share - 1)], -1))
    table = taps[0][:, :, None] * side + taps[1][:, None, :]
    weight = shares[0][:, :, None] * shares[1][:, None, :]
    return table.reshape(-1, 4), weight.reshape(-1, 4)


def native_patches(pixels: NDArray[np.uint8], config: ModelConfig) -> NDArray[np.uint8]:
    """A resized image uint8 [height, width, C] -> [n, values], in the order of Hugging Face's `pixel_values`.

    The values of a patch are in the order frame, row, column, channel; its frames are equal.
    """
    size, merge = config.vision.patch_size, config.merge
    height, width, channels = pixels.shape
    down, across = height // (size * merge), width // (size * merge)
    squares = pixels.reshape(down, merge, size, across, merge, size, channels).transpose(0, 3, 1, 4, 2, 5, 6)
    return np.tile(squares.reshape(down * across * merge**2, -1), (1, config.vision.frames))


def from_hf_patches(pixel_values: NDArray[np.float32], config: ModelConfig) -> NDArray[np.float32]:
    """Hugging Face's patches [n, channel frame row column] -> [n, frame row column channel]."""
    vision = config.vision
    shape = (len(pixel_values), vision.num_channels, vision.frames, vision.patch_size, vision.patch_size)
    return np.moveaxis(pixel_values.reshape(shape), 1, -1).reshape(len(pixel_values), -1)


def place_patches(patches: list[NDArray], grids: list[Grid], images: int, length: int, config: ModelConfig) -> NDArray:
    """The patches [n, values] of each image of a row -> [S, P, values] in the order of the tower; zeros where unused."""
    dtype = patches[0].dtype if patches else np.uint8
    placed = np.zeros((images, length, config.vision.patch_values), dtype)
    for number, (values, grid) in enumerate(zip(patches, grids, strict=True)):
        placed[number, arrange(grid, config).index] = values
    return placed
