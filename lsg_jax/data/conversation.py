"""Records -> conversations. Pure functions of text: no files, no images. `record_shapes` reads the keys of a record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from lsg_jax.data.record_shapes import IMAGE_TAG as IMAGE_TAG
from lsg_jax.data.record_shapes import Message, check_keys, image_fields, read_messages, tags_in_front
from lsg_jax.data.record_shapes import RecordError as RecordError


@dataclass(frozen=True)
class Turn:
    """One turn. The text of a human turn holds a tag `<image>` for each of its images, in their order.

    The tag of a turn's only image is at the start, followed by a newline (LLaVA-1.5).
    """

    role: Literal["human", "gpt"]
    text: str


@dataclass(frozen=True)
class Conversation:
    """A validated record: alternating turns from a human one to an answer.

    `images` are the paths as in the record, as many as the turns have tags. `notes` are slugs of repairs: `image_without_tag`,
    `system_dropped`, `leading_turn_dropped`, `unanswered_turn_dropped`, and `key_not_read: NAME`.
    """

    record_id: str
    images: tuple[str, ...]
    turns: tuple[Turn, ...]
    notes: tuple[str, ...] = ()


Example = tuple[tuple[Turn, ...], str]
"""The turns before an answer (the last is human), and the answer."""


def parse_record(record: Any, *, default_id: str = "") -> Conversation:
    """Validates a record of any shape that `record_shapes` reads.

    Raises:
        RecordError: with the reasons of `record_shapes`, or `not_a_record`, `bad_id`, `unknown_role`, `system_not_first`,
            `roles_not_alternating`, `tag_in_answer`, `tag_without_image`, `tags_and_images_differ`, `empty_question`,
            `empty_answer` or `nothing_supervised`.
    """
    if not isinstance(record, dict):
        raise RecordError("not_a_record", f"expected an object, got {type(record).__name__}")
    record_id = default_id if record.get("id") is None else record["id"]
    if isinstance(record_id, bool) or not isinstance(record_id, (str, int)):
        raise RecordError("bad_id", f"id is neither text nor an integer: {str(record_id)[:80]!r}")
    if not _encodable(str(record_id)):
        raise RecordError("bad_id", "id contains half of a surrogate pair")
    images = image_fields(record)
    key_notes = check_keys(record, has_image=bool(images))
    turns, turn_notes = _alternating(read_messages(record))
    turns, tag_notes = _place_tags(turns, len(images))
    for number, turn in enumerate(turns):
        if turn.text.strip():
            continue
        reason = "empty_answer" if turn.role == "gpt" else "empty_question"
        raise RecordError(reason, f"turn {number} ({turn.role}) is empty")
    if not turns:
        raise RecordError("nothing_supervised", "no question is followed by an answer")
    notes = dict.fromkeys((*key_notes, *turn_notes, *tag_notes))  # each once
    return Conversation(str(record_id), tuple(images), tuple(turns), tuple(notes))


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


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


def _place_tags(turns: list[Turn], images: int) -> tuple[list[Turn], list[str]]:
    """Checks the tags against the number of images. Tags in no turn go in front of the first question."""
    for number, turn in enumerate(turns):
        if turn.role == "gpt" and IMAGE_TAG in turn.text:
            raise RecordError("tag_in_answer", f"turn {number} is an answer that contains {IMAGE_TAG}")
    count = sum(turn.text.count(IMAGE_TAG) for turn in turns)
    if count and not images:
        raise RecordError("tag_without_image", f"{IMAGE_TAG} in the text, but the record has no image")
    if images and not count:
        return [Turn("human", tags_in_front(turns[0].text, images)), *turns[1:]], ["image_without_tag"]
    if count != images:
        raise tags_differ(count, images)
    # as in the code of LLaVA-NeXT: the only tag of a turn moves to its front, several stay where they are
    return [replace(t, text=tags_in_front(t.text, 1)) if t.text.count(IMAGE_TAG) == 1 else t for t in turns], []


def tags_differ(tags: int, images: int) -> RecordError:
    """The error of a text that has not a tag for each image."""
    of = lambda count, what: f"{count} {what}{'' if count == 1 else 's'}"
    return RecordError("tags_and_images_differ", f"{of(tags, f'{IMAGE_TAG} tag')} in the text for {of(images, 'image')}")


def question_turn(text: str, images: int) -> Turn:
    """A question as a turn, with the tags of its images.

    A single tag goes to the front. Several tags stay where they are; without any, they go to the front.

    Raises:
        RecordError: `tag_without_image` or `empty_question`, where there is no image; `tags_and_images_differ`, where there
            are tags, but not one for each image.
    """
    count = text.count(IMAGE_TAG)
    if images and count not in (0, images):
        error = tags_differ(count, images)
        raise RecordError(error.reason, f"{error}; write one for each image, or none")
    if images > 1 and count:
        return Turn("human", text.strip())
    if images:
        return Turn("human", tags_in_front(text, images))
    if count:
        raise RecordError("tag_without_image", f"{IMAGE_TAG} in the text, but there is no image")
    if not text.strip():
        raise RecordError("empty_question", "the question is empty, and there is no image")
    return Turn("human", text.strip())


def examples(turns: Sequence[Turn]) -> list[Example]:
    """One example per answer; the turns before it are the prompt."""
    return [(tuple(turns[:i]), turn.text) for i, turn in enumerate(turns) if turn.role == "gpt"]
