"""What every method of an evaluation answered to each question, and which questions it gained or lost against the base."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lsg_jax.errors import InputError
from lsg_jax.eval.benchmark import Benchmark, ImageSource
from lsg_jax.eval.registry import BENCHMARKS, QUESTIONS
from lsg_jax.gating.keys import GROUPS
from lsg_jax.report.pictures import small

Outcome = Literal["gained", "lost", "both right", "both wrong"]
OUTCOMES: tuple[Outcome, ...] = ("gained", "lost", "both right", "both wrong")
"""In the order in which they are shown."""

BASE = "base"
THUMBNAIL_SIDE = 224  # pixels
MAX_IMAGE_BYTES = 600_000
"""Of the images of one benchmark together; the page stays small enough to be sent."""


@dataclass(frozen=True)
class Answered:
    """A method's answer to one question.

    Attributes:
        parsed: what the output was read as; None: nothing.
        score: in [0, 1].
        ratio: mean ratio of the first token group over the gated layers, in this question; None without gates.
    """

    output: str
    parsed: str | None
    score: float
    ratio: float | None


@dataclass(frozen=True)
class Question:
    """One question with the answers of all methods.

    Attributes:
        category: its task within the benchmark, "" where it has none.
        prompt: what the model was asked.
        answers: method -> its answer, `base` first.
    """

    id: str
    category: str
    prompt: str
    reference: tuple[str, ...]
    answers: Mapping[str, Answered]

    def outcome(self, method: str) -> Outcome:
        """How a method did beside the base. Of partial scores the higher one is right, and equal ones unless they are 0."""
        base, score = self.answers[BASE].score, self.answers[method].score
        if score != base:
            return "gained" if score > base else "lost"
        return "both right" if score > 0 else "both wrong"

    @property
    def outcomes(self) -> list[Outcome]:
        """Of each method but the base."""
        return [self.outcome(method) for method in self.answers if method != BASE]

    @property
    def rank(self) -> int:
        """Place among OUTCOMES of what the method that changed most made of it."""
        return min(map(OUTCOMES.index, self.outcomes))


def read_questions(folder: Path, name: str, methods: Sequence[str]) -> list[Question]:
    """The questions of one benchmark in the order of its file.

    Args:
        folder: of the evaluation, with a file `<name>.<method>.jsonl` for each method.
        methods: `base` and at least one other.

    Raises:
        InputError: a file is missing.
        KeyError, TypeError, ValueError: a file is not as `lsg eval` writes it, or does not fit the others.
    """
    task = _benchmark(name).task
    lines = {method: _lines(folder / f"{name}.{method}.jsonl") for method in methods}
    questions = []
    for row in zip(*lines.values(), strict=True):
        first = row[0]
        if any((line["id"], line["prompt"]) != (first["id"], first["prompt"]) for line in row):
            raise ValueError(f"{name}: the methods were asked different questions")
        answers = {method: _answered(line) for method, line in zip(methods, row, strict=True)}
        category = str(first.get(task, "")) if task else ""
        questions.append(Question(str(first["id"]), category, str(first["prompt"]), tuple(map(str, first["answers"])), answers))
    return questions


def _benchmark(name: str) -> Benchmark:
    return BENCHMARKS.get(name, QUESTIONS)


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None


def _answered(line: Mapping[str, Any]) -> Answered:
    ratios = [layer[0] for layer in line.get("ratios") or []]
    ratio = sum(ratios) / len(ratios) if ratios else None
    return Answered(str(line["output"]), line["parsed"], float(line["score"]), ratio)


def choose(questions: Sequence[Question], count: int) -> list[Question]:
    """At most `count` questions, those that changed first; where not all fit, each outcome gets an even share.

    Within an outcome they are taken evenly from the whole file, and stay in its order.
    """
    kinds = [[question for question in questions if question.rank == rank] for rank in range(len(OUTCOMES))]
    left, chosen = count, dict.fromkeys(range(len(OUTCOMES)), 0)
    for open_kinds, rank in enumerate(sorted(chosen, key=lambda rank: len(kinds[rank]))):
        chosen[rank] = min(len(kinds[rank]), left // (len(OUTCOMES) - open_kinds))
        left -= chosen[rank]
    return [kinds[rank][i * len(kinds[rank]) // taken] for rank, taken in chosen.items() for i in range(taken)]


def group_of(method: Mapping[str, Any]) -> str | None:
    """The token group whose ratio an answer has, by a method's settings in result.json; None without gates."""
    gate = method.get("gate")
    return GROUPS[gate["grouping"]][0] if gate else None


def thumbnails(name: str, entry: Mapping[str, Any], questions: Sequence[Question]) -> tuple[dict[str, tuple[str, bytes]], str]:
    """Small images of questions by id, and why some are missing ("" if none is).

    They are read from the benchmark's own files, where these are still there and ask the same questions. Nothing is raised:
    answers are worth showing without their images.

    Args:
        entry: the benchmark's part of result.json.
    """
    if "path" not in entry:
        return {}, "the evaluation did not note where its files are"
    try:
        sources = _sources(name, entry, questions)
    except (InputError, OSError, ValueError, KeyError, TypeError) as error:
        return {}, f"the files of the benchmark cannot be read ({error})"
    found: dict[str, tuple[str, bytes]] = {}
    problem = "" if len(sources) == len(questions) else "the benchmark's files hold none for them, or ask other questions now"
    size = 0
    for id, source in sources.items():
        try:
            kind, file = small(source.read(), THUMBNAIL_SIDE)
        except (InputError, OSError, ValueError) as error:
            problem = str(error)
            continue
        size += len(file)
        if size > MAX_IMAGE_BYTES:
            return found, "the page would become too large"
        found[id] = (kind, file)
    return found, problem


def _sources(name: str, entry: Mapping[str, Any], questions: Sequence[Question]) -> dict[str, ImageSource]:
    benchmark = _benchmark(name)
    prompts = {question.id: question.prompt for question in questions}
    items = {item.id: item for item in benchmark.read(entry["path"]) if item.id in prompts}
    return {
        id: item.image
        for id, prompt in prompts.items()
        if (item := items.get(id)) is not None
        and item.image is not None
        and benchmark.prompt(item, entry["protocol"]) == prompt
    }
