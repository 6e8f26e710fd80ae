"""The numbers of the pointing game: hit rates, shares, paired changes and best choices, with their intervals.

Letters: Q questions, M maps (`raw` first), L layers, N heads.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lsg_jax.eval.statistics import interval, paired_test, resample_weights, wilson

Row = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Measured:
    """What each of Q questions gave; `analysis.pointing` says what the measures are.

    Attributes:
        hit: bool [Q, M, L], share: float [Q, M, L], of the mean over heads.
        head_hit: bool [Q, M, L, N].
        chance: float [Q].
        sink_share, visual: float [Q, L], of the raw attention, mean over heads.
    """

    hit: NDArray[np.bool_]
    share: NDArray[np.floating]
    head_hit: NDArray[np.bool_]
    chance: NDArray[np.floating]
    sink_share: NDArray[np.floating]
    visual: NDArray[np.floating]


def pooled(parts: Sequence[Measured]) -> Measured:
    """The questions of all parts."""
    columns = {field.name: [getattr(part, field.name) for part in parts] for field in dataclasses.fields(Measured)}
    return Measured(**{name: np.concatenate(values) for name, values in columns.items()})


def rate(hits: NDArray[np.bool_]) -> Row:
    """`hit` with Wilson's interval; hits bool [Q]."""
    low, high = wilson(int(hits.sum()), len(hits))
    return {"hit": float(hits.mean()), "low": low, "high": high}


def hit_rows(own: Measured, maps: Sequence[str]) -> list[Row]:
    """A row for each map and layer."""
    rows = []
    for at, name in enumerate(maps):
        for layer in range(own.hit.shape[2]):
            share = own.share[:, at, layer]
            low, high = _resampled(share)
            bounds = {"share": float(share.mean()), "share_low": low, "share_high": high}
            rows.append({"map": name, "layer": layer, **rate(own.hit[:, at, layer]), **bounds})
    return rows


def change_rows(own: Measured, maps: Sequence[str]) -> list[Row]:
    """A row for each layer and each map but the first: what it changes against the first."""
    rows = []
    for at, name in enumerate(maps[1:], 1):
        for layer in range(own.hit.shape[2]):
            share = own.share[:, at, layer] - own.share[:, 0, layer]
            low, high = _resampled(share)
            changed = _change(own.hit[:, 0, layer], own.hit[:, at, layer])
            bounds = {"share": float(share.mean()), "share_low": low, "share_high": high}
            rows.append({"map": name, "layer": layer, **changed, **bounds})
    return rows


def best_rows(own: Measured, choosing: Measured, maps: Sequence[str]) -> list[Row]:
    """The layer, and the head, with the most hits among the questions `choosing`, as they do on the others."""
    rows = []
    for choice in ("layer", "head"):
        base: NDArray[np.bool_] | None = None
        for at, name in enumerate(maps):
            field = "hit" if choice == "layer" else "head_hit"
            rates = getattr(choosing, field)[:, at].mean(0)
            place = np.unravel_index(int(rates.argmax()), rates.shape)
            hits = getattr(own, field)[:, at][(slice(None), *place)]
            row = {"map": name, "choice": choice, "layer": int(place[0]), "head": int(place[1]) if choice == "head" else None}
            change = None if base is None else _change(base, hits)
            base = hits if base is None else base
            rows.append(
                {
                    **row,
                    "chosen": float(rates[place]),
                    **rate(hits),
                    "change": change and change["hit"],
                    "change_low": change and change["low"],
                    "change_high": change and change["high"],
                    "p_value": change and change["p_value"],
                }
            )
    return rows


def _change(base: NDArray[np.bool_], other: NDArray[np.bool_]) -> Row:
    """Hits of the same questions [Q], the other minus the base."""
    difference = other.astype(np.float64) - base
    low, high = _resampled(difference)
    test = paired_test(base.astype(np.float64), other.astype(np.float64))
    counts = {"better": test.better, "worse": test.worse, "p_value": test.p_value}
    return {"hit": float(difference.mean()), "low": low, "high": high, **counts}


def _resampled(values: NDArray[np.floating]) -> tuple[float, float]:
    """Bootstrap interval of the mean of values [Q]."""
    return interval(_weights(len(values)) @ values / len(values))


@functools.lru_cache(maxsize=8)
def _weights(count: int) -> NDArray[np.float64]:
    return resample_weights([str(index) for index in range(count)])
