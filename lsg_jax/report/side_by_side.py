"""The answers of an evaluation side by side: how many questions each method gained or lost, and the questions themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from lsg_jax.eval.results import BASE, BenchmarkResult, EvaluationResult, MethodSettings, questions_file
from lsg_jax.report.answers import (
    OUTCOMES,
    THUMBNAIL_SIDE,
    Answered,
    Outcome,
    Question,
    choose,
    group_of,
    read_questions,
    thumbnails,
)
from lsg_jax.report.drawing import look_of, plain
from lsg_jax.report.gains import METHODS
from lsg_jax.report.parts import Details, Heading, Note, Part, Table
from lsg_jax.report.pictures import data_url

MAX_QUESTIONS = 40  # shown of one benchmark
MAX_PROMPT, MAX_OUTPUT = 800, 300  # characters; base models ramble
CUT = "\N{HORIZONTAL ELLIPSIS} (cut)"


@dataclass(frozen=True)
class AnswerCell:
    """One method's answer. `sign` and `word` say whether it is right, `remarks` stand below the output."""

    sign: str
    word: str
    good: bool
    output: str
    remarks: Sequence[str]


@dataclass(frozen=True)
class AnswerRow:
    """One question. `pictures` are data URLs of its images; `outcomes` has one entry for each method but the base."""

    id: str
    category: str
    prompt: str
    reference: str
    pictures: Sequence[str]
    outcomes: Sequence[Outcome]
    answers: Sequence[AnswerCell]

    picture_side: ClassVar[int] = THUMBNAIL_SIDE


@dataclass(frozen=True)
class Choice:
    """A drop-down list of the filter; `options` are (value, text)."""

    name: str
    label: str
    options: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Answers:
    """A part of the page: the questions of a benchmark as a table that the reader can filter.

    Attributes:
        columns: headings after image and question: the reference, then each method.
    """

    kind: ClassVar[str] = "answers"
    outcomes: ClassVar[Sequence[Outcome]] = OUTCOMES
    caption: str
    remarks: Sequence[str]
    choices: Sequence[Choice]
    columns: Sequence[str]
    rows: Sequence[AnswerRow]


def answer_parts(result: EvaluationResult, folder: Path) -> list[Part]:
    """The questions of all benchmarks under the base and each other method; nothing without another method.

    Args:
        folder: of the evaluation, with the answers.
    """
    methods = list(result.methods)
    if BASE not in methods or len(methods) < 2:
        return []
    parts: list[Part] = []
    for name, benchmark in result.benchmarks.items():
        parts.append(Heading(f"Answers side by side: {name}"))
        missing = [file.name for m in methods if not (file := questions_file(folder, name, m)).is_file()]
        if missing:
            parts.append(Note(f"{name}: the answers cannot be shown, since {', '.join(missing)} is not in the folder."))
            continue
        questions = read_questions(folder, name, methods, benchmark.rows)
        parts += [_outcome_table(name, questions, method) for method in methods if method != BASE]
        parts.append(_question_list(name, benchmark, questions, result.methods))
    return parts


def _label(method: str) -> str:
    return METHODS.get(method, method)


def _outcome_table(name: str, questions: Sequence[Question], method: str) -> Table:
    """Outcomes by category."""
    categories = sorted({question.category for question in questions} - {""})
    rows = []
    for category in [None, *(categories if len(categories) > 1 else [])]:
        found = [question.outcome(method) for question in questions if category in (None, question.category)]
        rows.append(["all" if category is None else category, str(len(found)), *(str(found.count(of)) for of in OUTCOMES)])
    caption = f"Questions of {name} that {_label(method)} gained and lost against the base"
    return Table(caption, ["category", "questions", *OUTCOMES], rows)


def _question_list(
    name: str, benchmark: BenchmarkResult, questions: Sequence[Question], methods: Mapping[str, MethodSettings]
) -> Details:
    shown = choose(questions, MAX_QUESTIONS)
    pictures, problem = thumbnails(name, benchmark, shown)
    groups = {method: group_of(settings) for method, settings in methods.items()}
    answers = Answers(
        caption=f"{name}: answers of {', '.join(map(_label, methods))}",
        remarks=_remarks(name, questions, shown, len(pictures), problem),
        choices=_choices(shown, list(methods)),
        columns=["reference", *map(_label, methods)],
        rows=[_row(question, pictures.get(question.id, []), groups) for question in shown],
    )
    summary = f"The questions: {len(shown)} of {len(questions)}" if len(shown) < len(questions) else "The questions"
    return Details(f"{summary}, those that changed first", [answers], opened=True)


def _remarks(name: str, questions: Sequence[Question], shown: Sequence[Question], pictures: int, problem: str) -> list[str]:
    """What is left out of the list, and how to read it."""
    remarks = []
    if len(shown) < len(questions):
        share = "an even share of each outcome, evenly from the whole file"
        where = f"all are in {name}.*.jsonl in the folder of the evaluation"
        remarks.append(f"{len(shown)} of {len(questions)} questions are shown, {share}; {where}.")
    if problem and pictures < len(shown):
        count = len(shown) - pictures
        remarks.append(f"{count} question{' is' if count == 1 else 's are'} shown without an image: {problem}.")
    answers = [answer for question in shown for answer in question.answers.values()]
    if any(0 < answer.score < 1 for answer in answers):
        remarks.append("An answer can be right in part. Gained and lost then mean a higher and a lower score.")
    if any(answer.ratio is not None for answer in answers):
        remarks.append("Below an answer: the gate ratio in this very question, mean over the gated layers.")
    return remarks


def _choices(questions: Sequence[Question], methods: Sequence[str]) -> list[Choice]:
    """The drop-down lists beside the choice of an outcome: which method's outcome, and which category."""
    others = [method for method in methods if method != BASE]
    categories = sorted({question.category for question in questions} - {""})
    choices = []
    if len(others) > 1:
        options = [(str(index), _label(method)) for index, method in enumerate(others)]
        choices.append(Choice("method", f"{_label(BASE)} against", options))
    if len(categories) > 1:
        choices.append(Choice("category", "category", [("", "all"), *((name, name) for name in categories)]))
    return choices


def _row(question: Question, pictures: Sequence[tuple[str, bytes]], groups: Mapping[str, str | None]) -> AnswerRow:
    return AnswerRow(
        id=question.id,
        category=question.category,
        prompt=_cut(question.prompt, MAX_PROMPT),
        reference=_cut(" / ".join(question.reference), MAX_OUTPUT),
        pictures=[data_url(*picture) for picture in pictures],
        outcomes=question.outcomes,
        answers=[
            _cell(answer, "" if method == BASE else question.outcome(method), groups[method])
            for method, answer in question.answers.items()
        ],
    )


def _cell(answer: Answered, outcome: str, group: str | None) -> AnswerCell:
    if answer.score in (0.0, 1.0):
        sign, word = ("\N{CHECK MARK}", "right") if answer.score else ("\N{BALLOT X}", "wrong")
    else:
        sign, word = "\N{ALMOST EQUAL TO}", f"{100 * answer.score:.0f} % right"
    if outcome in ("gained", "lost"):
        word = f"{word}, {outcome}"
    output, remarks = _cut(answer.output, MAX_OUTPUT), []
    if answer.parsed is None:
        remarks.append("no answer was found in it")
    elif not output:
        remarks.append("(empty)")
    if answer.ratio is not None and group is not None:
        remarks.append(f"{look_of(group).label}: ratio {plain(answer.ratio)}")
    return AnswerCell(sign, word, answer.score >= 0.5, output, remarks)


def _cut(text: str, length: int) -> str:
    """At most `length` characters; control characters, which a page cannot show, become replacement characters."""
    text = "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text.strip())
    return text if len(text) <= length else text[:length] + CUT
