"""LLaVA records. Pure functions of text: no files, no images.

A record is `{"id", "image"?, "conversations": [{"from": "human" | "gpt", "value": str}, ...]}`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from lsg_jax.errors import LsgError

IMAGE_TAG = "<image>"
"""The image's place in records, templates and prompts: at the start of a turn, followed by a newline."""


class RecordError(LsgError):
    """A record cannot be used. `reason` is a short slug by which rejects are counted."""

    exit_code = 65

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Turn:
    """One turn. The text of a human turn may start with `<image>\\n`; no other text contains the tag."""

    role: Literal["human", "gpt"]
    text: str


@dataclass(frozen=True)
class Conversation:
    """A validated record: alternating turns from a human one to an answer, with at most one image.

    `image` is the path as in the record, None without an image. `notes` are slugs of repairs: `image_without_tag`,
    `leading_turn_dropped`, `unanswered_turn_dropped`.
    """

    record_id: str
    image: str | None
    turns: tuple[Turn, ...]
    notes: tuple[str, ...] = ()


Example = tuple[tuple[Turn, ...], str]
"""The turns before an answer (the last is human), and the answer."""


def parse_record(record: Any, *, default_id: str = "") -> Conversation:
    """Validates a LLaVA record.

    Raises:
        RecordError: with reason `not_a_record`, `bad_id`, `bad_image_field`, `several_images`, `no_turns`, `bad_turn`,
            `unknown_role`, `roles_not_alternating`, `tag_in_answer`, `tag_without_image`, `empty_question`, `empty_answer`
            or `nothing_supervised`.
    """
    if not isinstance(record, dict):
        raise RecordError("not_a_record", f"expected an object, got {type(record).__name__}")
    record_id = record.get("id", default_id)
    if isinstance(record_id, bool) or not isinstance(record_id, (str, int)):
        raise RecordError("bad_id", f"id is neither text nor an integer: {str(record_id)[:80]!r}")
    image = image_field(record.get("image"))
    turns, notes = _alternating(_read_turns(record.get("conversations")))
    turns, tag_notes = _place_tag(turns, image is not None)
    for number, turn in enumerate(turns):
        if turn.text.strip():
            continue
        reason = "empty_answer" if turn.role == "gpt" else "empty_question"
        raise RecordError(reason, f"turn {number} ({turn.role}) is empty")
    if not turns:
        raise RecordError("nothing_supervised", "no question is followed by an answer")
    return Conversation(str(record_id), image, tuple(turns), (*notes, *tag_notes))


def image_field(value: Any) -> str | None:
    """The path in a record's `image` field; None without an image. RecordError `several_images` or `bad_image_field`."""
    if isinstance(value, list):
        if len(value) > 1:
            raise RecordError("several_images", f"the record lists {len(value)} images; one is supported")
        value = value[0] if value else None
    # pandas exports a missing path as nan, as a number or as text
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if not isinstance(value, str):
        raise RecordError("bad_image_field", f"image is not a path: {str(value)[:80]!r}")
    value = value.strip()
    return None if value == "" or value.lower() == "nan" else value


def _read_turns(conversations: Any) -> list[Turn]:
    if not isinstance(conversations, list) or not conversations:
        raise RecordError("no_turns", "conversations is missing, empty or not a list")
    turns = []
    for number, item in enumerate(conversations):
        if not isinstance(item, dict) or not isinstance(item.get("value"), str):
            raise RecordError("bad_turn", f"turn {number} has no text in `value`")
        role = item.get("from")
        if role not in ("human", "gpt") and number > 0:
            raise RecordError("unknown_role", f"turn {number} is from {role!r}; expected human or gpt")
        try:
            item["value"].encode("utf-8")
        except UnicodeEncodeError:
            raise RecordError("bad_turn", f"turn {number} contains half of a surrogate pair") from None
        # A leading turn of any other role (a system prompt) counts as a leading answer, which is dropped.
        turns.append(Turn("human" if role == "human" else "gpt", item["value"]))
    return turns


def _alternating(turns: list[Turn]) -> tuple[list[Turn], list[str]]:
    """Drops one leading turn that is not human, as LLaVA does, and a last question without an answer."""
    notes = []
    if turns[0].role != "human":
        turns = turns[1:]
        notes.append("leading_turn_dropped")
    for number, turn in enumerate(turns):
        if turn.role != ("human", "gpt")[number % 2]:
            raise RecordError("roles_not_alternating", f"turn {number + len(notes)} is a second {turn.role} turn in a row")
    if len(turns) > 2 and turns[-1].role == "human" and IMAGE_TAG not in turns[-1].text:
        turns = turns[:-1]
        notes.append("unanswered_turn_dropped")
    if not turns or turns[-1].role == "human":
        raise RecordError("nothing_supervised", "the last question has no answer")
    return turns, notes


def _place_tag(turns: list[Turn], has_image: bool) -> tuple[list[Turn], list[str]]:
    """Moves `<image>` to the front of its turn, or puts it in front of the first question."""
    for number, turn in enumerate(turns):
        if turn.role == "gpt" and IMAGE_TAG in turn.text:
            raise RecordError("tag_in_answer", f"turn {number} is an answer that contains {IMAGE_TAG}")
    count = sum(turn.text.count(IMAGE_TAG) for turn in turns)
    if count > 1:
        raise RecordError("several_images", f"{count} {IMAGE_TAG} tags; one image is supported")
    if count and not has_image:
        raise RecordError("tag_without_image", f"{IMAGE_TAG} in the text, but the record has no image")
    if has_image and not count:
        return [Turn("human", tag_front(turns[0].text)), *turns[1:]], ["image_without_tag"]
    return [replace(t, text=tag_front(t.text)) if IMAGE_TAG in t.text else t for t in turns], []


def tag_front(text: str) -> str:
    """`<image>\\n` and the text, without other tags and outer whitespace."""
    return f"{IMAGE_TAG}\n{text.replace(IMAGE_TAG, '').strip()}".strip()


def question_turn(text: str, *, has_image: bool) -> Turn:
    """A question as a turn, with the tag in front if it has an image.

    Raises:
        RecordError: `tag_without_image` or `empty_question`, where there is no image.
    """
    if has_image:
        return Turn("human", tag_front(text))
    if IMAGE_TAG in text:
        raise RecordError("tag_without_image", f"{IMAGE_TAG} in the text, but there is no image")
    if not text.strip():
        raise RecordError("empty_question", "the question is empty, and there is no image")
    return Turn("human", text.strip())


def examples(turns: Sequence[Turn]) -> list[Example]:
    """One example per answer; the turns before it are the prompt."""
    return [(tuple(turns[:i]), turn.text) for i, turn in enumerate(turns) if turn.role == "gpt"]
