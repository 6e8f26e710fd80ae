"""Figures of the pointing game: hit rates by layer, and example pictures with their maps."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lsg_jax.files import write_atomic
from lsg_jax.report.drawing import (
    INK,
    PAGE_WIDTH,
    Kept,
    Look,
    check_rows,
    distinct,
    key_line,
    layer_axis,
    legend_above,
    look_of,
    numbers,
    painted,
    render,
)
from lsg_jax.report.map_values import MAP_TITLES
from lsg_jax.report.overlay import draw_map

HITS = ("kind", "map", "layer", "hit", "low", "high", "share", "share_low", "share_high")
MAP_LOOKS = {
    "raw": Look(MAP_TITLES["raw"], "#D55E00", "-", "o", ""),
    "no_sinks": Look(MAP_TITLES["no_sinks"], "#0072B2", "--", "s", ""),
    "relative": Look(MAP_TITLES["relative"], "#009E73", "-.", "^", ""),
}
CHANCE = Look("chance", INK, ":", "", "")
SHADE = "#E4E4E4"
TARGET, PEAK = "#00E5FF", "#FFFFFF"
MARGIN = 0.012
"""Of a frame around its box, in units of the picture's sides: small letters stay visible."""

Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 in units of the picture's sides."""


@dataclass(frozen=True, eq=False)
class Example:
    """One question with its maps.

    Attributes:
        answer: of the model, and whether it is right.
        layer: whose maps are shown.
        target: what the question asks about.
        maps: name -> float [h, w], one map on the picture.
        peaks: name -> box of the token with the largest value.
        hits: name -> whether that lies on the target.
    """

    kind: str
    picture: Image.Image
    question: str
    answer: str
    layer: int
    target: Box
    maps: Mapping[str, NDArray[np.floating]]
    peaks: Mapping[str, Box]
    hits: Mapping[str, bool]


def draw_pointing(result: Mapping[str, Any], stem: Path | Kept) -> list[Path]:
    """Hit rate of each map by layer, with 95 % intervals, chance, and what sinks draw; a panel for each kind of question.

    Args:
        result: the content of pointing.json.

    Returns:
        The paths of `stem.csv`, `stem.svg` and `stem.png`.
    """
    rows = result["rows"]
    check_rows(rows, HITS, study="lsg pointing", stem=stem)
    kinds, maps = distinct(rows, "kind"), distinct(rows, "map")
    across = min(len(kinds), 3)
    down = math.ceil(len(kinds) / across)

    def paint(figure: Any) -> None:
        grid = figure.subplots(down, across, sharey=True, squeeze=False)
        for axes, kind in zip(grid.ravel(), kinds, strict=False):
            _draw_kind(axes, kind, result)
            axes.label_outer(remove_inner_ticks=False)
            axes.tick_params(labelbottom=True)
            axes.set_xlabel("decoder layer")
        for axes in grid.ravel()[len(kinds) :]:
            axes.remove()
        for axes in grid[:, 0]:
            axes.set_ylabel("hit rate (%)")
        shade = _patch(facecolor=SHADE, label="share that sinks draw (%)")
        legend_above(figure, [*(key_line(look) for look in (*map(_look_of_map, maps), CHANCE)), shade])

    return render(stem, rows, HITS, (PAGE_WIDTH, 2.0 * down + 0.4), paint)


def _look_of_map(name: str) -> Look:
    return MAP_LOOKS.get(name, look_of(name))


def _patch(**settings: Any) -> Any:
    from matplotlib.patches import Patch

    return Patch(**settings)


def _draw_kind(axes: Any, kind: str, result: Mapping[str, Any]) -> None:
    own = [row for row in result["rows"] if row["kind"] == kind]
    drawn = [row for row in result["attention"] if row["kind"] == kind]
    edges = np.arange(len(drawn) + 1) - 0.5
    axes.stairs([100 * row["share"] for row in drawn], edges, fill=True, color=SHADE, zorder=0)
    for name in distinct(own, "map"):
        some, look = [row for row in own if row["map"] == name], _look_of_map(name)
        layers = [row["layer"] for row in some]
        hit, low, high = (100 * numbers(row[column] for row in some) for column in ("hit", "low", "high"))
        axes.fill_between(layers, low, high, color=look.colour, alpha=0.18, linewidth=0)
        axes.plot(layers, hit, color=look.colour, linestyle=look.line, marker=look.marker)
    axes.axhline(100 * result["kinds"][kind]["chance"], color=INK, linestyle=":", linewidth=0.9)
    axes.set_title(f"{kind.replace('_', ' ')} ({result['kinds'][kind]['questions']} questions)")
    axes.set_ylim(0, 100)
    layer_axis(axes, distinct(own, "layer"))


def draw_examples(examples: Sequence[Example], path: Path) -> Path:
    """Each example as a column: the picture with its target, then each map on it, as a PNG file."""
    maps = list(examples[0].maps)

    def paint(figure: Any) -> None:
        grid = figure.subplots(len(maps) + 1, len(examples), squeeze=False)
        for column, example in zip(grid.T, examples, strict=True):
            _draw_picture(column[0], example)
            for axes, name in zip(column[1:], maps, strict=True):
                _draw_map(axes, example, name)
        for axes, name in zip(grid[:, 0], ["picture", *(_look_of_map(name).label for name in maps)], strict=True):
            axes.set_ylabel(name)
        frames = {"what the question asks about": (TARGET, "-"), "most attended token": (PEAK, "--")}
        legend_above(figure, [_key_frame(text, *look) for text, look in frames.items()])

    width = PAGE_WIDTH / max(len(examples), 3)
    png = painted((width * len(examples) + 0.2, width * (len(maps) + 1) + 1.15), paint)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, png)
    return path


def _key_frame(label: str, colour: str, line: Any) -> Any:
    from matplotlib.lines import Line2D

    return _outlined(Line2D([], [], color=colour, linestyle=line, linewidth=1.2, label=label))


def _draw_picture(axes: Any, example: Example) -> None:
    axes.imshow(example.picture, extent=(0, 1, 1, 0))
    _frame(axes, example.target, TARGET)
    axes.set_title(f"{_in_lines(example.question, 27)}\nlayer {example.layer}; {example.answer}", fontsize=6.5)
    _bare(axes)


def _draw_map(axes: Any, example: Example, name: str) -> None:
    axes.imshow(draw_map(example.picture, example.maps[name]), extent=(0, 1, 1, 0))
    _frame(axes, example.target, TARGET)
    _frame(axes, example.peaks[name], PEAK, line="--")
    axes.set_title("hit" if example.hits[name] else "miss", fontsize=6.5)
    _bare(axes)


def _frame(axes: Any, box: Box, colour: str, line: Any = "-") -> None:
    from matplotlib.patches import Rectangle

    x0, y0, x1, y1 = box[0] - MARGIN, box[1] - MARGIN, box[2] + MARGIN, box[3] + MARGIN
    frame = Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=1.2, linestyle=line, clip_on=False)
    axes.add_patch(_outlined(frame))


def _outlined(drawn: Any) -> Any:
    """The same with a dark rim, which shows on any ground."""
    from matplotlib.patheffects import Normal, withStroke

    drawn.set_path_effects([withStroke(linewidth=2.2, foreground="black"), Normal()])
    return drawn


def _bare(axes: Any) -> None:
    axes.set_xlim(0, 1)
    axes.set_ylim(1, 0)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def _in_lines(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, width))
