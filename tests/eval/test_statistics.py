"""Intervals and the paired test against closed forms."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binom, binomtest, norm

from lsg_jax.eval.benchmark import LOWER, Benchmark, Graded, Item, by, macro, mean
from lsg_jax.eval.intervals import change_intervals, items_of, resamples, score_intervals
from lsg_jax.eval.registry import BENCHMARKS
from lsg_jax.eval.statistics import PairedTest, interval, paired_test, resample_weights, wilson


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


def test_all_right_and_all_wrong_have_wilsons_interval():
    """None of 30 by the closed form z^2 / (n + z^2), in percent; in points (MME) scaled; other scores keep their resamples."""
    z = norm.ppf(0.975)
    bound = lambda count: z**2 / (count + z**2)
    assert wilson(0, 30) == pytest.approx((0, bound(30)), abs=1e-12) and bound(30) == pytest.approx(0.1135, abs=1e-4)
    items = [Item(str(i), "?", ("yes",), fields={"kind": "ab"[i % 3 == 0]}) for i in range(30)]
    score = np.array([item.fields["kind"] == "a" for item in items], float)  # all of a, none of b
    graded = Graded(items, ["yes"] * 30, score, np.ones((1, 30)))

    def metrics(found):
        parts = {f"kind: {name}": value for name, value in by(found, "kind").items()}
        points = 20 * parts["kind: a"]
        return {"all": mean(found), **parts, "kind: a: points": points, "yes": 0 * mean(found) + 100.0} | {
            f"{name}{LOWER}": 100.0 - value for name, value in parts.items()
        }

    made = Benchmark("made", None, None, None, metrics, {})
    resampled = metrics(replace(graded, weight=resamples(made, items)))
    found = score_intervals(made, graded, resampled)
    assert found["all"] == interval(resampled["all"]) and found["all"][0] < 200 / 3 < found["all"][1]
    assert found["kind: a"] == pytest.approx((100 - 100 * bound(20), 100))
    assert found["kind: b"] == pytest.approx((0, 100 * bound(10)))
    assert found["kind: a: points"] == pytest.approx((2000 - 2000 * bound(20), 2000))
    assert found[f"kind: a{LOWER}"] == pytest.approx((0, 100 * bound(20)))
    assert found[f"kind: b{LOWER}"] == pytest.approx((100 - 100 * bound(10), 100))
    assert found["yes"] == (100, 100)  # the answers being right or wrong does not decide it
    pairs = replace(made, unit="pair")  # two questions about an image count once
    of_pairs = [replace(item, fields={**item.fields, "pair": f"{item.fields['kind']}{i // 6}"}) for i, item in enumerate(items)]
    graded = replace(graded, items=of_pairs)
    found = score_intervals(pairs, graded, metrics(replace(graded, weight=resamples(pairs, of_pairs))))
    assert found["kind: b"] == pytest.approx((0, 100 * bound(5)))


def test_a_change_of_every_unit_is_no_certainty():
    """From all wrong to all right: Wilson's interval of all rising, scaled from a fall to a rise of all; 4 are enough."""
    for name, units in (("gqa", 1), ("gqa", 3), ("gqa", 4), ("gqa", 30)):
        items = [Item(f"{i}", "?", ("yes",), fields={"image": str(i // 2)}) for i in range(2 * units)]
        graded = Graded(items, ["yes"] * len(items), np.ones(len(items)), np.ones((1, len(items))))
        rise = {"accuracy": np.full(1000, 100.0)}
        low, high = change_intervals(BENCHMARKS[name], graded, rise)["accuracy"]
        assert high == 100 and low == pytest.approx(200 * binomtest(units, units).proportion_ci(method="wilson").low - 100)
        assert (low > 0) == (units > 3)
        fall = change_intervals(BENCHMARKS[name], graded, {"accuracy": -rise["accuracy"]})["accuracy"]
        assert fall == pytest.approx((-high, -low))
    none = {"accuracy": np.zeros(1000)}
    assert change_intervals(BENCHMARKS["gqa"], graded, none)["accuracy"] == (0, 0)
    some = {"accuracy": np.linspace(-1, 1, 1000)}
    assert change_intervals(BENCHMARKS["gqa"], graded, some)["accuracy"] == interval(some["accuracy"])


def test_questions_about_a_single_image_have_an_interval():
    """Its resamples are all the same, whatever share of its questions is answered rightly."""
    items = [Item(str(i), "?", ("yes",), fields={"image": "x"}) for i in range(3)]
    graded = Graded(items, ["yes"] * 3, np.array([1.0, 1, 0]), np.ones((1, 3)))
    weight = resamples(BENCHMARKS["gqa"], items)
    weight[1] = 3  # 2/3 under other weights differs by rounding
    resampled = BENCHMARKS["gqa"].metrics(replace(graded, weight=weight))
    z2, share = norm.ppf(0.975) ** 2, 2 / 3
    middle, reach = (share + z2 / 2) / (1 + z2), np.sqrt(z2 * share * (1 - share) + z2**2 / 4) / (1 + z2)
    expected = (100 * (middle - reach), 100 * (middle + reach))
    assert score_intervals(BENCHMARKS["gqa"], graded, resampled)["accuracy"] == pytest.approx(expected)
    for right, count in ((0, 1), (1, 1), (3, 10), (10, 10)):
        found = binomtest(right, count).proportion_ci(method="wilson")
        assert wilson(right, count) == pytest.approx((found.low, found.high))


def test_precision_recall_and_f1_of_all_right_or_all_wrong_have_an_interval_too():
    """F1 is POPE's official score: none or all of 30 are no certainty."""
    fields = lambda i: {"category": ("random", "popular", "adversarial")[i % 3], "image": str(i)}
    items = [Item(str(i), "?", (("yes", "no")[i % 2],), fields=fields(i)) for i in range(30)]
    bound = wilson(0, 30)[1]
    for right in (0, 1):
        read = [item.answers[0] if right else {"yes": "no", "no": "yes"}[item.answers[0]] for item in items]
        graded = Graded(items, read, np.full(30, float(right)), np.ones((1, 30)))
        resampled = BENCHMARKS["pope"].metrics(replace(graded, weight=resamples(BENCHMARKS["pope"], items)))
        found = score_intervals(BENCHMARKS["pope"], graded, resampled)
        expected = pytest.approx((100 - 100 * bound, 100) if right else (0, 100 * bound))
        assert [found[name] for name in ("f1_macro", "f1", "precision", "recall")] == [expected] * 4


def test_the_questions_behind_a_metric_are_counted_whatever_its_name_looks_like():
    made = lambda **fields: Item(str(fields), "?", ("yes",), fields=fields)
    pairs = [("VD", "0", "easy"), ("VD", "1", "easy"), ("VS", "2", "hard")]
    cases = {
        "mathvista": [made(task="t", **{f"skill: {name}": "yes"}) for name in ("arithmetic reasoning", "logical reasoning")],
        "hallusionbench": [made(category=category, **{part: pair}) for category, pair, part in pairs],
        "amber": [made(dimension=name) for name in ("generative", "generative", "existence", "existence", "relation")],
        "mmbench": [made(question=name, rotation=turn) for name in "ab" for turn in "012"],
        "mme": [made(category=name) for name in ("OCR", "count", "code_reasoning")],
    }
    counts = {
        "mathvista": {"accuracy": 2, "task: t": 2, "skill: logical reasoning": 1},
        "hallusionbench": {"aAcc": 3, "easy: qAcc": 2, "hard: qAcc": 1, "VS: fAcc": 1},
        "amber": {f"hal{LOWER}": 2, "cover": 2, "f1": 3, "existence: f1": 2, "amber_score": 5},
        "mmbench": {"plain": 2, "circular": 6},
        "mme": {"perception": 2, "cognition": 1, "total": 3, "count: acc": 1},
    }
    for name, items in cases.items():
        assert {metric: len(items_of(BENCHMARKS[name], items, metric)) for metric in counts[name]} == counts[name]
