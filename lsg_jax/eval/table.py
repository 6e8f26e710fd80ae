"""A result as plain text, a line a metric."""

from __future__ import annotations

from typing import Any

COLUMNS = ("metric", "majority", "base [95 %]", "gated [95 %]", "change [95 %]")


def table(result: dict[str, Any]) -> str:
    """The metrics of every benchmark of `eval.runner`'s result; the official score is marked `*`, or said to be missing."""
    return "\n\n".join(_benchmark(name, entry) for name, entry in result["benchmarks"].items())


def _benchmark(name: str, entry: dict[str, Any]) -> str:
    rows = [COLUMNS]
    for metric, base in entry["base"].items():
        rows.append(
            (
                metric + (" *" if metric == entry["score"] else ""),
                _value(entry["majority"][metric]),
                _interval(base),
                _interval(entry["gated"][metric]) if "gated" in entry else "",
                _interval(entry["change"][metric], sign="+") if "change" in entry else "",
            )
        )
    used = [i for i in range(len(COLUMNS)) if any(row[i] for row in rows[1:])]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    lines = ["  ".join(row[i].ljust(widths[i]) if i == 0 else row[i].rjust(widths[i]) for i in used) for row in rows]
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
    if "paired_test" not in entry:
        return []
    found = entry["paired_test"]
    return [f"gated against base: {found['better']} questions better, {found['worse']} worse, p = {found['p_value']:.3g}"]


def _value(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.2f}"


def _interval(entry: dict[str, float | None], sign: str = "") -> str:
    return f"{_value(entry['value'], sign)} [{_value(entry['low'], sign)}, {_value(entry['high'], sign)}]"
