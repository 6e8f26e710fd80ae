"""The fields of one row of own questions, as people write them: choices, accepted answers, images. A wrong one is named."""

from __future__ import annotations

import ast
import json
import math
import re
import string
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from lsg_jax.data.conversation import question_turn
from lsg_jax.data.record_shapes import (
    IMAGE_KEYS,
    IMAGE_TAG,
    OTHER_TAG,
    RecordError,
    check_keys,
    image_fields,
    may_hold_another,
)
from lsg_jax.errors import InputError
from lsg_jax.files import is_file

LETTERS = string.ascii_uppercase
CHOICE_KEYS = ("choices", "options")
KEYS = ("question", "answer", "category", *CHOICE_KEYS)

_LABEL = re.compile(r"\(?([A-Za-z])[).:]\s*")
_NUMBERED_TAG = re.compile(r"<\|?image[ _]?(\d{1,6})\|?>")


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
    line; or they are under the keys `A`, `B`, ... of the row. Labels A, B, ... in front of all of them are left out.

    Raises:
        InputError: none of these, or `choices` and `options` differ.
    """
    given = {key: row[key] for key in CHOICE_KEYS if _has_text(row.get(key)) and row[key] not in ([], {})}
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
        InputError: another type, an empty one, a list written as text: that may be one answer or several, or true or false:
            that may stand for yes or no.
    """
    value = row["answer"]
    if isinstance(value, str) and not any(row.get(key) for key in CHOICE_KEYS) and isinstance(_literal(value), list):
        raise InputError(f"{where}: answer is the text of a list; write a JSON list of accepted texts, or of this one text")
    if isinstance(value, bool) and not any(row.get(key) for key in CHOICE_KEYS):
        raise InputError(f"{where}: answer is {str(value).lower()}; write the text that is right, such as yes or no")
    answers = tuple(_text(entry, "answer", where) for entry in (value if isinstance(value, list) else [value]))
    if not answers or "" in answers:
        raise InputError(f"{where}: answer is empty")
    return answers


def choice_letter(answers: tuple[str, ...], choices: tuple[str, ...], where: str) -> str:
    """The letter of the correct choice, given as its text, as a letter with or without brackets, or as both.

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
        label = _LABEL.match(answers[0])
        if label and (label[1].upper(), answers[0][label.end() :]) in zip(LETTERS, choices, strict=False):
            return label[1].upper()
    raise InputError(f"{where}: answer {' / '.join(answers)} is none of the choices {', '.join(choices)}")


def images_of(row: dict[str, Any], folder: Path, where: str) -> list[Path]:
    """The image files of a row, in order, under the keys and in the forms that records may have; relative to `folder`.

    Raises:
        InputError: a file does not exist, an image is no path, or another key may hold an image.
    """
    others = {key: value for key, value in row.items() if key not in KEYS and key not in LETTERS}
    try:
        paths = image_fields(row)
        check_keys(others, has_image=bool(paths))
    except RecordError as error:
        raise InputError(f"{where}: {error}") from None
    for key, value in others.items():
        if key not in ("id", "source", *IMAGE_KEYS) and may_hold_another(key, value, paths):
            raise InputError(f"{where}: {key[:80]} may hold another image; list it with the others, or remove the key")
    files = [folder / (unquote(path[7:]) if path.startswith("file://") else path) for path in paths]
    files = [file if is_file(file) else Path(str(file).replace("\\", "/")) for file in files]
    for file in files:
        if not is_file(file):
            raise InputError(f"{where}: image {str(file)[:200]} does not exist")
    return files


def with_image_tags(question: str, choices: tuple[str, ...], images: int, where: str) -> tuple[str, tuple[str, ...]]:
    """The question and its choices with tags `<image>`, one for each image or none.

    Numbered tags of other tools (`<image 1>`, as in MMMU) become `<image>` if they count the images in order.

    Raises:
        InputError: other tags, not as many tags as images, or the tag of a single image in a choice: it would leave the choice
            for the front of the prompt.
    """
    texts = [question, *choices]
    if others := [tag for text in texts for tag in OTHER_TAG.findall(text)]:
        numbers = [number and int(number[1]) for number in map(_NUMBERED_TAG.fullmatch, others)]
        if numbers != list(range(1, images + 1)):
            raise InputError(
                f"{where}: images are marked as {', '.join(others)[:80]}; write {IMAGE_TAG} once for each, in order"
            )
        texts = [OTHER_TAG.sub(IMAGE_TAG, text) for text in texts]
    if images == 1 and any(IMAGE_TAG in choice for choice in texts[1:]):
        raise InputError(
            f"{where}: a choice contains {IMAGE_TAG}, but the only image comes before the question; remove the tag"
        )
    try:
        question_turn("\n".join(texts), images)
    except RecordError as error:
        raise InputError(f"{where}: {error}") from None
    return texts[0], tuple(texts[1:])


def _choices(value: Any, where: str) -> list[Any]:
    if isinstance(value, str):
        value = _literal(value) or _of_lines(value, where)
    if isinstance(value, dict):
        if set(value) == {"text", "label"} and isinstance(texts := value["text"], list):  # the form of ARC
            labels = value["label"]
            if not isinstance(labels, list) or len(set(map(str, labels))) < len(labels) or len(labels) != len(texts):
                raise InputError(f"{where}: choices have {len(texts)} texts, but not as many different labels")
            value = dict(zip(map(str, labels), texts, strict=True))
        return _of_object({str(key): entry for key, entry in value.items()}, where)
    if not isinstance(value, list):
        raise InputError(f"{where}: choices are of type {type(value).__name__}; give a list of texts")
    return value


def _of_object(value: dict[str, Any], where: str) -> list[Any]:
    """{"A": text, "B": text}, in the order of the letters; empty ones at the end are left out."""
    labels = {key.strip("() .:").upper(): entry for key, entry in value.items()}
    if len(labels) < len(value):
        raise InputError(f"{where}: two choices have the same label among {', '.join(value)[:120]}")
    while labels and not _has_text(labels[max(labels)]):
        del labels[max(labels)]
    if sorted(labels) != list(LETTERS[: len(labels)]):
        raise InputError(f"{where}: the choices are labelled {', '.join(value)[:120]}; label them A, B, C, ... without a gap")
    return [labels[letter] for letter in sorted(labels)]


def _of_lines(value: str, where: str) -> list[str]:
    """One choice a line."""
    lines = [line.strip() for line in value.split("\n") if line.strip()]
    if len(lines) < 2:
        raise InputError(f"{where}: choices are one line of text; give a list of texts")
    return lines


def _checked(choices: list[Any], where: str) -> tuple[str, ...]:
    if not 2 <= len(choices) <= len(LETTERS):
        raise InputError(f"{where}: {len(choices)} choices; give 2 to 26")
    texts = _without_labels(tuple(_text(choice, "a choice", where) for choice in choices))
    if "" in texts:
        raise InputError(f"{where}: choice {LETTERS[texts.index('')]} is empty")
    return texts


def _without_labels(texts: tuple[str, ...]) -> tuple[str, ...]:
    """The texts without `A.`, `B.`, ... in front, if all have one and some have more than that."""
    labels = [_LABEL.match(text) for text in texts]
    if [label and label[1].upper() for label in labels] != list(LETTERS[: len(texts)]):
        return texts
    rest = tuple(text[label.end() :] for text, label in zip(texts, labels, strict=True) if label)
    return rest if any(rest) else texts


def _literal(text: str) -> Any:
    """The list or object that a text spells, in JSON or as Python prints it; None if it spells none."""
    if not text.strip().startswith(("[", "{")):
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(text.strip())
            str(found)  # an integer written in hexadecimal may have no decimal form in Python
            return found
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
