"""Dimensions and thresholds from counts, on samples whose sinks, offsets, glitches and gaps are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsg_jax.sinks.calibrate import FINE, SIZES, confidence, find_dims, find_gap, histogram, reach, reaching

TOKENS, WIDTH, IMAGES = 2000, 96, 10


def tokens_of(seed):
    """float32 [1, TOKENS, WIDTH]: normal, with an offset of 40 in dimension 5 and a glitch of 500 in dimension 6."""
    x = np.random.default_rng(seed).normal(size=(1, TOKENS, WIDTH)).astype(np.float32)
    x[0, :, 5] += 40
    x[0, 17, 6] = 500
    return x


def dims_of(x, valid=None):
    valid = np.ones(x.shape[:2], bool) if valid is None else valid
    return find_dims(np.asarray(jax.jit(reach)(x, valid), np.int64), int(valid.sum()), IMAGES // 2)


def test_reach_counts_tokens_without_padding():
    x = tokens_of(0)
    valid = np.random.default_rng(1).random((1, TOKENS)) < 0.7
    counts = np.asarray(reach(jnp.asarray(x), jnp.asarray(valid)))
    for step in (0, 19, 20, 24, len(SIZES) - 1):
        np.testing.assert_array_equal(counts[step], (np.abs(x[valid]) >= SIZES[step]).sum(0))


def test_what_is_large_everywhere_or_once_or_often_is_no_sink_dimension():
    found = dims_of(tokens_of(0))
    assert found.dims == () and 0.5 <= found.typical <= 0.71  # the median of |normal| is 0.67
    often = tokens_of(0)
    often[0, ::4, 9] = 300  # a quarter of the tokens
    assert dims_of(often).dims == ()


@pytest.mark.parametrize("seed", range(4))
def test_planted_dimensions_are_found_largest_first(seed):
    rng = np.random.default_rng(seed)
    x = tokens_of(seed)
    dims = rng.choice(np.arange(10, WIDTH), 1 + seed % 3, replace=False)
    where = rng.choice(TOKENS, 4 * IMAGES, replace=False)
    for dim, size in zip(dims, (900, 400, 200), strict=False):
        x[0, where, dim] = size * rng.choice([-1, 1], len(where)) * rng.uniform(0.9, 1.1, len(where))
    x[0, where[:20], 3] = 30  # a dimension that these tokens raise only a little is cut off
    found = dims_of(x)
    assert found.dims == tuple(dims) and found.lead > 4
    padding = np.zeros((1, TOKENS), bool)
    padding[0, where] = True
    assert dims_of(x, ~padding).dims == ()


def test_the_threshold_lies_in_the_middle_of_the_gap():
    rng = np.random.default_rng(0)
    low, high = rng.lognormal(0, 0.5, 50_000), rng.lognormal(np.log(500), 0.2, 400)
    counts = histogram(np.concatenate([low, high]))
    gap = find_gap(counts, 100)
    # the tails of the modes may reach into the gap: a few tokens of many
    assert low.max() / 2 < gap.low < low.max() < gap.tau < high.min() <= gap.high < high.min() * 1.1
    assert gap.tau == pytest.approx((gap.low * gap.high) ** 0.5) and gap.inside <= 8
    assert (gap.above, gap.share) == (400, 400 / 50_400) and reaching(counts, gap.tau) == 400
    # Ashman's D of the two parts
    expected = 2**0.5 * np.log2(500) / np.hypot(0.5, 0.2) * np.log(2)
    assert gap.separation == pytest.approx(expected, rel=0.05)
    # a few tokens between the modes do not close the gap, but are counted
    between = np.geomspace(low.max() * 1.1, high.min() / 1.1, 30)
    wide = find_gap(histogram(np.concatenate([low, high, between])), 100)
    assert 30 <= wide.inside <= 60 and wide.low < gap.tau < wide.high
    assert 400 < wide.above < 430


def test_without_two_modes_there_is_no_gap():
    rng = np.random.default_rng(0)
    assert find_gap(histogram(rng.lognormal(0, 0.5, 50_000)), 50) is None
    assert find_gap(histogram(np.zeros(100)), 1) is None and find_gap(histogram(np.zeros(0)), 1) is None
    halves = np.concatenate([np.full(500, 1.0), np.full(500, 900.0)])
    assert find_gap(histogram(halves), 1) is None  # half of the tokens are no sinks
    few = np.concatenate([np.full(5000, 1.0), np.full(3, 900.0)])
    assert find_gap(histogram(few), 10) is None and find_gap(histogram(few), 3).above == 3
    assert histogram(np.array([0, 1e9, FINE[7], FINE[8] * 0.9999])).nonzero()[0].tolist() == [0, 7, len(FINE) - 1]


def test_confidence_falls_with_each_doubt():
    x = tokens_of(0)
    x[0, :40, 50] = 800
    dims = dims_of(x)
    peaks = np.abs(x[0, :, 50])
    gap = find_gap(histogram(peaks), 10)
    sure = lambda halves, dims=dims, gap=gap: confidence(dims, gap, halves)[0]
    assert sure([(dims, gap), (dims, gap)]) == "high"
    assert sure([]) == sure([(dims, gap), (dims, None)]) == "medium"
    nothing = dims_of(tokens_of(0))
    assert sure([(dims, gap), (nothing, gap)]) == "low"
    level, reasons = confidence(dims, find_gap(histogram(peaks[36:]), 3), [(dims, gap), (dims, gap)])
    assert level == "low" and any(reason.startswith("4 sinks were seen") for reason in reasons)
    assert confidence(nothing, None, [])[0] == confidence(dims, None, [])[0] == "none"
    assert "no gap" in confidence(dims, None, [])[1][0]
