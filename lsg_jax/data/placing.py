"""Where the images of a row stand in its sequence: what is gathered for each position, and its rotary positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lsg_jax.config import ModelConfig
from lsg_jax.data.layout import VisualLayout
from lsg_jax.types import NO_SOURCE


def place_images(
    valid: NDArray[np.bool_], is_image: NDArray[np.bool_], layouts: Sequence[VisualLayout], config: ModelConfig, patches: int
) -> dict[str, NDArray[Any]]:
    """The fields of one row of a `Batch` with images: `source`, and where the model needs them `weight`, `positions`, `block`.

    Args:
        valid: bool [T], no padding.
        is_image: bool [T], the positions of the tokens of all images; as many as the layouts have.
        layouts: of the row's images, whose tiles follow each other.
        patches: P, the patches of a tile, or of a native image.
    """
    fields = place_sources(is_image, layouts, config, patches) | place_text(valid, is_image, layouts, config)
    if config.text.images_see_themselves:
        fields["block"] = image_numbers(is_image)
    return fields


def place_text(
    valid: NDArray[np.bool_], is_image: NDArray[np.bool_], layouts: Sequence[VisualLayout], config: ModelConfig
) -> dict[str, NDArray[Any]]:
    """`positions` of one row, with images or without; nothing for a model whose positions count tokens."""
    return {"positions": rope_positions(valid, is_image, layouts)} if config.text.rope.sections else {}


def place_sources(
    is_image: NDArray[np.bool_], layouts: Sequence[VisualLayout], config: ModelConfig, patches: int | None = None
) -> dict[str, NDArray[Any]]:
    """`source` and, for a model that shrinks, `weight` of one row of a `Batch`: the connector outputs behind each position.

    Args:
        is_image, layouts: as in `place_images`.
        patches: P of a native tower, filled up; None for tiles.

    Returns:
        source int32 [T, K], `NO_SOURCE` for text; weight float32 [T, K], 0 for text.
    """
    count = config.sources_per_token
    source = np.full((len(is_image), count), NO_SOURCE, np.int32)
    weight = np.zeros((len(is_image), count), np.float32)
    if layouts:
        outputs = config.tokens_per_tile
        if config.vision.native:
            assert patches is not None
            outputs = patches // config.merge**2
        starts = np.cumsum([0, *(layout.tiles for layout in layouts)]) * outputs
        shifted = [layout.source + start * (layout.source >= 0) for layout, start in zip(layouts, starts[:-1], strict=True)]
        source[is_image] = np.concatenate(shifted)
        weight[is_image] = np.concatenate([layout.weight for layout in layouts])
    return {"source": source} if count == 1 else {"source": source, "weight": weight}


def rope_positions(valid: NDArray[np.bool_], is_image: NDArray[np.bool_], layouts: Sequence[VisualLayout]) -> NDArray[np.int32]:
    """Frame, row and column int32 [T, 3] that the rotary embedding takes (M-RoPE, Qwen-VL); 0 on padding.

    Text counts in all three. The tokens of an image start at the next position, and add their place in it. What follows goes on
    behind the largest of these.
    """
    at = np.flatnonzero(valid)
    image = is_image[at]
    # how far each token takes the next one: text by 1, an image by its longer side, at its last token
    step = np.where(image, 0, 1)
    offset = np.zeros((len(at), 3), np.int64)
    if layouts:
        places = [layout.place for layout in layouts]
        assert all(place is not None for place in places)
        offset[image] = np.concatenate(places)  # type: ignore[arg-type]
        last = np.flatnonzero(image)[np.cumsum([len(layout) for layout in layouts]) - 1]
        step[last] = [int(place.max()) + 1 for place in places if place is not None]
    start = np.cumsum(step) - step
    positions = np.zeros((len(valid), 3), np.int32)
    positions[at] = start[:, None] + offset
    return positions


def image_numbers(is_image: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Number int32 [T] of the image of the row that each position shows, -1 for text (`Batch.block`).

    An image is a run of its tokens, as in Gemma 3 of transformers.
    """
    starts = is_image & ~np.pad(is_image, (1, 0))[:-1]
    return np.where(is_image, np.cumsum(starts) - 1, -1).astype(np.int32)
