"""What a question about a scene asks the model to look at: the box that its answer can be seen in.

Three kinds of question have none: the answer to `count`, `common_colour` and `background` is spread over the picture, and so
is a `no` to `exists`.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

from lsg_jax.data.drawing import Box, corner_letter_box, item_box, item_letter_box
from lsg_jax.data.scene_questions import KINDS, SceneQuestion, Split, scene_question
from lsg_jax.data.shapes import CORNERS, Item
from lsg_jax.errors import InputError

TARGETS = {
    "corner_letter": "the letter in the asked corner",
    "object_letter": "the letter on the named shape",
    "exists": "the named shape, where it exists",
    "further_left": "the one of the two named shapes that is further left",
    "smallest_colour": "the smallest shape",
}
"""Kinds of question that have a target, and what it is."""


def target_box(asked: SceneQuestion) -> Box | None:
    """The box of what must be seen to answer, in units of the picture's sides; None for a question without such a place."""
    items = asked.scene.items
    if asked.kind == "corner_letter":
        return corner_letter_box(next(corner for corner in CORNERS if f" {corner} corner" in asked.question))
    if asked.kind == "object_letter":
        return item_letter_box(_named(asked.question, [item for item in items if item.letter == asked.answer]))
    if asked.kind == "exists" and asked.answer == "yes":
        return item_box(_named(asked.question, items))
    if asked.kind == "further_left":
        return item_box(_named(asked.answer, items))
    if asked.kind == "smallest_colour":
        return item_box(min(items, key=lambda item: item.radius))
    return None


def _named(text: str, items: list[Item] | tuple[Item, ...]) -> Item:
    return next(item for item in items if item.name in text)


def questions_with_target(split: Split, kind: str, number: int, *, seed: int = 0) -> list[SceneQuestion]:
    """The first `number` questions of a kind in a split that have a target.

    Raises:
        InputError: a kind without targets.
    """
    if kind not in TARGETS:
        raise InputError(f"questions of the kind {kind} have no target; those that have: {', '.join(TARGETS)}")
    found = _of_kind(split, kind, seed)
    return [next(found) for _ in range(number)]


def _of_kind(split: Split, kind: str, seed: int) -> Iterator[SceneQuestion]:
    for index in count(list(KINDS).index(kind), len(KINDS)):
        asked = scene_question(split, index, seed=seed)
        if target_box(asked) is not None:
            yield asked
