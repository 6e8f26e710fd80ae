"""Own questions as JSONL: multiple choice if `choices` are given, else short answers.

One object per line: `question` and `answer` (text, a list of accepted texts, or for multiple choice a letter or the text of a
choice), and optionally `image` (path, relative to the file), `choices`, `id`, `category`.
"""

from __future__ import annotations

import json
import re
import string
from dataclasses import dataclass
from pathlib import Path

from lsg_jax.config import Protocol
from lsg_jax.data.prompts import WORD_SUFFIX, multiple_choice_prompt
from lsg_jax.errors import InputError
from lsg_jax.eval.benchmark import Benchmark, Graded, Item, Match, Metrics, by, check_unique, mean
from lsg_jax.eval.letters import chosen_letter


@dataclass(frozen=True)
class ImageFile:
    """An image file."""

    path: Path

    def read(self) -> bytes:
        """The encoded file. Raises InputError that names it."""
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read: {error.strerror or error}") from None


def read(path: str) -> list[Item]:
    """Reads and checks the whole file.

    Raises:
        InputError: no such file, or a line that is not a question; names the line.
    """
    file = Path(path)
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise InputError(f"{path}: cannot read the questions: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text; expected one JSON object a line") from None
    items = [_read_line(line, f"{path}:{n}", file.parent, n) for n, line in enumerate(lines, 1) if line.strip()]
    if not items:
        raise InputError(f"{path}: no questions in it")
    check_unique(items, path)
    return items


def _read_line(line: str, where: str, folder: Path, number: int) -> Item:
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
    return Item(
        id=str(row.get("id", number)),
        question=str(row["question"]).strip(),
        answers=answers,
        choices=choices,
        image=None if image is None else ImageFile(image),
        fields={"category": str(row["category"])} if row.get("category") else {},
    )


def _choice_letter(answers: tuple[str, ...], choices: tuple[str, ...], where: str) -> str:
    """The letter of the correct choice, given as its text or as a letter, with or without brackets."""
    if len(answers) == 1:
        if answers[0] in choices:
            return string.ascii_uppercase[choices.index(answers[0])]
        letter = answers[0].strip("() .").upper()
        if len(letter) == 1 and letter in string.ascii_uppercase[: len(choices)]:
            return letter
    raise InputError(f"{where}: answer {' / '.join(answers)} is none of the choices {', '.join(choices)}")


def prompt(item: Item, protocol: Protocol) -> str:
    """The user's turn, with the suffix that LLaVA-1.5 was trained on."""
    return multiple_choice_prompt(item.question, item.choices) if item.choices else item.question + WORD_SUFFIX


def match(item: Item, output: str, protocol: Protocol) -> Match:
    """Multiple choice: the letter that the output gives. Short answers: equal after lower-casing and stripping punctuation."""
    if item.choices:
        letter = chosen_letter(output, len(item.choices))
        return Match(letter, float(letter == item.answers[0]))
    text = normalise(output)
    return Match(text, float(text in {normalise(answer) for answer in item.answers}))


def normalise(text: str) -> str:
    """Lower case, single spaces, no leading article, no punctuation at the ends; a minus sign is kept."""
    text = " ".join(text.lower().split()).strip(" .,;:!?\"'`()[]")
    return re.sub(r"^(?:a|an|the) ", "", text)


def metrics(graded: Graded) -> Metrics:
    """Accuracy over all questions and by category."""
    return {"accuracy": mean(graded), **{f"category: {name}": value for name, value in by(graded, "category").items()}}


QUESTIONS = Benchmark(name="questions", read=read, prompt=prompt, match=match, metrics=metrics, official={}, task="category")
