"""What a benchmark is: rows -> items, prompt, match, metrics. One file each in `benchmarks/`; nothing here runs a model.

A metric is a function of item weights, not of a list of items. With all weights one it is the score; with the counts of a
resample with replacement it is the bootstrap's, and a thousand resamples are one call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from typing import Protocol as Interface

import numpy as np
from PIL import Image

from lsg_jax.config import Protocol
from lsg_jax.errors import InputError


class ImageSource(Interface):
    """An image that is read when it is needed."""

    def read(self) -> bytes | Image.Image:
        """The encoded file, or the image itself. Raises InputError that names the file and row."""
        ...


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        id: unique within the benchmark, the same in every run.
        question: as the file states it.
        answers: accepted answers; of multiple choice the one letter, of yes/no `yes` or `no`.
        choices: texts of the choices, A first; empty where the question itself lists them or there are none.
        image: None for a question of text only.
        fields: what items are grouped by and prompts are made of (category, task, source, hint, ...); unknown to the runner.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()
    image: ImageSource | None = None
    fields: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Match:
    """How an output was read (None: not at all) and what it scores, in [0, 1]."""

    parsed: str | None
    score: float


@dataclass(frozen=True)
class Graded:
    """Items with what they scored, as columns.

    Attributes:
        items: the N items.
        parsed: what each output was read as.
        score: float64 [N], in [0, 1].
        weight: float64 [R, N], how often each item counts; ones [1, N] for the score itself.
    """

    items: Sequence[Item]
    parsed: Sequence[str | None]
    score: np.ndarray
    weight: np.ndarray

    def where(self, name: str, value: str) -> np.ndarray:
        """bool [N], the items whose field `name` is `value`."""
        return np.array([item.fields.get(name) == value for item in self.items], bool)

    def values(self, name: str) -> list[str]:
        """The distinct values of a field, sorted."""
        return sorted({item.fields[name] for item in self.items if name in item.fields})


Metrics = dict[str, np.ndarray]
"""name -> float64 [R]; in percent unless the benchmark says otherwise. NaN where a resample has no item of a group."""


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
    """Mean score in percent of every value of the field `name`: {value: [R]}."""
    return {value: mean(graded, graded.where(name, value)) for value in graded.values(name)}


def macro(groups: Metrics) -> np.ndarray:
    """Unweighted mean of groups: [R]."""
    return np.mean(list(groups.values()), axis=0)


@dataclass(frozen=True)
class Benchmark:
    """One test set and how it is scored under each protocol.

    Attributes:
        name: as in `--benchmark NAME=PATH`.
        read: opens what the user points at -> items, in the order of the file. Raises InputError that names the missing column
            or category, a duplicate id, or an answer outside the choices.
        prompt: (item, protocol) -> the user's turn without the image tag.
        match: (item, output, protocol) -> how the output is read and what it scores.
        metrics: every aggregate that somebody reports, whatever the protocol.
        official: protocol -> name of the metric that is *the* score. A protocol that has no rules of its own for this benchmark
            is left out, and then `paper`'s are used and the result says so.
        size: rows of the official file. None: any number is whole (own question files).
        unit: field whose equal values are resampled together, since their items are not independent (images with several
            questions); None: each item alone.
        guess_by: field by which the majority baseline guesses: the most frequent answer among items of equal value; None: among
            all.
        task: field that says what kind of question an item is, for tables by task; None: all are of one.
        max_new_tokens: {protocol: tokens}, the protocol's own limit where it has one; the run's setting goes before it.
    """

    name: str
    read: Callable[[str], list[Item]]
    prompt: Callable[[Item, Protocol], str]
    match: Callable[[Item, str, Protocol], Match]
    metrics: Callable[[Graded], Metrics]
    official: Mapping[Protocol, str]
    size: int | None = None
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
    """Raises InputError unless the distinct values of a column are exactly the expected ones; names those that differ."""
    found, expected = set(map(str, found)), set(expected)
    if missing := sorted(expected - found):
        raise InputError(f"{where}: no rows of {what} {', '.join(missing)}; is this the whole file?")
    if unknown := sorted(found - expected):
        raise InputError(f"{where}: unknown {what} {', '.join(unknown)[:200]}; known: {', '.join(sorted(expected))}")
