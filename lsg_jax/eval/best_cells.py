"""The best and worst cells of an oracle map: which fixed coefficients change the score of a task most, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

from lsg_jax.eval.benchmark import gain, has_better

Row = Mapping[str, Any]
Which = Literal["best", "worst"]
WHICH: tuple[Which, ...] = get_args(Which)

TIE_DIGITS = 9  # changes in percent that agree in these are equal
WHERE_WORDS = "tie: all have this change; (+n): n more layers and coefficients have it too"
"""Legend of `where_words`."""


def extreme_cells(rows: Sequence[Row], which: Which) -> list[Row]:
    """The row with the greatest change for the better or the worse for each benchmark, task and layer; of equal ones the first.

    Coefficients that are all 1 are the base model and are ignored. Without a row that has a change there is no best one, nor
    of a task of which neither more nor less is better (`has_better`).

    Args:
        rows: of sweep.json.

    Returns:
        The rows, and in each `tied`, all coefficients with this change, and `of`, the number of those compared. Where all of
        several tie, `coefficients` is None: none of them is better than the others.
    """
    cells: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        if row["change"] is not None and set(row["coefficients"]) != {1} and has_better(row["task"]):
            cells.setdefault((row["benchmark"], row["task"], row["layer"]), []).append(row)
    found: list[Row] = []
    for own in cells.values():
        equal = _equal(own, which)
        tie = len(equal) == len(own) > 1
        tied = [row["coefficients"] for row in equal]
        found.append({**equal[0], "coefficients": None if tie else tied[0], "tied": tied, "of": len(own)})
    return found


def extreme_layer(cells: Sequence[Row], which: Which) -> Row:
    """The greatest change of a task for the better or the worse over its layers.

    Args:
        cells: `extreme_cells` of this task.

    Returns:
        The first cell that has it, and in it `others`, how many more layers and coefficients do. Where all do, `layer` and
        `coefficients` are None.
    """
    equal = _equal(cells, which)
    others = sum(len(cell["tied"]) for cell in equal) - 1
    first = {**equal[0], "coefficients": equal[0]["tied"][0], "others": others}
    if others and others + 1 == sum(cell["of"] for cell in cells):
        first |= {"layer": None, "coefficients": None}
    return first


def where_words(cell: Row) -> tuple[str, str]:
    """Layer and coefficients of an `extreme_layer`, as a table has them."""
    if cell["coefficients"] is None:
        return "any", "tie"
    more = f" (+{cell['others']})" if cell["others"] else ""
    return str(cell["layer"]), ", ".join(f"{value:g}" for value in cell["coefficients"]) + more


def _equal(rows: Sequence[Row], which: Which) -> list[Row]:
    pick: Callable[[Iterable[float]], float] = max if which == "best" else min
    gains = [round(gain(row["task"], row["change"]), TIE_DIGITS) for row in rows]
    return [row for row, value in zip(rows, gains, strict=True) if value == pick(gains)]
