"""Scene -> pixels, bit-identical on every machine.

NumPy renders shapes by their signed distances and letters from a bitmap font. It uses only operations that IEEE 754 rounds
exactly (+ - * / sqrt; no trigonometry, no matrix product of floats), so pixels do not depend on library versions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from random import Random

import numpy as np

from lsg_jax.data.shapes import COLOURS, CORNERS, Background, Item, Scene
from lsg_jax.errors import InputError

MIN_SIDE, MAX_SIDE = 56, 448

FONT = {
    "C": ".###. #...# #.... #.... #.... #...# .###.",
    "E": "##### #.... #.... ####. #.... #.... #####",
    "H": "#...# #...# #...# ##### #...# #...# #...#",
    "J": "..### ...#. ...#. ...#. ...#. #..#. .##..",
    "K": "#...# #..#. #.#.. ##... #.#.. #..#. #...#",
    "L": "#.... #.... #.... #.... #.... #.... #####",
    "M": "#...# ##.## #.#.# #.#.# #...# #...# #...#",
    "P": "####. #...# #...# ####. #.... #.... #....",
    "S": ".#### #.... #.... .###. ....# ....# ####.",
    "T": "##### ..#.. ..#.. ..#.. ..#.. ..#.. ..#..",
    "U": "#...# #...# #...# #...# #...# #...# .###.",
    "X": "#...# #...# .#.#. ..#.. .#.#. #...# #...#",
}
"""Bitmaps of 7 rows by 5 cells."""

CORNER_HEIGHT = 0.1
"""Height of a corner letter, in units of the side."""

Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 in units of the image's sides."""

_DARK, _LIGHT = (20, 20, 24), (250, 250, 250)

# height of the letter on a shape and its offset below the centre, in radii: the largest that fits
_LETTER_FIT = {
    "circle": (1.15, 0.0),
    "square": (1.15, 0.0),
    "triangle": (0.9, 0.05),
    "diamond": (1.05, 0.0),
    "cross": (1.05, 0.0),
    "star": (0.82, 0.03),
}

# contrast of the pattern in grey levels: darker on a bright tone, brighter on a dark one; low, so that items stay visible
_DEPTH = {"plain": 0, "stripes": 22, "dots": 26, "checks": 20, "noise": 48, "gradient": 80}


def draw(scene: Scene, side: int = 224) -> np.ndarray:
    """Renders a scene as RGB: uint8 [side, side, 3].

    Raises:
        InputError: the side is not within 56..448 pixels.
    """
    if not MIN_SIDE <= side <= MAX_SIDE:
        raise InputError(f"scenes are drawn with {MIN_SIDE} to {MAX_SIDE} pixels a side, not {side}")
    pixels_CHW = _draw_background(scene.background, side)
    for item in scene.items:
        _draw_item(pixels_CHW, item)
    ink = _ink(scene.background.tone)
    for corner, letter in scene.corners.items():
        _draw_letter(pixels_CHW, letter, *CORNERS[corner], CORNER_HEIGHT, ink)
    return np.stack(list(pixels_CHW), axis=-1)


def _ink(ground: tuple[int, int, int]) -> tuple[int, int, int]:
    """Dark on bright, bright on dark."""
    red, green, blue = ground
    return _DARK if 3 * red + 6 * green + blue > 1300 else _LIGHT


def _blend(pixels_CHW: np.ndarray, top: int, left: int, coverage_HW: np.ndarray, colour: tuple[int, int, int]) -> None:
    """Blends a colour into the region at (top, left), in place. `coverage`: float32 [H, W] in [0, 1]."""
    height, width = coverage_HW.shape
    region = pixels_CHW[:, top : top + height, left : left + width]
    paint = np.array(colour, np.float32)[:, None, None]
    region[...] = region + (paint - region) * coverage_HW + np.float32(0.5)


# ------------------------------------------------------------------------------------------------------------------- shapes


def _circle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.sqrt(u * u + v * v) - np.float32(1)


def _square(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(u, abs(v)) - np.float32(0.82)


def _diamond(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return (u + abs(v) - np.float32(1.15)) * np.float32(0.70710678)


def _triangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(v, np.float32(0.8660254) * u - np.float32(0.5) * v) - np.float32(0.575)


def _cross(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    v, arm, width = abs(v), np.float32(1.05), np.float32(0.4)
    return np.minimum(np.maximum(u - arm, v - width), np.maximum(u - width, v - arm))


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """A pentagram: points inside lie beyond at most one of its five lines, so the second largest distance decides.

    The fifth line (the upper one on the other side) is never among the two largest.
    """
    lower_near = np.float32(0.58778525) * u + np.float32(0.80901699) * v
    lower_far = np.float32(-0.58778525) * u + np.float32(0.80901699) * v
    upper, top = np.float32(0.95105652) * u - np.float32(0.30901699) * v, -v
    second = np.maximum(np.minimum(np.maximum(upper, top), lower_near), np.maximum(np.minimum(upper, top), lower_far))
    return second - np.float32(1.2 * 0.30901699)


_DISTANCES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "diamond": _diamond,
    "cross": _cross,
    "star": _star,
}
"""Signed distance to the outline, in radii, negative inside: (|x| [1, W], y [H, 1] from the centre) -> [H, W]."""

_EXTENT = {
    "circle": (1.0, 1.0, 1.0),
    "square": (0.82, 0.82, 0.82),
    "triangle": (0.9959, 1.15, 0.575),
    "diamond": (1.15, 1.15, 1.15),
    "cross": (1.05, 1.05, 1.05),
    "star": (1.1413, 1.2, 0.9708),
}
"""How far the outline reaches from the centre, in radii: to either side, up and down."""


def item_box(item: Item) -> Box:
    """The box around a shape."""
    beside, up, down = (reach * item.radius for reach in _EXTENT[item.shape])
    return item.x - beside, item.y - up, item.x + beside, item.y + down


def item_letter_box(item: Item) -> Box:
    """The box around the letter on a shape; the shape must have one."""
    height, drop = _LETTER_FIT[item.shape]
    return _letter_box(item.x, item.y + drop * item.radius, height * item.radius)


def corner_letter_box(corner: str) -> Box:
    """The box around a letter in a corner, such as `top left`."""
    return _letter_box(*CORNERS[corner], CORNER_HEIGHT)


def _letter_box(x: float, y: float, height: float) -> Box:
    beside = height * 5 / 14  # a bitmap has 7 rows and 5 columns
    return x - beside, y - height / 2, x + beside, y + height / 2


def _draw_item(pixels_CHW: np.ndarray, item: Item) -> None:
    side = pixels_CHW.shape[1]
    reach = 1.25 * item.radius * side
    top, bottom = max(0, int(item.y * side - reach)), min(side, int(item.y * side + reach) + 1)
    left, right = max(0, int(item.x * side - reach)), min(side, int(item.x * side + reach) + 1)
    scale = 1 / (item.radius * side)
    u = abs((np.arange(left, right) + 0.5 - item.x * side) * scale).astype(np.float32)[None, :]
    v = ((np.arange(top, bottom) + 0.5 - item.y * side) * scale).astype(np.float32)[:, None]
    distance = _DISTANCES[item.shape](u, v) * np.float32(item.radius * side)
    colour = COLOURS[item.colour]
    _blend(pixels_CHW, top, left, np.clip(np.float32(0.5) - distance, 0, 1), colour)
    if item.letter:
        height, drop = _LETTER_FIT[item.shape]
        _draw_letter(pixels_CHW, item.letter, item.x, item.y + drop * item.radius, height * item.radius, _ink(colour))


# ------------------------------------------------------------------------------------------------------------------ letters


@cache
def _bitmap(letter: str) -> np.ndarray:
    return np.array([[cell == "#" for cell in row] for row in FONT[letter].split()], np.int32)


def _draw_letter(pixels_CHW: np.ndarray, letter: str, x: float, y: float, height: float, ink: tuple[int, int, int]) -> None:
    """Draws a letter centred at (x, y); position and height in units of the side."""
    side = pixels_CHW.shape[1]
    cell = height * side / 7
    top, rows = _overlap(y * side - 3.5 * cell, cell, 7)
    left, columns = _overlap(x * side - 2.5 * cell, cell, 5)
    # integers, because libraries round a matrix product of floats differently
    covered = rows @ _bitmap(letter) @ columns.T
    _blend(pixels_CHW, top, left, covered.astype(np.float32) / np.float32(256 * 256), ink)


def _overlap(start: float, cell: float, count: int) -> tuple[int, np.ndarray]:
    """Overlap of pixels and cells along one axis: (first pixel, int32 [pixels, cells] in 1/256 of a pixel)."""
    first = int(start)
    pixels = np.arange(first, int(start + count * cell) + 1)[:, None]
    edges = start + cell * np.arange(count + 1)
    covered = np.minimum(pixels + 1, edges[1:]) - np.maximum(pixels, edges[:-1])
    return first, np.floor(np.clip(covered, 0, 1) * 256).astype(np.int32)


# -------------------------------------------------------------------------------------------------------------- backgrounds


def _draw_background(background: Background, side: int) -> np.ndarray:
    """Renders a background: uint8 [3, side, side]."""
    strength = _PATTERNS[background.pattern](background, side) * np.float32(_DEPTH[background.pattern])
    levels = (strength + np.float32(0.5)).astype(np.uint8)
    tone = np.array(background.tone, np.uint8)[:, None, None]
    plain = np.broadcast_to(tone, (3, side, side))
    return plain - levels if _ink(background.tone) == _DARK else plain + levels


def _line(side: int, direction: int) -> np.ndarray:
    """Coordinates of pixels along a direction, in units of the side: [side], or [2 side - 1] along a diagonal."""
    return (np.arange(side) + 0.5) / side if direction < 2 else (np.arange(2 * side - 1) + 1) * (0.70710678 / side)


def _spread(profile: np.ndarray, direction: int, side: int) -> np.ndarray:
    """Extends a profile along a direction to [side, side]."""
    if direction < 2:
        return np.broadcast_to(profile[None, :] if direction == 0 else profile[:, None], (side, side))
    window = np.lib.stride_tricks.sliding_window_view(profile, side)
    return window if direction == 2 else window[:, ::-1]


def _bands(place: np.ndarray, phase: float, period: float, side: int) -> np.ndarray:
    """0 in one half of each period, 1 in the other, with a ramp of one pixel between: float32, shaped like `place`."""
    part = place / period + phase
    part = part - np.floor(part)
    return np.clip(0.5 + (abs(part - 0.5) - 0.25) * (period * side), 0, 1).astype(np.float32)


def _plain(background: Background, side: int) -> np.ndarray:
    return np.zeros((1, 1), np.float32)


def _stripes(background: Background, side: int) -> np.ndarray:
    place = _line(side, background.direction)
    return _spread(_bands(place, background.phase[0], background.period, side), background.direction, side)


def _gradient(background: Background, side: int) -> np.ndarray:
    place = _line(side, background.direction)
    return _spread((place / place[-1]).astype(np.float32), background.direction, side)


def _checks(background: Background, side: int) -> np.ndarray:
    signs = [2 * _bands(_line(side, 0), phase, 1.4 * background.period, side) - 1 for phase in background.phase]
    return (signs[0][None, :] * signs[1][:, None] + 1) * np.float32(0.5)


def _dots(background: Background, side: int) -> np.ndarray:
    parts = [_line(side, 0) / background.period + phase for phase in background.phase]
    u, v = [((part - np.floor(part) - 0.5) * (background.period * side)).astype(np.float32) for part in parts]
    distance = np.sqrt((u * u)[None, :] + (v * v)[:, None])
    return np.clip(np.float32(0.5 + 0.3 * background.period * side) - distance, 0, 1)


def _noise(background: Background, side: int) -> np.ndarray:
    """Bilinear interpolation of random values on a lattice."""
    rng = Random(background.seed)
    place = _line(side, 0) / (0.6 * background.period)
    low = place.astype(np.int32)
    share = (place - low).astype(np.float32)
    count = int(low[-1]) + 2
    heights = np.array([rng.random() for _ in range(count * count)], np.float32).reshape(count, count)
    rows = heights[low] + (heights[low + 1] - heights[low]) * share[:, None]
    return rows[:, low] + (rows[:, low + 1] - rows[:, low]) * share[None, :]


_PATTERNS: dict[str, Callable[[Background, int], np.ndarray]] = {
    "plain": _plain,
    "stripes": _stripes,
    "dots": _dots,
    "checks": _checks,
    "noise": _noise,
    "gradient": _gradient,
}
"""Strength of a pattern at each pixel: float32 in [0, 1] that broadcasts to [side, side]."""
