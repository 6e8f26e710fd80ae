"""Seeded scenes in the style of CLEVR: coloured shapes on a plain or patterned background, with small letters.

A scene is an exact description of an image, in units of the image's side; `drawing.draw` renders it at any size. Random
numbers come from Python's `random.Random`, so scenes are the same on every machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

COLOURS = {
    "red": (214, 39, 40),
    "orange": (250, 140, 30),
    "yellow": (245, 222, 50),
    "green": (40, 150, 60),
    "cyan": (60, 200, 215),
    "blue": (40, 80, 215),
    "purple": (135, 50, 170),
    "pink": (245, 130, 190),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "star")

SIZES = {"small": 0.06, "medium": 0.095, "large": 0.15}
"""Nominal radius of each size; items vary by 5 %. Any shape of one size has less area than any shape of the next."""

PATTERNS = ("plain", "stripes", "dots", "checks", "noise", "gradient")
TONES = ((232, 230, 224), (214, 222, 232), (222, 232, 216), (50, 52, 58), (62, 54, 56))

LETTERS = tuple("CEHJKLMPSTUX")
"""Letters that are distinct at low resolution; none is an English word."""

CORNERS = {
    "top left": (0.075, 0.085),
    "top right": (0.925, 0.085),
    "bottom left": (0.075, 0.915),
    "bottom right": (0.925, 0.915),
}
"""Centre (x, y) of each corner's letter."""

MAX_ITEMS = 10

ATTRIBUTES: dict[str, tuple[Any, ...]] = {
    "count": tuple(range(1, MAX_ITEMS + 1)),
    "largest": tuple(SIZES),
    "colours": tuple(COLOURS),
    "shapes": SHAPES,
}
"""Vocabulary of each attribute. `count` and `largest` have one label per scene, `colours` and `shapes` any number."""

_REACH = 1.2  # largest distance of a point of any shape from its centre, in radii
_GAP = 0.005
_CORNER_REACH = 0.065


@dataclass(frozen=True)
class Look:
    """Appearance of an item, without a position. `letter` is empty for none."""

    colour: str
    shape: str
    size: str
    letter: str = ""

    @property
    def name(self) -> str:
        """`red circle`."""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True, kw_only=True)
class Item(Look):
    """A placed shape. Centre (from the top left) and radius are in units of the image's side."""

    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Background:
    """Background of a scene.

    Attributes:
        pattern: one of PATTERNS.
        tone: base colour, RGB.
        direction: direction of stripes and gradients: 0 along x, 1 along y, 2 and 3 along the diagonals.
        period: period of the pattern, in units of the side.
        phase: (x, y) shift of the pattern, in periods.
        seed: seed of the noise.
    """

    pattern: str
    tone: tuple[int, int, int]
    direction: int
    period: float
    phase: tuple[float, float]
    seed: int


@dataclass(frozen=True)
class Scene:
    """Exact description of an image. `corners` maps some of CORNERS to letters."""

    items: tuple[Item, ...]
    background: Background
    corners: Mapping[str, str]


def attributes(scene: Scene) -> dict[str, Any]:
    """Exact labels for linear probes; see ATTRIBUTES.

    Returns:
        `count`: number of items. `largest`: size of the largest item. `colours`, `shapes`: those present, in vocabulary order.
    """
    return {
        "count": len(scene.items),
        "largest": max(scene.items, key=lambda item: item.radius).size,
        "colours": tuple(colour for colour in COLOURS if any(item.colour == colour for item in scene.items)),
        "shapes": tuple(shape for shape in SHAPES if any(item.shape == shape for item in scene.items)),
    }


def random_sizes(rng: Random, count: int) -> list[str]:
    """Sizes of `count` items in random order. The largest size is drawn first, so it does not depend on the count.

    At most two are large and four medium; otherwise ten would not fit.
    """
    names = list(SIZES)
    largest = rng.randrange(len(names))
    sizes = [names[largest]]
    while len(sizes) < count:
        size = rng.choice(names[: largest + 1])
        if sizes.count(size) < {"small": MAX_ITEMS, "medium": 4, "large": 2}[size]:
            sizes.append(size)
    rng.shuffle(sizes)
    return sizes


def random_looks(rng: Random, count: int) -> list[Look]:
    """Random colours, shapes and sizes of `count` items."""
    return [Look(rng.choice(list(COLOURS)), rng.choice(SHAPES), size) for size in random_sizes(rng, count)]


def compose(
    rng: Random, looks: Sequence[Look], *, corners: Mapping[str, str] | None = None, pattern: str | None = None
) -> Scene:
    """Places items at random without overlap; whatever is not given is random too.

    30 % of the items without a letter that have room for one get a letter, and half of the scenes get one in a corner. So
    letters carry no information about the question.
    """
    if corners is None:
        corners = {rng.choice(list(CORNERS)): rng.choice(LETTERS)} if rng.random() < 0.5 else {}
    radii = [round(SIZES[look.size] * rng.uniform(0.95, 1.05), 4) for look in looks]
    letters = [look.letter or (rng.choice(LETTERS) if has_room(look) and rng.random() < 0.3 else "") for look in looks]
    items = tuple(
        Item(look.colour, look.shape, look.size, letter, x=x, y=y, radius=radius)
        for look, letter, radius, (x, y) in zip(looks, letters, radii, _places(rng, radii, corners), strict=True)
    )
    background = Background(
        pattern=pattern or rng.choice(PATTERNS),
        tone=rng.choice(TONES),
        direction=rng.randrange(4),
        period=round(rng.uniform(0.09, 0.15), 4),
        phase=(round(rng.random(), 4), round(rng.random(), 4)),
        seed=rng.getrandbits(32),
    )
    return Scene(items, background, corners)


def has_room(look: Look) -> bool:
    """Whether a letter on this item is readable at 112 pixels a side."""
    return look.size == "large" or (look.size == "medium" and look.shape != "star")


def _places(rng: Random, radii: Sequence[float], corners: Mapping[str, str]) -> list[tuple[float, float]]:
    """Centres for items of these radii that overlap neither each other nor the corner letters."""
    taken = [(*CORNERS[corner], _CORNER_REACH) for corner in corners]
    order = sorted(range(len(radii)), key=lambda i: -radii[i])
    while True:
        discs = list(taken)
        for index in order:
            reach = _REACH * radii[index] + _GAP
            disc = _free_disc(rng, reach, discs)
            if disc is None:  # no room left: start over
                break
            discs.append(disc)
        else:
            places = dict(zip(order, discs[len(taken) :], strict=True))
            return [places[i][:2] for i in range(len(radii))]


def _free_disc(rng: Random, reach: float, discs: Sequence[tuple[float, float, float]]) -> tuple[float, float, float] | None:
    for _ in range(50):
        x, y = round(rng.uniform(reach, 1 - reach), 4), round(rng.uniform(reach, 1 - reach), 4)
        if all((x - a) ** 2 + (y - b) ** 2 >= (reach + other) ** 2 for a, b, other in discs):
            return x, y, reach
    return None
