"""Sink dimensions and thresholds from counts of activation sizes.

A sink dimension is large, far above typical activations, and rare: only few tokens are large in it. A dimension that is large
in every token is a constant offset. Over the sink dimensions, max |h[d]| of the tokens has two modes. The threshold is the
middle of the gap between them, on a logarithmic scale. All sizes are absolute values of activations, or norms.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

SIZES = 2.0 ** np.arange(-10, 17.25, 0.5)
"""float64 [E], sizes at which tokens are counted for each dimension: steps of a factor 1.41 from 0.001 to 131,072."""

FINE = 2.0 ** np.arange(-10, 17.01, 1 / 32)
"""float64 [F], lower edges of the bins of a histogram over tokens: steps of a factor 1.02."""

OUTLIER = 20.0  # multiple of the typical activation, as in the dim_rms criterion; normal variates reach 5 to 7
RARE = 0.1  # largest share of tokens that reach a quarter of the dimension's size
MOST_DIMS = 8
SMALLEST_GAP = 0.5  # octaves
LARGEST_SHARE = 0.25  # of the tokens may be sinks
STRAGGLERS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3)  # tokens allowed in the gap for each token above it, tried in turn


@dataclass(frozen=True)
class SinkDims:
    """Sink dimensions.

    Attributes:
        dims: largest first; empty if there are none.
        sizes: |h[d]| that `least` tokens reach, for each of `dims`.
        typical: typical |h[d]|: the median over tokens, then over dimensions.
        runner_up: size of the next dimension, or OUTLIER * typical if no further one is an outlier.
    """

    dims: tuple[int, ...]
    sizes: tuple[float, ...]
    typical: float
    runner_up: float

    @property
    def lead(self) -> float:
        """How many times larger the smallest of `dims` is than the next dimension."""
        return self.sizes[-1] / self.runner_up


@dataclass(frozen=True)
class Gap:
    """The gap between the two modes of a distribution of sizes.

    Attributes:
        low, high: its ends; `tau`, the threshold, is their geometric mean.
        above: number of tokens that reach the threshold.
        share: of all tokens, those that reach it.
        inside: number of tokens in the gap, on either side of the threshold.
        separation: distance between the means of the modes in units of their deviation, of log sizes (Ashman's D). Above 2 the
            modes are separate.
    """

    low: float
    high: float
    above: int
    share: float
    inside: int
    separation: float

    @property
    def tau(self) -> float:
        return _middle(self.low, self.high)


def reach(states: jax.Array, valid: jax.Array) -> jax.Array:
    """Number of tokens that reach each of SIZES in each dimension.

    Args:
        states: [B, T, D].
        valid: bool [B, T], tokens to count.

    Returns:
        int32 [E, D].
    """
    size = jnp.where(valid[..., None], jnp.abs(states.astype(jnp.float32)), -1.0)
    counts: jax.Array = jax.lax.map(lambda edge: (size >= edge).sum((0, 1), dtype=jnp.int32), jnp.asarray(SIZES, jnp.float32))
    return counts


def find_dims(counts: np.ndarray, tokens: int, least: int) -> SinkDims:
    """The dimensions that are large and rare, up to the largest drop in size.

    Args:
        counts: int [E, D], tokens that reach each of SIZES, summed over all images.
        tokens: number of tokens counted.
        least: number of tokens that must reach a dimension's size, so that a single glitch makes no sink dimension.
    """
    size = _largest(counts, max(least, 1))
    median = _largest(counts, -(-tokens // 2))
    typical = float(np.median(median))
    dims = np.arange(counts.shape[1])
    near = counts[np.searchsorted(SIZES, size / 4), dims]
    outlier = (size >= OUTLIER * np.maximum(median, typical)) & (size > SIZES[0]) & (near <= RARE * tokens)
    order = dims[outlier][np.argsort(-size[outlier], kind="stable")]
    if not len(order):
        return SinkDims((), (), typical, OUTLIER * typical)
    falling = np.append(size[order], OUTLIER * typical)[: MOST_DIMS + 1]
    cut = 1 + int(np.argmax(falling[:-1] / falling[1:]))
    chosen = order[:cut]
    return SinkDims(tuple(chosen.tolist()), tuple(size[chosen].tolist()), typical, float(falling[cut]))


def _largest(counts: np.ndarray, least: int) -> np.ndarray:
    """float64 [D], the largest of SIZES that `least` tokens reach in each dimension; half the smallest if they reach none."""
    steps = (counts >= least).sum(0)  # counts decrease with size
    largest: np.ndarray = np.where(steps > 0, SIZES[np.maximum(steps - 1, 0)], SIZES[0] / 2)
    return largest


def histogram(sizes: np.ndarray) -> np.ndarray:
    """int64 [F], histogram of sizes over the bins of FINE; sizes below the first edge count in the first bin."""
    bins = np.clip(np.searchsorted(FINE, np.ravel(sizes), side="right") - 1, 0, len(FINE) - 1)
    return np.bincount(bins, minlength=len(FINE))


def reaching(counts: np.ndarray, tau: float) -> int:
    """Number of tokens of a histogram in the bin of `tau` and above."""
    return int(counts[np.searchsorted(FINE, tau, side="right") - 1 :].sum())


def find_gap(counts: np.ndarray, least: int) -> Gap | None:
    """The widest gap between two modes on a log scale; None if there is none.

    Tokens in a gap reduce its width: half as many as above it reduce it to zero.

    Args:
        counts: int [F], a histogram over FINE.
        least: smallest number of tokens above the gap; the largest is a quarter of all.
    """
    total = int(counts.sum())
    below = np.concatenate([[0], np.cumsum(counts)])  # below[i]: tokens in the bins before i
    above = total - below
    ends = [i for i in np.flatnonzero(counts).tolist() if max(least, 1) <= above[i] <= LARGEST_SHARE * total]
    best, best_width = None, SMALLEST_GAP
    for allowed in STRAGGLERS:
        for end in ends:
            # the gap starts where it holds no more tokens than allowed
            start = int(np.searchsorted(below, below[end] - allowed * above[end], side="left"))
            inside = int(below[end] - below[start])
            width = float(np.log2(FINE[end] / FINE[start])) * (1 - 2 * inside / above[end])
            if width > best_width:
                best, best_width = (start, end, inside), width
    if best is None:
        return None
    start, end, inside = best
    low, high = float(FINE[start]), float(FINE[end])
    sinks = reaching(counts, _middle(low, high))
    return Gap(
        low=low,
        high=high,
        above=sinks,
        share=sinks / total,
        inside=inside,
        separation=_separation(counts, start, end),
    )


def _middle(low: float, high: float) -> float:
    return float(np.sqrt(low * high))


def _separation(counts: np.ndarray, start: int, end: int) -> float:
    """Ashman's D = sqrt(2) |m1 - m2| / sqrt(s1^2 + s2^2) of the octaves below and above a gap."""
    octave = np.log2(FINE)
    means, variances = [], []
    for part in (slice(0, start), slice(end, None)):
        weights = counts[part] / counts[part].sum()
        means.append(float(weights @ octave[part]))
        # the variance within a bin, so that equal sizes do not have a deviation of zero
        variances.append(float(weights @ (octave[part] - means[-1]) ** 2) + (1 / 32) ** 2 / 12)
    return float(np.sqrt(2) * (means[1] - means[0]) / np.sqrt(sum(variances)))


LEVELS = ("low", "medium", "high")


def confidence(dims: SinkDims, gap: Gap | None, halves: list[tuple[SinkDims, Gap | None]]) -> tuple[str, list[str]]:
    """Confidence in dimensions and threshold: `high`, `medium` or `low`, `none` if one of them was not found; and the reasons.

    Args:
        halves: dimensions and gap found in each half of the sample; empty if it could not be halved.
    """
    if not dims.dims:
        return "none", [
            f"no dimension is both large in some tokens (over {OUTLIER:g} times what is usual) and small in the others"
        ]
    if gap is None:
        return "none", [f"the tokens' sizes in dimensions {list(dims.dims)} have no gap: no threshold parts sinks from others"]
    levels: list[int] = []
    reasons: list[str] = []

    def weigh(value: float, medium: float, high: float, text: str) -> None:
        levels.append(int(value >= medium) + int(value >= high))
        reasons.append(text)

    weigh(dims.lead, 2, 4, f"they reach {dims.lead:.1f} times the next dimension's size")
    factor = gap.high / gap.low
    weigh(factor, 2, 4, f"the gap reaches from {gap.low:.4g} to {gap.high:.4g}, a factor of {factor:.1f}")
    stragglers = gap.inside / gap.above
    weigh(-stragglers, -0.1, -0.02, f"{gap.inside} tokens lie in the gap, {gap.above} reach the threshold in its middle")
    weigh(gap.separation, 2, 4, f"the modes are {gap.separation:.1f} deviations apart")
    weigh(gap.above, 5, 20, f"{gap.above} sinks were seen, {gap.share:.2%} of the tokens")
    levels.append(int(gap.share <= 0.1) + int(gap.share <= 0.05))
    if not halves:
        weigh(0, 0, 1, "the sample cannot be halved to see whether the result holds")
    else:
        same = all(set(half.dims) == set(dims.dims) for half, _ in halves)
        holds = all(other is not None and other.low <= gap.tau <= other.high for _, other in halves)
        texts = {
            (True, True): "both halves of the images give the same dimensions and a gap around the threshold",
            (True, False): "the halves of the images give the same dimensions, but other thresholds",
        }
        weigh(same + holds, 1, 2, texts.get((same, holds), "the halves of the images give other dimensions"))
        if not same:
            levels[-1] = 0
    return LEVELS[min(levels)], reasons
