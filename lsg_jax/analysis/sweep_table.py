"""Results of a sweep as rows and as text: scores by task, layer and coefficients, against the base model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lsg_jax.eval.benchmark import Metrics
from lsg_jax.eval.best_cells import WHERE_WORDS, WHICH, extreme_layer, where_words
from lsg_jax.eval.intervals import Interval, change_intervals, items_of, resamples, score_intervals
from lsg_jax.eval.runner import Asked, grade

Row = dict[str, Any]

NO_VALUE = "no question of this task, or of a part of it, was asked, or no answer has what it is a share of"


class Grader:
    """Scores the cells of one benchmark and their change over the base model.

    Args:
        base: outputs of the base model.
    """

    def __init__(self, name: str, test: Asked, base: Sequence[str]):
        self._name, self._test = name, test
        self._weight = resamples(test.benchmark, test.items)
        self._seen: dict[tuple[str, ...], tuple[Metrics, Metrics]] = {}
        self._base = self._metrics(base)
        self._of_base = grade(test, base)
        self._base_intervals = score_intervals(test.benchmark, self._of_base, self._base[1])
        self._questions = {task: len(items_of(test.benchmark, test.items, task)) for task in self._base[0]}

    def base_rows(self) -> list[Row]:
        """`{benchmark, task, value, low, high, questions}` for each task of the base model, and `reason` if value is null."""
        point = self._base[0]
        return [self._row(task, value=point[task], bounds=self._base_intervals[task]) for task in point]

    def cell_rows(self, layer: int, coefficients: Sequence[float], outputs: Sequence[str]) -> list[Row]:
        """`{benchmark, task, layer, coefficients, value, change, low, high, questions}` for each task.

        `low` and `high` are the interval of the change. Units: percent and percentage points, or those of the benchmark's
        metric.
        """
        (base, base_resampled), (point, resampled) = self._base, self._metrics(outputs)
        differences = {task: resampled[task] - base_resampled[task] for task in point}
        bounds = change_intervals(self._test.benchmark, self._of_base, differences)
        place = {"layer": layer, "coefficients": list(coefficients)}
        return [
            self._row(
                task,
                **place,
                value=point[task],
                change=point[task] - base[task],
                bounds=bounds[task],
            )
            for task in point
        ]

    def _row(self, task: str, *, bounds: Interval, **numbers: Any) -> Row:
        low, high = bounds
        row: Row = {"benchmark": self._name, "task": task}
        row |= {name: _number(value[0]) if isinstance(value, np.ndarray) else value for name, value in numbers.items()}
        row |= {"low": _number(low), "high": _number(high), "questions": self._questions[task]}
        return row if row["value"] is not None else row | {"reason": NO_VALUE}

    def _metrics(self, outputs: Sequence[str]) -> tuple[Metrics, Metrics]:
        """The metrics, and those of the resamples. Cells with equal outputs are graded once."""
        key = tuple(outputs)
        if key not in self._seen:
            graded, metrics = grade(self._test, outputs), self._test.benchmark.metrics
            self._seen[key] = metrics(graded), metrics(replace(graded, weight=self._weight))
        return self._seen[key]


def table(result: Mapping[str, Any]) -> str:
    """The layers and coefficients with the greatest and the smallest change, for each task of sweep.json."""
    return "\n\n".join(_benchmark(name, entry, result) for name, entry in result["benchmarks"].items())


def _benchmark(name: str, entry: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    groups = ", ".join(result["groups"])
    header = ("task", "base [95 %]", "best change [95 %]", "layer", f"coefficients ({groups})")
    lines: list[tuple[str, ...]] = [(*header, "worst change [95 %]", "layer", "coefficients")]
    for base in (row for row in result["base"] if row["benchmark"] == name):
        line = [base["task"], _interval(base["value"], base)]
        for which in WHICH:
            of_task = [row for row in result[which] if (row["benchmark"], row["task"]) == (name, base["task"])]
            found = extreme_layer(of_task, which) if of_task else None
            line += ("-",) * 3 if found is None else (_interval(found["change"], found, sign="+"), *where_words(found))
        lines.append(tuple(line))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [[text.rjust(width) for text, width in zip(line, widths, strict=True)] for line in lines]
    text = ["  ".join((line[0].ljust(widths[0]), *right[1:])) for line, right in zip(lines, aligned, strict=True)]
    cells = len(result["layers"]) * len(result["coefficients"])
    part = f"; PARTIAL, {entry['questions']} of {entry['of']}" if entry["partial"] else ""
    title = f"{name}: {entry['questions']} questions, protocol {entry['protocol']}{part}"
    bias = f"each the best of {cells} cells on the same questions: an upper bound (the worst: a lower one), not what to expect"
    return "\n".join([title, *text, *[bias] * (cells > 1), WHERE_WORDS])


def _interval(value: float | None, row: Mapping[str, Any], sign: str = "") -> str:
    if value is None:
        return "-"
    texts = ("-" if number is None else f"{number:{sign}.2f}" for number in (value, row["low"], row["high"]))
    return "{} [{}, {}]".format(*texts)


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None  # NaN is no JSON
