"""Labels for the vision tower: what lies in each patch, and attributes of the whole scene."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from lsg_jax.data.shapes import COLOURS, CORNERS, LETTERS, MAX_ITEMS, PATTERNS, SHAPES, SIZES, Scene

MOST = 4
"""Counts of shapes of one colour or kind are clipped here."""

PATCH = {"shape": len(SHAPES), "colour": len(COLOURS), "size": len(SIZES), "letter": len(LETTERS) + 1}
"""Number of classes of each attribute of a shape whose centre lies in a patch; letter 0 is none."""

SCENE = {
    "count": (1, MAX_ITEMS),
    "largest": (1, len(SIZES)),
    "pattern": (1, len(PATTERNS)),
    "colours": (len(COLOURS), MOST + 1),
    "shapes": (len(SHAPES), MOST + 1),
}
"""Attributes of the whole scene: (number of labels, classes of each)."""

_REACH = {"circle": 1.0, "square": 1.16, "triangle": 1.15, "diamond": 1.15, "cross": 1.05, "star": 1.2}
_CORNER_REACH, _BLUR = 0.065, 0.006


def labels(scenes: Sequence[Scene], grid: int) -> dict[str, np.ndarray]:
    """Labels of B scenes on `grid` x `grid` = P patches, in row-major order.

    Returns:
        `shape`, `colour`, `size`, `letter`: int8 [B, P], of the shape whose centre lies in the patch; -1 for none.
        `place`: float32 [B, P, 2], that centre (x, y) within its patch, 0 to 1.
        `corner`: int8 [B, 4], the letter in each of CORNERS; 0 for none.
        `room`: float32 [B, P], distance from the patch to the nearest shape or letter, in units of the image's side; 0 if one
        touches the patch.
        Each of SCENE: int8 [B, number of labels].
    """
    made = [_labels(scene, grid) for scene in scenes]
    return {name: np.stack([one[name] for one in made]) for name in made[0]}


def _labels(scene: Scene, grid: int) -> dict[str, np.ndarray]:
    found = {name: np.full(grid * grid, -1, np.int8) for name in PATCH}
    place = np.zeros((grid * grid, 2), np.float32)
    edges = np.arange(grid) / grid
    room = np.full((grid, grid), 2.0)

    def limit_room(x: float, y: float, reach: float) -> None:
        across, down = (np.maximum(np.maximum(edges - at, at - edges - 1 / grid), 0) for at in (x, y))
        distance = np.sqrt(across[None, :] ** 2 + down[:, None] ** 2) - reach
        room[...] = np.minimum(room, np.maximum(distance, 0))

    for item in scene.items:
        column, row = int(item.x * grid), int(item.y * grid)
        patch = row * grid + column
        found["shape"][patch] = SHAPES.index(item.shape)
        found["colour"][patch] = list(COLOURS).index(item.colour)
        found["size"][patch] = list(SIZES).index(item.size)
        found["letter"][patch] = _letter(item.letter)
        place[patch] = item.x * grid - column, item.y * grid - row
        limit_room(item.x, item.y, _REACH[item.shape] * item.radius + _BLUR)
    for corner in scene.corners:
        limit_room(*CORNERS[corner], _CORNER_REACH)
    return {
        **found,
        "place": place,
        "corner": np.array([_letter(scene.corners.get(corner, "")) for corner in CORNERS], np.int8),
        "room": room.reshape(-1).astype(np.float32),
        **_whole(scene),
    }


def _letter(letter: str) -> int:
    return LETTERS.index(letter) + 1 if letter else 0


def _whole(scene: Scene) -> dict[str, np.ndarray]:
    def counts(of: Sequence[str], what: str) -> list[int]:
        number: Counter[str] = Counter(getattr(item, what) for item in scene.items)
        return [min(number[name], MOST) for name in of]

    largest = max(scene.items, key=lambda item: item.radius).size
    values = {
        "count": [len(scene.items) - 1],
        "largest": [list(SIZES).index(largest)],
        "pattern": [PATTERNS.index(scene.background.pattern)],
        "colours": counts(list(COLOURS), "colour"),
        "shapes": counts(SHAPES, "shape"),
    }
    return {name: np.array(value, np.int8) for name, value in values.items()}
