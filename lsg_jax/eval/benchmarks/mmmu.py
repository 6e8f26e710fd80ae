"""MMMU (Yue et al., 2024), validation: 900 questions of 30 college subjects, of which 53 are open; up to seven images each.

Questions and choices say `<image 1>` where an image stands. Files: `MMMU/MMMU` (a folder a subject) or `lmms-lab/MMMU`; rows of
the splits dev and test are left out by their ids. Cambrian shows the first image alone, so it has no rules here.
"""

from __future__ import annotations

import ast
import re

from lsg_jax.config import Protocol
from lsg_jax.data.conversation import IMAGE_TAG
from lsg_jax.data.parquet import Row, read_rows
from lsg_jax.data.prompts import LETTER_SUFFIX, WORD_SUFFIX, question_with_options
from lsg_jax.errors import InputError
from lsg_jax.eval.benchmark import Benchmark, Graded, Item, Match, Metrics, by, check_unique, check_values, mean
from lsg_jax.eval.letters import LETTERS, check_letter, letter_match, vlmevalkit_letter, vlmevalkit_prompt

DOMAINS = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        "Basic_Medical_Science", "Clinical_Medicine", "Diagnostics_and_Laboratory_Medicine", "Pharmacy", "Public_Health",
    ),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        "Agriculture", "Architecture_and_Engineering", "Computer_Science", "Electronics", "Energy_and_Power", "Materials",
        "Mechanical_Engineering",
    ),
}  # fmt: skip
DOMAIN_OF = {subject: domain for domain, subjects in DOMAINS.items() for subject in subjects}
IMAGES = tuple(f"image_{number}" for number in range(1, 8))
CHOICE, OPEN = "multiple-choice", "open"

_TAG = re.compile(r"<image ([1-7])>")


def read(path: str) -> list[Item]:
    """Items with the fields `kind`, `subject`, `domain`, `answer` (as in the file). Raises InputError: see `Benchmark.read`."""
    rows = read_rows(path, needs=["id", "question", "options", "answer", "question_type"], images=IMAGES)
    rows = [row for row in rows if str(row["id"]).startswith("validation_")]
    if not rows:
        raise InputError(f"{path}: no row of the validation split, whose ids begin with validation_")
    check_values((row["question_type"] for row in rows), (CHOICE, OPEN), what="question_type", where=path)
    check_values(map(_subject, rows), DOMAIN_OF, what="subject", where=path)
    items = [_item(row) for row in rows]
    check_unique(items, path)
    return items


def _subject(row: Row) -> str:
    return "_".join(row["id"].split("_")[1:-1])


def _item(row: Row) -> Item:
    kind, subject = row["question_type"], _subject(row)
    choices = _list(str(row["options"]), row.where) if kind == CHOICE else ()
    if len(choices) > len(LETTERS):
        raise InputError(f"{row.where}: options holds {len(choices)} choices; only {len(LETTERS)} have a letter")
    answer = str(row["answer"])
    if kind == CHOICE:
        answers: tuple[str, ...] = (check_letter(answer, len(choices), row.where),)
    else:
        answers = _list(answer, row.where) if answer.startswith("[") else (answer,)
    named = sorted(set(_TAG.findall("\n".join((row.text("question"), *choices))))) or ["1"]
    images = [image for number in named for image in row.images(f"image_{number}", required=False)]
    if len(images) != len(named):
        raise InputError(f"{row.where}: {', '.join(f'<image {number}>' for number in named)}, but {len(images)} images")
    fields = {"kind": kind, "subject": subject, "domain": DOMAIN_OF[subject], "answer": answer}
    return Item(row["id"], row.text("question"), answers, choices, tuple(images), fields)


def _list(text: str, where: str) -> tuple[str, ...]:
    """A list of texts that is written as Python would."""
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        found = None
    if not isinstance(found, list) or not found or not all(isinstance(each, str | int | float) for each in found):
        raise InputError(f"{where}: {text[:80]!r} is no list of texts")
    return tuple(map(str, found))


def prompt(item: Item, protocol: Protocol) -> str:
    """The question, its choices and a request.

    `paper` is the owner's for LLaVA-1.5, with every image at its tag: the owner shows the first image alone. In lmms-eval and
    VLMEvalKit all images come first, and `<image 1>` stays as text.
    """
    suffix = LETTER_SUFFIX if item.choices else WORD_SUFFIX
    if protocol == "lmms_eval":
        return f"{question_with_options(item.question, item.choices)}\n{suffix}"
    if protocol == "vlmevalkit":
        asks = "\nAnswer the question directly."
        return vlmevalkit_prompt(item.question, item.choices) if item.choices else item.question + asks
    options = "".join(f"\n({letter}) {choice}" for letter, choice in zip(LETTERS, item.choices, strict=False))
    return _with_images(item.question + options + "\n" * bool(options)) + suffix


def _with_images(text: str) -> str:
    """The text with the first mention of each image as its tag; unchanged if they are out of order: then all come first."""
    numbers = list(dict.fromkeys(_TAG.findall(text)))
    if numbers == sorted(numbers):
        for number in numbers:
            text = text.replace(f"<image {number}>", IMAGE_TAG, 1)
    return text


def match(item: Item, output: str, protocol: Protocol) -> Match:
    """A letter, or an open answer that is part of what was said.

    An output without a letter is wrong; the owner and lmms-eval guess one. Of several accepted open answers lmms-eval and
    VLMEvalKit compare the list as it is written, so such a question is wrong there.
    """
    if protocol == "vlmevalkit":
        return _match_vlmevalkit(item, output)
    if item.fields["kind"] == CHOICE:
        marks = ("{} ", "{}.") if protocol == "lmms_eval" else (" {} ",)
        return letter_match(item, _letter(output, item.choices, marks))
    answers = (item.fields["answer"],) if protocol == "lmms_eval" else item.answers
    said = _open_answers(output)
    return Match(str(said[0]), float(_is_said(said, [form for answer in answers for form in _forms(answer)])))


def _match_vlmevalkit(item: Item, output: str) -> Match:
    """An open question is a choice between A, the answer, and B, `Other Answers`; of an answer that is a letter, the letter."""
    if item.fields["kind"] == CHOICE:
        return letter_match(item, vlmevalkit_letter(output, item.choices))
    answer = item.fields["answer"]
    letter = vlmevalkit_letter(output, (answer, "Other Answers"))
    return Match(letter, float(letter == (answer if len(answer) == 1 and answer in LETTERS else "A")))


def _letter(output: str, choices: tuple[str, ...], marks: tuple[str, ...]) -> str | None:
    """The letter mentioned last: `(B)`, else by the marks in their order, else by the text of a choice in six words or more."""
    for mark in ",.!?;:'":
        output = output.strip(mark)
    text, lower = f" {output} ", f" {output} ".lower()
    letters = LETTERS[: len(choices)]
    for mark in ("({})", *marks):
        if found := [letter for letter in letters if mark.format(letter) in text]:
            last = mark if mark == "({})" else " {} "  # also where another mark was found: the first one then
            return max(found, key=lambda letter: text.rfind(last.format(letter)))
    named = [letter for letter, choice in zip(letters, choices, strict=True) if choice.lower() in lower]
    if not named or len(text.split()) <= 5:
        return None
    return max(named, key=lambda letter: lower.rfind(choices[letters.index(letter)].lower()))


_KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)


def _open_answers(output: str) -> list[str | float]:
    """What an output says (the owner's `parse_open_response`): the text after a key word of each line, or all; and its numbers.

    Texts are in lower case, numbers rounded to two digits. `=` is a key word in the last line.
    """
    lines = output.strip().strip(".").lower().split("\n")
    said = [text for i, line in enumerate(lines) if (text := _after_key(line, last=i == len(lines) - 1))] or ["\n".join(lines)]
    numbers = [number for text in said for pattern in _NUMBERS for number in pattern.findall(text)]
    return [form for text in (*said, *numbers) for form in _forms(text)]


def _after_key(line: str, *, last: bool) -> str:
    """The shortest text after the last mention of a key word; empty if there is none, or it is a mark alone."""
    found = [line.split(key)[-1].strip() for key in (*_KEYS, *["="] * last) if key in line]
    shortest = ""
    for text in found:
        if not shortest or len(text) < len(shortest):
            shortest = text
    return "" if shortest in tuple(":,.!?;'") else shortest


def _forms(text: str) -> list[str | float]:
    """A number rounded to two digits, or the text in lower case; one character needs a space beside it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def _is_said(said: list[str | float], forms: list[str | float]) -> bool:
    """Whether a number that was said is a form of the answer, or a text that was said contains one."""
    texts = [form for form in forms if isinstance(form, str)]
    return any(one in forms if isinstance(one, float) else any(text in one for text in texts) for one in said)


def metrics(graded: Graded) -> Metrics:
    """Accuracy over all questions, by kind, domain and subject."""
    groups = {name: by(graded, name) for name in ("kind", "domain", "subject")}
    return {
        "accuracy": mean(graded),
        **{f"{name}: {value}": score for name, scores in groups.items() for value, score in scores.items()},
    }


MMMU = Benchmark(
    name="mmmu",
    read=read,
    prompt=prompt,
    match=match,
    metrics=metrics,
    task="domain",
    official=dict.fromkeys(("paper", "lmms_eval", "vlmevalkit"), "accuracy"),
    size=900,
    groups={"kind": (CHOICE, OPEN), "subject": tuple(DOMAIN_OF)},
    guess_by="kind",
    max_new_tokens={"paper": 128, "lmms_eval": 128, "vlmevalkit": 2048},
)
