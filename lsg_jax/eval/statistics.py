"""How sure a score is: bootstrap intervals, and a paired test of base against gated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

RESAMPLES = 1000
LEVEL = 95.0
"""Percent of the resamples that an interval covers."""


def resample_weights(units: Sequence[str], *, count: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """How often each item is drawn in resamples with replacement: float64 [count, N].

    Args:
        units: of each item; items of equal unit are drawn together (a cluster bootstrap).
    """
    _, index = np.unique(np.asarray(units), return_inverse=True)
    total = int(index.max()) + 1
    draws = np.random.default_rng(seed).integers(0, total, (count, total))
    counts = np.stack([np.bincount(row, minlength=total) for row in draws])
    return counts[:, index].astype(np.float64)


def interval(values: np.ndarray) -> tuple[float, float]:
    """The percentile interval of resampled scores [R], those that are no number left out; (nan, nan) if none is left.

    It is empty where all items score the same: resamples of few items say nothing about scores that were never seen.
    """
    values = values[np.isfinite(values)]
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.percentile(values, [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    return float(low), float(high)


def paired_test(base: np.ndarray, gated: np.ndarray) -> dict[str, Any]:
    """Exact two-sided test of whether the items whose score changed got better or worse equally often.

    On right/wrong scores this is McNemar's test; on graded scores (soft accuracy) the sign test. Items count as independent.

    Args:
        base, gated: float [N], scores of the same items.

    Returns:
        better, worse: items whose score rose or fell; p_value.
    """
    from scipy.stats import binomtest

    better, worse = int((gated > base).sum()), int((gated < base).sum())
    p_value = binomtest(better, better + worse).pvalue if better + worse else 1.0
    return {"better": better, "worse": worse, "p_value": float(p_value)}
