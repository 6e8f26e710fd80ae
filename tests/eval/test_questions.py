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
        ("", "no questions in it"),
    ],
)
def test_bad_files(tmp_path, row, message):
    with pytest.raises(InputError, match=re.escape(message)):
        read(write(tmp_path, row))


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
