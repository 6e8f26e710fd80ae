"""The answers of an evaluation as tables of a page: how many questions each method gained or lost, and the questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from lsg_jax.report.answers import (
    BASE,
    OUTCOMES,
    THUMBNAIL_SIDE,
    Answered,
    Question,
    choose,
    group_of,
    read_questions,
    thumbnails,
)
from lsg_jax.report.drawing import look_of, plain
from lsg_jax.report.gains import METHODS
from lsg_jax.report.html import details, heading, note, paragraph, table
from lsg_jax.report.pictures import data_url

MAX_QUESTIONS = 40  # shown of one benchmark
MAX_PROMPT, MAX_OUTPUT = 800, 300  # characters; base models ramble
CUT = "\N{HORIZONTAL ELLIPSIS} (cut)"


def answer_parts(result: Mapping[str, Any], folder: Path) -> list[str]:
    """HTML of all benchmarks' questions under the base and each other method; nothing where there is no other.

    Args:
        result: result.json.
        folder: where it lies, with the answers.
    """
    methods = list(result["methods"])
    if BASE not in methods or len(methods) < 2:
        return []
    parts = []
    for name, entry in result["benchmarks"].items():
        parts.append(heading(f"Answers side by side: {name}"))
        missing = [file for m in methods if not (folder / (file := f"{name}.{m}.jsonl")).is_file()]
        if missing:
            parts.append(note(f"{name}: the answers cannot be shown, since {', '.join(missing)} is not in the folder."))
            continue
        questions = read_questions(folder, name, methods)
        parts += [_counts(name, questions, method) for method in methods if method != BASE]
        parts.append(_browser(name, entry, questions, result["methods"]))
    return parts


def _name(method: str) -> str:
    return METHODS.get(method, method)


def _counts(name: str, questions: Sequence[Question], method: str) -> str:
    """A table of outcomes by category."""
    categories = sorted({question.category for question in questions} - {""})
    lines = []
    for category in [None, *(categories if len(categories) > 1 else [])]:
        own = [question.outcome(method) for question in questions if category in (None, question.category)]
        lines.append(["all" if category is None else category, str(len(own)), *(str(own.count(of)) for of in OUTCOMES)])
    caption = f"Questions of {name} that {_name(method)} gained and lost against the base"
    return table(caption, ["category", "questions", *OUTCOMES], lines)


def _browser(name: str, entry: Mapping[str, Any], questions: Sequence[Question], methods: Mapping[str, Any]) -> str:
    shown = choose(questions, MAX_QUESTIONS)
    pictures, problem = thumbnails(name, entry, shown)
    told = []
    if len(shown) < len(questions):
        share = "an even share of each outcome, evenly from the whole file"
        where = f"all are in {name}.*.jsonl in the folder of the evaluation"
        told.append(paragraph(f"{len(shown)} of {len(questions)} questions are shown, {share}; {where}."))
    if problem and len(pictures) < len(shown):
        told.append(paragraph(f"{len(shown) - len(pictures)} questions are shown without an image: {problem}."))
    if any(0 < answer.score < 1 for question in shown for answer in question.answers.values()):
        told.append(paragraph("An answer can be right in part. Gained and lost then mean a higher and a lower score."))
    groups = {method: group_of(settings) for method, settings in methods.items()}
    if any(answer.ratio is not None for question in shown for answer in question.answers.values()):
        told.append(paragraph("Below an answer: the gate ratio in this very question, mean over the gated layers."))
    summary = f"The questions: {len(shown)} of {len(questions)}" if len(shown) < len(questions) else "The questions"
    body = "".join(told) + _filter(shown, list(methods)) + _table(name, shown, pictures, groups)
    return details(f"{summary}, those that changed first", f'<div class="answers">{body}</div>', opened=True)


def _filter(questions: Sequence[Question], methods: Sequence[str]) -> str:
    """What chooses the rows; hidden until the page's script, which it needs, has run."""
    radios = "".join(
        f'<label><input type="radio" name="outcome" value="{value}"{"" if value else " checked"}> <span>{label}</span></label>'
        for value, label in [("", "all"), *((of, of) for of in OUTCOMES)]
    )
    categories = sorted({question.category for question in questions} - {""})
    others = [method for method in methods if method != BASE]
    selects = ""
    if len(others) > 1:
        selects += _select("method", f"{_name(BASE)} against", [(str(i), _name(method)) for i, method in enumerate(others)])
    if len(categories) > 1:
        selects += _select("category", "category", [("", "all"), *((name, name) for name in categories)])
    return (
        f'<form class="filter" autocomplete="off" hidden><fieldset><legend>Show</legend>{radios}</fieldset>{selects}'
        '<p role="status"></p></form>'
    )


def _select(name: str, label: str, options: Sequence[tuple[str, str]]) -> str:
    inner = "".join(f'<option value="{escape(value)}">{escape(text)}</option>' for value, text in options)
    return f'<label>{escape(label)} <select name="{name}">{inner}</select></label>'


def _table(
    name: str, questions: Sequence[Question], pictures: Mapping[str, tuple[str, bytes]], groups: Mapping[str, str | None]
) -> str:
    """A row a question. On a narrow screen the cells stack, so their roles are spelled out: the layout would lose them."""
    header = ["image", "question", "reference", *map(_name, groups)]
    head = "".join(f'<th role="columnheader" scope="col">{escape(text)}</th>' for text in header)
    rows = "".join(_row(question, pictures.get(question.id), groups) for question in questions)
    caption = f"{name}: answers of {', '.join(map(_name, groups))}"
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table role="table" class="stacking">'
        f'<caption><span>{escape(caption)}</span></caption><thead role="rowgroup"><tr role="row">{head}</tr></thead>'
        f'<tbody role="rowgroup">{rows}</tbody></table></div>'
    )


def _row(question: Question, picture: tuple[str, bytes] | None, groups: Mapping[str, str | None]) -> str:
    image = '<span class="faint">none</span>'
    if picture is not None:
        alt = escape(f"Image of question {question.id}")
        image = f'<img alt="{alt}" width="{THUMBNAIL_SIDE}" src="{data_url(*picture)}">'
    category = f"{escape(question.category)}, " if question.category else ""
    cells = [
        image,
        f'<p class="prompt">{escape(_cut(question.prompt, MAX_PROMPT))}</p>'
        f'<p class="faint">{category}{escape(question.id)}</p>',
        escape(_cut(" / ".join(question.reference), MAX_OUTPUT)),
        *(
            _answer(answer, "" if method == BASE else question.outcome(method), groups[method])
            for method, answer in question.answers.items()
        ),
    ]
    beside = "reference", *map(_name, groups)  # what a cell is, where there is no room for the header
    labels = ["", "", *(f' data-label="{escape(label)}"' for label in beside)]
    inner = "".join(f'<td role="cell"{label}>{cell}</td>' for label, cell in zip(labels, cells, strict=True))
    data = f'data-outcomes="{escape(",".join(question.outcomes))}" data-category="{escape(question.category)}"'
    return f'<tr role="row" {data}>{inner}</tr>'


def _answer(answer: Answered, outcome: str, group: str | None) -> str:
    """Whether it is right as a sign and a word, then the output."""
    if answer.score in (0.0, 1.0):
        sign, word = ("\N{CHECK MARK}", "right") if answer.score else ("\N{BALLOT X}", "wrong")
    else:
        sign, word = "\N{ALMOST EQUAL TO}", f"{100 * answer.score:.0f} % right"
    told = f"{word}, {outcome}" if outcome in ("gained", "lost") else word
    parts = [f'<p class="mark {"good" if answer.score >= 0.5 else "bad"}"><span aria-hidden="true">{sign}</span> {told}</p>']
    parts.append(f'<p class="output">{escape(_cut(answer.output, MAX_OUTPUT))}</p>' if answer.output.strip() else "")
    if answer.parsed is None:
        parts.append('<p class="faint">no answer was found in it</p>')
    elif not answer.output.strip():
        parts.append('<p class="faint">(empty)</p>')
    if answer.ratio is not None and group is not None:
        parts.append(f'<p class="faint">{escape(look_of(group).label)}: ratio {plain(answer.ratio)}</p>')
    return "".join(parts)


def _cut(text: str, length: int) -> str:
    """At most `length` characters; control characters, which a page cannot show, as their replacement."""
    text = "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text.strip())
    return text if len(text) <= length else text[:length] + CUT
