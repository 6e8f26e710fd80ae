"""Statistical certainty of scores: bootstrap intervals, and a paired test of a method against the base model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

RESAMPLES = 1000
LEVEL = 95.0
"""Percent of the resamples that an interval covers."""


@dataclass(frozen=True)
class PairedTest:
    """Number of items whose score rose (`better`) or fell (`worse`), and the p-value of the two being equally likely."""

    better: int
    worse: int
    p_value: float


def resample_weights(units: Sequence[str], *, count: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """How often each item is drawn in `count` resamples with replacement: float64 [count, N].

    Args:
        units: one per item; items with the same unit are drawn together (cluster bootstrap).
    """
    _, index = np.unique(np.asarray(units), return_inverse=True)
    total = int(index.max()) + 1
    draws = np.random.default_rng(seed).integers(0, total, (count, total))
    counts = np.stack([np.bincount(row, minlength=total) for row in draws])
    return counts[:, index].astype(np.float64)


def interval(values: np.ndarray) -> tuple[float, float]:
    """Percentile interval of resampled scores [R], without those that are NaN; (nan, nan) if all are.

    The interval has width 0 where all items score the same; see `wilson`.
    """
    values = values[np.isfinite(values)]
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.percentile(values, [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    return float(low), float(high)


def wilson(right: float, count: int) -> tuple[float, float]:
    """Wilson's score interval of a share, in [0, 1]; also none or all of `count` have one (30 of 30: 0.886 to 1).

    Args:
        right: from 0 to `count`; no whole number where answers are right in part.
    """
    z = NormalDist().inv_cdf((1 + LEVEL / 100) / 2)
    share = right / count
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    reach = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2)) / (1 + z**2 / count)
    return (0.0 if right <= 0 else middle - reach), (1.0 if right >= count else middle + reach)


def paired_test(base: np.ndarray, gated: np.ndarray) -> PairedTest:
    """Exact two-sided binomial test: among items whose score changed, are better and worse equally likely?

    For right/wrong scores this is McNemar's test, for graded scores (soft accuracy) the sign test. Items count as independent.

    Args:
        base, gated: float [N], scores of the same items.
    """
    from scipy.stats import binomtest

    better, worse = int((gated > base).sum()), int((gated < base).sum())
    p_value = binomtest(better, better + worse).pvalue if better + worse else 1.0
    return PairedTest(better, worse, float(p_value))
