"""The oracle map: which layer and which fixed coefficients help which task, and by how much."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lsg_jax.errors import InputError
from lsg_jax.report.drawing import PAGE_WIDTH, PERCENTAGE_POINTS, Row, check_rows, distinct, look_of, render, unit_of
from lsg_jax.report.heat_map import Lines, dot_cells, draw_bar, draw_map, lines_of

COLUMNS = ("benchmark", "task", "layer", "coefficients", "value", "change", "low", "high", "questions")
GROUPS = {2: ("v_sink", "rest"), 3: ("v_sink", "l_sink", "ordinary")}

CHANGES = "RdBu"  # diverging, white at no change; red and blue stay apart for colour-blind eyes
COEFFICIENTS = "cividis"


def best_cells(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For each benchmark, task and layer the row of the greatest change; of equal ones the first.

    Coefficients that are all 1 are the base model and never count as the best. Where no change is known, all numbers are None.
    """
    best: dict[tuple[str, str, int], dict[str, Any]] = {}
    for row in rows:
        if all(coefficient == 1 for coefficient in row["coefficients"]):
            continue
        key = (row["benchmark"], row["task"], row["layer"])
        known = best.get(key)
        if row["change"] is None:
            if known is None:
                best[key] = dict.fromkeys(COLUMNS) | dict(zip(COLUMNS, key, strict=False)) | {"questions": row["questions"]}
        elif known is None or known["change"] is None or row["change"] > known["change"]:
            best[key] = {name: row[name] for name in COLUMNS}
    return list(best.values())


def draw_oracle_map(rows: Sequence[Row], stem: Path, *, groups: Sequence[str] = ()) -> list[Path]:
    """Task by layer: the best change over the coefficients above, the coefficients that gave it below.

    A dot marks a best change whose interval excludes 0, a cross a cell that was not measured. The best of many settings, chosen
    on the same questions, is an upper bound and no estimate of what a gate would reach. Benchmarks that count points (MME) are
    drawn only where all do: beside percentages their changes would take the whole colour scale.

    Args:
        rows: of sweep.json, two or three coefficients each.
        stem: where the three files go; the CSV holds the best row of each cell.
        groups: the token group of each coefficient; without them V-sinks and the rest, or V-sinks, L-sinks and ordinary.

    Raises:
        InputError: no rows, or none that changes a key.
    """
    check_rows(rows, COLUMNS, study="lsg sweep", stem=stem)
    in_points = [b for b in distinct(rows, "benchmark") if unit_of(r for r in rows if r["benchmark"] == b) != PERCENTAGE_POINTS]
    alone = len(in_points) == len(distinct(rows, "benchmark"))
    cells = best_cells([row for row in rows if alone or row["benchmark"] not in in_points])
    found = [cell for cell in cells if cell["change"] is not None]
    if not found:
        raise InputError(f"{stem}: no row of lsg sweep has a change under coefficients other than 1; nothing to draw")
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


def _free_groups(coefficients: Sequence[Sequence[float]], groups: Sequence[str]) -> dict[int, str]:
    """Index and name of the groups whose coefficient has to be shown: without the last where all sums are equal."""
    names = [look_of(group).label for group in groups or GROUPS[len(coefficients[0])]]
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
