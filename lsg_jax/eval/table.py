"""A result as plain text, a line a metric."""

from __future__ import annotations

from typing import Any

from lsg_jax.eval.runner import BASE


def table(result: dict[str, Any]) -> str:
    """The metrics of every benchmark of `eval.runner`'s result; the official score is marked `*`, or said to be missing.

    Beside one method the base has both scores; of several, each is shown by what it changes.
    """
    return "\n\n".join(_benchmark(name, entry) for name, entry in result["benchmarks"].items())


def _benchmark(name: str, entry: dict[str, Any]) -> str:
    methods, changed = entry["methods"], entry["change"]
    if len(changed) > 1:  # the width of a screen: of each method what it changes only
        methods = {BASE: methods[BASE]}
    rows = [["metric", "majority", *(f"{m} [95 %]" for m in methods), *(f"{m}: change [95 %]" for m in changed)]]
    for metric, majority in entry["majority"].items():
        rows.append(
            [
                metric + (" *" if metric == entry["score"] else ""),
                _value(majority),
                *(_interval(found[metric]) for found in methods.values()),
                *(_interval(found[metric], sign="+") for found in changed.values()),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = [
        [cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        for row in rows
    ]
    lines = ["  ".join(row) for row in aligned]
    return "\n".join([_title(name, entry), *lines, *_unread(entry), *_test(entry)])


def _title(name: str, entry: dict[str, Any]) -> str:
    title = f"{name}: {entry['questions']} questions, protocol {entry['protocol']}"
    if entry["questions"] > entry["of"]:
        return f"{title}; the official file has {entry['of']}: no official score"
    if entry["partial"]:
        return f"{title}; PARTIAL, {entry['questions']} of {entry['of']}: no official score"
    return title + (f"; * official score: {entry['score']}" if entry["score"] else "")


def _unread(entry: dict[str, Any]) -> list[str]:
    counts = ", ".join(f"{method} {count}" for method, count in entry["unread"].items() if count)
    return [f"outputs that the matcher found no answer in: {counts}"] if counts else []


def _test(entry: dict[str, Any]) -> list[str]:
    return [
        f"{method} against base: {found['better']} questions better, {found['worse']} worse, p = {found['p_value']:.3g}"
        for method, found in entry["paired_test"].items()
    ]


def _value(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.2f}"


def _interval(entry: dict[str, float | None], sign: str = "") -> str:
    return f"{_value(entry['value'], sign)} [{_value(entry['low'], sign)}, {_value(entry['high'], sign)}]"
