"""Questions about rendered scenes, coarse and fine, with balanced answers.

For each question the answer is chosen first; then a scene is composed for it. The answers of a kind are cycled through, in a
new order each round, and so are the letters of the right choice. So in any prefix of a split, the counts of two answers of a
kind differ by at most one.

Question i of a split depends only on (seed, split, i). Splits use different random seeds.
"""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Literal, TypeVar, get_args

from PIL import Image

from lsg_jax.data.conversation import IMAGE_TAG
from lsg_jax.data.drawing import draw
from lsg_jax.data.prompts import WORD_SUFFIX, multiple_choice_prompt
from lsg_jax.data.shapes import (
    COLOURS,
    CORNERS,
    LETTERS,
    MAX_ITEMS,
    PATTERNS,
    SHAPES,
    Look,
    Scene,
    compose,
    random_looks,
    random_sizes,
)
from lsg_jax.errors import InputError
from lsg_jax.files import write_atomic

Split = Literal["train", "validation", "test"]
Grain = Literal["coarse", "fine"]
T = TypeVar("T")

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

LEFT_MARGIN = 0.06
"""Minimum distance along x for "further left", beyond the difference of the radii, in units of the side."""


@dataclass(frozen=True)
class SceneQuestion:
    """One question and the scene it is about.

    Attributes:
        id: unique over all splits of a seed.
        kind: one of KINDS.
        question: text without choices and suffix.
        answer: in words, also for multiple choice.
        answers: accepted answers; for multiple choice, the letter. The first is the training target.
        choices: two or four texts, A first; empty for short answers.
    """

    id: str
    kind: str
    grain: Grain
    question: str
    answer: str
    answers: tuple[str, ...]
    choices: tuple[str, ...]
    scene: Scene

    @property
    def prompt(self) -> str:
        """The user's turn, as in evaluation."""
        return multiple_choice_prompt(self.question, self.choices) if self.choices else self.question + WORD_SUFFIX


@dataclass(frozen=True)
class Kind:
    """One kind of question.

    Attributes:
        answers: possible answers, used equally often.
        choices: number of choices; 0 for short answers.
        compose: (rng, answer, the other choices) -> (question, scene in which only this answer is right).
    """

    grain: Grain
    answers: tuple[str, ...]
    choices: int
    compose: Callable[[Random, str, Sequence[str]], tuple[str, Scene]]


def scene_question(split: Split, index: int, *, seed: int = 0) -> SceneQuestion:
    """Question `index` (from 0) of a split.

    Raises:
        InputError: no such split, or a negative index.
    """
    stream = f"scenes {seed} {_checked(split, index)}"
    turn, place = divmod(index, len(KINDS))
    name, kind = list(KINDS.items())[place]
    rng = Random(f"{stream} {index}")
    answer = _in_turn(kind.answers, turn, f"{stream} {name}")
    others: list[str] = []
    if kind.choices:
        others = rng.sample([other for other in kind.answers if other != answer], kind.choices - 1)
    question, scene = kind.compose(rng, answer, others)
    accepted: tuple[str, ...] = (answer, NUMBERS[int(answer) - 1]) if answer.isdigit() else (answer,)
    if kind.choices:
        right = _in_turn(range(kind.choices), turn, f"{stream} {name} letter")
        others.insert(right, answer)
        accepted = (string.ascii_uppercase[right],)
    return SceneQuestion(f"{split}-{index:06d}", name, kind.grain, question, answer, accepted, tuple(others), scene)


def scene_questions(split: Split, count: int, *, seed: int = 0) -> list[SceneQuestion]:
    """The first `count` questions of a split. A longer list starts with the same ones."""
    return [scene_question(split, index, seed=seed) for index in range(count)]


def probe_scene(split: Split, index: int, *, seed: int = 0) -> Scene:
    """A scene for linear probes. All counts are equally frequent; the size of the largest shape is independent of the count."""
    stream = f"scenes {seed} {_checked(split, index)} probe"
    count = _in_turn(range(1, MAX_ITEMS + 1), index, stream)
    rng = Random(f"{stream} scene {index}")
    return compose(rng, random_looks(rng, count))


def write_questions(folder: Path, split: Split, count: int, *, seed: int = 0, side: int = 224) -> Path:
    """Writes the first `count` questions of a split and their images.

    `folder/questions.jsonl` is for evaluation, `folder/llava.jsonl` has the same questions as LLaVA conversations for training.
    Both refer to the images `folder/images/00000.png`, ...

    Returns:
        The path of `questions.jsonl`.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows, records = [], []
    for index, question in enumerate(scene_questions(split, count, seed=seed)):
        image = f"images/{index:05d}.png"
        Image.fromarray(draw(question.scene, side)).save(folder / image, compress_level=1)
        rows.append(_as_row(question, image))
        records.append(as_llava(question, image))
    for name, lines in {"questions": rows, "llava": records}.items():
        write_atomic(folder / f"{name}.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    return folder / "questions.jsonl"


def _as_row(question: SceneQuestion, image: str) -> dict[str, object]:
    row = {"id": question.id, "image": image, "question": question.question, "category": question.kind, "grain": question.grain}
    if question.choices:
        return {**row, "choices": question.choices, "answer": question.answer}
    return {**row, "answer": question.answers}


def as_llava(question: SceneQuestion, image: str) -> dict[str, object]:
    """The question as a LLaVA record, with the prompt of evaluation and the letter or short answer as the answer."""
    human, gpt = f"{IMAGE_TAG}\n{question.prompt}", question.answers[0]
    turns = [{"from": "human", "value": human}, {"from": "gpt", "value": gpt}]
    return {"id": question.id, "image": image, "conversations": turns}


def _checked(split: str, index: int) -> str:
    if split not in get_args(Split):
        raise InputError(f"no split {split!r} of the scenes; there are {', '.join(get_args(Split))}")
    if index < 0:
        raise InputError(f"scenes are numbered from 0; there is no {index}")
    return split


def _in_turn(options: Sequence[T], turn: int, stream: str) -> T:
    """Cycles through the options, in a new random order each round."""
    round_, place = divmod(turn, len(options))
    return Random(f"{stream} {round_}").sample(options, len(options))[place]


# -------------------------------------------------------------------------------------------------------------------- kinds


def _other(rng: Random, options: Sequence[str], *but: str) -> str:
    return rng.choice([option for option in options if option not in but])


def _count(rng: Random, answer: str, _: Sequence[str]) -> tuple[str, Scene]:
    return "How many shapes are there?", compose(rng, random_looks(rng, int(answer)))


def _common_colour(rng: Random, answer: str, others: Sequence[str]) -> tuple[str, Scene]:
    """At least two more shapes of this colour than of any other; every choice occurs."""
    counts = [rng.randint(1, 2) for _ in others]
    colours = [answer] * (max(counts) + 2) + [colour for colour, n in zip(others, counts, strict=True) for _ in range(n)]
    looks = [replace(look, colour=colour) for look, colour in zip(random_looks(rng, len(colours)), colours, strict=True)]
    return "What is the most common colour of the shapes?", compose(rng, looks)


def _exists(rng: Random, answer: str, _: Sequence[str]) -> tuple[str, Scene]:
    """For either answer, two items have the colour and two the shape asked for; the count does not depend on the answer."""
    colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
    colour_only = lambda: (colour, _other(rng, SHAPES, shape))
    shape_only = lambda: (_other(rng, list(COLOURS), colour), shape)
    neither = lambda: (_other(rng, list(COLOURS), colour), _other(rng, SHAPES, shape))
    pairs = [colour_only(), shape_only()]
    pairs += [(colour, shape), neither()] if answer == "yes" else [colour_only(), shape_only()]
    pairs += [neither() for _ in range(rng.randint(0, 4))]
    article = "an" if colour == "orange" else "a"
    return f"Is there {article} {colour} {shape}?", compose(rng, _sized(rng, pairs))


def _background(rng: Random, answer: str, _: Sequence[str]) -> tuple[str, Scene]:
    scene = compose(rng, random_looks(rng, rng.randint(1, MAX_ITEMS)), pattern=answer)
    return "What is the pattern of the background?", scene


def _corner_letter(rng: Random, answer: str, _: Sequence[str]) -> tuple[str, Scene]:
    """A second corner has a different letter."""
    corner, second = rng.sample(list(CORNERS), 2)
    letters = {corner: answer, second: _other(rng, LETTERS, answer)}
    scene = compose(rng, random_looks(rng, rng.randint(1, MAX_ITEMS)), corners=letters)
    return f"What is the small letter in the {corner} corner?", scene


def _object_letter(rng: Random, answer: str, _: Sequence[str]) -> tuple[str, Scene]:
    """Two distractors with other letters: one shares the colour, one the shape."""
    colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
    pairs = [(colour, shape), (colour, _other(rng, SHAPES, shape)), (_other(rng, list(COLOURS), colour), shape)]
    letters = [answer, *rng.sample([letter for letter in LETTERS if letter != answer], 2)]
    looks = [Look(*pair, "large" if "star" in pair else "medium", letter) for pair, letter in zip(pairs, letters, strict=True)]
    looks += _fillers(rng, rng.randint(0, 4), pairs[:1])
    return f"What is the letter on the {colour} {shape}?", compose(rng, looks)


def _further_left(rng: Random, answer: str, others: Sequence[str]) -> tuple[str, Scene]:
    """Rejection sampling: until the answer's shape is far enough to the left of the other."""
    pairs = [tuple(name.split()) for name in (answer, *others)]
    looks = _sized(rng, pairs)
    looks += _fillers(rng, rng.randint(0, 4), pairs)
    while True:
        scene = compose(rng, looks)
        left, right = scene.items[:2]
        if right.x - left.x >= LEFT_MARGIN + abs(right.radius - left.radius):
            return "Which of the two is further left?", scene


def _smallest_colour(rng: Random, answer: str, others: Sequence[str]) -> tuple[str, Scene]:
    """All choices occur. The other shapes are at least one size larger, in any of these colours, the answer's included."""
    colours = [answer, *others, *rng.choices([answer, *others], k=rng.randint(0, 2))]
    if rng.random() < 0.5:
        sizes = ["small", *rng.choices(("medium", "large"), weights=(3, 1), k=len(colours) - 1)]
    else:
        colours = colours[:4]
        sizes = ["medium"] + ["large"] * 3
    looks = [Look(colour, rng.choice(SHAPES), size) for colour, size in zip(colours, sizes, strict=True)]
    return "What colour is the smallest shape?", compose(rng, looks)


def _sized(rng: Random, pairs: Sequence[Sequence[str]]) -> list[Look]:
    """Items of these colours and shapes, with random sizes."""
    return [Look(colour, shape, size) for (colour, shape), size in zip(pairs, random_sizes(rng, len(pairs)), strict=True)]


def _fillers(rng: Random, count: int, but: Sequence[Sequence[str]]) -> list[Look]:
    """`count` small and medium items, except of these (colour, shape) pairs."""
    free = [(colour, shape) for colour in COLOURS for shape in SHAPES if (colour, shape) not in but]
    return [Look(*rng.choice(free), rng.choice(("small", "medium"))) for _ in range(count)]


KINDS: dict[str, Kind] = {
    "count": Kind("coarse", tuple(map(str, range(1, MAX_ITEMS + 1))), 0, _count),
    "corner_letter": Kind("fine", LETTERS, 0, _corner_letter),
    "common_colour": Kind("coarse", tuple(COLOURS), 4, _common_colour),
    "object_letter": Kind("fine", LETTERS, 0, _object_letter),
    "exists": Kind("coarse", ("yes", "no"), 0, _exists),
    "further_left": Kind("fine", tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES), 2, _further_left),
    "background": Kind("coarse", PATTERNS, 4, _background),
    "smallest_colour": Kind("fine", tuple(COLOURS), 4, _smallest_colour),
}
"""Coarse and fine alternate, so that any prefix of a split has nearly equal shares of each kind."""
