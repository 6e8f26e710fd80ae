"""Rendered scenes: answers read from the pixels, balance, splits, reproducibility, files."""

import hashlib
import itertools
import json
from collections import Counter
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage, special

from lsg_jax.data.conversation import parse_record
from lsg_jax.data.drawing import FONT, draw
from lsg_jax.data.scene_questions import (
    KINDS,
    probe_scene,
    scene_question,
    scene_questions,
    write_questions,
)
from lsg_jax.data.shapes import ATTRIBUTES, COLOURS, LETTERS, PATTERNS, SHAPES, TONES, Background, Item, Scene, attributes
from lsg_jax.errors import InputError
from lsg_jax.eval.benchmarks import questions as own_questions

SIDE = 224
PLAIN = Background("plain", TONES[0], 0, 0.1, (0.0, 0.0), 0)


def of_kind(name, count, split="train"):
    place = list(KINDS).index(name)
    return [scene_question(split, turn * len(KINDS) + place) for turn in range(count)]


# ------------------------------------------------------------------------------- what is in an image, read from its pixels


@dataclass
class Seen:
    colour: str
    shape: str
    letter: str
    area: int
    x: float
    left: float
    right: float


def shape_of(mask):
    """Classifies a shape by the share of its bounding box that it fills, and by the height of its centre of mass."""
    share = mask.mean()
    low = (np.nonzero(mask)[0].mean() + 0.5) / len(mask) - 0.5
    expected = {"circle": (0.785, 0), "square": (1, 0), "triangle": (0.5, 0.167), "diamond": (0.5, 0), "cross": (0.62, 0)}
    expected["star"] = (0.327, 0.05)
    return min(SHAPES, key=lambda name: (share - expected[name][0]) ** 2 + (low - expected[name][1]) ** 2)


def letter_of(ink):
    """The letter whose bitmap fits the bounding box of the changed pixels best; empty without any."""
    if not ink.any():
        return ""
    rows, columns = (np.nonzero(ink.any(axis))[0] for axis in (1, 0))
    box = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(float)
    y, x = ((np.arange(n) + 0.5) / n * size for n, size in zip((7, 5), box.shape, strict=True))
    cells = box[np.ix_(y.astype(int), x.astype(int))] > 0.5
    bitmaps = {letter: np.array([[c == "#" for c in row] for row in FONT[letter].split()]) for letter in LETTERS}
    return min(LETTERS, key=lambda letter: (bitmaps[letter] != cells).sum())


def look(scene):
    """Reads items, corner letters and the background's pattern from the pixels."""
    empty = draw(replace(scene, items=(), corners={}), SIDE)
    shapes = draw(replace(scene, items=tuple(replace(item, letter="") for item in scene.items), corners={}), SIDE)
    lettered = draw(replace(scene, corners={}), SIDE)
    whole = draw(scene, SIDE)
    labels, _ = ndimage.label((shapes != empty).any(-1), np.ones((3, 3)))
    items = []
    for number, (rows, columns) in enumerate(ndimage.find_objects(labels), 1):
        own = labels[rows, columns] == number
        inside = shapes[rows, columns][own]
        colour = max(COLOURS, key=lambda name: (inside == COLOURS[name]).all(-1).sum())
        solid = (shapes[rows, columns] == COLOURS[colour]).all(-1)
        strong = abs(lettered[rows, columns].astype(int) - shapes[rows, columns]).max(-1) > 100
        edges = np.nonzero(own.any(0))[0] + columns.start
        x = np.nonzero(own)[1].mean() + columns.start
        assert solid.sum() > 40
        items.append(Seen(colour, shape_of(own), letter_of(strong & own), int(own.sum()), x, edges[0], edges[-1]))
    corner_ink = abs(whole.astype(int) - lettered).max(-1) > 60
    assert not (corner_ink & (labels > 0)).any()
    half = SIDE // 2
    corners = {
        f"{vertical} {horizontal}": letter
        for vertical, rows in (("top", slice(half)), ("bottom", slice(half, SIDE)))
        for horizontal, columns in (("left", slice(half)), ("right", slice(half, SIDE)))
        if (letter := letter_of(corner_ink[rows, columns]))
    }
    return SimpleNamespace(items=items, corners=corners, pattern=pattern_of(empty[..., 0].astype(int)))


def pattern_of(grey):
    if np.ptp(grey) == 0:
        return "plain"
    along_a_line = any(
        (a == b).all()
        for a, b in (
            (grey[1:], grey[:-1]),
            (grey[:, 1:], grey[:, :-1]),
            (grey[1:, 1:], grey[:-1, :-1]),
            (grey[1:, :-1], grey[:-1, 1:]),
        )
    )
    extremes = [(grey == grey.min()).mean(), (grey == grey.max()).mean()]
    if sum(extremes) < 0.5:
        return "gradient" if along_a_line else "noise"
    if along_a_line:
        return "stripes"
    return "checks" if min(extremes) > 0.35 else "dots"


# ------------------------------------------------------------------------------------------------------------------ answers


def named(seen, name):
    """The only item of that colour and shape."""
    (item,) = [item for item in seen.items if f"{item.colour} {item.shape}" == name]
    return item


def read_count(question, seen):
    return str(len(seen.items))


def read_common_colour(question, seen):
    (first, most), (_, second), *_ = Counter(item.colour for item in seen.items).most_common()
    assert most >= second + 2 and set(question.choices) == {item.colour for item in seen.items}
    return first


def read_exists(question, seen):
    colour, shape = question.question.removesuffix("?").split()[-2:]
    assert sum(item.colour == colour for item in seen.items) == 2 == sum(item.shape == shape for item in seen.items)
    return "yes" if any((item.colour, item.shape) == (colour, shape) for item in seen.items) else "no"


def read_corner_letter(question, seen):
    assert len(set(seen.corners.values())) == 2
    return seen.corners[" ".join(question.question.split()[-3:-1])]


def read_object_letter(question, seen):
    item = named(seen, " ".join(question.question.removesuffix("?").split()[-2:]))
    others = {(other.colour == item.colour, other.shape == item.shape) for other in seen.items if other.letter != item.letter}
    assert {(True, False), (False, True)} <= others
    return item.letter


def read_further_left(question, seen):
    left, right = sorted((named(seen, name) for name in question.choices), key=lambda item: item.x)
    assert left.left < right.left and left.right < right.right and right.x - left.x > 0.055 * SIDE
    return f"{left.colour} {left.shape}"


def read_smallest_colour(question, seen):
    first, second, *_ = sorted(seen.items, key=lambda item: item.area)
    assert first.area < 0.95 * second.area and set(question.choices) == {item.colour for item in seen.items}
    return first.colour


def read_background(question, seen):
    return seen.pattern


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_what_the_pixels_show(kind):
    read = globals()[f"read_{kind}"]
    for question in of_kind(kind, 12, "test"):
        seen, scene = look(question.scene), question.scene
        assert read(question, seen) == question.answer, question
        if question.choices:
            assert len(set(question.choices)) == len(question.choices) == KINDS[kind].choices
            assert question.choices["ABCD".index(question.answers[0])] == question.answer
        else:
            assert question.answers[0] == question.answer
        # the rest of the scene matches its description, too
        place = lambda item: item.x
        for item, found in zip(sorted(scene.items, key=place), sorted(seen.items, key=place), strict=True):
            assert abs(item.x * SIDE - found.x) < 1
        described = lambda items: sorted((item.colour, item.shape, item.letter) for item in items)
        assert described(scene.items) == described(seen.items)
        assert seen.corners == scene.corners and seen.pattern == scene.background.pattern


@pytest.fixture(scope="module")
def train_questions():
    return scene_questions("train", 960)


def test_kinds_answers_and_letters_are_balanced_in_every_prefix(train_questions):
    tables = {kind: {"answer": Counter(dict.fromkeys(KINDS[kind].answers, 0)), "letter": Counter()} for kind in KINDS}
    for kind in KINDS:
        tables[kind]["letter"].update(dict.fromkeys("ABCD"[: KINDS[kind].choices], 0))
    spread = lambda counter: max(counter.values()) - min(counter.values())
    for question in train_questions:
        table = tables[question.kind]
        table["answer"][question.answer] += 1
        assert spread(table["answer"]) <= 1 and set(table["answer"]) == set(KINDS[question.kind].answers)
        if question.choices:
            table["letter"][question.answers[0]] += 1
            assert spread(table["letter"]) <= 1
    assert [question.kind for question in train_questions] == list(KINDS) * 120
    assert [question.grain for question in train_questions] == ["coarse", "fine"] * 480


def independence_p(pairs):
    """p-value of Pearson's chi-square test of independence."""
    rows, columns = (sorted(set(side)) for side in zip(*pairs, strict=True))
    table = np.zeros((len(rows), len(columns)))
    for row, column in pairs:
        table[rows.index(row), columns.index(column)] += 1
    expected = table.sum(1, keepdims=True) * table.sum(0) / table.sum()
    return special.chdtrc((len(rows) - 1) * (len(columns) - 1), ((table - expected) ** 2 / expected).sum())


def test_answers_do_not_follow_from_the_rest_of_the_scene():
    count = lambda q: len(q.scene.items)
    largest = lambda q: attributes(q.scene)["largest"]
    pattern = lambda q: q.scene.background.pattern
    letters = lambda q: bool(q.scene.corners)
    independent = {
        "exists": (count, largest, pattern, letters),
        "count": (largest, pattern, letters),
        "background": (count, largest, letters),
        "smallest_colour": (count, pattern),
    }
    for kind, features in independent.items():
        questions = of_kind(kind, 300, "validation")
        for number, feature in enumerate(features):
            assert independence_p([(question.answer, feature(question)) for question in questions]) > 0.001, (kind, number)
    probes = [attributes(probe_scene("train", index)) for index in range(400)]
    assert set(Counter(probe["count"] for probe in probes).values()) == {40}
    assert independence_p([(probe["count"], probe["largest"]) for probe in probes]) > 0.001


def test_attributes_are_what_the_pixels_show():
    for index in range(20):
        scene = probe_scene("validation", index)
        seen, labels = look(scene), attributes(scene)
        assert set(labels) == set(ATTRIBUTES)
        assert labels["count"] == len(seen.items) and labels["count"] in ATTRIBUTES["count"]
        assert labels["colours"] == tuple(colour for colour in COLOURS if colour in {item.colour for item in seen.items})
        assert labels["shapes"] == tuple(shape for shape in SHAPES if shape in {item.shape for item in seen.items})
        # circles have the largest area, stars the smallest; edge pixels count in full
        largest = max(item.area for item in seen.items) / SIDE**2
        assert labels["largest"] == ("small" if largest < 0.014 else "medium" if largest < 0.0345 else "large")


# ------------------------------------------------------------------------------------------------- splits, reproducibility


def test_splits_share_nothing_and_prefixes_are_stable():
    splits = {split: scene_questions(split, 64) for split in ("train", "validation", "test")}
    splits["other seed"] = scene_questions("train", 64, seed=1)
    everything = list(itertools.chain(*splits.values()))
    assert len({repr(question.scene) for question in everything}) == len(everything)
    assert len({draw(question.scene, 56).tobytes() for question in everything}) == len(everything)
    assert len({question.id for question in everything}) == 3 * 64

    assert splits["test"][:20] == scene_questions("test", 20)
    assert splits["test"] == [scene_question("test", index) for index in reversed(range(64))][::-1]
    assert splits["other seed"][63] == scene_question("train", 63, seed=1)


def test_golden_questions_and_pixels(train_questions):
    """They must not change with the version of Python, NumPy or Pillow."""
    digest = lambda parts: hashlib.sha256(b"".join(parts)).hexdigest()[:16]
    questions = train_questions[:96]
    assert {question.scene.background.pattern for question in questions} == set(PATTERNS)
    assert {item.shape for question in questions for item in question.scene.items} == set(SHAPES)
    assert digest(repr(question).encode() for question in questions) == "f236001c0f3c7427"
    golden = {56: "d88d40a0dc942e05", 112: "44322678cc43fa80", 224: "224ad829afa1aec5"}
    for side, expected in golden.items():
        assert digest(draw(question.scene, side).tobytes() for question in questions) == expected
    assert digest(draw(probe_scene("test", index), 447).tobytes() for index in range(8)) == "65b42e999b539407"


def test_a_scene_looks_the_same_at_any_size():
    for question in scene_questions("validation", 16):
        fine = draw(question.scene, 448).astype(float)
        halves = fine.reshape(224, 2, 224, 2, 3).mean((1, 3))
        assert abs(draw(question.scene, 224) - halves).mean() < 0.5


# ------------------------------------------------------------------------------------------------------------ what is drawn


def test_letters_differ_at_112_pixels():
    """In a corner and on the smallest shape of its kind that carries one."""
    item = lambda shape, letter: Item("red", shape, "medium", letter, x=0.3, y=0.6, radius=0.143 if shape == "star" else 0.09)
    drawn = {"corner": {letter: Scene((), PLAIN, {"top right": letter}) for letter in LETTERS}}
    for shape in SHAPES:
        drawn[shape] = {letter: Scene((item(shape, letter),), PLAIN, {}) for letter in LETTERS}
    for where, scenes in drawn.items():
        images = {letter: draw(scene, 112).astype(int) for letter, scene in scenes.items()}
        for a, b in itertools.combinations(LETTERS, 2):
            assert (abs(images[a] - images[b]).max(-1) > 80).sum() >= 9, (where, a, b)


def test_colours_stand_out():
    for a, b in itertools.combinations(COLOURS.values(), 2):
        assert np.linalg.norm(np.subtract(a, b)) > 60
    for pattern, tone in itertools.product(PATTERNS, TONES):
        ground = draw(Scene((), Background(pattern, tone, 1, 0.12, (0.2, 0.7), 5), {}), 112).reshape(-1, 3).astype(int)
        for colour in COLOURS.values():
            assert abs(ground - colour).max(-1).min() > 50


# ----------------------------------------------------------------------------------------------------------- files, baseline


def test_written_questions_are_asked_and_accepted_as_they_are_trained(tmp_path):
    questions = scene_questions("test", 16)
    path = write_questions(tmp_path, "test", 16, side=64)
    records = [json.loads(line) for line in (tmp_path / "llava.jsonl").read_text().splitlines()]
    for question, item, record in zip(questions, own_questions.read(path), records, strict=True):
        human, gpt = parse_record(record).turns
        prompt = own_questions.prompt(item, "paper")
        assert human.text == f"<image>\n{prompt}" and question.prompt == prompt
        assert item.id == question.id == record["id"] and item.answers == question.answers
        assert own_questions.match(item, gpt.text, "paper").score == 1
        assert (np.asarray(Image.open(tmp_path / record["image"])) == draw(question.scene, 64)).all()
    assert own_questions.match(own_questions.read(path)[0], f"{questions[0].answers[1].title()}.", "paper").score == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: draw(Scene((), PLAIN, {}), 55), "56 to 448 pixels a side, not 55"),
        (lambda: draw(Scene((), PLAIN, {}), 449), "56 to 448 pixels a side, not 449"),
        (lambda: scene_question("dev", 0), "no split 'dev' of the scenes; there are train, validation, test"),
        (lambda: probe_scene("test", -1), "numbered from 0; there is no -1"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()
