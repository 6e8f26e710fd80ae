"""The greedy stack: the change by each layer's gate alone, and by stacks of growing size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lsg_jax.report.drawing import INK, PAGE_WIDTH, Kept, Look, Row, check_rows, draw_interval, layer_axis, render, unit_of

COLUMNS = ("part", "layers", "value", "change", "low", "high")
PARTS = {
    "single": Look("one gate", "#0072B2", "-", "o", ""),
    "step": Look("stack", "#D55E00", "-", "s", ""),
    "joint": Look("trained jointly", "#009E73", "-", "^", ""),
}


def rows_of_stack(study: Mapping[str, Any]) -> list[dict[str, Any]]:
    """stack.json as rows of COLUMNS: `part` is single, step or joint; `layers` are the gated layers."""
    numbers = lambda entry: {name: entry.get(name) for name in ("value", "change", "low", "high")}
    rows = [{"part": "single", "layers": [entry["layer"]], **numbers(entry)} for entry in study.get("singles", [])]
    rows += [{"part": "step", "layers": entry["layers"], **numbers(entry)} for entry in study.get("steps", [])]
    if joint := study.get("joint"):
        rows.append({"part": "joint", "layers": joint.get("layers", []), **numbers(joint)})
    return rows


def draw_stack(rows: Sequence[Row], stem: Path | Kept) -> list[Path]:
    """Changes with intervals: at the left of each gate alone, by layer; at the right of the stack as gates are added.

    Args:
        rows: of `rows_of_stack`.
        stem: path of the three files without suffix.

    Raises:
        InputError: there are no rows.
    """
    check_rows(rows, COLUMNS, study="lsg stack", stem=stem)
    singles = [row for row in rows if row["part"] == "single"]
    stacks = [row for row in rows if row["part"] != "single"]

    def paint(figure: Any) -> None:
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
        _draw_changes(left, [row["layers"][0] for row in singles], singles)
        _draw_changes(right, list(range(len(stacks))), stacks)
        left.set_title("One gate alone")
        left.set_ylabel(f"change ({unit_of(rows)})")
        if singles:
            layer_axis(left, [row["layers"][0] for row in singles])
        right.set_title("Stacked, from left to right")
        right.set_xlabel("gate added")
        right.set_xticks(range(len(stacks)), [_name(row) for row in stacks])
        right.set_xlim(-0.5, max(len(stacks), 1) - 0.5)

    return render(stem, rows, COLUMNS, (PAGE_WIDTH, 2.6), paint)


def _name(row: Row) -> str:
    if row["part"] == "joint":
        return "trained\njointly"
    return ("+ " if len(row["layers"]) > 1 else "") + f"L{row['layers'][-1]}"


def _draw_changes(axes: Any, places: Sequence[float], rows: Sequence[Row]) -> None:
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.grid(axis="y")
    for place, row in zip(places, rows, strict=True):
        draw_interval(axes, place, PARTS[row["part"]], row, upright=True)
