"""Intervals and the paired test against closed forms."""

import numpy as np
import pytest
from scipy.stats import binom

from lsg_jax.eval.benchmark import Graded, Item, by, macro, mean
from lsg_jax.eval.statistics import PairedTest, interval, paired_test, resample_weights


def test_an_interval_of_a_mean_is_that_of_the_normal_law():
    count, right = 400, 240
    score = (np.arange(count) < right).astype(float)
    items = [Item(str(i), "?", ("x",)) for i in range(count)]
    weight = resample_weights([item.id for item in items], count=4000)
    assert (weight.sum(-1) == count).all()
    low, high = interval(mean(Graded(items, [None] * count, score, weight)))
    width = 100 * 1.96 * np.sqrt(0.6 * 0.4 / count)
    assert low == pytest.approx(60 - width, abs=0.4) and high == pytest.approx(60 + width, abs=0.4)
    np.testing.assert_array_equal(weight, resample_weights([item.id for item in items], count=4000))


def test_items_of_a_unit_are_drawn_together():
    weight = resample_weights(["a", "a", "b", "c", "c", "c"], count=50)
    np.testing.assert_array_equal(weight[:, 0], weight[:, 1])
    np.testing.assert_array_equal(weight[:, 3], weight[:, 5])
    assert (weight[:, [0, 2, 3]].sum(-1) == 3).all() and len(np.unique(weight[:, 2])) > 1


def test_weights_count_as_repeats_do():
    """A metric under integer weights equals the metric of the list in which items are repeated as often."""
    rng = np.random.default_rng(0)
    items = [Item(str(i), "?", ("x",), fields={"group": "ab"[i % 3 > 0]}) for i in range(12)]
    score, weight = rng.integers(0, 2, 12).astype(float), rng.integers(1, 4, (5, 12)).astype(float)
    found = Graded(items, [None] * 12, score, weight)
    for row in range(5):
        index = np.repeat(np.arange(12), weight[row].astype(int))
        repeated = Graded([items[i] for i in index], [None] * len(index), score[index], np.ones((1, len(index))))
        assert mean(found)[row] == pytest.approx(mean(repeated)[0], rel=1e-12)
        assert macro(by(found, "group"))[row] == pytest.approx(macro(by(repeated, "group"))[0], rel=1e-12)
        assert by(repeated, "group")["a"][0] == pytest.approx(100 * score[index][index % 3 == 0].mean(), rel=1e-12)


def test_a_resample_without_a_group_does_not_count():
    assert interval(np.array([np.nan, 1.0, 1.0])) == (1.0, 1.0)
    assert np.isnan(interval(np.array([np.nan]))).all()


@pytest.mark.parametrize("better, worse", [(0, 0), (1, 0), (10, 3), (3, 10), (25, 25)])
def test_paired_test_is_mcnemars_exact_one(better, worse):
    base = np.array([0.0] * better + [1.0] * worse + [1.0, 0.0])
    gated = np.array([1.0] * better + [0.0] * worse + [1.0, 0.0])
    found = paired_test(base, gated)
    tail = binom.cdf(min(better, worse), better + worse, 0.5)
    assert (found.better, found.worse) == (better, worse)
    assert found.p_value == pytest.approx(min(1.0, 2 * tail) if better + worse else 1.0, rel=1e-9)


def test_graded_scores_count_by_their_sign():
    found = paired_test(np.array([0.3, 0.6, 1.0]), np.array([0.6, 0.3, 1.0]))
    assert found == PairedTest(1, 1, 1.0)
