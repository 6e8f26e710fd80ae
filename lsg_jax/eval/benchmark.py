"""A benchmark: rows -> items, prompt, match, metrics. One file each in `benchmarks/`; nothing here runs a model.

A metric is a function of item weights. With all weights 1 it gives the score; with the counts of a resample with replacement
it gives the score of that resample, so a thousand bootstrap resamples are one call.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from typing import Protocol as Interface

import numpy as np
from PIL import Image

from lsg_jax.config import BenchmarkKind, Protocol
from lsg_jax.data.parquet import named_files
from lsg_jax.errors import InputError


class ImageSource(Interface):
    """An image that is read on demand."""

    def read(self) -> bytes | Image.Image:
        """The encoded file, or the decoded image. Raises InputError that names the file and row."""
        ...


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        id: unique within the benchmark, the same in every run.
        question: as in the file.
        answers: accepted answers; for multiple choice one letter, for yes/no questions `yes` or `no`.
        choices: texts of the choices, A first; empty if the question lists them itself or there are none.
        images: in the order of the tags `<image>` in its prompt, if it has any; () for a text-only question.
        fields: values for grouping and prompts (category, task, source, hint, ...); the runner does not interpret them.
        data: what else the benchmark's own functions need; it is not written to files.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()
    images: tuple[ImageSource, ...] = ()
    fields: Mapping[str, str] = field(default_factory=dict)
    data: Any = None


@dataclass(frozen=True)
class Match:
    """How the matcher read an output (None: it found no answer), and its score in [0, 1].

    Attributes:
        counts: name -> number, for metrics that are no mean of scores (words of a caption, objects in it, ...).
    """

    parsed: str | None
    score: float
    counts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Graded:
    """N items with their scores, as columns.

    Attributes:
        parsed: how the matcher read each output.
        score: float64 [N], in [0, 1].
        weight: float64 [R, N], the count of each item in each of R resamples; ones [1, N] for the score itself.
        counts: `Match.counts` of each output; () if there are none.
    """

    items: Sequence[Item]
    parsed: Sequence[str | None]
    score: np.ndarray
    weight: np.ndarray
    counts: Sequence[Mapping[str, float]] = ()

    def total(self, name: str) -> np.ndarray:
        """float64 [R]: the sum of a count over all items; outputs without it count 0."""
        return self.weight @ np.array([each.get(name, 0.0) for each in self.counts or [{}] * len(self.items)])

    def where(self, name: str, value: str) -> np.ndarray:
        """bool [N]: which items have `value` in the field `name`."""
        return np.array([item.fields.get(name) == value for item in self.items], bool)

    def values(self, name: str) -> list[str]:
        """The distinct values of a field, sorted."""
        return sorted({item.fields[name] for item in self.items if name in item.fields})


Metrics = dict[str, np.ndarray]
"""name -> float64 [R], in percent unless the benchmark says otherwise. NaN where a resample has no item of a group."""

LOWER = " (lower is better)"
"""Ends the names of metrics of which a smaller value is the better one, so that every table says so."""


NEITHER = ("yes_ratio", "mean_length")
"""Metrics that describe answers: neither more nor less of them is better."""


def has_better(metric: str) -> bool:
    """Whether a change of a metric, also of a part of the questions (`random: yes_ratio`), is for the better or the worse."""
    return metric.split(": ")[-1] not in NEITHER


def gain(metric: str, change: float) -> float:
    """The change of a metric, positive where it is for the better."""
    return -change if metric.endswith(LOWER) else change


def mean(graded: Graded, mask: np.ndarray | None = None, *, score: np.ndarray | None = None) -> np.ndarray:
    """Weighted mean score in percent over the items of `mask` (all if None): float64 [R].

    Args:
        score: float64 [N] instead of `graded.score`.
    """
    weight = graded.weight if mask is None else graded.weight * mask
    values = graded.score if score is None else score
    with np.errstate(invalid="ignore"):
        return 100.0 * (weight @ values) / weight.sum(-1)


def by(graded: Graded, name: str) -> Metrics:
    """Mean score in percent for every value of the field `name`: {value: [R]}."""
    return {value: mean(graded, graded.where(name, value)) for value in graded.values(name)}


def macro(groups: Metrics) -> np.ndarray:
    """Unweighted mean over groups: [R]."""
    return np.mean(list(groups.values()), axis=0)


def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """100 * part / whole: [R]; NaN where the whole is 0."""
    return np.divide(100.0 * part, whole, out=np.full(len(whole), np.nan), where=whole > 0)


GroupSize = Callable[[Item], int]
"""How many items the group of an item has in the official file."""


def is_whole(items: Sequence[Item], name: str, size: GroupSize) -> np.ndarray:
    """bool [N]: which items are in a group, by the field `name`, of which all members are among the items."""
    found = Counter(item.fields.get(name) for item in items)
    return np.array([name in item.fields and found[item.fields[name]] >= size(item) for item in items], bool)


def mean_of_groups(graded: Graded, name: str, size: GroupSize, mask: np.ndarray | None = None) -> np.ndarray:
    """Percent of the whole groups, by the field `name`, in which every item is right: float64 [R].

    Groups that lost a member are not counted. The items of a group must have the same weight (`Benchmark.unit`).
    """
    wrong = {item.fields.get(name) for item, score in zip(graded.items, graded.score, strict=True) if score < 1}
    right = np.array([item.fields.get(name) not in wrong for item in graded.items], np.float64)
    share = is_whole(graded.items, name, size) / np.array([size(item) if name in item.fields else 1 for item in graded.items])
    return mean(graded, share if mask is None else share * mask, score=right)


@dataclass(frozen=True)
class Benchmark:
    """One test set and how it is scored under each protocol.

    Attributes:
        name: as in `--benchmark NAME=PATH`.
        read: PATH of the command line -> items, in the order of the file. Raises InputError that names the missing column, an
            unknown category, a duplicate id, or an answer that is not among the choices. What the file lacks of the official
            one is no error: the run is partial.
        prompt: (item, protocol) -> the user's turn; with tags `<image>` only where the question itself has them.
        match: (item, output, protocol) -> how the output is read, and its score.
        metrics: all aggregates that are reported anywhere, whatever the protocol.
        official: protocol -> name of the metric that is the official score. A protocol without rules for this benchmark is left
            out; the rules of `paper` are used then, and the result says so.
        kind: what it is about, for methods with settings for each kind: hallucination, or vision-centric where the papers of
            these methods name it so; the others are general.
        size: rows of the official file; None: a file of any size is complete (own questions).
        groups: field -> its values in the official file. A run that lacks one is partial, and its result names it.
        whole: field -> size of the groups that its equal values make (pairs). A run that has only a part of one is partial.
        files: PATH -> the files that are read, for the digests of the result.
        behind: metric -> whether it is about an item, for metrics of some items whose name names no field or value of these.
        points: metric -> whether it counts points, not percent.
        note: items -> how this scoring differs from the owner's, or on which files it depends; "" if there is nothing to say.
        unit: field; items of equal value are resampled together because they are not independent (several questions about one
            image). None: each item is a unit.
        guess_by: field; the majority baseline guesses the most frequent answer among items of equal value. None: among all.
        task: field with the kind of question, for tables by task; None: all are of one kind.
        max_new_tokens: protocol -> its own limit, where it has one; `eval.max_new_tokens` overrides it.
    """

    name: str
    read: Callable[[str], list[Item]]
    prompt: Callable[[Item, Protocol], str]
    match: Callable[[Item, str, Protocol], Match]
    metrics: Callable[[Graded], Metrics]
    official: Mapping[Protocol, str]
    kind: BenchmarkKind = "general"
    size: int | None = None
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    whole: Mapping[str, GroupSize] = field(default_factory=dict)
    files: Callable[[str], Sequence[Path]] = named_files
    behind: Mapping[str, Callable[[Item], bool]] = field(default_factory=dict)
    points: Callable[[str], bool] = lambda metric: False
    note: Callable[[Sequence[Item]], str] = lambda items: ""
    unit: str | None = None
    guess_by: str | None = None
    task: str | None = None
    max_new_tokens: Mapping[Protocol, int] = field(default_factory=dict)


def check_unique(items: Sequence[Item], where: str) -> None:
    """Raises InputError if two items have the same id."""
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise InputError(f"{where}: id {item.id} occurs more than once")
        seen.add(item.id)


def check_values(found: Iterable[Any], expected: Iterable[str], *, what: str, where: str) -> None:
    """Raises InputError that names the values of a column that are not among the expected ones."""
    found, expected = set(map(str, found)), set(expected)
    if unknown := sorted(found - expected):
        raise InputError(f"{where}: unknown {what} {', '.join(unknown)[:200]}; known: {', '.join(sorted(expected))}")
