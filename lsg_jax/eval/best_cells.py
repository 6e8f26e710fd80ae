"""The best cells of an oracle map: which fixed coefficients raise the score of a task most, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lsg_jax.eval.benchmark import gain

Row = Mapping[str, Any]


def best_cells(rows: Sequence[Row]) -> list[Row]:
    """The row with the greatest change for the better for each benchmark, task and layer; of equal ones the first.

    Coefficients that are all 1 are the base model and are ignored. Without a row that has a change there is no best one.

    Args:
        rows: of sweep.json.
    """
    best: dict[tuple[str, str, int], Row] = {}
    for row in rows:
        if row["change"] is None or set(row["coefficients"]) == {1}:
            continue
        key = (row["benchmark"], row["task"], row["layer"])
        if key not in best or gain(row["task"], row["change"]) > gain(row["task"], best[key]["change"]):
            best[key] = row
    return list(best.values())
