"""Heat maps over tasks (rows, grouped by benchmark) and layers (columns)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lsg_jax.report.drawing import FAINT, PAPER, RIM, STROKE

LINE_HEIGHT = 0.185  # inches of a line of the map
BAR_WIDTH = 0.11  # inches
MAX_COLUMN_LABELS = 17
MAX_LABEL = 56  # characters; longer ones would leave no room for the map


@dataclass(frozen=True)
class Lines:
    """The lines of a map, from the top.

    Attributes:
        keys: (benchmark, task), or None for the heading of a benchmark.
        labels: text at the left of each line.
    """

    keys: tuple[tuple[str, str] | None, ...]
    labels: tuple[str, ...]

    @property
    def height(self) -> float:
        """Inches."""
        return LINE_HEIGHT * len(self.keys)

    def table(self, cells: Mapping[tuple[str, str, int], float | None], layers: Sequence[int]) -> np.ndarray:
        """float64 [lines, layers] of the values by (benchmark, task, layer); NaN if there is none."""
        table = np.full((len(self.keys), len(layers)), np.nan)
        for line, key in enumerate(self.keys):
            for column, layer in enumerate(layers):
                value = None if key is None else cells.get((*key, layer))
                if value is not None:
                    table[line, column] = value
        return table


def lines_of(tasks: Sequence[tuple[str, str]]) -> Lines:
    """Lines of (benchmark, task) pairs in order of appearance, with a heading for each benchmark."""
    benchmarks = list(dict.fromkeys(benchmark for benchmark, _ in tasks))
    keys: list[tuple[str, str] | None] = []
    labels = []
    for benchmark in benchmarks:
        own = [(name, task) for name, task in tasks if name == benchmark]
        keys += [None, *own]
        labels += [_shortened(label) for label in (benchmark, *(task for _, task in own))]
    return Lines(tuple(keys), tuple(labels))


def _shortened(label: str) -> str:
    """The start and the end of a label that is too long."""
    end = MAX_LABEL // 4
    return label if len(label) <= MAX_LABEL else f"{label[: MAX_LABEL - end - 1]}\N{HORIZONTAL ELLIPSIS}{label[-end:]}"


def draw_map(
    axes: Any,
    lines: Lines,
    layers: Sequence[int],
    table: np.ndarray,
    *,
    colours: str,
    limits: tuple[float, float],
    across: int,
    left_out: np.ndarray | None = None,
) -> Any:
    """Draws the table; a cell without a number has a small cross. Returns the mesh, for `draw_bar`.

    Args:
        table: float64 [lines, layers].
        limits: ends of the colour scale.
        across: number of maps side by side.
        left_out: bool [lines, layers], cells that stay empty.
    """
    mesh = axes.pcolormesh(
        np.arange(len(layers) + 1) - 0.5,
        np.arange(len(lines.keys) + 1) - 0.5,
        np.ma.masked_invalid(table if left_out is None else np.where(left_out, np.nan, table)),
        cmap=colours,
        vmin=limits[0],
        vmax=limits[1],
        edgecolors=PAPER,
        linewidth=0.4,
    )
    missing = [(line, column) for line, column in np.argwhere(np.isnan(table)) if lines.keys[line] is not None]
    axes.scatter([c for _, c in missing], [r for r, _ in missing], marker="x", s=8, linewidths=0.6, color=FAINT)
    label_lines(axes, lines)
    step = -(-len(layers) * across // MAX_COLUMN_LABELS)
    axes.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axes.set_xlabel("decoder layer")
    axes.tick_params(axis="x", length=0)
    axes.spines[:].set_visible(False)
    return mesh


def label_lines(axes: Any, lines: Lines) -> None:
    """Labels the y axis with the lines, from the top; headings are bold."""
    axes.set_ylim(len(lines.keys) - 0.5, -0.5)
    axes.set_yticks(range(len(lines.keys)), lines.labels)
    axes.tick_params(axis="y", length=0)
    for key, label in zip(lines.keys, axes.get_yticklabels(), strict=True):
        if key is None:
            label.set_fontweight("bold")


def mark_cells(axes: Any, marked: np.ndarray, *, filled: bool = False) -> None:
    """Draws a circle, or a dot that is visible on any colour, into the cells where bool [lines, layers] is true."""
    where, look = np.argwhere(marked), {"facecolors": RIM, "edgecolors": STROKE} if filled else {"facecolors": "none"}
    axes.scatter(where[:, 1], where[:, 0], s=8, linewidths=0.6, **({"edgecolors": FAINT} | look))


def hatch_cells(axes: Any, marked: np.ndarray) -> None:
    """Hatches the cells where bool [lines, layers] is true; the strokes are visible on dark and on pale cells."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    cells = [Rectangle((column - 0.5, line - 0.5), 1, 1) for line, column in np.argwhere(marked)]
    axes.add_collection(PatchCollection(cells, facecolor="none", edgecolor=STROKE, hatch="/////", linewidth=0))


def draw_bar(figure: Any, mesh: Any, panels: list[Any], lines: Lines, label: str) -> None:
    """The colour bar of maps side by side."""
    figure.colorbar(mesh, ax=panels, label=label, pad=0.01, aspect=lines.height / BAR_WIDTH)
