"""Every answer in a training conversation is the right one, worked out here from the scene by other means."""

import json
import re
import string
from collections import Counter
from dataclasses import replace
from typing import get_args

import pytest
from PIL import Image

from lsg_jax.data.conversation import parse_record
from lsg_jax.data.shapes import COLOURS, SHAPES, has_room
from recipes.embedded_model.conversations import TEXT_ONLY, Form, Lesson, listing, scene_conversation, write_conversations


def right_answers(scene, question):
    """All answers that are right for a question in words."""
    named = lambda text: [item for item in scene.items if f"{item.colour} {item.shape}" == text]
    if question == "How many shapes are there?":
        return {str(len(scene.items))}
    if match := re.fullmatch(r"How many (\w+) shapes are there\?", question):
        return {str(len([item for item in scene.items if item.colour == match[1]]))}
    if question == "What is the pattern of the background?":
        return {scene.background.pattern}
    if match := re.fullmatch(r"What is the small letter in the (.*) corner\?", question):
        return {scene.corners[match[1]]}
    if match := re.fullmatch(r"What is the letter on the (.*)\?", question):
        return {item.letter for item in named(match[1])}
    if match := re.fullmatch(r"Is there an? (.*)\?", question):
        return {"yes" if named(match[1]) else "no"}
    if question == "What is the most common colour of the shapes?":
        number = Counter(item.colour for item in scene.items)
        return {colour for colour in number if number[colour] == max(number.values())}
    if question == "What colour is the smallest shape?":
        return {item.colour for item in scene.items if item.radius <= 1.2 * min(other.radius for other in scene.items)}
    if match := re.fullmatch(r"What colour is the (\w+)\?", question):
        return {item.colour for item in scene.items if item.shape == match[1]}
    if match := re.fullmatch(r"What shape is the (\w+) one\?", question):
        return {item.shape for item in scene.items if item.colour == match[1]}
    if match := re.fullmatch(r"What size is the (.*)\?", question):
        return {item.size for item in named(match[1])}
    if match := re.fullmatch(r"On which side is the (.*)\?", question):
        return {"left" if item.x < 0.5 else "right" for item in named(match[1])}
    raise AssertionError(question)


def test_every_answer_is_right_and_the_only_one():
    kinds, forms = Counter(), Counter()
    for index in range(400):
        scene, exchanges = scene_conversation("train", index, seed=3)
        assert len({question for question, _ in exchanges}) == len(exchanges)
        for prompt, answer in exchanges:
            question, *rest = prompt.split("\n")
            choices = {line[0]: line[3:] for line in rest if re.match(r"[A-D]\. ", line)}
            *about, told = answer.split()
            form = next(form for form in (Form.WORD, Form.LETTER, Form.PHRASE, Form.PLAIN) if prompt.endswith(form))
            assert " ".join(about) in prompt and (form is Form.PHRASE or not about)
            if choices:
                told = choices[told]
                assert form is not Form.PHRASE or about == told.split()
            forms[bool(choices), form] += 1
            if question == "Which of the two is further left?":
                places = {f"{item.colour} {item.shape}": item.x for item in scene.items}
                assert places[told] == min(places[name] for name in choices.values())
            else:
                assert right_answers(scene, question) == {told}, (index, question)
            if choices:
                assert list(choices) == list(string.ascii_uppercase[: len(choices)])
                assert len(set(choices.values())) == len(choices)
            kinds[re.sub("|".join([*COLOURS, *SHAPES]), "*", question)] += 1
    assert len(kinds) == 17 and min(kinds.values()) >= 10
    assert len(forms) == 6 and min(forms.values()) > 0.08 * forms.total()


def test_letters_stand_for_the_choices_behind_them():
    sizes, answers = Counter(), Counter()
    for lesson in ("pairs", "letters"):
        for index in range(100):
            for prompt, answer in scene_conversation("train", index, seed=3, lesson=lesson)[1]:
                question, *lines = prompt.split("\n")
                asked = re.fullmatch(r"Which letter is (.*)\?", question)[1]
                lines = [line for line in lines if line[1:3] == ". "]
                assert [line[0] for line in lines] == list("ABCD"[: len(lines)])
                assert [line[0] for line in lines if line[3:] == asked] == [answer]
                sizes[lesson, len(lines), " " in asked] += 1
                answers[lesson, len(lines), answer] += 1
    assert set(sizes) == {("pairs", 2, False), ("letters", 4, False), ("letters", 2, True)} and min(sizes.values()) > 100
    assert len(answers) == 8 and all(answers["pairs", 2, letter] == pytest.approx(300, abs=50) for letter in "AB")


def test_the_listing_says_the_whole_and_then_all_row_by_row():
    for index in range(100):
        scene, _ = scene_conversation("train", index, seed=5)
        told = [part.split() for part in listing(scene)[1].split("; ")]
        corners = [[*corner.split(), letter] for corner, letter in scene.corners.items()]
        by_place = {(int(item.y * 8), item.x): [item.size, item.colour, item.shape, *item.letter] for item in scene.items}
        assert told.pop(0) == [str(len(scene.items)), "on", scene.background.pattern]
        ranked = Counter(item.colour for item in scene.items).most_common(2)
        if len(ranked) == 2 and ranked[0][1] > ranked[1][1]:
            assert told.pop(0) == ["mostly", ranked[0][0]]
        assert told == [by_place[place] for place in sorted(by_place)] + corners


def test_yes_and_no_and_letters_of_choices_are_balanced():
    answers = Counter()
    for index in range(600):
        for prompt, answer in scene_conversation("train", index, seed=4)[1]:
            if prompt.startswith("Is there") or "\nD. " in prompt:
                answers[answer.split()[-1]] += 1
    assert answers["yes"] == pytest.approx(300, abs=50)
    letters = [answers[letter] for letter in "ABCD"]
    assert max(letters) < 1.35 * min(letters)


def test_the_same_in_any_order_and_another_by_seed():
    assert scene_conversation("train", 7, seed=1) == scene_conversation("train", 7, seed=1)
    others = [scene_conversation(split, 7, seed=seed) for split, seed in (("train", 2), ("test", 1), ("train", 1))]
    assert all(one != other for number, one in enumerate(others) for other in others[:number])


def test_finding_asks_by_name_about_the_same_scenes():
    for index in range(40):
        scene, exchanges = scene_conversation("train", index, seed=3, lesson="finding")
        assert scene == scene_conversation("train", index, seed=3)[0] and exchanges
        for prompt, _ in exchanges:
            question = prompt.split("\n")[0]
            assert re.search("|".join([*COLOURS, *SHAPES, "corner"]), question) and "\nA. " not in prompt


def test_reading_asks_for_the_letters_of_all_shapes_that_have_room_for_one():
    asked = 0
    for index in range(100):
        scene, exchanges = scene_conversation("train", index, seed=3, lesson="reading")
        plain, _ = scene_conversation("train", index, seed=3)
        assert [replace(item, letter="") for item in scene.items] == [replace(item, letter="") for item in plain.items]
        assert [bool(item.letter) for item in scene.items] == [has_room(item) for item in scene.items]
        for prompt, answer in exchanges:
            question = prompt.split("\n")[0]
            if re.match("What is the (small )?letter ", question):
                assert right_answers(scene, question) == {answer.split()[-1]}
                asked += 1
    assert asked > 150


def test_most_of_choosing_is_choices_among_what_the_image_shows():
    asked = [scene_conversation("train", index, seed=3, lesson="choosing")[1] for index in range(40)]
    image = [("\nA. " in prompt, answer in "ABCD") for one in asked for prompt, answer in one if "Which letter" not in prompt]
    assert sum(choice for choice, _ in image) > len(image) / 2
    assert sum(choice and letter for choice, letter in image) > sum(choice for choice, _ in image) / 2


@pytest.mark.parametrize("lesson", get_args(Lesson))
def test_records_that_lsg_prepare_takes(lesson, tmp_path):
    path = write_conversations(tmp_path, "train", 10, lesson=lesson, side=56)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 10
    again = write_conversations(tmp_path / "two", "train", 10, lesson=lesson, side=56, processes=2)
    assert again.read_bytes() == path.read_bytes()
    for index, line in enumerate(lines):
        found = parse_record(line, default_id="")
        assert found.turns[0].text.startswith("<image>\n") == (lesson not in TEXT_ONLY) and not found.notes
        assert lesson in TEXT_ONLY or Image.open(tmp_path / line["image"]).size == (56, 56)
        scene, exchanges = scene_conversation("train", index, lesson=lesson)
        told = [*exchanges[:3], listing(scene)] if lesson == "answering" and index % 5 == 4 else exchanges
        assert [turn.text.removeprefix("<image>\n") for turn in found.turns] == [text for pair in told for text in pair]
