"""Training conversations: drawn scenes with several questions each.

The benchmark (`lsg_jax.data.scene_questions`) composes a scene for one question. Here the scene comes first, from the same
generators. It gets every kind of question with a unique answer in it, and easier ones that teach what the others presuppose.
"""

from __future__ import annotations

import json
import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from random import Random
from typing import Literal

from PIL import Image

from lsg_jax.data.conversation import IMAGE_TAG
from lsg_jax.data.drawing import draw
from lsg_jax.data.prompts import LETTER_SUFFIX, WORD_SUFFIX, question_with_options
from lsg_jax.data.scene_questions import LEFT_MARGIN, Split, probe_scene, scene_question
from lsg_jax.data.shapes import COLOURS, LETTERS, PATTERNS, SHAPES, SIZES, Item, Scene, has_room

Exchange = tuple[str, str]
"""Question and answer."""

_Ask = Callable[[Random, Scene], Iterator[Exchange]]

Lesson = Literal["finding", "pairs", "letters", "choosing", "answering", "reading"]
"""The curriculum, in order: questions that name what they ask for; the letter of one of two choices; the letters of all
choices; multiple choice; all kinds; letters in corners and on all shapes that have room for one."""

TEXT_ONLY: tuple[Lesson, ...] = ("pairs", "letters")
"""Lessons whose questions need no image; their records have none."""


class Form(StrEnum):
    """The suffix of a question. Without one, more questions fit into a record."""

    PLAIN = ""
    WORD = WORD_SUFFIX
    LETTER = LETTER_SUFFIX
    PHRASE = "\nAnswer in a phrase."


LISTING = "Describe the image."
ROWS = 8  # shapes whose centres lie in the same eighth of the height are in one row


def scene_conversation(
    split: Split, index: int, *, seed: int = 0, lesson: Lesson = "answering"
) -> tuple[Scene, list[Exchange]]:
    """Scene `index` (from 0) of a split with the questions of a lesson in random order; a function of its arguments alone.

    `listing` is not among the questions. The scene is the same in each lesson, but for the letters in `reading`.
    """
    if index % 4 == 3:
        scene = probe_scene(split, index // 4, seed=seed)
    else:
        scene = scene_question(split, index - index // 4, seed=seed).scene
    rng = Random(f"conversation {seed} {split} {index}")
    if lesson == "reading":
        scene = replace(scene, items=tuple(_lettered(rng, item) for item in scene.items))

    def some(asks: tuple[_Ask, ...], most: int | None = None) -> list[Exchange]:
        asked = [exchange for ask in asks for exchange in ask(rng, scene)]
        rng.shuffle(asked)
        return asked[:most]

    if lesson == "pairs":
        exchanges = [_which_letter(rng, rng.sample(rng.choice(_WORDS), 2), Form.PLAIN) for _ in range(6)]
    elif lesson == "letters":
        exchanges = [_one_option(rng) for _ in range(4)]
    elif lesson == "finding":
        exchanges = [*some(_READ), *some((_exists, *_NAMED), 6)]
    elif lesson == "choosing":
        exchanges = [*some((*_CHOICES, *_CHOICES), 4), *some((*_READ, _exists, *_NAMED), 2), _one_option(rng)]
    elif lesson == "reading":
        exchanges = [*some(_READ, 5), *some(_NAMED, 1), *some(_OTHERS, 2)]
    else:
        exchanges = [*some(_READ, 2), *some(_NAMED, 2), *some(_OTHERS)]
    rng.shuffle(exchanges)
    return scene, exchanges


def write_conversations(
    folder: Path,
    split: Split,
    count: int,
    *,
    lesson: Lesson = "answering",
    seed: int = 0,
    side: int = 112,
    processes: int = 1,
) -> Path:
    """Writes `count` scenes as LLaVA records, with images unless the lesson is in TEXT_ONLY. Returns the path of the JSONL.

    A record holds the exchanges of `scene_conversation`. Every fifth record of `answering` holds three of them and then the
    listing; it comes last, so that no question can be answered from it.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    path = folder / "conversations.jsonl"
    write = partial(_write_one, folder, split, lesson=lesson, seed=seed, side=side)
    with path.open("w", encoding="utf-8") as file:
        if processes == 1:
            file.writelines(map(write, range(count)))
        else:
            with multiprocessing.get_context("spawn").Pool(processes) as pool:
                file.writelines(pool.imap(write, range(count), chunksize=100))
    return path


def _write_one(folder: Path, split: Split, index: int, *, lesson: Lesson, seed: int, side: int) -> str:
    """Writes the image of a scene, if the lesson has images, and returns its line of the JSONL."""
    scene, exchanges = scene_conversation(split, index, seed=seed, lesson=lesson)
    image = None if lesson in TEXT_ONLY else f"images/{index:06d}.png"
    if image:
        Image.fromarray(draw(scene, side)).save(folder / image, compress_level=1)
    described = lesson == "answering" and index % 5 == 4
    turns = [*exchanges[:3], listing(scene)] if described else exchanges
    return json.dumps(as_record(f"{split}-{index:06d}", image, turns)) + "\n"


def listing(scene: Scene) -> Exchange:
    """A description of everything in the scene, as captions are for LLaVA: many more target tokens than in short answers.

    First the whole, then the shapes row by row, then the letters in the corners.
    """
    ranked = Counter(item.colour for item in scene.items).most_common()
    mostly = [f"mostly {ranked[0][0]}"] if len(ranked) > 1 and ranked[0][1] > ranked[1][1] else []
    whole = [f"{len(scene.items)} on {scene.background.pattern}", *mostly]
    items = sorted(scene.items, key=lambda item: (int(item.y * ROWS), item.x))
    shapes = [f"{item.size} {item.name}" + (f" {item.letter}" if item.letter else "") for item in items]
    return LISTING, "; ".join([*whole, *shapes, *(f"{corner} {letter}" for corner, letter in scene.corners.items())])


def as_record(name: str, image: str | None, exchanges: list[Exchange]) -> dict[str, object]:
    """A LLaVA record; without an image it is text only."""
    turns = []
    for number, (question, answer) in enumerate(exchanges):
        tag = f"{IMAGE_TAG}\n" if image and number == 0 else ""
        turns += [{"from": "human", "value": tag + question}, {"from": "gpt", "value": answer}]
    return {"id": name, **({"image": image} if image else {}), "conversations": turns}


# ------------------------------------------------------------------------------------------------------------------ questions


def _short(rng: Random, question: str, answer: str, about: str = "") -> Exchange:
    """A question without options. Two fifths have no suffix, one fifth the benchmark's, two fifths ask for a phrase.

    The phrase begins with the subject of the question: to name it, the model has to find it in the question, from where it
    can find it in the image.
    """
    form = rng.choice((Form.PLAIN, Form.PLAIN, Form.WORD, Form.PHRASE, Form.PHRASE))
    return question + form, f"{about} {answer}".strip() if form is Form.PHRASE else answer


def _choice(rng: Random, question: str, answer: str, others: list[str]) -> Exchange:
    """One third of these questions are answered by word, the others by letter."""
    return _short(rng, question, answer) if rng.random() < 1 / 3 else _letter(rng, question, answer, others)


def _letter(rng: Random, question: str, answer: str, others: list[str]) -> Exchange:
    """Multiple choice. A third each have no suffix, the benchmark's, or ask for a phrase with the option and its letter."""
    choices = [answer, *others]
    rng.shuffle(choices)
    question, letter = question_with_options(question, choices), "ABCD"[choices.index(answer)]
    form = rng.choice((Form.PLAIN, Form.LETTER, Form.PHRASE))
    return question + form, f"{answer} {letter}" if form is Form.PHRASE else letter


def _some(rng: Random, options: list[str] | tuple[str, ...], answer: str, count: int = 3) -> list[str]:
    return rng.sample([option for option in options if option != answer], count)


def _count(rng: Random, scene: Scene) -> Iterator[Exchange]:
    yield _short(rng, "How many shapes are there?", str(len(scene.items)))


def _background(rng: Random, scene: Scene) -> Iterator[Exchange]:
    pattern = scene.background.pattern
    yield _choice(rng, "What is the pattern of the background?", pattern, _some(rng, PATTERNS, pattern))


def _corner_letters(rng: Random, scene: Scene) -> Iterator[Exchange]:
    for corner, letter in scene.corners.items():
        yield _short(rng, f"What is the small letter in the {corner} corner?", letter, corner)


def _object_letters(rng: Random, scene: Scene) -> Iterator[Exchange]:
    with_letters = [item for item in _unique(scene) if item.letter]
    for item in rng.sample(with_letters, min(4, len(with_letters))):
        yield _short(rng, f"What is the letter on the {item.name}?", item.letter, item.name)


def _exists(rng: Random, scene: Scene) -> Iterator[Exchange]:
    """For the answer "no" the scene contains both the colour and the shape, in different items, where possible."""
    pairs = {(item.colour, item.shape) for item in scene.items}
    colours, shapes = ([getattr(item, what) for item in scene.items] for what in ("colour", "shape"))
    absent = sorted({(colour, shape) for colour in colours for shape in shapes} - pairs)
    absent = absent or [(rng.choice(list(COLOURS)), rng.choice(SHAPES))]
    yes = rng.random() < 0.5
    colour, shape = rng.choice(sorted(pairs) if yes else absent)
    article = "an" if colour == "orange" else "a"
    yield _short(rng, f"Is there {article} {colour} {shape}?", "yes" if (colour, shape) in pairs else "no", f"{colour} {shape}")


def _common_colour(rng: Random, scene: Scene) -> Iterator[Exchange]:
    ranked = Counter(item.colour for item in scene.items).most_common()
    if len(ranked) > 1 and ranked[0][1] > ranked[1][1]:
        answer = ranked[0][0]
        present = [colour for colour, _ in ranked[1:4]]
        others = present + rng.sample([c for c in COLOURS if c != answer and c not in present], 3 - len(present))
        yield _choice(rng, "What is the most common colour of the shapes?", answer, others)


def _further_left(rng: Random, scene: Scene) -> Iterator[Exchange]:
    unique = _unique(scene)
    if len(unique) < 2:
        return
    for _ in range(4):
        left, right = sorted(rng.sample(unique, 2), key=lambda item: item.x)
        if right.x - left.x >= LEFT_MARGIN + abs(right.radius - left.radius):
            yield _letter(rng, "Which of the two is further left?", left.name, [right.name])
            return


def _smallest_colour(rng: Random, scene: Scene) -> Iterator[Exchange]:
    ranked = sorted(scene.items, key=lambda item: item.radius)
    if len(ranked) > 1 and list(SIZES).index(ranked[0].size) < list(SIZES).index(ranked[1].size):
        answer = ranked[0].colour
        present = sorted({item.colour for item in scene.items} - {answer})
        others = rng.sample(present, min(3, len(present)))
        others += rng.sample([c for c in COLOURS if c != answer and c not in others], 3 - len(others))
        yield _choice(rng, "What colour is the smallest shape?", answer, others)


def _one_attribute(rng: Random, scene: Scene) -> Iterator[Exchange]:
    """Up to three times the colour of the only shape of its kind, and the shape of the only item of its colour."""
    for given, wanted in (("shape", "colour"), ("colour", "shape")):
        number = Counter(getattr(item, given) for item in scene.items)
        single = [item for item in scene.items if number[getattr(item, given)] == 1]
        for item in rng.sample(single, min(3, len(single))):
            named = item.shape if given == "shape" else f"{item.colour} one"
            yield _short(rng, f"What {wanted} is the {named}?", getattr(item, wanted), getattr(item, given))


def _of_unique(rng: Random, scene: Scene) -> Iterator[Exchange]:
    """The sizes of up to two items and the sides of up to two, each named by colour and shape."""
    unique = _unique(scene)
    for item in rng.sample(unique, min(2, len(unique))):
        yield _short(rng, f"What size is the {item.name}?", item.size, item.name)
    aside = [item for item in unique if abs(item.x - 0.5) > LEFT_MARGIN]
    for item in rng.sample(aside, min(2, len(aside))):
        side = "left" if item.x < 0.5 else "right"
        yield _short(rng, f"On which side is the {item.name}?", side, item.name)


def _count_of_colour(rng: Random, scene: Scene) -> Iterator[Exchange]:
    colour = rng.choice([item.colour for item in scene.items])
    yield _short(rng, f"How many {colour} shapes are there?", str(sum(item.colour == colour for item in scene.items)), colour)


def _one_option(rng: Random) -> Exchange:
    """The letter of one of the choices; needs no image."""
    names = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    options = rng.sample(*rng.choice((*((words, 4) for words in _WORDS), (names, 2))))
    return _which_letter(rng, options, rng.choice((Form.PLAIN, Form.LETTER)))


def _which_letter(rng: Random, options: list[str], form: Form) -> Exchange:
    asked = rng.randrange(len(options))
    return question_with_options(f"Which letter is {options[asked]}?", options) + form, "ABCD"[asked]


def _lettered(rng: Random, item: Item) -> Item:
    return replace(item, letter=rng.choice(LETTERS)) if has_room(item) else item


def _unique(scene: Scene) -> list[Item]:
    """Items whose combination of colour and shape is unique in the scene."""
    number = Counter(item.name for item in scene.items)
    return [item for item in scene.items if number[item.name] == 1]


_WORDS = (list(COLOURS), list(PATTERNS))
_READ: tuple[_Ask, ...] = (_corner_letters, _object_letters)
_NAMED: tuple[_Ask, ...] = (_one_attribute, _of_unique, _count_of_colour)
_CHOICES: tuple[_Ask, ...] = (_background, _common_colour, _further_left, _smallest_colour)
_OTHERS: tuple[_Ask, ...] = (_count, _exists, *_CHOICES)
