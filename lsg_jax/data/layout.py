"""Image layout on the host: which tokens an image becomes, and where each of them lies in the image.

The layout depends only on the image's size and the model's configuration, so lengths are known before an image is decoded.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lsg_jax.config import Canvas, ModelConfig
from lsg_jax.errors import InputError
from lsg_jax.types import NEWLINE, NO_SOURCE

TILE_BUCKETS = (1, 3, 5, 10, 19, 37)
"""Numbers of tiles of a row that programs are compiled for; the last fits 6 x 6 tiles and the whole image."""

ImageSize = tuple[int, int]
"""(width, height) in pixels, as PIL states it."""

Kind = Literal["square", "anyres"]


@dataclass(frozen=True, eq=False)
class VisualLayout:
    """The tokens of one image, in the order of the sequence. All arrays are read-only.

    Attributes:
        token_ids: int32 [n], replaces `<image>` in the text.
        source: int32 [n, K], the connector outputs that each token combines, counted over the tiles; `NO_SOURCE` where there
            are fewer than K, `NEWLINE` for a token that is no patch.
        weight: float32 [n, K], their weights; 0 for `NO_SOURCE`.
        box: float32 [n, 4], x0, y0, x1, y1 of each token, in units of the original image's width and height; 0 for `NEWLINE`.
            Boxes are not clipped: patches in the padding of `pad` lie partly or wholly outside [0, 1].
        tiles: number of squares that the vision tower sees.
    """

    token_ids: NDArray[np.int32]
    source: NDArray[np.int32]
    weight: NDArray[np.float32]
    box: NDArray[np.float32]
    tiles: int = 1

    def __post_init__(self) -> None:
        for array in (self.token_ids, self.source, self.weight, self.box):
            array.setflags(write=False)

    def __len__(self) -> int:
        return len(self.token_ids)


@functools.lru_cache(maxsize=512)
def lay_out(image_size: ImageSize, config: ModelConfig) -> VisualLayout:
    """The layout of an image of (width, height) pixels.

    Raises:
        InputError: a side is below one pixel.
    """
    if min(image_size) < 1:
        raise InputError(f"an image of {image_size[0]} x {image_size[1]} pixels has no area")
    return _LAYOUTS[_kind(config)](image_size, config)


def longest_layout(config: ModelConfig) -> VisualLayout:
    """The layout with the most tokens of all image sizes: without padding on the largest canvas."""
    side = config.vision.image_size
    canvases = config.image.canvases or (Canvas(side, side),)
    return max((lay_out((canvas.width, canvas.height), config) for canvas in canvases), key=len)


def tile_bucket(tiles: int) -> int:
    """`tiles` rounded up, so that few numbers of tiles are compiled."""
    return next((size for size in TILE_BUCKETS if size >= tiles), -(-tiles // TILE_BUCKETS[-1]) * TILE_BUCKETS[-1])


def place_sources(is_image: NDArray[np.bool_], layouts: Sequence[VisualLayout], config: ModelConfig) -> NDArray[np.int32]:
    """`Batch.source` of one row of layouts with weights of 1: the connector outputs behind each position of its sequence.

    Args:
        is_image: bool [T], the positions of the tokens of all images; as many as the layouts have.
        layouts: of the row's images, whose tiles follow each other.

    Returns:
        int32 [T, K], `NO_SOURCE` for text.
    """
    source = np.full((len(is_image), 1), NO_SOURCE, np.int32)
    if layouts:
        starts = np.cumsum([0, *(layout.tiles for layout in layouts)]) * config.num_image_tokens
        shifted = [layout.source + start * (layout.source >= 0) for layout, start in zip(layouts, starts[:-1], strict=True)]
        source[is_image] = np.concatenate(shifted)
    return source


def place_boxes(layouts: Sequence[VisualLayout], config: ModelConfig) -> NDArray[np.float32]:
    """float32 [N, 4], the box of each connector output of one row; 0 for outputs that no token shows."""
    each = config.num_image_tokens
    boxes = []
    for layout in layouts:
        box = np.zeros((layout.tiles * each, 4), np.float32)
        shown = layout.source[:, 0] >= 0
        box[layout.source[shown, 0]] = layout.box[shown]
        boxes.append(box)
    return np.concatenate(boxes) if boxes else np.zeros((0, 4), np.float32)


def _kind(config: ModelConfig) -> Kind:
    return "anyres" if config.image.canvases else "square"


def _square(image_size: ImageSize, config: ModelConfig) -> VisualLayout:
    """One square image, one token a patch, row by row (LLaVA-1.5).

    The tower drops a remainder at the right and lower edge. The box of a class token is the whole image. `feature_select =
    "default"` drops the first token, whatever it is.
    """
    size, patch = config.vision.image_size, config.vision.patch_size
    x, y = _grid_lines(image_size, size, patch, config.image.aspect)
    lines = np.arange(len(x) - 1)
    row, column = (index.ravel() for index in np.meshgrid(lines, lines, indexing="ij"))
    box = np.stack([x[column], y[row], x[column + 1], y[row + 1]], axis=1)
    if config.vision.has_class_token:
        box = np.concatenate([[[0.0, 0.0, 1.0, 1.0]], box])
    if config.feature_select == "default":
        box = box[1:]
    return _plain(np.arange(len(box)), box, config)


def _plain(source: NDArray[Any], box: NDArray[Any], config: ModelConfig, tiles: int = 1) -> VisualLayout:
    """A layout in which each token is one connector output, or a newline."""
    count = len(source)
    return VisualLayout(
        token_ids=np.full(count, config.image_token_id, np.int32),
        source=source.astype(np.int32)[:, None],
        weight=np.ones((count, 1), np.float32),
        box=box.astype(np.float32),
        tiles=tiles,
    )


def _anyres(image_size: ImageSize, config: ModelConfig) -> VisualLayout:
    """The whole image as the first tile, then the tiles of a canvas without its padding, row by row (LLaVA-NeXT).

    The rows run over all tiles of the canvas, and a newline ends each of them.
    """
    whole = _square(image_size, config)
    width, height = image_size
    side, patch = config.vision.image_size, config.vision.patch_size
    canvas_width, canvas_height = best_canvas(image_size, config.image.canvases)
    grid, across = side // patch, canvas_width // side
    rows, columns = canvas_height // side * grid, across * grid
    # the padding in patches, as LLaVA-NeXT takes it away: HF's unpad_image, with its rounding
    top = left = 0
    if width / height > columns / rows:
        top = (rows - int(round(height * (columns / width), 7))) // 2
    else:
        left = (columns - int(round(width * (rows / height), 7))) // 2
    row, column = np.meshgrid(np.arange(top, rows - top), np.arange(left, columns - left), indexing="ij")
    tile = 1 + row // grid * across + column // grid
    source = tile * len(whole) + row % grid * grid + column % grid

    new_width, new_height = resized_to_fit(image_size, (canvas_width, canvas_height))
    x = (column // grid * side + column % grid * patch - (canvas_width - new_width) // 2) / new_width
    y = (row // grid * side + row % grid * patch - (canvas_height - new_height) // 2) / new_height
    box = np.stack([x, y, x + patch / new_width, y + patch / new_height], axis=-1)
    ended = np.pad(source, ((0, 0), (0, 1)), constant_values=NEWLINE)
    boxes = np.pad(box, ((0, 0), (0, 1), (0, 0)))
    return _plain(
        np.concatenate([whole.source[:, 0], ended.ravel()]),
        np.concatenate([whole.box, boxes.reshape(-1, 4)]),
        config,
        tiles=1 + across * (canvas_height // side),
    )


def best_canvas(image_size: ImageSize, canvases: Sequence[Canvas]) -> ImageSize:
    """(width, height) of the canvas that keeps most of an image's pixels, and wastes least among those (LLaVA-NeXT).

    The first of equals is taken.
    """
    width, height = image_size

    def kept(canvas: Canvas) -> tuple[int, int]:
        scale = min(canvas.width / width, canvas.height / height)
        pixels = min(int(width * scale) * int(height * scale), width * height)
        return pixels, pixels - canvas.height * canvas.width

    best = max(canvases, key=kept)
    return best.width, best.height


def resized_to_fit(image_size: ImageSize, canvas: ImageSize) -> ImageSize:
    """Size of an image resized to touch a canvas from within; the other side is rounded up, as LLaVA-NeXT does."""
    (width, height), (across, down) = image_size, canvas
    if across / width < down / height:
        return across, min(math.ceil(height * (across / width)), down)
    return min(math.ceil(width * (down / height)), across), down


def _grid_lines(image_size: ImageSize, size: int, patch: int, aspect: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Vertical and horizontal borders of the patches in units of the image's sides; inverts `images.prepare_pixels`."""
    width, height = image_size
    lines = patch * np.arange(size // patch + 1, dtype=np.float64)
    if aspect == "squash":
        return lines / size, lines / size
    if aspect == "pad":
        side = max(image_size)
        lines = lines * side / size
        return (lines - (side - width) // 2) / width, (lines - (side - height) // 2) / height
    new_width, new_height = resized_to_cover(image_size, size)
    return (lines + (new_width - size) // 2) / new_width, (lines + (new_height - size) // 2) / new_height


def resized_to_cover(image_size: ImageSize, size: int) -> ImageSize:
    """Size of an image whose shortest edge is resized to `size`, rounded as CLIP's processor does.

    The order is size * long / short, truncated: scaling by a rounded factor would differ by a pixel at times.
    """
    width, height = image_size
    return size if width <= height else int(size * width / height), size if height <= width else int(size * height / width)


_LAYOUTS: dict[Kind, Callable[[ImageSize, ModelConfig], VisualLayout]] = {"square": _square, "anyres": _anyres}
