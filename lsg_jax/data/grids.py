"""Grids of tiles: how many an image is cut into, what it is resized to, and where the tokens of each lie in it.

InternVL chooses the grid whose aspect is closest to the image's. SmolVLM resizes the longest edge to a length, then both sides
up to multiples of a tile. Both keep no aspect, so boxes are fractions of the grid. The whole image is the last tile.
"""

from __future__ import annotations

import functools
import math

import numpy as np
from numpy.typing import NDArray

from lsg_jax.config import ImageConfig, ModelConfig

ImageSize = tuple[int, int]
"""(width, height) in pixels, as PIL states it."""

LONGEST_EDGE = 4096
"""Pixels; SmolVLM resizes no image beyond it, whatever its settings say."""

_FAKE, _GLOBAL = "<fake_token_around_image>", "<global-img>"  # SmolVLM's separators


@functools.lru_cache(maxsize=16)
def _grids(fewest: int, most: int) -> tuple[tuple[int, int], ...]:
    """(columns, rows) of all grids of `fewest` to `most` tiles, in the order in which InternVL tries them."""
    sides = range(1, most + 1)
    grids = [(across, down) for across in sides for down in sides if fewest <= across * down <= most]
    return tuple(sorted(grids, key=lambda grid: grid[0] * grid[1]))


def best_grid(image_size: ImageSize, image: ImageConfig) -> tuple[int, int]:
    """(columns, rows) of the grid whose aspect is closest to the image's (InternVL).

    Of grids of one aspect, a larger one is taken if the image has more than half its pixels.
    """
    width, height = image_size
    if image.max_grid == 1:
        return 1, 1
    best, least = (1, 1), math.inf
    for across, down in _grids(image.min_grid, image.max_grid):
        differs = abs(width / height - across / down)
        enlarges = width * height > 0.5 * image.size * image.size * across * down
        if differs < least or (differs == least and enlarges):
            best, least = (across, down), differs
    return best


def split_sizes(image_size: ImageSize, image: ImageConfig) -> tuple[ImageSize, ImageSize]:
    """What SmolVLM resizes an image to, first and second: to its longest edge, then up to multiples of a tile."""
    width, height = image_size
    longest = image.longest_edge or image.size
    aspect = width / height
    if width >= height:
        width, height = longest, int(longest / aspect)
        height += height % 2
    else:
        height, width = longest, int(longest * aspect)
        width += width % 2
    width, height = max(width, 1), max(height, 1)
    aspect = width / height
    if width >= height and width > LONGEST_EDGE:
        width, height = LONGEST_EDGE, max(int(LONGEST_EDGE / aspect), 1)
    elif height > width and height > LONGEST_EDGE:
        height, width = LONGEST_EDGE, max(int(LONGEST_EDGE * aspect), 1)
    return (width, height), _to_tiles((width, height), image.size)


def _to_tiles(size: ImageSize, tile: int) -> ImageSize:
    """Both sides rounded up to multiples of a tile; the shorter one follows the aspect of the longer one, rounded."""
    width, height = size
    aspect = width / height
    up = lambda side: math.ceil(side / tile) * tile
    if width >= height:
        return up(width), up(int(up(width) / aspect))
    return up(int(up(height) * aspect)), up(height)


def split_grid(image_size: ImageSize, image: ImageConfig) -> tuple[int, int]:
    """(columns, rows) of the tiles that an image is split into (SmolVLM); (1, 1) for one that is not split."""
    _, (width, height) = split_sizes(image_size, image)
    return width // image.size, height // image.size


def grid_boxes(grid: tuple[int, int], whole: bool, config: ModelConfig) -> NDArray[np.float64]:
    """Boxes [n, 4] of the tokens of (columns, rows) tiles, tile by tile and row by row in a tile; then of the whole image."""
    across, down = grid
    boxes = [tile_boxes(column, row, across, down, config) for row in range(down) for column in range(across)]
    return np.concatenate([*boxes, tile_boxes(0, 0, 1, 1, config)] if whole else boxes)


def tile_boxes(column: int, row: int, across: int, down: int, config: ModelConfig) -> NDArray[np.float64]:
    """Boxes [tokens of a tile, 4] of one tile of a grid. The tower drops a remainder at the right and lower edge."""
    size, step = config.vision.image_size, config.vision.patch_size * config.merge
    lines = step * np.arange(size // step + 1) / size
    x, y = (column + lines) / across, (row + lines) / down
    boxes = np.broadcast_arrays(x[None, :-1], y[:-1, None], x[None, 1:], y[1:, None])
    return np.stack(boxes, -1).reshape(-1, 4)


def split_text(grid: tuple[int, int] | None, tokens: int) -> tuple[tuple[tuple[str, int], ...], str]:
    """What SmolVLM writes for an image of (columns, rows) tiles and the whole image: see `VisualLayout.text` and `tail`.

    Args:
        grid: None for an image that is not split.
        tokens: of one tile.
    """
    if grid is None:
        return ((_FAKE + _GLOBAL, tokens),), _FAKE
    across, down = grid
    ends = lambda row, column: "\n" if row and not column else ""  # of the row before
    tiles = [
        (f"{ends(row, column)}{_FAKE}<row_{row + 1}_col_{column + 1}>", tokens)
        for row in range(down)
        for column in range(across)
    ]
    return (*tiles, ("\n\n" + _FAKE + _GLOBAL, tokens)), _FAKE
