"""Intervals of the scores of a benchmark: from resamples, and Wilson's where resamples are all the same and say nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lsg_jax.eval.benchmark import LOWER, Benchmark, Graded, Item, Metrics
from lsg_jax.eval.statistics import interval, resample_weights, wilson

Interval = tuple[float, float]


def resamples(benchmark: Benchmark, items: Sequence[Item]) -> np.ndarray:
    """The weights of the items in resamples, drawn by the benchmark's unit: float64 [R, N]."""
    return resample_weights([_unit(benchmark, item) for item in items])


def score_intervals(benchmark: Benchmark, graded: Graded, resampled: Metrics) -> dict[str, Interval]:
    """95 % intervals of all metrics.

    Resamples of answers that are all right, or all wrong, or of a single unit (a question, or what the benchmark resamples
    together), are all the same, and say nothing of how sure this is. There Wilson's interval stands for the units behind the
    metric, scaled to what the metric is if all answers are wrong and if all are right. A metric of counts, like the share of
    objects that captions name, keeps that of the resamples.

    Args:
        graded: every item with weight one.
        resampled: the metrics under the weights of `resamples`.
    """
    lowest, highest = _extremes(benchmark, graded)
    return {
        name: _bounds(values, lowest[name], highest[name], count_units(benchmark, graded.items, name))
        for name, values in resampled.items()
    }


def change_intervals(benchmark: Benchmark, graded: Graded, resampled: Metrics) -> dict[str, Interval]:
    """95 % intervals of the changes of all metrics against those of another method.

    As for scores, Wilson's interval stands where every unit changed from all wrong to all right or back, or where there is a
    single one: from the fall to the rise of all of them. No change at all keeps an interval of width 0.

    Args:
        graded: of either method, every item with weight one.
        resampled: the differences under the weights of `resamples`.
    """
    found = {name: interval(values) for name, values in resampled.items()}
    if not (certain := [name for name, (low, high) in found.items() if _equal(low, high) and not _equal(low, 0)]):
        return found
    lowest, highest = _extremes(benchmark, graded)
    for name in certain:
        rise = highest[name] - lowest[name]
        found[name] = _bounds(resampled[name], -rise, rise, count_units(benchmark, graded.items, name))
    return found


def _extremes(benchmark: Benchmark, graded: Graded) -> tuple[dict[str, float], dict[str, float]]:
    """All metrics if all answers are wrong, and if all are right, also as they are read: precision and recall count these."""
    right, unread = [item.answers[0] for item in graded.items], [None] * len(graded.items)
    of_none = benchmark.metrics(replace(graded, score=np.zeros_like(graded.score), parsed=unread))
    of_all = benchmark.metrics(replace(graded, score=np.ones_like(graded.score), parsed=right))
    return {name: float(at[0]) for name, at in of_none.items()}, {name: float(at[0]) for name, at in of_all.items()}


def items_of(benchmark: Benchmark, items: Sequence[Item], metric: str) -> list[Item]:
    """The questions behind a metric: as the benchmark says (`Benchmark.behind`), else by the parts of its name.

    `task: Count` or `adversarial: f1` are of those with a field of such a value; where none has it, `skill: algebra` or
    `hard: qAcc` of those with a field of that name; others are of all.
    """
    if metric in benchmark.behind:
        return [item for item in items if benchmark.behind[metric](item)]
    named = {metric, *metric.removesuffix(LOWER).split(": ")}
    by_value = [item for item in items if not named.isdisjoint(item.fields.values())]
    return by_value or [item for item in items if not named.isdisjoint(item.fields)] or list(items)


def count_units(benchmark: Benchmark, items: Sequence[Item], metric: str) -> int:
    """How many units the questions behind a metric are."""
    return len({_unit(benchmark, item) for item in items_of(benchmark, items, metric)})


def _unit(benchmark: Benchmark, item: Item) -> str:
    return item.id if benchmark.unit is None else item.fields[benchmark.unit]


def _bounds(values: np.ndarray, lowest: float, highest: float, units: int) -> Interval:
    low, high = interval(values)
    extreme = _equal(low, lowest) or _equal(low, highest)
    if not _equal(low, high) or lowest == highest or not (extreme or units == 1):
        return low, high
    share = 1.0 if _equal(low, highest) else 0.0 if _equal(low, lowest) else (low - lowest) / (highest - lowest)
    below, above = wilson(units * share, units)
    one, other = (lowest + (highest - lowest) * at for at in (below, above))
    return min(one, other), max(one, other)  # where lower is better, the lowest is the larger number


def _equal(a: float, b: float) -> bool:
    """Whether two numbers in percent are the same up to rounding: resamples of one unit are so."""
    return abs(a - b) < 1e-9
