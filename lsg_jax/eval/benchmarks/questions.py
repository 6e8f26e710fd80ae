"""Own questions as JSONL: multiple choice if there are choices, else short answers.

One object per line: `question` and `answer` (text, a list of accepted texts, or for multiple choice a letter or the text of a
choice), and optionally `image` (a path or a list of paths, relative to the file), `choices`, `id`, `category`. Tags `<image>`
in the question say where several images stand; without any, they come first. `question_fields` reads the fields and tags in the
forms in which other tools write them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lsg_jax.config import Protocol
from lsg_jax.data.prompts import WORD_SUFFIX, multiple_choice_prompt
from lsg_jax.errors import InputError
from lsg_jax.eval.benchmark import Benchmark, Graded, Item, Match, Metrics, by, check_unique, mean
from lsg_jax.eval.image_files import ImageFile
from lsg_jax.eval.letters import chosen_letter
from lsg_jax.eval.question_fields import answers_of, choice_letter, choices_of, images_of, text_field, with_image_tags
from lsg_jax.json_files import FlawedJson, json_lines, parse_tabular


def read(path: str) -> list[Item]:
    """Reads and checks the whole file.

    Raises:
        InputError: no such file, or a line that is not a question; names the line.
    """
    rows = json_rows(path, ("question", "answer"))
    items = [_item(row, where, Path(path).parent, int(where.rpartition(":")[2])) for row, where in rows]
    if not items:
        raise InputError(f"{path}: no questions in it")
    check_unique(items, path)
    return items


def json_rows(path: str, needs: Sequence[str]) -> list[tuple[dict[str, Any], str]]:
    """(object, FILE:LINE) of the lines of a JSONL file. Raises InputError that names a line which lacks one of `needs`."""
    lines = ((line, f"{path}:{number}") for number, line in json_lines(Path(path)))
    return [(_row(line, where, needs), where) for line, where in lines]


def _row(line: str, where: str, needs: Sequence[str]) -> dict[str, Any]:
    try:
        row, end = parse_tabular(line := line.strip(" \t\r\n"))
        if end < len(line):
            raise json.JSONDecodeError("Extra data", line, end)
    except FlawedJson as flaw:
        raise InputError(f"{where}: {flaw}") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected an object, got {type(row).__name__}")
    if missing := [name for name in needs if row.get(name) in (None, "", [])]:
        raise InputError(f"{where}: no {missing[0]}; there are {', '.join(row)}")
    return row


def _item(row: dict[str, Any], where: str, folder: Path, number: int) -> Item:
    question, category = text_field(row, "question", where), text_field(row, "category", where)
    if not question:
        raise InputError(f"{where}: question is empty")
    choices, answers = choices_of(row, where), answers_of(row, where)
    if choices:
        answers = (choice_letter(answers, choices, where),)
    images = images_of(row, folder, where)
    question, choices = with_image_tags(question, choices, len(images), where)
    return Item(
        id=text_field(row, "id", where) or str(number),
        question=question,
        answers=answers,
        choices=choices,
        images=tuple(map(ImageFile, images)),
        fields={"category": category} if category else {},
    )


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
