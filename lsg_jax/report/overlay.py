"""Draws sinks and maps of attention onto the original image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

V_SINK = (230, 97, 0)  # orange and blue can be told apart with any of the common colour deficiencies
L_SINK = (26, 133, 255)

MAP_STRENGTH = 0.9
"""Share of the map's colour in the brightest place of a picture; the rest is the picture."""

MAP_DARK, MAP_GREY = 0.15, 0.65
"""The picture below a map: its grey times the second, plus the first. page.css has the same as a filter."""

Box = Sequence[float]
"""x0, y0, x1, y1 in units of the image's width and height."""


def draw_sinks(image: Image.Image, sinks: Mapping[str, Any], *, side: int = 672) -> Image.Image:
    """Draws V-sinks as orange frames, and patches that are L-sinks in some layer as smaller blue frames.

    Frames are clipped at the border of the image: a patch that lies in the padding is not drawn.

    Args:
        image: the original image, RGB.
        sinks: the entry of the image in sinks.json.
        side: longer side of the result in pixels.
    """
    scale = side / max(image.size)
    size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
    drawn = image.resize(size, Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(drawn)
    for patch in sinks["v_sinks"] or []:
        _frame(pen, drawn.size, sinks["boxes"][patch], V_SINK, inset=0.0)
    for patch in l_sinks(sinks):
        _frame(pen, drawn.size, sinks["boxes"][patch], L_SINK, inset=0.2)
    return drawn


def draw_map(picture: Image.Image, values: np.ndarray, *, peak: float | None = None) -> Image.Image:
    """Colours a picture by a map: grey and dark where there is little, from purple to yellow where there is much.

    Args:
        picture: the original image.
        values: float32 [height, width], not negative; the result has this size.
        peak: the value that is drawn brightest; None for the largest.
    """
    height, width = values.shape
    grey = np.asarray(picture.convert("L").resize((width, height), Image.Resampling.BICUBIC), np.float32) / 255
    top = float(values.max(initial=0.0)) if peak is None else peak
    share = np.clip(values / top, 0.0, 1.0) if top > 0 else np.zeros_like(values)
    colour, weight = map_colours(share)
    drawn = (1 - weight[..., None]) * (MAP_DARK + MAP_GREY * grey[..., None]) + weight[..., None] * colour
    return Image.fromarray((255 * drawn).round().astype(np.uint8))


def map_colours(share: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Colour [..., 3] and opacity [...], in [0, 1], of shares [...] of a map's peak."""
    import matplotlib

    # weak values, which most of a picture has, are seen too
    return matplotlib.colormaps["inferno"](0.15 + 0.85 * share)[..., :3], MAP_STRENGTH * share**0.7


def l_sinks(sinks: Mapping[str, Any]) -> list[int]:
    """Patches that are an L-sink in some layer, ascending."""
    return sorted({patch for layer in sinks["l_sinks"] or [] for patch in layer})


def in_padding(box: Box) -> bool:
    """Whether nothing of the image is in the box."""
    x0, y0, x1, y1 = box
    return min(x1, y1) <= 0 or max(x0, y0) >= 1


def _frame(pen: ImageDraw.ImageDraw, size: tuple[int, int], box: Box, colour: tuple[int, int, int], inset: float) -> None:
    """Args: inset: distance from the border of the box, as a share of its shorter side."""
    if in_padding(box):
        return
    x0, y0, x1, y1 = (min(max(edge * size[axis % 2], 0), size[axis % 2] - 1) for axis, edge in enumerate(box))
    cell = min(x1 - x0, y1 - y0)
    corners = (x0 + inset * cell, y0 + inset * cell, x1 - inset * cell, y1 - inset * cell)
    width, rim = (max(3, round(cell / 20)), 2) if cell >= 20 else (2, 1)  # pixels; small patches stay visible inside
    pen.rectangle(corners, outline=(0, 0, 0), width=width + rim)  # a dark rim shows on an image of the same colour
    pen.rectangle(corners, outline=colour, width=width)
