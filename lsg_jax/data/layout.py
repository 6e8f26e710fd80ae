"""Image layout on the host: which tokens an image becomes, and where each of them lies in the image.

The layout depends only on the image's size and the model's configuration, so lengths are known before an image is decoded.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lsg_jax.config import Aspect, Canvas, ImageConfig, ModelConfig
from lsg_jax.data.grids import ImageSize as ImageSize
from lsg_jax.data.grids import best_grid, grid_boxes, split_grid, split_text
from lsg_jax.data.native import Grid, arrange, native_grid, patch_bucket
from lsg_jax.errors import InputError
from lsg_jax.types import NEWLINE, NO_SOURCE

TILE_BUCKETS = (1, 3, 5, 10, 13, 19, 37)
"""Numbers of tiles of a row that programs are compiled for; 13 fits 12 tiles and the whole image, the last 6 x 6 and it."""


@dataclass(frozen=True, eq=False)
class VisualLayout:
    """The tokens of one image, in the order of the sequence. All arrays are read-only.

    Only tokens that stand for the connector's outputs, or for newlines, are counted. Separators, such as `<img>`, are text.

    Attributes:
        token_ids: int32 [n], replaces `<image>` in the text.
        source: int32 [n, K], the connector outputs that each token combines, counted over the tiles; `NO_SOURCE` where there
            are fewer than K, `NEWLINE` for a token that is no patch.
        weight: float32 [n, K], their weights; 0 for `NO_SOURCE`.
        box: float32 [n, 4], x0, y0, x1, y1 of each token, in units of the original image's width and height; 0 for `NEWLINE`.
            Boxes are not clipped: patches in the padding of `pad` lie partly or wholly outside [0, 1].
        tiles: number of squares that the vision tower sees; 1 for a native image.
        text: pieces (text in front, number of tokens that follow it), which together have all tokens; and
        tail: text behind the last token.
        grid: rows and columns of patches of a native image; None for tiles.
        place: int32 [n, 3], frame, row and column of each token, for rotary positions; None for tiles.
    """

    token_ids: NDArray[np.int32]
    source: NDArray[np.int32]
    weight: NDArray[np.float32]
    box: NDArray[np.float32]
    tiles: int = 1
    text: tuple[tuple[str, int], ...] = ()
    tail: str = ""
    grid: Grid | None = None
    place: NDArray[np.int32] | None = None

    def __post_init__(self) -> None:
        for array in (self.token_ids, self.source, self.weight, self.box, self.place):
            if array is not None:
                array.setflags(write=False)

    def __len__(self) -> int:
        return len(self.token_ids)


@functools.lru_cache(maxsize=256)
def lay_out(image_size: ImageSize, config: ModelConfig, *, alone: bool = True) -> VisualLayout:
    """The layout of an image of (width, height) pixels.

    Args:
        alone: it is the only image of its prompt. OneVision makes each of several images one square (`image_of`).

    Raises:
        InputError: a side is below one pixel.
    """
    if min(image_size) < 1:
        raise InputError(f"an image of {image_size[0]} x {image_size[1]} pixels has no area")
    image = image_of(config.image, alone=alone)
    if image.kind == "native":
        return native_layout(native_grid(image_size, config), config)
    if image.kind == "tiles":
        return tiles_layout(best_grid(image_size, image), config)
    if image.kind == "split":
        return split_layout(split_grid(image_size, image), config)
    if image.canvases:
        return _anyres(image_size, config, image)
    source, box = _square(image_size, config, image.aspect)
    if config.image.canvases:  # tokens that go beside those of other images end with a newline, as theirs do
        source, box = np.append(source, NEWLINE), np.pad(box, ((0, 1), (0, 0)))
    return _layout(source[:, None], np.ones((len(source), 1)), box, config)


def native_layout(grid: Grid, config: ModelConfig) -> VisualLayout:
    """The layout of an image of rows and columns of patches: a token for each square of them, row by row (Qwen-VL)."""
    down, across = grid[0] // config.merge, grid[1] // config.merge
    row, column = (axis.ravel() for axis in np.meshgrid(np.arange(down), np.arange(across), indexing="ij"))
    box = np.stack([column / across, row / down, (column + 1) / across, (row + 1) / down], 1)
    source = arrange(grid, config).group[:, None]
    layout = _layout(source, np.ones(source.shape), box, config)
    place = np.stack([np.zeros_like(row), row, column], 1).astype(np.int32)
    return dataclasses.replace(layout, grid=grid, place=place)


def tiles_layout(grid: tuple[int, int], config: ModelConfig) -> VisualLayout:
    """The layout of a grid of (columns, rows) tiles, and the whole image if there is more than one (InternVL)."""
    whole = config.image.thumbnail and grid != (1, 1)
    return layout_of_tiles(grid_boxes(grid, whole, config), config)


def split_layout(grid: tuple[int, int], config: ModelConfig) -> VisualLayout:
    """The layout of a grid of (columns, rows) tiles and the whole image, or of an image that is not split (SmolVLM)."""
    split = grid != (1, 1)
    text, tail = split_text(grid if split else None, config.tokens_per_tile)
    return dataclasses.replace(layout_of_tiles(grid_boxes(grid, split, config), config), text=text, tail=tail)


def layout_of_tiles(box: NDArray[np.float64], config: ModelConfig) -> VisualLayout:
    """The layout of whole tiles after each other, with the boxes [n, 4] of all their tokens."""
    source = np.arange(len(box))[:, None]
    return _layout(source, np.ones(source.shape), box, config, tiles=len(box) // config.tokens_per_tile)


def image_of(image: ImageConfig, *, alone: bool) -> ImageConfig:
    """How an image is prepared that is the only one of its prompt, or one of several: these OneVision pads to a square each."""
    return image if alone or image.max_tiles is None else dataclasses.replace(image, aspect="pad", canvases=())


def depends_on_size(image: ImageConfig) -> bool:
    """Whether the tokens of an image depend on its size."""
    return image.kind != "square"


def longest_layout(config: ModelConfig, longest: int | None = None) -> VisualLayout:
    """The layout with the most tokens of the images that fill a canvas. With `max_tiles`, others are up to 21 % longer.

    Args:
        longest: tokens that an image has room for; None for any number.
    """
    return max(_largest_layouts(config, longest), key=len)


def most_tiles(config: ModelConfig, longest: int | None = None) -> int:
    """The largest number of tiles of an image of at most `longest` tokens."""
    return max(layout.tiles for layout in _largest_layouts(config, longest))


def most_patches(config: ModelConfig, longest: int | None = None) -> int:
    """Patches of one of the tiles, or of the largest native image of at most `longest` tokens, filled up as in a batch (P).

    Windows of images of which one side is more than four times the other may be filled up to more.
    """
    if not config.vision.native:
        return config.vision.num_patches
    grids = [layout.grid for layout in _largest_layouts(config, longest)]
    return max(patch_bucket(arrange(grid, config).length, config) for grid in grids if grid)


def _largest_layouts(config: ModelConfig, longest: int | None) -> list[VisualLayout]:
    """Layouts of at most `longest` tokens, the longest and those with most tiles among them; the shortest if none has room."""
    layouts = [lay_out(size, config) for size in _largest_images(config, longest)]
    fitting = [layout for layout in layouts if longest is None or len(layout) <= longest]
    return fitting or [min(layouts, key=len)]


def _largest_images(config: ModelConfig, longest: int | None) -> list[ImageSize]:
    """Sizes of images, the longest and those with most tiles among them; smaller ones too where they are to have room."""
    image, side = config.image, config.vision.image_size
    if image.kind == "native":
        return _largest_native_images(config, longest)
    if image.kind == "tiles":
        most = [image.max_grid] if longest is None else range(1, image.max_grid + 1)
        grids = [(across, tiles // across) for tiles in most for across in range(1, tiles + 1)]
        return [(across * side, down * side) for across, down in grids]
    if image.kind == "split":
        edge = image.longest_edge or side
        thinner = 1 if longest is None else max(1, edge // side)
        return [(edge, edge // part) for part in range(1, thinner + 1)]
    return [(canvas.width, canvas.height) for canvas in image.canvases] or [(side, side)]


def _largest_native_images(config: ModelConfig, longest: int | None) -> list[ImageSize]:
    """Sizes of images of aspects from 1 to 4, of as many squares of patches as `max_pixels` and `longest` allow."""
    image, unit = config.image, config.vision.patch_size * config.merge
    squares = max(1, image.max_pixels // unit**2)
    if longest is not None:
        squares = min(squares, max(longest, 1))
    shortest = max(1, math.isqrt(squares // 4))
    return [(squares // down * unit, down * unit) for down in range(shortest, math.isqrt(squares) + 1)]


def tile_bucket(tiles: int) -> int:
    """`tiles` rounded up, so that few numbers of tiles are compiled."""
    return next((size for size in TILE_BUCKETS if size >= tiles), -(-tiles // TILE_BUCKETS[-1]) * TILE_BUCKETS[-1])


def _square(image_size: ImageSize, config: ModelConfig, aspect: Aspect) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """(source [n], box [n, 4]) of one square image, one token a patch, or a square of `merge` of them, row by row.

    The tower drops a remainder at the right and lower edge. The box of a class token is the whole image. `feature_select =
    "default"` drops the first token, whatever it is.
    """
    size, patch = config.vision.image_size, config.vision.patch_size * config.merge
    x, y = _grid_lines(image_size, size, patch, aspect)
    lines = np.arange(len(x) - 1)
    row, column = (index.ravel() for index in np.meshgrid(lines, lines, indexing="ij"))
    box = np.stack([x[column], y[row], x[column + 1], y[row + 1]], axis=1)
    if config.vision.has_class_token:
        box = np.concatenate([[[0.0, 0.0, 1.0, 1.0]], box])
    if config.feature_select == "default":
        box = box[1:]
    return np.arange(len(box)), box


def _layout(source: NDArray[Any], weight: NDArray[Any], box: NDArray[Any], config: ModelConfig, tiles: int = 1) -> VisualLayout:
    """A layout of sources [n, k] and their weights, filled up to the K of the model, in one piece of text."""
    room = ((0, 0), (0, config.sources_per_token - source.shape[1]))
    return VisualLayout(
        token_ids=np.full(len(source), config.image_token_id, np.int32),
        source=np.pad(source, room, constant_values=NO_SOURCE).astype(np.int32),
        weight=np.pad(weight, room).astype(np.float32),
        box=box.astype(np.float32),
        tiles=tiles,
        text=((config.image.before, len(source)),),
        tail=config.image.after,
    )


def _anyres(image_size: ImageSize, config: ModelConfig, image: ImageConfig) -> VisualLayout:
    """The whole image as the first tile, then the tiles of a canvas without its padding, row by row (LLaVA-NeXT).

    The rows run over all tiles of the canvas, and a newline ends each of them. With `max_tiles` (OneVision) they are shrunk
    bilinearly if there are many of them.
    """
    whole, whole_box = _square(image_size, config, image.aspect)
    width, height = image_size
    side, patch = config.vision.image_size, config.vision.patch_size
    canvas = best_canvas(image_size, image.canvases)
    grid, across, down = side // patch, canvas[0] // side, canvas[1] // side
    rows, columns = down * grid, across * grid
    # the padding in patches, as LLaVA-NeXT takes it away: HF's unpad_image, with its rounding
    top = left = 0
    if width / height > columns / rows:
        top = (rows - int(round(height * (columns / width), 7))) // 2
    else:
        left = (columns - int(round(width * (rows / height), 7))) // 2
    unpadded = rows - 2 * top, columns - 2 * left
    row, column, weight, y, x = _resampled(unpadded, _shrunk(unpadded, grid, image.max_tiles))
    row, column = top + row, left + column
    source = (1 + row // grid * across + column // grid) * len(whole) + row % grid * grid + column % grid
    source = np.where(weight > 0, source, NO_SOURCE)[..., : config.sources_per_token]
    weight = weight[..., : config.sources_per_token]

    new_size = resized_to_fit(image_size, canvas)
    box = _boxes(
        (_pixels(left + x, side, patch) - (canvas[0] - new_size[0]) // 2) / new_size[0],
        (_pixels(top + y, side, patch) - (canvas[1] - new_size[1]) // 2) / new_size[1],
    )
    # a newline after each row
    end = ((0, 0), (0, 1), (0, 0))
    source = np.pad(source, end, constant_values=NO_SOURCE)
    source[:, -1, 0] = NEWLINE
    k = source.shape[-1]
    room = ((0, 0), (0, k - 1))
    return _layout(
        np.concatenate([np.pad(whole[:, None], room, constant_values=NO_SOURCE), source.reshape(-1, k)]),
        np.concatenate([np.pad(np.ones((len(whole), 1)), room), np.pad(weight, end).reshape(-1, k)]),
        np.concatenate([whole_box, np.pad(box, end).reshape(-1, 4)]),
        config,
        tiles=1 + across * down,
    )


def lay_out_video(frames: int, config: ModelConfig) -> VisualLayout:
    """The layout of a video: each frame is a square whose patches are pooled 2 x 2, and a newline ends the last (OneVision).

    Boxes are in units of the frame's sides.
    """
    assert config.video_token_id is not None
    side, patch = config.vision.image_size, config.vision.patch_size
    grid, pooled = side // patch, math.ceil(side // patch / 2)
    row, column, weight, y, x = _resampled((grid, grid), (pooled, pooled))
    of_frame = np.where(weight > 0, row * grid + column, NO_SOURCE).reshape(1, -1, 4)
    source = np.where(of_frame < 0, of_frame, of_frame + np.arange(frames)[:, None, None] * grid**2).reshape(-1, 4)
    box = _boxes(x * patch / side, y * patch / side).reshape(-1, 4)
    layout = _layout(
        np.concatenate([source, [[NEWLINE] + 3 * [NO_SOURCE]]]),
        np.concatenate([np.tile(weight.reshape(-1, 4), (frames, 1)), np.zeros((1, 4))]),
        np.concatenate([np.tile(box, (frames, 1)), np.zeros((1, 4))]),
        config,
        tiles=frames,
    )
    return dataclasses.replace(layout, token_ids=np.full(len(layout), config.video_token_id, np.int32))


def _shrunk(size: tuple[int, int], grid: int, max_tiles: int | None) -> tuple[int, int]:
    """What (rows, columns) of patches are shrunk to: to about the patches of `max_tiles` tiles (OneVision's anyres_max_N)."""
    if max_tiles is None:
        return size
    ratio = math.sqrt(size[0] * size[1] / (max_tiles * grid**2))
    return (int(size[0] // ratio), int(size[1] // ratio)) if ratio > 1.1 else size


def _resampled(size: tuple[int, int], new: tuple[int, int]) -> tuple[NDArray[Any], ...]:
    """PyTorch's `interpolate(mode="bilinear", align_corners=False)` of [rows, columns], as weights of what is combined.

    Returns:
        int [R, C, 4], the rows and the columns behind each new place; float32 [R, C, 4], their weights; float64 [2, R] and
        [2, C], where each new row and column starts and ends, in units of old ones.
    """
    (row, row_weight, y), (column, column_weight, x) = (_resampled_axis(*each) for each in zip(size, new, strict=True))
    rows, columns = np.broadcast_arrays(row[:, None, :, None], column[None, :, None, :])
    weight = row_weight[:, None, :, None] * column_weight[None, :, None, :]
    return rows.reshape(*new, 4), columns.reshape(*new, 4), weight.reshape(*new, 4), y, x


def _resampled_axis(length: int, new: int) -> tuple[NDArray[Any], ...]:
    """One axis of `_resampled`, in PyTorch's float32: places [new, 2], weights [new, 2], starts and ends [2, new].

    Nothing is left of an axis that is thinner than a patch: `new` is 0.
    """
    scale = length / max(new, 1)
    at = np.maximum((np.arange(new, dtype=np.float32) + np.float32(0.5)) * np.float32(scale) - np.float32(0.5), 0)
    low = at.astype(np.int64)
    share = at - low.astype(np.float32)
    lines = np.arange(new + 1) * scale
    places = np.stack([low, np.minimum(low + 1, length - 1)], axis=1)
    return places, np.stack([1 - share, share], axis=1), np.stack([lines[:-1], lines[1:]])


def _boxes(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Starts and ends of columns [2, C] and of rows [2, R] -> boxes [R, C, 4]."""
    return np.stack(np.broadcast_arrays(x[0][None], y[0][:, None], x[1][None], y[1][:, None]), axis=-1)


def _pixels(lines: NDArray[np.float64], side: int, patch: int) -> NDArray[np.float64]:
    """Starts and ends [2, n] of tokens in patches of a canvas -> in its pixels. The tower drops the remainder of each tile."""
    patches: NDArray[np.float64] = np.stack([np.floor(lines[0]), np.ceil(lines[1]) - 1])
    return patches // (side // patch) * side + patches % (side // patch) * patch + (lines - patches) * patch


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
