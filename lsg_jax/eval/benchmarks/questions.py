"""A JSONL of questions with images: multiple choice where `choices` are given, short answers where not.

One object a line: `question` and `answer` (text, a list of accepted texts, or for multiple choice a letter or the text of a
choice), and optionally `image` (path, relative to the file), `choices`, `id`, `category`.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lsg_jax.errors import InputError

LETTER_SUFFIX = "\nAnswer with the option's letter from the given choices directly."
WORD_SUFFIX = "\nAnswer the question using a single word or phrase."


@dataclass(frozen=True)
class Question:
    """One item. `answers` are the accepted texts; for multiple choice the one letter."""

    id: str
    question: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()
    image: Path | None = None
    category: str = ""

    @property
    def prompt(self) -> str:
        """The user's turn, with the suffix that LLaVA-1.5 was trained on."""
        if not self.choices:
            return self.question + WORD_SUFFIX
        options = "".join(f"\n{letter}. {choice}" for letter, choice in zip(string.ascii_uppercase, self.choices, strict=False))
        return self.question + options + LETTER_SUFFIX


def read_questions(path: Path) -> list[Question]:
    """Reads and checks the whole file.

    Raises:
        InputError: no such file, or a line that is no question; names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise InputError(f"{path}: cannot read the questions: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text; expected one JSON object a line") from None
    questions = [_read_line(line, f"{path}:{n}", path.parent, n) for n, line in enumerate(lines, 1) if line.strip()]
    if not questions:
        raise InputError(f"{path}: no questions in it")
    if repeated := [name for name, count in Counter(q.id for q in questions).items() if count > 1]:
        raise InputError(f"{path}: id {repeated[0]} occurs more than once")
    return questions


def _read_line(line: str, where: str, folder: Path, number: int) -> Question:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected an object, got {type(row).__name__}")
    if missing := [name for name in ("question", "answer") if row.get(name) in (None, "", [])]:
        raise InputError(f"{where}: no {missing[0]}; there are {', '.join(row)}")
    choices = tuple(map(str, row.get("choices") or ()))
    if len(choices) == 1 or len(choices) > 26:
        raise InputError(f"{where}: {len(choices)} choices; give 2 to 26")
    answers = tuple(map(str, row["answer"] if isinstance(row["answer"], list) else [row["answer"]]))
    if choices:
        answers = (_choice_letter(answers, choices, where),)
    image = folder / row["image"] if row.get("image") else None
    if image is not None and not image.is_file():
        raise InputError(f"{where}: image {image} does not exist")
    return Question(
        id=str(row.get("id", number)),
        question=str(row["question"]).strip(),
        answers=answers,
        choices=choices,
        image=image,
        category=str(row.get("category", "")),
    )


def _choice_letter(answers: tuple[str, ...], choices: tuple[str, ...], where: str) -> str:
    """The letter of the right choice, given as its text or as a letter, with or without brackets."""
    if len(answers) == 1:
        if answers[0] in choices:
            return string.ascii_uppercase[choices.index(answers[0])]
        letter = answers[0].strip("() .").upper()
        if len(letter) == 1 and letter in string.ascii_uppercase[: len(choices)]:
            return letter
    raise InputError(f"{where}: answer {' / '.join(answers)} is none of the choices {', '.join(choices)}")


def is_correct(question: Question, output: str) -> bool:
    """Multiple choice: the letter that the output gives. Short answers: equal after lower-casing and stripping punctuation."""
    if question.choices:
        return chosen_letter(output, len(question.choices)) == question.answers[0]
    return normalise(output) in {normalise(answer) for answer in question.answers}


def chosen_letter(output: str, count: int) -> str | None:
    """The letter of an output: `B`, `(B)`, `B.`, `B. a cat`; None for anything wordier."""
    match = re.match(rf"\(?([A-{string.ascii_uppercase[count - 1]}])(?:[).:,]|\s*$)", output.strip())
    return match[1] if match else None


def normalise(text: str) -> str:
    """Lower case, single spaces, no leading article, no punctuation at the ends; a minus sign stays."""
    text = " ".join(text.lower().split()).strip(" .,;:!?\"'`()[]")
    return re.sub(r"^(?:a|an|the) ", "", text)


def aggregate(questions: list[Question], correct: list[bool]) -> dict[str, Any]:
    """Accuracy in percent over all questions and by category, with counts."""
    groups: dict[str, list[bool]] = defaultdict(list)
    for question, hit in zip(questions, correct, strict=True):
        groups[question.category].append(hit)
    score = lambda hits: {"accuracy": 100.0 * sum(hits) / len(hits), "correct": sum(hits), "count": len(hits)}
    named = {name: score(hits) for name, hits in sorted(groups.items()) if name}
    return {**score(correct), **({"categories": named} if named else {})}


def majority(questions: list[Question]) -> dict[str, Any]:
    """Accuracy of always giving the most frequent answer of the file; what a blind guesser reaches."""
    answers = [q.answers[0] if q.choices else normalise(q.answers[0]) for q in questions]
    answer, count = Counter(answers).most_common(1)[0]
    return {"accuracy": 100.0 * count / len(questions), "answer": answer}
