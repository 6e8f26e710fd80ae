"""One table of all evaluations: benchmarks and tasks down, methods and runs across."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from lsg_jax.eval.benchmark import gain, has_better
from lsg_jax.eval.results import BASE, EvaluationResult
from lsg_jax.report.drawing import Row, interval_text, plain
from lsg_jax.report.gains import METHODS, rows_of_gains, score_text

MAX_SENTENCES = 3

Key = tuple[Any, ...]
"""What a row of the table measures: benchmark, metric, protocol, and how many questions of how many."""


@dataclass(frozen=True)
class Cell:
    """A score with its interval, the difference to the base, and whether that is for the better ("up"), "down" or ""."""

    score: str
    change: str = ""
    clear: str = ""


@dataclass(frozen=True)
class Pivot:
    """A part of the page. `rows` are (label, majority answer, a cell for each of `columns` or None)."""

    kind: ClassVar[str] = "pivot"
    caption: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, str, Sequence[Cell | None]]]


@dataclass
class _Column:
    method: str
    run: str
    backbone: str
    values: dict[Key, float | None] = field(default_factory=dict)
    cells: dict[Key, Cell] = field(default_factory=dict)


def pivot(caption: str, evaluations: Sequence[tuple[str, EvaluationResult]], *, every_metric: bool = False) -> Pivot:
    """The table of evaluations, each with the name of its run. Base models that gave the same scores share a column.

    Args:
        every_metric: a row for each metric, those of tasks among them, instead of one for each benchmark.
    """
    columns: list[_Column] = []
    labels: dict[Key, str] = {}
    majority: dict[Key, str] = {}
    for run, result in evaluations:
        own: dict[str, _Column] = {}
        for row in rows_of_gains(result, every_metric=every_metric):
            benchmark = result.benchmarks[row["benchmark"]]
            key = (row["benchmark"], row["metric"], benchmark.protocol, benchmark.questions, benchmark.of)
            part = f" ({benchmark.questions} of {benchmark.of})" if benchmark.partial else ""
            labels[key] = f"{row['benchmark']}, {row['metric']}{part}"
            majority[key] = plain(benchmark.majority.get(row["metric"]))
            column = own.setdefault(row["method"], _Column(row["method"], run, result.backbone))
            column.values[key] = row["value"]
            column.cells[key] = _cell(row, score_text(row))
        for column in own.values():
            _add(columns, column)
    # several protocols of a benchmark in one table are told apart
    protocols = {(key[0], key[2]) for key in labels}
    several = {name for name, _ in protocols if sum(name == other for other, _ in protocols) > 1}
    named = {key: label + (f", protocol {key[2]}" if key[0] in several else "") for key, label in labels.items()}
    rows = [(named[key], majority[key], [column.cells.get(key) for column in columns]) for key in labels]
    return Pivot(caption, _names(columns), rows)


def found_in(evaluations: Sequence[tuple[str, EvaluationResult]]) -> list[str]:
    """What the methods change, in a sentence for each change, or in one for all."""
    changes = [(run, row) for run, result in evaluations for row in rows_of_gains(result) if row["change"] is not None]
    if len(changes) > MAX_SENTENCES:
        clear = [_clear(row) for _, row in changes]
        up, down = clear.count("up"), clear.count("down")
        return [f"Of {len(changes)} changes over the base model {up} are gains, {down} losses, and {clear.count('')} unclear."]
    verdicts = {"up": ", a gain", "down": ", a loss", "": ": no clear change, the interval covers 0"}
    return [
        f"{METHODS.get(row['method'], row['method'])}{f' ({run})' if len(evaluations) > 1 else ''} changes {row['benchmark']}, "
        f"{row['metric']}, by {interval_text(row['change'], row['low'], row['high'])} to {plain(row['value'])}"
        f"{verdicts[_clear(row)] if row['low'] is not None else ''}."
        for run, row in changes
    ]


def _clear(row: Row) -> str:
    if row["low"] is None or row["high"] is None or not has_better(row["metric"]):
        return ""
    low, high = sorted(gain(row["metric"], bound) for bound in (row["low"], row["high"]))
    return "up" if low > 0 else "down" if high < 0 else ""


def _cell(row: Row, score: str) -> Cell:
    if row["method"] == BASE:
        return Cell(score)
    return Cell(score, interval_text(row["change"], row["low"], row["high"]), _clear(row))


def _add(columns: list[_Column], column: _Column) -> None:
    """Adds a column; a base joins one of the same weights that agrees wherever both were measured."""
    for other in columns if column.method == BASE else []:
        common = other.values.keys() & column.values.keys()
        same = other.method == BASE and other.backbone == column.backbone
        if same and all(other.values[key] == column.values[key] for key in common):
            other.values |= column.values
            other.cells |= column.cells
            return
    columns.append(column)


def _names(columns: Sequence[_Column]) -> list[str]:
    """The method, with the run where several have it."""
    methods = [column.method for column in columns]
    return [
        METHODS.get(column.method, column.method) + (f", {column.run}" if methods.count(column.method) > 1 else "")
        for column in columns
    ]
