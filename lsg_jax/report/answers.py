"""The answers of every method of an evaluation, question by question, and which questions a method gained or lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lsg_jax.config import Protocol
from lsg_jax.errors import InputError
from lsg_jax.eval.benchmark import Benchmark, ImageSource
from lsg_jax.eval.registry import BENCHMARKS, QUESTIONS
from lsg_jax.eval.results import BASE, BenchmarkResult, MethodSettings, QuestionRow, questions_file
from lsg_jax.eval.results import read_questions as read_rows
from lsg_jax.gating.keys import GROUPS
from lsg_jax.report.pictures import small

Outcome = Literal["gained", "lost", "both right", "both wrong"]
OUTCOMES: tuple[Outcome, ...] = ("gained", "lost", "both right", "both wrong")
"""In the order of the page."""

THUMBNAIL_SIDE = 224  # pixels
MAX_IMAGE_BYTES = 600_000
"""Of all images of one benchmark, so that the page stays small enough to be sent."""


@dataclass(frozen=True)
class Answered:
    """A method's answer to one question.

    Attributes:
        parsed: the answer that was read from the output; None: no answer was found.
        score: in [0, 1].
        ratio: gate ratio of the first token group for this question, mean over the gated layers; None without gates.
    """

    output: str
    parsed: str | None
    score: float
    ratio: float | None


@dataclass(frozen=True)
class Question:
    """One question with the answers of all methods.

    Attributes:
        category: its task within the benchmark, "" if it has none.
        prompt: the question as the model got it.
        answers: method -> its answer, `base` first.
    """

    id: str
    category: str
    prompt: str
    reference: tuple[str, ...]
    answers: Mapping[str, Answered]

    def outcome(self, method: str) -> Outcome:
        """The method against the base. Of partial scores the higher one counts as right, equal ones unless they are 0."""
        base, score = self.answers[BASE].score, self.answers[method].score
        if score != base:
            return "gained" if score > base else "lost"
        return "both right" if score > 0 else "both wrong"

    @property
    def outcomes(self) -> list[Outcome]:
        """One for each method but the base."""
        return [self.outcome(method) for method in self.answers if method != BASE]

    @property
    def rank(self) -> int:
        """Index into OUTCOMES of the outcome that comes first among all methods."""
        return min(map(OUTCOMES.index, self.outcomes))


def read_questions(folder: Path, name: str, methods: Sequence[str], rows_sha256: Mapping[str, str]) -> list[Question]:
    """The questions of one benchmark in the order of its file.

    Args:
        folder: of the evaluation, with a file `<name>.<method>.jsonl` for each method.
        methods: `base` and at least one other.
        rows_sha256: `BenchmarkResult.rows`.

    Raises:
        InputError: a file is missing, broken or of another evaluation.
        ValueError: the files are of different questions.
    """
    task = _benchmark(name).task
    questions = []
    files = [read_rows(questions_file(folder, name, method), rows_sha256.get(method)) for method in methods]
    for rows in zip(*files, strict=True):
        first = rows[0]
        if any((row.id, row.prompt) != (first.id, first.prompt) for row in rows):
            raise ValueError(f"{name}: the methods were asked different questions")
        answers = {method: _answered(row) for method, row in zip(methods, rows, strict=True)}
        category = str(first.fields.get(task, "")) if task else ""
        questions.append(Question(first.id, category, first.prompt, first.answers, answers))
    return questions


def _benchmark(name: str) -> Benchmark:
    return BENCHMARKS.get(name, QUESTIONS)


def _answered(row: QuestionRow) -> Answered:
    ratios = [layer[0] for layer in row.ratios or []]
    return Answered(row.output, row.parsed, row.score, sum(ratios) / len(ratios) if ratios else None)


def choose(questions: Sequence[Question], count: int) -> list[Question]:
    """At most `count` questions, sorted by `rank`; if not all fit, an even share of each outcome.

    Questions of an outcome are taken at even distances from the file, in its order.
    """
    kinds = [[question for question in questions if question.rank == rank] for rank in range(len(OUTCOMES))]
    left, chosen = count, dict.fromkeys(range(len(OUTCOMES)), 0)
    for open_kinds, rank in enumerate(sorted(chosen, key=lambda rank: len(kinds[rank]))):
        chosen[rank] = min(len(kinds[rank]), left // (len(OUTCOMES) - open_kinds))
        left -= chosen[rank]
    return [kinds[rank][i * len(kinds[rank]) // taken] for rank, taken in chosen.items() for i in range(taken)]


def group_of(method: MethodSettings) -> str | None:
    """The token group of `Answered.ratio`; None without gates."""
    return GROUPS[method.gate["grouping"]][0] if method.gate else None


def thumbnails(
    name: str, benchmark: BenchmarkResult, questions: Sequence[Question]
) -> tuple[dict[str, list[tuple[str, bytes]]], str]:
    """Small images of questions, read from the benchmark's files if these still ask the same questions.

    A question has all of its images, or none. Nothing is raised: answers are shown without images, too.

    Returns:
        {id: [(`png` or `jpeg`, the file)]}, and why images are missing, "" if none is.
    """
    if benchmark.path is None:
        return {}, "the evaluation did not note where its files are"
    try:
        sources = _sources(name, benchmark.path, benchmark.protocol, questions)
    except (InputError, OSError, ValueError, KeyError, TypeError) as error:
        return {}, f"the files of the benchmark cannot be read ({error})"
    found: dict[str, list[tuple[str, bytes]]] = {}
    problem = "" if len(sources) == len(questions) else "the benchmark's files hold none for them, or ask other questions now"
    size = 0
    for id, images in sources.items():
        try:
            files = [small(image.read(), THUMBNAIL_SIDE) for image in images]
        except (InputError, OSError, ValueError) as error:
            problem = str(error)
            continue
        size += sum(len(file) for _, file in files)
        if size > MAX_IMAGE_BYTES:
            return found, "the page would become too large"
        found[id] = files
    return found, problem


def _sources(name: str, path: str, protocol: Protocol, questions: Sequence[Question]) -> dict[str, tuple[ImageSource, ...]]:
    benchmark = _benchmark(name)
    prompts = {question.id: question.prompt for question in questions}
    items = {item.id: item for item in benchmark.read(path) if item.id in prompts}
    return {
        id: item.images
        for id, prompt in prompts.items()
        if (item := items.get(id)) is not None and item.images and benchmark.prompt(item, protocol) == prompt
    }
