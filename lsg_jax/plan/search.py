"""Which remat policy to take, and how large a batch may be: as few compilations as will do."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

Measured = dict[str, Any]

VERIFICATIONS = 3


def try_policies(policies: Iterable[str], run: Callable[[str], Measured], *, also: Iterable[str] = ()) -> list[Measured]:
    """Measures policies, the fastest first, up to the first that fits, and those of `also`."""
    found: list[Measured] = []
    for policy in policies:
        found.append(run(policy) | {"remat": policy})
        if found[-1]["fits"]:
            break
    tried = {entry["remat"] for entry in found}
    return found + [run(policy) | {"remat": policy} for policy in also if policy not in tried]


def fastest(measured: Iterable[Measured]) -> Measured | None:
    """The one that fits and whose bound is the shortest; None if none fits."""
    fitting = [entry for entry in measured if entry["fits"]]
    return min(fitting, key=lambda entry: entry["seconds"]["bound"]) if fitting else None


def largest_batch(known: Measured, run: Callable[[int], Measured], *, unit: int, limit_gib: float) -> Measured | None:
    """The largest number of rows that fits: from two points of a line, then tried.

    Args:
        known: of some number of rows, whether it fits or not.
        run: rows -> measured.
        unit: rows come in multiples of it.

    Returns:
        The largest that was compiled and fits; None if none of the few tried does.
    """
    rows = known["rows"]
    half = max(unit, rows // 2 // unit * unit)
    points = [known, run(half if half < rows else rows + unit)]
    for _ in range(VERIFICATIONS):
        low, high = sorted(points, key=lambda entry: entry["rows"])[:: len(points) - 1]
        slope = (high["memory_gib"]["peak"] - low["memory_gib"]["peak"]) / (high["rows"] - low["rows"])
        if slope <= 0:
            break
        guess = low["rows"] + (limit_gib - low["memory_gib"]["peak"]) / slope
        best = max((entry["rows"] for entry in points if entry["fits"]), default=0)
        worst = min((entry["rows"] for entry in points if not entry["fits"]), default=math.inf)
        chosen = int(min(guess, worst - 1)) // unit * unit
        if chosen <= best:
            break
        points.append(run(max(chosen, unit)))
        if points[-1]["fits"]:
            break
    fitting = [entry for entry in points if entry["fits"]]
    return max(fitting, key=lambda entry: entry["rows"]) if fitting else None
