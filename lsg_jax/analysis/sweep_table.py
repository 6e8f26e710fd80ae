"""Results of a sweep as rows and as text: scores by task, layer and coefficients, against the base model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lsg_jax.eval.benchmark import Item, Metrics, gain
from lsg_jax.eval.runner import Asked, grade
from lsg_jax.eval.statistics import interval, resample_weights

Row = dict[str, Any]

NO_VALUE = "no question of this task, or of a part of it, was asked"


class Grader:
    """Scores the cells of one benchmark and their change over the base model.

    Args:
        base: outputs of the base model.
    """

    def __init__(self, name: str, test: Asked, base: Sequence[str]):
        unit = test.benchmark.unit
        self._name, self._test = name, test
        self._weight = resample_weights([item.id if unit is None else item.fields[unit] for item in test.items])
        self._seen: dict[tuple[str, ...], tuple[Metrics, Metrics]] = {}
        self._base = self._metrics(base)
        self._questions = {task: count_questions(test.items, task) for task in self._base[0]}

    def base_rows(self) -> list[Row]:
        """`{benchmark, task, value, low, high, questions}` for each task of the base model, and `reason` if value is null."""
        point, resampled = self._base
        return [self._row(task, value=point[task], interval_of=resampled[task]) for task in point]

    def cell_rows(self, layer: int, coefficients: Sequence[float], outputs: Sequence[str]) -> list[Row]:
        """`{benchmark, task, layer, coefficients, value, change, low, high, questions}` for each task.

        `low` and `high` are the interval of the change. Units: percent and percentage points, or those of the benchmark's
        metric.
        """
        (base, base_resampled), (point, resampled) = self._base, self._metrics(outputs)
        place = {"layer": layer, "coefficients": list(coefficients)}
        return [
            self._row(
                task,
                **place,
                value=point[task],
                change=point[task] - base[task],
                interval_of=resampled[task] - base_resampled[task],
            )
            for task in point
        ]

    def _row(self, task: str, *, interval_of: np.ndarray, **numbers: Any) -> Row:
        low, high = interval(interval_of)
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


def count_questions(items: Sequence[Item], task: str) -> int:
    """Number of questions behind a metric such as `task: Count` or `adversarial: f1`: those with a field it names, or all."""
    named = set(task.split(": "))
    return sum(not named.isdisjoint(item.fields.values()) for item in items) or len(items)


def table(result: Mapping[str, Any]) -> str:
    """The layer and coefficients with the greatest change, for each task of sweep.json."""
    return "\n\n".join(_benchmark(name, entry, result) for name, entry in result["benchmarks"].items())


def _benchmark(name: str, entry: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    groups = ", ".join(result["groups"])
    lines = [("task", "base [95 %]", "best change [95 %]", "layer", f"coefficients ({groups})")]
    for base in (row for row in result["base"] if row["benchmark"] == name):
        of_task = [row for row in result["best"] if (row["benchmark"], row["task"]) == (name, base["task"])]
        found = max(of_task, key=lambda row: gain(row["task"], row["change"]), default=None)
        where = ("-",) * 3
        if found is not None:
            coefficients = ", ".join(f"{value:g}" for value in found["coefficients"])
            where = (_interval(found["change"], found, sign="+"), str(found["layer"]), coefficients)
        lines.append((base["task"], _interval(base["value"], base), *where))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [[text.rjust(width) for text, width in zip(line, widths, strict=True)] for line in lines]
    text = ["  ".join((line[0].ljust(widths[0]), *right[1:])) for line, right in zip(lines, aligned, strict=True)]
    cells = len(result["layers"]) * len(result["coefficients"])
    part = f"; PARTIAL, {entry['questions']} of {entry['of']}" if entry["partial"] else ""
    title = f"{name}: {entry['questions']} questions, protocol {entry['protocol']}{part}"
    bias = f"each the best of {cells} cells on the same questions: an upper bound, not what to expect on others"
    return "\n".join([title, *text, bias])


def _interval(value: float | None, row: Row, sign: str = "") -> str:
    numbers = [value, row["low"], row["high"]]
    return "-" if None in numbers else "{} [{}, {}]".format(*(f"{number:{sign}.2f}" for number in numbers))


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None  # NaN is no JSON
