"""The fields of one row of own questions, as people write them: choices, accepted answers, images. A wrong one is named."""

from __future__ import annotations

import ast
import json
import math
import re
import string
from pathlib import Path
from typing import Any

from lsg_jax.data.record_shapes import RecordError, check_keys, image_fields
from lsg_jax.errors import InputError

LETTERS = string.ascii_uppercase
CHOICE_KEYS = ("choices", "options")
KEYS = ("question", "answer", "category", *CHOICE_KEYS)

_LABEL = re.compile(r"\(?([A-Za-z])[).:]\s*")


def text_field(row: dict[str, Any], name: str, where: str) -> str:
    """A text or a finite number as text, without outer whitespace; empty if the field is missing, null or NaN.

    Raises:
        InputError: it has another type, or holds half of a surrogate pair.
    """
    value = row.get(name)
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else _text(value, name, where)


def choices_of(row: dict[str, Any], where: str) -> tuple[str, ...]:
    """The texts of a row's 2 to 26 choices, A first; empty for a question without choices.

    They are under `choices` or `options`: a list, an object {"A": text, ...}, either of these written as text, or one choice a
    line; or they are under the keys `A`, `B`, ... of the row.

    Raises:
        InputError: none of these, or `choices` and `options` differ.
    """
    given = {key: row[key] for key in CHOICE_KEYS if row.get(key) not in (None, "", [], {})}
    if not given:
        lettered = {letter: row[letter] for letter in LETTERS if _has_text(row.get(letter))}
        return _checked(_of_object(lettered, where), where) if len(lettered) > 1 else ()
    found = {key: _checked(_choices(value, where), where) for key, value in given.items()}
    if len(set(found.values())) > 1:
        raise InputError(f"{where}: choices and options differ; keep one")
    return next(iter(found.values()))


def answers_of(row: dict[str, Any], where: str) -> tuple[str, ...]:
    """The accepted answers: a text or number, or a list of these.

    Raises:
        InputError: another type, an empty one, or a list written as text: that may be one answer or several.
    """
    value = row["answer"]
    if isinstance(value, str) and not any(row.get(key) for key in CHOICE_KEYS) and isinstance(_literal(value), list):
        raise InputError(f"{where}: answer is the text of a list; write a JSON list of accepted texts, or of this one text")
    answers = tuple(_text(entry, "answer", where) for entry in (value if isinstance(value, list) else [value]))
    if not answers or "" in answers:
        raise InputError(f"{where}: answer is empty")
    return answers


def choice_letter(answers: tuple[str, ...], choices: tuple[str, ...], where: str) -> str:
    """The letter of the correct choice, given as its text or as a letter, with or without brackets.

    Raises:
        InputError: it is none of the choices, or several.
    """
    if len(answers) == 1:
        if choices.count(answers[0]) > 1:
            raise InputError(f"{where}: answer {answers[0]} is the text of several choices; give its letter")
        if answers[0] in choices:
            return LETTERS[choices.index(answers[0])]
        letter = answers[0].strip("() .:").upper()
        if len(letter) == 1 and letter in LETTERS[: len(choices)]:
            return letter
    raise InputError(f"{where}: answer {' / '.join(answers)} is none of the choices {', '.join(choices)}")


def images_of(row: dict[str, Any], folder: Path, where: str) -> list[Path]:
    """The image files of a row, in order, under the keys and in the forms that records may have; relative to `folder`.

    Raises:
        InputError: a file does not exist, an image is no path, or a row without an image seems to have one under another key.
    """
    try:
        paths = image_fields(row)
        check_keys({key: value for key, value in row.items() if key not in KEYS and key not in LETTERS}, has_image=bool(paths))
    except RecordError as error:
        raise InputError(f"{where}: {error}") from None
    files = [folder / path.removeprefix("file://") for path in paths]
    files = [file if file.is_file() else Path(str(file).replace("\\", "/")) for file in files]
    for file in files:
        if not file.is_file():
            raise InputError(f"{where}: image {str(file)[:200]} does not exist")
    return files


def _choices(value: Any, where: str) -> list[Any]:
    if isinstance(value, str):
        value = _literal(value) or _of_lines(value, where)
    if isinstance(value, dict):
        if set(value) == {"text", "label"} and isinstance(value["text"], list):  # the form of ARC
            value = dict(zip(map(str, value["label"]), value["text"], strict=False))
        return _of_object(value, where)
    if not isinstance(value, list):
        raise InputError(f"{where}: choices are of type {type(value).__name__}; give a list of texts")
    return value


def _of_object(value: dict[str, Any], where: str) -> list[Any]:
    """{"A": text, "B": text}, in the order of the letters; empty ones at the end are left out."""
    labels = {key.strip("() .:").upper(): entry for key, entry in value.items()}
    while labels and not _has_text(labels[max(labels)]):
        del labels[max(labels)]
    if sorted(labels) != list(LETTERS[: len(labels)]):
        raise InputError(f"{where}: the choices are labelled {', '.join(value)[:120]}; label them A, B, C, ... without a gap")
    return [labels[letter] for letter in sorted(labels)]


def _of_lines(value: str, where: str) -> list[str]:
    """One choice a line, with or without its letter in front."""
    lines = [line.strip() for line in value.split("\n") if line.strip()]
    labels = [_LABEL.match(line) for line in lines]
    if [label and label[1].upper() for label in labels] == list(LETTERS[: len(lines)]):
        lines = [line[label.end() :] for line, label in zip(lines, labels, strict=True) if label]
    if len(lines) < 2:
        raise InputError(f"{where}: choices are one line of text; give a list of texts")
    return lines


def _checked(choices: list[Any], where: str) -> tuple[str, ...]:
    if not 2 <= len(choices) <= len(LETTERS):
        raise InputError(f"{where}: {len(choices)} choices; give 2 to 26")
    texts = tuple(_text(choice, "a choice", where) for choice in choices)
    if "" in texts:
        raise InputError(f"{where}: choice {LETTERS[texts.index('')]} is empty")
    return texts


def _literal(text: str) -> Any:
    """The list or object that a text spells, in JSON or as Python prints it; None if it spells none."""
    if not text.strip().startswith(("[", "{")):
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    return None


def _has_text(value: Any) -> bool:
    return not (value is None or value == "" or (isinstance(value, float) and math.isnan(value)))


def _text(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str | int | float) or (isinstance(value, float) and not math.isfinite(value)):
        raise InputError(f"{where}: {name} is {str(value)[:80]!r}, of type {type(value).__name__}; give a text")
    text = str(value).strip()
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{where}: {name} holds half of a surrogate pair") from None
    return text
