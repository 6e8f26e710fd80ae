"""Draws the oracle map: the effect of fixed coefficients on each task, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lsg_jax.errors import InputError
from lsg_jax.eval.best_cells import best_cells
from lsg_jax.gating.keys import GROUPS
from lsg_jax.report.drawing import PAGE_WIDTH, PERCENTAGE_POINTS, Kept, Row, check_rows, distinct, look_of, render, unit_of
from lsg_jax.report.heat_map import Lines, dot_cells, draw_bar, draw_map, lines_of

COLUMNS = ("benchmark", "task", "layer", "coefficients", "value", "change", "low", "high", "questions")

CHANGES = "RdBu"  # diverging, white at no change; red and blue stay apart for colour-blind eyes
COEFFICIENTS = "cividis"


def draw_oracle_map(rows: Sequence[Row], stem: Path | Kept, *, groups: Sequence[str] = ()) -> list[Path]:
    """Heat maps over tasks and layers: above the best change over the coefficients, below the coefficients that gave it.

    A dot marks a best change whose interval excludes 0, a cross a cell without a value. The best of many settings, chosen on
    the same questions, is an upper bound and no estimate of what a gate would reach. Benchmarks scored in points (MME) are
    drawn only if all are: beside percentages their changes would take up the whole colour scale.

    Args:
        rows: of sweep.json, two or three coefficients each.
        stem: path of the three files without suffix; the CSV holds the best row of each cell.
        groups: the token group of each coefficient; by default V-sinks and the rest, or V-sinks, L-sinks and ordinary.

    Raises:
        InputError: there are no rows, or none with coefficients other than 1 has a change.
    """
    check_rows(rows, COLUMNS, study="lsg sweep", stem=stem)
    in_points = [b for b in distinct(rows, "benchmark") if unit_of(r for r in rows if r["benchmark"] == b) != PERCENTAGE_POINTS]
    alone = len(in_points) == len(distinct(rows, "benchmark"))
    shown = [row for row in rows if alone or row["benchmark"] not in in_points]
    found = best_cells(shown)
    if not found:
        raise InputError(f"{stem}: no row of lsg sweep has a change under coefficients other than 1; nothing to draw")
    cells = _all_cells(shown, found)
    lines = lines_of(distinct(cells, "benchmark", "task"))
    layers = sorted(distinct(cells, "layer"))
    free = _free_groups([cell["coefficients"] for cell in found], groups)

    def paint(figure: Any) -> None:
        grid = figure.add_gridspec(2, len(free))
        _draw_changes(figure.add_subplot(grid[0, :]), cells, lines, layers, "points" if alone else PERCENTAGE_POINTS)
        panels = [figure.add_subplot(grid[1, column]) for column in range(len(free))]
        _draw_coefficients(panels, found, lines, layers, free)
        if in_points and not alone:
            figure.supxlabel(f"left out, since they count points: {', '.join(in_points)}", fontsize=7)

    return render(stem, cells, COLUMNS, (PAGE_WIDTH, 2 * lines.height + 1.5), paint)


def _all_cells(rows: Sequence[Row], found: Sequence[Row]) -> list[dict[str, Any]]:
    """The best cells with COLUMNS only, and cells without a value, whose numbers are None; in order of appearance."""
    best = {(cell["benchmark"], cell["task"], cell["layer"]): cell for cell in found}
    cells = {}
    for row in rows:
        place = (row["benchmark"], row["task"], row["layer"])
        empty = dict.fromkeys(COLUMNS) | dict(zip(COLUMNS, place, strict=False)) | {"questions": row["questions"]}
        cells[place] = {name: best[place][name] for name in COLUMNS} if place in best else empty
    return list(cells.values())


def _free_groups(coefficients: Sequence[Sequence[float]], groups: Sequence[str]) -> dict[int, str]:
    """Index and name of the groups whose coefficient is drawn: not the last if the coefficients always have the same sum."""
    default = next(names for names in GROUPS.values() if len(names) == len(coefficients[0]))
    names = [look_of(group).label for group in groups or default]
    implied = len({round(sum(row), 6) for row in coefficients}) == 1
    return dict(enumerate(names[:-1] if implied else names))


def _draw_changes(axes: Any, cells: Sequence[Row], lines: Lines, layers: Sequence[int], unit: str) -> None:
    by_place = {(cell["benchmark"], cell["task"], cell["layer"]): cell for cell in cells}
    change = lines.table({place: cell["change"] for place, cell in by_place.items()}, layers)
    low = lines.table({place: cell["low"] for place, cell in by_place.items()}, layers)
    high = lines.table({place: cell["high"] for place, cell in by_place.items()}, layers)
    bound = max(float(np.nanmax(np.abs(change))), 0.1)
    mesh = draw_map(axes, lines, layers, change, colours=CHANGES, limits=(-bound, bound), across=1)
    dot_cells(axes, (low > 0) | (high < 0))
    axes.set_title("Best change over the coefficients")
    axes.set_title("dot: interval excludes 0   cross: not measured", loc="right", fontsize=7)
    draw_bar(axes.figure, mesh, [axes], lines, unit)


def _draw_coefficients(
    panels: Sequence[Any], cells: Sequence[Row], lines: Lines, layers: Sequence[int], free: dict[int, str]
) -> None:
    top = max(1.0, *(coefficient for cell in cells for coefficient in cell["coefficients"]))
    for axes, (index, name) in zip(panels, free.items(), strict=True):
        values = {(cell["benchmark"], cell["task"], cell["layer"]): cell["coefficients"][index] for cell in cells}
        table = lines.table(values, layers)
        mesh = draw_map(axes, lines, layers, table, colours=COEFFICIENTS, limits=(0.0, top), across=len(panels))
        axes.set_title(f"Coefficient of {name}")
    for axes in panels[1:]:
        axes.tick_params(labelleft=False)
    draw_bar(panels[0].figure, mesh, list(panels), lines, "at the best change")
