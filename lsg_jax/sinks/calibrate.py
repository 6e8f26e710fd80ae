"""Sink dimensions and thresholds from counts of activation sizes.

A sink dimension is an outlier twice: it is far above what activations usually are, and only in few tokens (one that is large in
every token is a constant offset). Over such dimensions, max |h[d]| of the tokens has two modes, and the threshold goes into the
middle of the gap between them, on a logarithmic scale. All sizes are absolute values of activations, or norms.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

SIZES = 2.0 ** np.arange(-10, 17.25, 0.5)
"""float64 [E], sizes at which dimensions are counted: factors of 1.41 from 0.001 to 131,072."""

FINE = 2.0 ** np.arange(-10, 17.01, 1 / 32)
"""float64 [F], lower edges of the bins of a histogram over tokens: factors of 1.02."""

OUTLIER = 20.0  # times what activations usually are, as in the dim_rms criterion; normal variates reach 5 to 7
RARE = 0.1  # of the tokens at most are within a quarter of the dimension's size
MOST_DIMS = 8
SMALLEST_GAP = 0.5  # octaves
LARGEST_SHARE = 0.25  # of the tokens may be sinks
STRAGGLERS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3)  # tokens that may lie in the gap for each one above it, tried in turn


@dataclass(frozen=True)
class SinkDims:
    """Dimensions that stand out.

    Attributes:
        dims: largest first; empty where none stands out.
        sizes: |h[d]| that `least` tokens reach, for each of `dims`.
        typical: the usual |h[d]|, the median over dimensions of each one's median over tokens.
        runner_up: the size of the next rare dimension, at least OUTLIER * typical, where the next would count as one.
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
        low, high: where it begins and ends; `tau`, the threshold, is their geometric mean.
        above: tokens that reach the threshold. share: of all tokens.
        inside: tokens in the gap, on either side of the threshold.
        separation: distance of the modes' means in units of their deviation, of log sizes (Ashman's D); above 2 they are apart.
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
    """How many tokens reach each of SIZES in each dimension.

    Args:
        states: [B, T, D].
        valid: bool [B, T], tokens that count.

    Returns:
        int32 [E, D].
    """
    size = jnp.where(valid[..., None], jnp.abs(states.astype(jnp.float32)), -1.0)
    return jax.lax.map(lambda edge: (size >= edge).sum((0, 1), dtype=jnp.int32), jnp.asarray(SIZES, jnp.float32))


def find_dims(counts: np.ndarray, tokens: int, least: int) -> SinkDims:
    """The dimensions that are outliers by size and by rarity, cut where sizes fall most.

    Args:
        counts: int [E, D], tokens that reach each of SIZES, summed over all images.
        tokens: number of tokens counted.
        least: as many tokens must reach a dimension's size, so that a single glitch makes no sink dimension.
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
    """The largest of SIZES that `least` tokens reach in each dimension, half the smallest where none does: float64 [D]."""
    steps = (counts >= least).sum(0)  # counts fall as sizes grow
    return np.where(steps > 0, SIZES[np.maximum(steps - 1, 0)], SIZES[0] / 2)


def histogram(sizes: np.ndarray) -> np.ndarray:
    """int64 [F], sizes counted in the bins of FINE; those below the first edge go into the first bin."""
    bins = np.clip(np.searchsorted(FINE, np.ravel(sizes), side="right") - 1, 0, len(FINE) - 1)
    return np.bincount(bins, minlength=len(FINE))


def reaching(counts: np.ndarray, tau: float) -> int:
    """Tokens of a histogram in the bins from that of `tau` on."""
    return int(counts[np.searchsorted(FINE, tau, side="right") - 1 :].sum())


def find_gap(counts: np.ndarray, least: int) -> Gap | None:
    """The gap between two modes, with at least `least` tokens, and at most a quarter of all, above it; None without one.

    It is the widest one on a log scale, where tokens in it count against its width: a half as many as above it, all of it.

    Args:
        counts: int [F], a histogram over FINE.
    """
    total = int(counts.sum())
    below = np.concatenate([[0], np.cumsum(counts)])  # below[i]: tokens in the bins before i
    above = total - below
    ends = [i for i in np.flatnonzero(counts).tolist() if max(least, 1) <= above[i] <= LARGEST_SHARE * total]
    best, best_width = None, SMALLEST_GAP
    for allowed in STRAGGLERS:
        for end in ends:
            # it begins after the last bin that would let too many tokens into it
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
        # a bin has a width, so that equal sizes have no deviation of zero
        variances.append(float(weights @ (octave[part] - means[-1]) ** 2) + (1 / 32) ** 2 / 12)
    return float(np.sqrt(2) * (means[1] - means[0]) / np.sqrt(sum(variances)))


LEVELS = ("low", "medium", "high")


def confidence(dims: SinkDims, gap: Gap | None, halves: list[tuple[SinkDims, Gap | None]]) -> tuple[str, list[str]]:
    """How sure dimensions and threshold are: `high`, `medium`, `low`, or `none` where there is nothing to be sure of; and why.

    Args:
        halves: the same found in each half of the sample; empty where it could not be halved.
    """
    if not dims.dims:
        return "none", [
            f"no dimension is both large in some tokens (over {OUTLIER:g} times what is usual) and small in the others"
        ]
    if gap is None:
        return "none", [f"the tokens' sizes in dimensions {list(dims.dims)} have no gap: no threshold parts sinks from others"]
    levels, reasons = [], []

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
