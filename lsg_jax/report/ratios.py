"""Gate ratios by task: the ratio of each token group at each gated layer, as a figure and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lsg_jax.report.drawing import (
    GRID,
    PAGE_WIDTH,
    Kept,
    Row,
    check_rows,
    distinct,
    key_line,
    legend_above,
    look_of,
    numbers,
    plain,
    render,
)
from lsg_jax.report.heat_map import Lines, draw_bar, draw_map, label_lines, lines_of

COLUMNS = ("benchmark", "task", "layer", "group", "mean", "std", "questions")
POINT_LAYERS = 6
"""Up to so many gated layers, ratios are points with standard deviations, a panel for each layer; above, a heat map."""

COLOURS = "cividis"


def drawn_groups(rows: Sequence[Row]) -> list[str]:
    """The token groups to draw: of two only the first, since the ratios of a gate have a fixed sum."""
    groups = distinct(rows, "group")
    return groups[:1] if len(groups) == 2 else groups


def greatest_ratio(rows: Sequence[Row]) -> float:
    """What no ratio can exceed: the sum over the groups, which is the same for all questions (`gate.key_scale`)."""
    sums: dict[tuple[str, str, int], float] = {}
    for row in rows:
        place = (row["benchmark"], row["task"], row["layer"])
        sums[place] = sums.get(place, 0.0) + (row["mean"] or 0.0)
    return round(max(sums.values()), 2) or 1.0


def draw_gate_ratios(rows: Sequence[Row], stem: Path | Kept) -> list[Path]:
    """Mean ratio over the questions of each task, as points with standard deviations, or with many layers as a heat map.

    Deviations end at 0 and at what no ratio can exceed.

    Args:
        rows: `ratios` of an evaluation.
        stem: path of the three files without suffix; the CSV holds all groups.

    Raises:
        InputError: there are no rows.
    """
    check_rows(rows, COLUMNS, study="lsg eval with gates", stem=stem)
    lines = lines_of(distinct(rows, "benchmark", "task"))
    layers = sorted(distinct(rows, "layer"))
    shown = drawn_groups(rows)
    top = greatest_ratio(rows)
    if len(layers) <= POINT_LAYERS:
        size = (min(PAGE_WIDTH, 2.0 + 1.6 * len(layers)), lines.height + 1.0)
        return render(stem, rows, COLUMNS, size, lambda figure: _draw_points(figure, rows, lines, layers, shown, top))
    size = (PAGE_WIDTH, -(-len(shown) // 2) * (lines.height + 0.7))
    return render(stem, rows, COLUMNS, size, lambda figure: _draw_maps(figure, rows, lines, layers, shown, top))


def table_of_ratios(rows: Sequence[Row], group: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table of one group's ratios, mean ± standard deviation over the questions of each task.

    Rows are tasks and columns layers, or the other way round if there are more layers than tasks.
    """
    tasks = distinct(rows, "benchmark", "task")
    layers = sorted(distinct(rows, "layer"))
    found = {(row["benchmark"], row["task"], row["layer"]): row for row in rows if row["group"] == group}
    across = [f"layer {layer}" for layer in layers]
    down = [task if benchmark == task else f"{benchmark}, {task}" for benchmark, task in tasks]
    cells = [[_text(found.get((*task, layer))) for layer in layers] for task in tasks]
    if len(layers) > len(tasks):
        return ["layer", *down], [[name, *column] for name, column in zip(across, zip(*cells, strict=True), strict=True)]
    counts = [str(max(row["questions"] for row in rows if (row["benchmark"], row["task"]) == task)) for task in tasks]
    lines = [[name, count, *line] for name, count, line in zip(down, counts, cells, strict=True)]
    return ["benchmark, task", "questions", *across], lines


def _text(row: Row | None) -> str:
    if row is None or row["mean"] is None:
        return "-"
    return plain(row["mean"]) + ("" if row["std"] is None else f" ± {plain(row['std'])}")


def _draw_points(
    figure: Any, rows: Sequence[Row], lines: Lines, layers: Sequence[int], groups: Sequence[str], top: float
) -> None:
    panels = figure.subplots(1, len(layers), sharey=True, squeeze=False)[0]
    offsets = np.linspace(-0.22, 0.22, len(groups)) if len(groups) > 1 else [0.0]
    place = {key: index for index, key in enumerate(lines.keys) if key is not None}
    for axes, layer in zip(panels, layers, strict=True):
        for group, offset in zip(groups, offsets, strict=True):
            look = look_of(group)
            own = [row for row in rows if (row["layer"], row["group"]) == (layer, group)]
            y = [place[row["benchmark"], row["task"]] + offset for row in own]
            mean, std = numbers(row["mean"] for row in own), numbers(row["std"] for row in own)
            axes.hlines(y, np.maximum(mean - std, 0.0), np.minimum(mean + std, top), color=look.colour, linewidth=1)
            axes.plot(mean, y, color=look.colour, linestyle="", marker=look.marker, markersize=4, clip_on=False)
        axes.set_title(f"layer {layer}")
        axes.set_xlim(0, top)
        axes.set_xlabel("gate ratio")
        axes.grid(axis="x")
        axes.hlines(list(place.values()), 0, top, color=GRID, linewidth=0.5, zorder=0)
    label_lines(panels[0], lines)
    for axes in panels[1:]:
        axes.tick_params(axis="y", length=0)
    legend_above(figure, [key_line(look_of(group), line="") for group in groups])


def _draw_maps(
    figure: Any, rows: Sequence[Row], lines: Lines, layers: Sequence[int], groups: Sequence[str], top: float
) -> None:
    across = min(2, len(groups))
    panels = figure.subplots(-(-len(groups) // across), across, squeeze=False)
    for axes, group in zip(panels.ravel(), groups, strict=False):
        cells = {(row["benchmark"], row["task"], row["layer"]): row["mean"] for row in rows if row["group"] == group}
        table = lines.table(cells, layers)
        mesh = draw_map(axes, lines, layers, table, colours=COLOURS, limits=(0.0, top), across=across)
        axes.set_title(f"Gate ratio of {look_of(group).label}")
    for axes in panels[:, 1:].ravel():
        axes.tick_params(labelleft=False)
    for axes in panels.ravel()[len(groups) :]:
        axes.remove()
    draw_bar(figure, mesh, panels[0].tolist(), lines, "mean over questions")
