"""Draws the oracle map: the effect of fixed coefficients on each task, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lsg_jax.errors import InputError
from lsg_jax.eval.benchmark import LOWER, gain, has_better
from lsg_jax.eval.best_cells import Which, extreme_cells
from lsg_jax.gating.keys import GROUPS
from lsg_jax.report.drawing import PAGE_WIDTH, PERCENTAGE_POINTS, Kept, Row, check_rows, distinct, look_of, render, unit_of
from lsg_jax.report.heat_map import Lines, draw_bar, draw_map, hatch_cells, lines_of, mark_cells

COLUMNS = ("benchmark", "task", "layer", "which", "coefficients", "tied", "value", "change", "low", "high", "questions")
READ = tuple(name for name in COLUMNS if name not in ("which", "tied"))
TITLES: dict[Which, str] = {"best": "Best change over the coefficients", "worst": "Worst change over the coefficients"}

CHANGES = "RdBu"  # diverging, white at no change; red and blue stay apart for colour-blind eyes
COEFFICIENTS = "cividis"


def draw_oracle_map(rows: Sequence[Row], stem: Path | Kept, *, groups: Sequence[str] = ()) -> list[Path]:
    """Heat maps over tasks and layers: the best and the worst change over the coefficients, and those that gave the best.

    Blue is better, also where that is less. A change whose interval covers 0 or is unknown is hatched, a cell without a value
    has a cross. Where all coefficients tie, none is drawn; where several do, the first of them, with a dot. Tasks that were
    measured in no cell, or of which neither more nor less is better, are left out.
    The best of many settings, chosen on the same questions, is an upper bound and no estimate of what a gate would reach.
    Benchmarks scored in points (MME) are drawn only if all are: beside percentages their changes would take up the whole
    colour scale.

    Args:
        rows: of sweep.json, two or three coefficients each.
        stem: path of the three files without suffix; the CSV holds the best and the worst row of each cell.
        groups: the token group of each coefficient; by default V-sinks and the rest, or V-sinks, L-sinks and ordinary.

    Raises:
        InputError: there are no rows, or none with coefficients other than 1 has a change.
    """
    check_rows(rows, READ, study="lsg sweep", stem=stem)
    in_points = [b for b in distinct(rows, "benchmark") if unit_of(r for r in rows if r["benchmark"] == b) != PERCENTAGE_POINTS]
    alone = len(in_points) == len(distinct(rows, "benchmark"))
    measured = {_task(row) for row in rows if row["change"] is not None and has_better(row["task"])}
    shown = [row for row in rows if (alone or row["benchmark"] not in in_points) and _task(row) in measured]
    found = {which: extreme_cells(shown, which) for which in TITLES}
    if not found["best"]:
        raise InputError(f"{stem}: no row of lsg sweep has a change under coefficients other than 1; nothing to draw")
    cells = [cell for which in TITLES for cell in _all_cells(shown, found[which], which)]
    lines = lines_of(distinct(cells, "benchmark", "task"))
    layers = sorted(distinct(cells, "layer"))
    free = _free_groups([row["coefficients"] for row in shown], groups)

    def paint(figure: Any) -> None:
        grid = figure.add_gridspec(3, len(free))
        panels = [figure.add_subplot(grid[row, :]) for row in range(2)]
        _draw_changes(panels, cells, lines, layers, "points" if alone else PERCENTAGE_POINTS)
        panels = [figure.add_subplot(grid[2, column]) for column in range(len(free))]
        _draw_coefficients(panels, found["best"], lines, layers, free)
        if in_points and not alone:
            figure.supxlabel(f"left out, since they count points: {', '.join(in_points)}", fontsize=7)

    return render(stem, cells, COLUMNS, (PAGE_WIDTH, 3 * lines.height + 2.1), paint)


def _all_cells(rows: Sequence[Row], found: Sequence[Row], which: Which) -> list[dict[str, Any]]:
    """The cells with COLUMNS only, and cells without a value, whose numbers are None; in order of appearance."""
    known = {_place(cell): cell for cell in found}
    cells = {}
    for row in rows:
        place = _place(row)
        empty = dict.fromkeys(COLUMNS) | dict(zip(COLUMNS, place, strict=False)) | {"questions": row["questions"]}
        cell = {**known[place], "tied": len(known[place]["tied"])} if place in known else empty
        cells[place] = {name: cell[name] for name in COLUMNS if name != "which"} | {"which": which}
    return list(cells.values())


def _task(row: Row) -> tuple[str, str]:
    return row["benchmark"], row["task"]


def _place(row: Row) -> tuple[str, str, int]:
    return row["benchmark"], row["task"], row["layer"]


def _free_groups(coefficients: Sequence[Sequence[float]], groups: Sequence[str]) -> dict[int, str]:
    """Index and name of the groups whose coefficient is drawn: not the last if the coefficients always have the same sum."""
    default = next(names for names in GROUPS.values() if len(names) == len(coefficients[0]))
    names = [look_of(group).label for group in groups or default]
    implied = len({round(sum(row), 6) for row in coefficients if set(row) != {1}}) == 1
    return dict(enumerate(names[:-1] if implied else names))


def _draw_changes(panels: Sequence[Any], cells: Sequence[Row], lines: Lines, layers: Sequence[int], unit: str) -> None:
    """The best and the worst changes, each with its own scale of colours: harm is often far greater than help.

    Colours show changes for the better: where less is better, a fall.
    """
    if any(cell["task"].endswith(LOWER) for cell in cells):
        unit += " better"
    for axes, (which, title) in zip(panels, TITLES.items(), strict=True):
        own = {_place(cell): cell for cell in cells if cell["which"] == which}
        change, low, high = (
            lines.table({place: _gain(cell, name) for place, cell in own.items()}, layers) for name in ("change", "low", "high")
        )
        bound = max(float(np.nanmax(np.abs(change))), 0.1)
        mesh = draw_map(axes, lines, layers, change, colours=CHANGES, limits=(-bound, bound), across=1)
        hatch_cells(axes, ~np.isnan(change) & ~(low * high > 0))
        axes.set_title(title)
        axes.set_xlabel("decoder layer\nhatched: interval covers 0; cross: not measured")
        draw_bar(axes.figure, mesh, [axes], lines, unit)


def _gain(cell: Row, name: str) -> float | None:
    return None if cell[name] is None else gain(cell["task"], cell[name])


def _draw_coefficients(
    panels: Sequence[Any], cells: Sequence[Row], lines: Lines, layers: Sequence[int], free: dict[int, str]
) -> None:
    tied = {_place(cell): float(cell["coefficients"] is None) for cell in cells}
    known = {_place(cell): cell["tied"][0] for cell in cells}
    drawn = [values[index] for values in known.values() for index in free]
    limits = min(0.0, *drawn), max(1.0, *drawn)
    tie = lines.table(tied, layers) > 0
    some = lines.table({_place(cell): float(len(cell["tied"]) > 1) for cell in cells}, layers) > 0
    for axes, (index, name) in zip(panels, free.items(), strict=True):
        table = lines.table({place: values[index] for place, values in known.items()}, layers)
        mesh = draw_map(axes, lines, layers, table, colours=COEFFICIENTS, limits=limits, across=len(panels), left_out=tie)
        mark_cells(axes, tie)
        mark_cells(axes, some & ~tie, filled=True)
        axes.set_title(f"Coefficient of {name}")
    for axes in panels[1:]:
        axes.tick_params(labelleft=False)
    panels[0].set_xlabel("decoder layer\ncircle: all tie; dot: several, the first is drawn")
    draw_bar(panels[0].figure, mesh, list(panels), lines, "at the best change")
