"""Values of visual tokens: what is left of them without sinks, and how they lie on a picture."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lsg_jax.data.grids import ImageSize

Floats = NDArray[np.float32]

MAP_TITLES = {"raw": "all attention", "no_sinks": "without sinks", "relative": "over a neutral prompt"}
"""What people read as the names of maps (`look.Look.maps`)."""


def without_sinks(raw: Floats, sinks: NDArray[np.bool_]) -> Floats:
    """The attention on visual tokens that are no sinks, as shares of its sum.

    Args:
        raw: float32 [A, L, ..., V].
        sinks: bool [L, V].

    Returns:
        As `raw`; sums to 1 over V, or to 0 where nothing is left.
    """
    by_layer = sinks.reshape(sinks.shape[0], *[1] * (raw.ndim - 3), sinks.shape[1])
    rest = np.where(by_layer, np.float32(0), raw)
    total = rest.sum(-1, keepdims=True)
    return np.divide(rest, total, out=np.zeros_like(rest), where=total > 0)


def spread(box: Floats, values: Floats, size: ImageSize) -> Floats:
    """Spreads each value evenly over its box; where boxes overlap they add up, and what lies outside the image is left out.

    Args:
        box: float32 [V, 4], in units of the image's sides.
        values: float32 [V].
        size: (width, height) of the result.

    Returns:
        float32 [height, width], value per area, in units of the whole image's.
    """
    across, down = size
    drawn = np.zeros((down, across), np.float64)
    for (x0, y0, x1, y1), value in zip(box.astype(float), values, strict=True):
        area = (x1 - x0) * (y1 - y0)
        if area > 0 and value:
            rows, columns = _cover(y0, y1, down), _cover(x0, x1, across)
            drawn[rows[0], columns[0]] += float(value) / area * np.outer(rows[1], columns[1])
    return drawn.astype(np.float32)


def _cover(start: float, stop: float, cells: int) -> tuple[slice, NDArray[np.float64]]:
    """The cells of [0, 1] that an interval touches, and how much of each it covers, from 0 to 1."""
    first, last = max(int(np.floor(start * cells)), 0), min(int(np.ceil(stop * cells)), cells)
    edges = np.arange(first, max(last, first) + 1)
    covered = np.minimum(edges[1:], stop * cells) - np.maximum(edges[:-1], start * cells)
    return slice(first, max(last, first)), np.clip(covered, 0, 1)
