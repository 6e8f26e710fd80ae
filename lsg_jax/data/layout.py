"""Image layout on the host: which tokens an image becomes, and where each of them lies in the image.

The layout depends only on the image's size and the model's configuration, so lengths are known before an image is decoded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lsg_jax.config import ModelConfig
from lsg_jax.errors import InputError

NO_SOURCE = -1
"""In `VisualLayout.source`: no connector output (padding along K)."""

ImageSize = tuple[int, int]
"""(width, height) in pixels, as PIL states it."""

Kind = Literal["square"]


@dataclass(frozen=True, eq=False)
class VisualLayout:
    """The tokens of one image, in the order of the sequence. All arrays are read-only.

    Attributes:
        token_ids: int32 [n], replaces `<image>` in the text.
        source: int32 [n, K], the connector outputs that each token combines; `NO_SOURCE` where there are fewer than K.
        weight: float32 [n, K], their weights; 0 for `NO_SOURCE`.
        box: float32 [n, 4], x0, y0, x1, y1 of each token, in units of the original image's width and height. Boxes are not
            clipped: patches in the padding of `pad` lie partly or wholly outside [0, 1].
    """

    token_ids: NDArray[np.int32]
    source: NDArray[np.int32]
    weight: NDArray[np.float32]
    box: NDArray[np.float32]

    def __post_init__(self) -> None:
        for array in (self.token_ids, self.source, self.weight, self.box):
            array.setflags(write=False)

    def __len__(self) -> int:
        return len(self.token_ids)


@functools.lru_cache(maxsize=4096)
def lay_out(image_size: ImageSize, config: ModelConfig) -> VisualLayout:
    """The layout of an image of (width, height) pixels.

    Raises:
        InputError: a side is below one pixel.
    """
    if min(image_size) < 1:
        raise InputError(f"an image of {image_size[0]} x {image_size[1]} pixels has no area")
    return _LAYOUTS[_kind(config)](image_size, config)


def num_tokens(image_size: ImageSize, config: ModelConfig) -> int:
    """Number of tokens of an image of (width, height) pixels; errors as `lay_out`."""
    return len(lay_out(image_size, config))


def place_sources(is_image: NDArray[np.bool_], layout: VisualLayout) -> NDArray[np.int32]:
    """`Batch.source` of one row of a layout with weights of 1: the connector outputs behind each position of its sequence.

    Args:
        is_image: bool [T], the positions of the image's visual tokens; none, or as many as the layout has.

    Returns:
        int32 [T, K], `NO_SOURCE` for text.
    """
    source = np.full((len(is_image), layout.source.shape[1]), NO_SOURCE, np.int32)
    if is_image.any():
        source[is_image] = layout.source
    return source


def _kind(config: ModelConfig) -> Kind:
    return "square"


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
    count = len(box)
    return VisualLayout(
        token_ids=np.full(count, config.image_token_id, np.int32),
        source=np.arange(count, dtype=np.int32)[:, None],
        weight=np.ones((count, 1), np.float32),
        box=box.astype(np.float32),
    )


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


_LAYOUTS: dict[Kind, Callable[[ImageSize, ModelConfig], VisualLayout]] = {"square": _square}
