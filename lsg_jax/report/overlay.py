"""Sinks drawn onto the image that the model saw."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, ImageDraw

V_SINK = (230, 97, 0)  # orange and blue stay apart for colour-blind eyes
L_SINK = (26, 133, 255)


def draw_sinks(pixels: np.ndarray, sinks: dict[str, Any], *, side: int = 672) -> Image.Image:
    """V-sinks as full orange frames, patches that are L-sinks in some layer as inner blue frames.

    Args:
        pixels: uint8 [H, W, 3], the prepared image.
        sinks: one image's entry of analysis.sinks.find_sinks.

    Returns:
        RGB image of side x side pixels.
    """
    image = Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(image)
    cell = side / sinks["grid"]

    def frame(patch: int, colour: tuple[int, int, int], inset: float) -> None:
        row, column = divmod(patch, sinks["grid"])
        left, top = column * cell + inset, row * cell + inset
        box = (left, top, left + cell - 2 * inset, top + cell - 2 * inset)
        width = max(3, round(cell / 20))
        pen.rectangle(box, outline=(0, 0, 0), width=width + 2)  # a dark rim keeps the colour visible on its like
        pen.rectangle(box, outline=colour, width=width)

    for patch in sinks["v_sinks"] or []:
        frame(patch, V_SINK, 0.0)
    for patch in sorted({patch for layer in sinks["l_sinks"] or [] for patch in layer}):
        frame(patch, L_SINK, cell / 5)
    return image
