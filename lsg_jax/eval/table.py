"""Evaluation results as plain text, one line per metric."""

from __future__ import annotations

from collections.abc import Mapping

from lsg_jax.eval.results import BASE, BenchmarkResult, Estimate


def table(benchmarks: Mapping[str, BenchmarkResult]) -> str:
    """The metrics of every benchmark by name; `*` marks the official score, and the title says if there is none.

    With one method beside the base model, both scores are shown; with several, only what each changes.
    """
    return "\n\n".join(_benchmark(name, found) for name, found in benchmarks.items())


def _benchmark(name: str, found: BenchmarkResult) -> str:
    seeds = {name for over in found.over_seeds.values() for name in over.seeds}
    methods = {m: scores for m, scores in found.methods.items() if m not in seeds}
    changes = {m: scores for m, scores in found.change.items() if m not in seeds}
    over_seeds = found.over_seeds
    if len(changes) + len(over_seeds) > 1:  # scores of several methods would not fit on a screen
        methods = {BASE: methods[BASE]}
    headings = [f"{m} [95 %]" for m in methods] + [f"{m}: change [95 %]" for m in changes]
    rows = [["metric", "majority", *headings, *(f"{m}: mean change [95 %] ± over seeds" for m in over_seeds)]]
    for metric, majority in found.majority.items():
        rows.append(
            [
                metric + (" *" if metric == found.score else ""),
                _value(majority),
                *(_estimate(scores[metric]) for scores in methods.values()),
                *(_estimate(scores[metric], sign="+") for scores in changes.values()),
                *(f"{_estimate(of.change[metric], sign='+')} ± {_value(of.deviation[metric])}" for of in over_seeds.values()),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = [
        [cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        for row in rows
    ]
    lines = ["  ".join(row) for row in aligned]
    said = [*found.lacks, *([found.note] if found.note else [])]
    return "\n".join([_title(name, found), *said, *lines, *_by_seed(found), *_unread(found), *_tests(found)])


def _title(name: str, found: BenchmarkResult) -> str:
    title = f"{name}: {found.questions} questions, protocol {found.protocol}"
    if found.questions > found.of:
        return f"{title}; the official file has {found.of}: no official score"
    if found.partial:
        return f"{title}; PARTIAL, {found.questions} of {found.of}: no official score"
    return title + (f"; * official score: {found.score}" if found.score else "")


def _by_seed(found: BenchmarkResult) -> list[str]:
    """The scores of each seed: the official one, or the first that there is."""
    metric, lines = found.shown(next(iter(found.methods))), []
    for method, of in found.over_seeds.items():
        each = ", ".join(_value(found.methods[name][metric].value) for name in of.seeds)
        mean = f"{_estimate(of.methods[metric])} ± {_value(of.deviation[metric])}"
        lines.append(f"{method}, {metric}: mean {mean} of {len(of.seeds)} seeds, {each}")
    return lines


def _unread(found: BenchmarkResult) -> list[str]:
    counts = ", ".join(f"{method} {count}" for method, count in found.unread.items() if count)
    return [f"outputs that the matcher found no answer in: {counts}"] if counts else []


def _tests(found: BenchmarkResult) -> list[str]:
    return [
        f"{method} against base: {test.better} questions better, {test.worse} worse, p = {test.p_value:.3g}"
        for method, test in found.paired_test.items()
    ]


def _value(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.2f}"


def _estimate(at: Estimate, sign: str = "") -> str:
    return f"{_value(at.value, sign)} [{_value(at.low, sign)}, {_value(at.high, sign)}]"
