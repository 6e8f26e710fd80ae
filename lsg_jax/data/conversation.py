"""Records -> conversations. Pure functions of text: no files, no images. `record_shapes` reads the keys of a record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from lsg_jax.data.record_shapes import IMAGE_TAG as IMAGE_TAG
from lsg_jax.data.record_shapes import Message, check_keys, image_fields, read_messages
from lsg_jax.data.record_shapes import RecordError as RecordError


@dataclass(frozen=True)
class Turn:
    """One turn. The text of a human turn may start with `<image>\\n`; no other text contains the tag."""

    role: Literal["human", "gpt"]
    text: str


@dataclass(frozen=True)
class Conversation:
    """A validated record: alternating turns from a human one to an answer, with at most one image.

    `image` is the path as in the record, None without an image. `notes` are slugs of repairs: `image_without_tag`,
    `system_dropped`, `leading_turn_dropped`, `unanswered_turn_dropped`, and `key_not_read: NAME`.
    """

    record_id: str
    image: str | None
    turns: tuple[Turn, ...]
    notes: tuple[str, ...] = ()


Example = tuple[tuple[Turn, ...], str]
"""The turns before an answer (the last is human), and the answer."""


def parse_record(record: Any, *, default_id: str = "") -> Conversation:
    """Validates a record of any shape that `record_shapes` reads.

    Raises:
        RecordError: with the reasons of `record_shapes`, or `not_a_record`, `bad_id`, `several_images`, `unknown_role`,
            `system_not_first`, `roles_not_alternating`, `tag_in_answer`, `tag_without_image`, `empty_question`,
            `empty_answer` or `nothing_supervised`.
    """
    if not isinstance(record, dict):
        raise RecordError("not_a_record", f"expected an object, got {type(record).__name__}")
    record_id = record.get("id", default_id)
    if isinstance(record_id, bool) or not isinstance(record_id, (str, int)):
        raise RecordError("bad_id", f"id is neither text nor an integer: {str(record_id)[:80]!r}")
    images = image_fields(record)
    key_notes = check_keys(record, has_image=bool(images))
    turns, turn_notes = _alternating(read_messages(record))
    if len(images) > 1:
        raise RecordError("several_images", f"the record lists {len(images)} images; one is supported")
    image = images[0] if images else None
    turns, tag_notes = _place_tag(turns, image is not None)
    for number, turn in enumerate(turns):
        if turn.text.strip():
            continue
        reason = "empty_answer" if turn.role == "gpt" else "empty_question"
        raise RecordError(reason, f"turn {number} ({turn.role}) is empty")
    if not turns:
        raise RecordError("nothing_supervised", "no question is followed by an answer")
    notes = dict.fromkeys((*key_notes, *turn_notes, *tag_notes))  # each once
    return Conversation(str(record_id), image, tuple(turns), tuple(notes))


def _alternating(messages: list[Message]) -> tuple[list[Turn], list[str]]:
    """Drops a system prompt, then a leading turn that is not human, as LLaVA does, and a last question without an answer."""
    notes = []
    if messages[0].role == "system":
        notes.append("system_dropped")
    if len(messages) > len(notes) and messages[len(notes)].role != "human":
        notes.append("leading_turn_dropped")
    turns: list[Turn] = []
    for number, message in enumerate(messages[len(notes) :], start=len(notes)):
        due: Literal["human", "gpt"] = ("human", "gpt")[len(turns) % 2]
        if message.role == "system":
            raise RecordError("system_not_first", f"turn {number} is a system prompt; only the first turn may be one")
        if message.role == "other":
            raise RecordError(
                "unknown_role", f"turn {number} is from {message.written!r}; expected human or gpt, user or assistant"
            )
        if message.role != due:
            again = number > 0 and messages[number - 1].role == message.role
            problem = "a second {} turn in a row" if again else "from {}, where a human turn is due"
            raise RecordError("roles_not_alternating", f"turn {number} is {problem.format(message.written)}")
        turns.append(Turn(due, message.text))
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
