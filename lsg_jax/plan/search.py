"""Chooses the remat policy and the largest batch with as few compilations as possible."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from lsg_jax.config import Remat
from lsg_jax.plan.measure import Measured

VERIFICATIONS = 3


def try_policies(policies: Iterable[Remat], run: Callable[[Remat], Measured], *, also: Iterable[Remat] = ()) -> list[Measured]:
    """Measures remat policies, the fastest first, up to the first that fits, and those of `also`."""
    found: dict[Remat, Measured] = {}
    for policy in policies:
        found[policy] = run(policy)
        if found[policy].fits:
            break
    return [*found.values(), *(run(policy) for policy in also if policy not in found)]


def fastest(measured: Iterable[Measured]) -> Measured | None:
    """The program that fits and has the shortest time bound; None if none fits."""
    return min((one for one in measured if one.fits), key=lambda one: one.bound, default=None)


def largest_batch(known: Measured, run: Callable[[int], Measured], *, unit: int, limit_gib: float) -> Measured | None:
    """The largest number of rows that fits: extrapolated from two measurements, then verified.

    Args:
        known: of some number of rows, whether it fits or not.
        run: rows -> measured.
        unit: the number of rows is a multiple of it.

    Returns:
        The largest that was compiled and fits; None if none of the few tried does.
    """
    half = max(unit, known.rows // 2 // unit * unit)
    points = [known, run(half if half < known.rows else known.rows + unit)]
    for _ in range(VERIFICATIONS):
        low, high = sorted(points, key=lambda point: point.rows)[:: len(points) - 1]
        slope = (high.memory_gib["peak"] - low.memory_gib["peak"]) / (high.rows - low.rows)
        if slope <= 0:
            break
        guess = low.rows + (limit_gib - low.memory_gib["peak"]) / slope
        best = max((point.rows for point in points if point.fits), default=0)
        worst = min((point.rows for point in points if not point.fits), default=math.inf)
        chosen = int(min(guess, worst - 1)) // unit * unit
        if chosen <= best:
            break
        points.append(run(max(chosen, unit)))
        if points[-1].fits:
            break
    return max((point for point in points if point.fits), key=lambda point: point.rows, default=None)
