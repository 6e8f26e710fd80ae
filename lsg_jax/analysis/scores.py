"""Scores by which a study compares methods: one metric of each benchmark, and the criterion that selects a method."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lsg_jax.errors import ConfigError, InputError
from lsg_jax.eval.benchmark import LOWER, Graded, Metrics
from lsg_jax.eval.results import BASE, BenchmarkResult, EvaluationResult
from lsg_jax.eval.runner import Asked

Score = dict[str, Any]
"""`value` in percent or in the unit of the metric; `change` over the base model with its interval `low`, `high`; or null."""


@dataclass(frozen=True)
class Selection:
    """The criterion that selects a method: the metric of one benchmark, or the mean over several.

    Attributes:
        metrics: benchmark -> metric.
    """

    metrics: Mapping[str, str]

    @property
    def name(self) -> str:
        """The benchmark, or `mean`."""
        return "mean" if len(self.metrics) > 1 else next(iter(self.metrics))

    @property
    def metric(self) -> str:
        """The metric, or those in the mean."""
        if len(self.metrics) == 1:
            return next(iter(self.metrics.values()))
        return "mean of " + " and ".join(f"{benchmark} {metric}" for benchmark, metric in self.metrics.items())

    def score(self, result: EvaluationResult, method: str) -> Score:
        """The score of a method.

        Benchmarks in a mean count as independent: the distances of their bounds from the changes add in quadrature.

        Args:
            result: of `eval.runner.evaluate`.

        Raises:
            InputError: a metric has no value under this method.
        """
        scores = {name: _score(result.benchmarks[name], metric, method) for name, metric in self.metrics.items()}
        for name, score in scores.items():
            if score["change"] is None:
                raise InputError(f"{name}: {self.metrics[name]} has no value under {method}: choose another by --select")
        found = list(scores.values())
        mean = lambda of: math.fsum(score[of] for score in found) / len(found)
        change = mean("change")
        bound = lambda of, sign: change + sign * math.hypot(*(score["change"] - score[of] for score in found)) / len(found)
        known = all(None not in score.values() for score in found)
        low, high = (bound("low", -1), bound("high", 1)) if known else (None, None)
        return {"value": mean("value"), "change": change, "low": low, "high": high}


def selection(asked: Mapping[str, Asked], select: str | None) -> Selection:
    """Selection by one benchmark, or by the mean change over all.

    Raises:
        ConfigError: `select` is not among the benchmarks.
        InputError: its metric has no value on these questions, or the mean would mix percentages and points.
    """
    if select is not None and select not in asked:
        raise ConfigError(f"--select {select}: no such benchmark is given; given are {', '.join(asked)}")
    names = list(asked) if select is None else [select]
    metrics = {name: counted_metric(asked[name]) for name in names}
    for name, metric in metrics.items():
        full = float(_all_right(asked[name])[metric][0])
        if not math.isfinite(full):
            raise InputError(f"{name}: {metric} has no value on these questions, so it cannot decide: name another by --select")
        if len(names) > 1 and metric.endswith(LOWER):
            raise InputError(f"{name}: {metric} is in no mean with metrics that should rise: give --select")
        if len(names) > 1 and not math.isclose(full, 100.0):
            raise InputError(
                f"{name}: {metric} is in points up to {full:.0f}, a mean with percentages would be of it alone: give --select"
            )
    return Selection(metrics)


def counted_metric(test: Asked) -> str:
    """The metric that represents a benchmark: its official score, else its first metric."""
    return test.score or next(iter(_all_right(test)))


def score_rows(result: EvaluationResult, asked: Mapping[str, Asked]) -> list[dict[str, Any]]:
    """`{benchmark, metric, method, value, change, low, high}` of every benchmark's counted metric; the base has no change."""
    return [
        {"benchmark": name, "metric": metric, "method": method, **_score(result.benchmarks[name], metric, method)}
        for name, metric in ((name, counted_metric(test)) for name, test in asked.items())
        for method in result.methods
    ]


def _score(found: BenchmarkResult, metric: str, method: str) -> Score:
    if method == BASE:
        return {"value": found.methods[BASE][metric].value, "change": None, "low": None, "high": None}
    change = found.change[method][metric]
    return {"value": found.methods[method][metric].value, "change": change.value, "low": change.low, "high": change.high}


def _all_right(test: Asked) -> Metrics:
    """The metrics of a model that answers every question correctly."""
    count = len(test.items)
    return test.benchmark.metrics(
        Graded(test.items, [item.answers[0] for item in test.items], np.ones(count), np.ones((1, count)))
    )
