"""Own question files: what is read, what is refused, what counts as correct."""

import json
import re

import numpy as np
import pytest

from lsg_jax.errors import InputError
from lsg_jax.eval.benchmark import Graded, Item
from lsg_jax.eval.benchmarks.questions import match, metrics, prompt, read


def write(tmp_path, *rows):
    path = tmp_path / "q.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


def test_prompts(tmp_path):
    choice, short = read(
        write(
            tmp_path,
            {"id": "x", "question": " Which? ", "choices": ["cat", "dog"], "answer": "dog"},
            {"question": "How many?", "answer": ["2", "two"], "category": "count"},
        )
    )
    assert prompt(choice, "paper") == (
        "Which?\nA. cat\nB. dog\nAnswer with the option's letter from the given choices directly."
    )
    assert choice.answers == ("B",) and choice.id == "x" and choice.fields == {}
    assert prompt(short, "paper") == "How many?\nAnswer the question using a single word or phrase."
    assert short.answers == ("2", "two") and short.id == "2" and short.fields == {"category": "count"}


@pytest.mark.parametrize("answer", ["B", "(B)", "b", "B.", "dog"])
def test_right_choice_by_letter_or_text(tmp_path, answer):
    (question,) = read(write(tmp_path, {"question": "?", "choices": ["cat", "dog"], "answer": answer}))
    assert question.answers == ("B",)


CHOICES = {
    "list": {"choices": ["cat", "dog"]},
    "options": {"options": ["cat", "dog"]},
    "both": {"choices": ["cat", "dog"], "options": {"A": "cat", "B": "dog"}},
    "choices empty": {"choices": [], "options": ["cat", "dog"]},
    "object": {"choices": {"A": "cat", "B": "dog"}},
    "object in another order": {"choices": {"B": "dog", "A": "cat"}},
    "object with brackets": {"choices": {"(a)": "cat", "(b)": "dog"}},
    "object padded with null": {"choices": {"A": "cat", "B": "dog", "C": None, "D": ""}},
    "object of ARC": {"choices": {"text": ["cat", "dog"], "label": ["A", "B"]}},
    "text of a list, as in MMMU": {"options": "['cat', 'dog']"},
    "text of a list, as JSON": {"options": '["cat", "dog"]'},
    "text of an object": {"options": '{"A": "cat", "B": "dog", "C": null}'},
    "lines": {"choices": "cat\n dog\n"},
    "lines with letters": {"choices": "A. cat\nB. dog"},
    "lines with brackets": {"choices": "(A) cat\n(B) dog"},
    "list with letters": {"choices": ["A. cat", "B. dog"]},
    "list with brackets": {"choices": ["(A) cat", "(B) dog"]},
    "list with half brackets": {"choices": ["a) cat", "b) dog"]},
    "text of a list with letters": {"options": "['A: cat', 'B: dog']"},
    "choices NaN": {"choices": float("nan"), "options": ["cat", "dog"]},
    "columns beside NaN": {"choices": float("nan"), "A": "cat", "B": "dog"},
    "columns": {"A": "cat", "B": "dog", "C": None},
}


@pytest.mark.parametrize("form", CHOICES)
@pytest.mark.parametrize("answer", ["dog", "B", "B. dog", "(b) dog"])
def test_forms_of_choices(tmp_path, form, answer):
    (question,) = read(write(tmp_path, {"question": "?", "answer": answer, **CHOICES[form]}))
    assert (question.choices, question.answers) == (("cat", "dog"), ("B",))


def test_choices_keep_their_text(tmp_path):
    (numbers, labels, code, letters) = read(
        write(
            tmp_path,
            {"question": "?", "choices": [1, 2.5, True], "answer": 2.5},
            {"question": "?", "choices": "A. cat\nC. dog", "answer": "C. dog"},
            {"question": "?", "choices": ["['a']", "['b']"], "answer": "['b']"},
            {"question": "?", "choices": ["(A)", "(B)"], "answer": "B"},
        )
    )
    assert (numbers.choices, numbers.answers) == (("1", "2.5", "True"), ("B",))
    assert (labels.choices, labels.answers) == (("A. cat", "C. dog"), ("B",))
    assert (letters.choices, letters.answers) == (("(A)", "(B)"), ("B",))
    assert (code.choices, code.answers) == (("['a']", "['b']"), ("B",))


@pytest.mark.parametrize(
    "image",
    [
        {"image": "sub/a.png"},
        {"image": ["sub/a.png"]},
        {"image": {"path": "sub/a.png", "bytes": None}},
        {"images": [{"path": "sub/a.png"}]},
        {"image_path": "sub\\a.png"},
        {"img": "{folder}/sub/a.png"},
        {"image": "file://{folder}/sub/a.png"},
        {"image": "file://{folder}/s%75b/a.png"},
        {"image": "sub/a.png", "file_name": "a.png", "image_id": 4, "image_2": None, "img_type": "['Photo']"},
        {"image": "sub/a.png", "image_1": "sub/a.png", "coco_source": "https://example.org/b.png", "has_image": True},
    ],
    ids=str,
)
def test_forms_of_images(tmp_path, image):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/a.png").write_bytes(b"png")
    row = json.dumps({"question": "?", "answer": "x", **image}).replace("{folder}", str(tmp_path))
    (question,) = read(write(tmp_path, row))
    assert [image.read() for image in question.images] == [b"png"]


@pytest.mark.parametrize(
    "fields",
    [
        {"image_2": "b.png"},
        {"image2": {"bytes": "QQ==", "path": None}},
        {"left_image": "b"},
        {"image_b_path": ["b"]},
        {"second": "other/q.jsonl.png"},
        {"meta": {"frames": ["b.jpg"]}},
        {"image_2": "https://example.org/b"},
    ],
    ids=str,
)
def test_an_image_under_another_key_is_not_left_out(tmp_path, fields):
    row = {"question": "?", "answer": "x", "image": "q.jsonl", **fields}
    with pytest.raises(InputError, match=f"q.jsonl:1: {next(iter(fields))} may hold another image; list it"):
        read(write(tmp_path, row))


@pytest.mark.parametrize(
    ("images", "question", "choices", "asked"),
    [
        (1, "<image 1> Which?", (), "<image> Which?"),
        (1, "See <|image_1|>.", ("a", "b"), "See <image>.\nA. a\nB. b"),
        (2, "<image 1> or <image_2>?", (), "<image> or <image>?"),
        (3, "Like <image 1>?", ("<image 2>", "<image 3>"), "Like <image>?\nA. <image>\nB. <image>"),
        (2, "Which?", ("<image>", "x <image>"), "Which?\nA. <image>\nB. x <image>"),
        (1, "Which <image>?", (), "Which <image>?"),
        (2, "Which?", (), "Which?"),
    ],
)
def test_tags_of_images(tmp_path, images, question, choices, asked):
    row = {"question": question, "images": ["q.jsonl"] * images, "choices": choices, "answer": "A" if choices else "x"}
    assert prompt(*read(write(tmp_path, row)), "paper").startswith(asked + "\nAnswer")


@pytest.mark.parametrize(
    ("images", "question", "choices", "message"),
    [
        (0, "<image 1> Which?", (), "images are marked as <image 1>; write <image> once for each, in order"),
        (1, f"<image {'9' * 5000}> Which?", (), "marked as <image 999"),
        (0, "<image> Which?", (), "<image> in the text, but there is no image"),
        (1, "<image 2> Which?", (), "marked as <image 2>"),
        (1, "<image 1> and <image 1>?", (), "marked as <image 1>, <image 1>"),
        (2, "<image 2> or <image 1>?", (), "marked as <image 2>, <image 1>"),
        (2, "<image 1>?", (), "marked as <image 1>"),
        (1, "<ImageHere>?", (), "marked as <ImageHere>"),
        (1, "?", ("<img>1.png</img>", "b"), "marked as <img>1.png</img>"),
        (1, "<image> and <image 1>?", (), "2 <image> tags in the text for 1 image; write one for each image, or none"),
        (1, "Is <image> like <image>?", (), "2 <image> tags in the text for 1 image"),
        (1, "Which?", ("<image>", "none"), "a choice contains <image>"),
        (1, "Which?", ("<image 1>", "none"), "a choice contains <image>"),
        (3, "<image> or <image>?", (), "2 <image> tags in the text for 3 images"),
    ],
)
def test_tags_that_are_not_the_images(tmp_path, images, question, choices, message):
    row = {"question": question, "images": ["q.jsonl"] * images, "choices": choices, "answer": "A" if choices else "x"}
    with pytest.raises(InputError, match="q.jsonl:1: .*" + re.escape(message)):
        read(write(tmp_path, row))


SEPARATORS = "\u2028\u2029\x85\x1c\x0b"  # str.splitlines breaks at each of them


def test_a_line_ends_at_a_newline_only(tmp_path):
    rows = [{"question": f"a{SEPARATORS}b", "answer": "x", "choices": f"x\u2028y\nz\x85\x1f{i}"} for i in range(2)]
    rows = [row | {"answer": "A"} for row in rows]
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "q.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    first, second = read(str(tmp_path / "q.jsonl"))
    assert first.question == f"a{SEPARATORS}b" and first.choices == ("x\u2028y", "z\x85\x1f0")
    assert (first.id, second.id) == ("1", "2")


@pytest.mark.parametrize(
    "row, message",
    [
        ("{", "q.jsonl:1: not JSON"),
        ("[1]", "q.jsonl:1: expected an object, got list"),
        ({"answer": "x"}, "q.jsonl:1: no question; there are answer"),
        ({"question": "x"}, "no answer"),
        ({"question": "x", "choices": ["a"], "answer": "a"}, "1 choices; give 2 to 26"),
        ({"question": "x", "choices": ["a", "b"], "answer": "C"}, "answer C is none of the choices a, b"),
        ({"question": "x", "choices": ["a", "b"], "answer": ["a", "b"]}, "none of the choices"),
        ({"question": "x", "answer": "y", "image": "none.png"}, "none.png does not exist"),
        ({"question": "x", "answer": "y", "image": ["q.jsonl", "none.png"]}, "none.png does not exist"),
        ({"question": "x", "answer": "y", "images": [3]}, "q.jsonl:1: images is not a path: '3'"),
        ({"question": "x", "answer": "y", "images": ["q.jsonl", ""]}, "q.jsonl:1: images: entry 2 of 2 has no path"),
        ({"question": "x", "answer": "y", "image": "q.jsonl", "images": ["a"]}, "image and images hold different images; keep"),
        ("", "no questions in it"),
        ({"question": ["x"], "answer": "y"}, "q.jsonl:1: question is \"['x']\", of type list; give a text"),
        ({"question": " ", "answer": "y"}, "question is empty"),
        ({"question": "x\ud83d", "answer": "y"}, "question holds half of a surrogate pair"),
        ({"question": "x", "answer": {"a": 1}}, "answer is \"{'a': 1}\", of type dict; give a text"),
        ({"question": "x", "answer": ["y", None]}, "answer is 'None', of type NoneType"),
        ({"question": "x", "answer": ["y", " "]}, "answer is empty"),
        ({"question": "x", "answer": True}, "answer is true; write the text that is right"),
        ({"question": "x", "answer": float("nan")}, "answer is 'nan', of type float"),
        ({"question": "x", "answer": "['a', 'b']"}, "answer is the text of a list"),
        ({"question": "x", "answer": "y", "id": ["a"]}, "id is"),
        ({"question": "x", "answer": "y", "category": {"a": 1}}, "category is"),
        ({"question": "x", "choices": 4, "answer": "y"}, "choices are of type int; give a list"),
        ({"question": "x", "choices": "cat, dog", "answer": "cat"}, "choices are one line of text"),
        ({"question": "x", "choices": "['cat' 'dog']", "answer": "cat"}, "1 choices; give 2 to 26"),  # as numpy prints
        ({"question": "x", "choices": ["cat", ["dog"]], "answer": "cat"}, "a choice is \"['dog']\", of type list"),
        ({"question": "x", "choices": ["cat", ""], "answer": "cat"}, "choice B is empty"),
        ({"question": "x", "choices": ["A. cat", "B."], "answer": "cat"}, "choice B is empty"),
        ({"question": "x", "choices": ["cat", "dog"], "answer": "A. dog"}, "answer A. dog is none of the choices"),
        ({"question": "x", "choices": {"A": "cat", "a": "dog"}, "answer": "A"}, "two choices have the same label among A, a"),
        ({"question": "x", "choices": ["cat", "cat"], "answer": "cat"}, "text of several choices"),
        ({"question": "x", "choices": {"A": "cat", "C": "dog"}, "answer": "A"}, "are labelled A, C; label them A, B"),
        ({"question": "x", "choices": {"A": "", "B": "dog"}, "answer": "B"}, "choice A is empty"),
        ({"question": "x", "choices": {"1": "cat", "2": "dog"}, "answer": 1}, "are labelled 1, 2"),
        ({"question": "x", "choices": ["a", "b"], "options": ["b", "a"], "answer": "A"}, "choices and options differ"),
        ({"question": "x", "A": "cat", "C": "dog", "answer": "A"}, "are labelled A, C"),
        ({"question": "x", "answer": "y", "image": 3}, "q.jsonl:1: image is not a path"),
        ({"question": "x", "answer": "y", "image": {"bytes": "QQ=="}}, "image holds the image itself; save it to a file"),
        ({"question": "x", "answer": "y", "image": ["a.png", "b.png"]}, "does not exist"),
        ({"question": "x", "answer": "y", "image": "https://example.org/a.png"}, "not a file; save the image"),
        ({"question": "x", "answer": "y", "file_name": "a.png"}, "file_name seems to be one"),
        ({"question": "x", "answer": "y", "video": "a.mp4"}, "video is not supported"),
    ],
)
def test_bad_files(tmp_path, row, message):
    with pytest.raises(InputError, match=re.escape(message)):
        read(write(tmp_path, row))


def test_images(tmp_path):
    for name in "ab":
        (tmp_path / name).write_bytes(name.encode())
    common = {"question": "?", "answer": "x"}
    given = [
        {"image": "a"},
        {"image": ["b", "a"]},
        {"images": ["a", "b", "a"]},
        {"images": "b"},
        {"image": [], "images": None},
        {},
    ]
    items = read(write(tmp_path, *(common | fields for fields in given)))
    assert [b"".join(image.read() for image in item.images) for item in items] == [b"a", b"ba", b"aba", b"b", b"", b""]


def test_repeated_ids(tmp_path):
    row = {"id": "a", "question": "?", "answer": "x"}
    with pytest.raises(InputError, match="id a occurs more than once"):
        read(write(tmp_path, row, row))


@pytest.mark.parametrize(
    "answers, output, correct",
    [
        (("two", "2"), "2", True),
        (("two",), "Two.", True),
        (("cat",), "a  cat", True),
        (("the cat",), "cat", True),
        (("cat",), "cats", False),
        (("-5",), "5", False),
        (("3.5",), "3.5", True),
        (("yes",), "", False),
    ],
)
def test_short_answers(answers, output, correct):
    assert match(Item("1", "?", answers), output, "paper").score == correct


def test_choices():
    item = Item("1", "?", ("B",), choices=("cat", "dog"))
    assert [match(item, text, "paper").parsed for text in ("B", "(A)", "A dog")] == ["B", "A", None]
    assert [match(item, text, "paper").score for text in ("B. dog", "A", "")] == [1.0, 0.0, 0.0]


def test_accuracy_with_unequal_groups():
    items = [Item(str(i), "?", ("x",), fields={"category": c}) for i, c in enumerate(["a", "a", "a", "b"])]
    found = metrics(Graded(items, ["x"] * 4, np.array([1.0, 0.0, 0.0, 1.0]), np.ones((1, 4))))
    assert {name: value[0] for name, value in found.items()} == {
        "accuracy": 50.0,
        "category: a": pytest.approx(100 / 3),
        "category: b": 100.0,
    }
