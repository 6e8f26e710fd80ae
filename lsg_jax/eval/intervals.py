"""Intervals of the scores of a benchmark: from resamples, and Wilson's where all answers are right or all are wrong."""

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

    Resamples of answers that are all right, or all wrong, are all the same, and say nothing of how sure this is. There
    Wilson's interval stands for the units (questions, or what the benchmark resamples together) behind the metric, scaled to
    what the metric is if all answers are wrong and if all are right. A metric that has other parts, like a precision, keeps
    that of the resamples.

    Args:
        graded: every item with weight one.
        resampled: the metrics under the weights of `resamples`.
    """
    zeros, ones = np.zeros_like(graded.score), np.ones_like(graded.score)
    lowest, highest = (benchmark.metrics(replace(graded, score=score)) for score in (zeros, ones))
    return {
        name: _bounds(values, float(lowest[name][0]), float(highest[name][0]), count_units(benchmark, graded.items, name))
        for name, values in resampled.items()
    }


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
    if low != high or lowest == highest or low not in (lowest, highest):
        return low, high
    below, above = wilson(units if low == highest else 0, units)
    one, other = (lowest + (highest - lowest) * share for share in (below, above))
    return min(one, other), max(one, other)  # where lower is better, the lowest is the larger number
