"""Question files: what is read, what is refused, what counts as correct."""

import json
import re

import pytest

from lsg_jax.errors import InputError
from lsg_jax.eval.benchmarks.questions import Question, aggregate, chosen_letter, is_correct, majority, read_questions
from lsg_jax.eval.runner import table


def write(tmp_path, *rows):
    path = tmp_path / "q.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_prompts(tmp_path):
    choice, short = read_questions(
        write(
            tmp_path,
            {"id": "x", "question": " Which? ", "choices": ["cat", "dog"], "answer": "dog"},
            {"question": "How many?", "answer": ["2", "two"], "category": "count"},
        )
    )
    assert choice.prompt == "Which?\nA. cat\nB. dog\nAnswer with the option's letter from the given choices directly."
    assert choice.answers == ("B",) and choice.id == "x"
    assert short.prompt == "How many?\nAnswer the question using a single word or phrase."
    assert short.answers == ("2", "two") and short.id == "2" and short.category == "count"


@pytest.mark.parametrize("answer", ["B", "(B)", "b", "B.", "dog"])
def test_right_choice_by_letter_or_text(tmp_path, answer):
    (question,) = read_questions(write(tmp_path, {"question": "?", "choices": ["cat", "dog"], "answer": answer}))
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
        read_questions(write(tmp_path, row))


def test_repeated_ids(tmp_path):
    row = {"id": "a", "question": "?", "answer": "x"}
    with pytest.raises(InputError, match="id a occurs more than once"):
        read_questions(write(tmp_path, row, row))


@pytest.mark.parametrize(
    "output, letter",
    [
        ("B", "B"),
        (" B ", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        ("B. dog", "B"),
        ("B: dog", "B"),
        ("E", None),
        ("Because", None),
        ("A dog", None),  # an article is no answer
        ("Based on the image, C", None),
        ("", None),
    ],
)
def test_letters(output, letter):
    assert chosen_letter(output, 4) == letter


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
    assert is_correct(Question("1", "?", answers), output) is correct


def test_aggregate_with_unequal_groups():
    questions = [Question(str(i), "?", ("x",), category=c) for i, c in enumerate(["a", "a", "a", "b"])]
    result = aggregate(questions, [True, False, False, True])
    assert result["accuracy"] == 50.0 and (result["correct"], result["count"]) == (2, 4)
    assert result["categories"]["a"]["accuracy"] == pytest.approx(100 / 3)
    assert result["categories"]["b"] == {"accuracy": 100.0, "correct": 1, "count": 1}


def test_majority_answer():
    questions = [Question(str(i), "?", (a,)) for i, a in enumerate(["Red", "red", "blue"])]
    assert majority(questions) == {"accuracy": pytest.approx(200 / 3), "answer": "red"}


def test_table():
    part = {"accuracy": 25.0, "correct": 1, "count": 4}
    better = {"accuracy": 50.0, "correct": 2, "count": 4}
    text = table({"benchmarks": {"x": {"majority": {"accuracy": 30.0}, "base": part, "gated": better}}})
    assert text.splitlines()[1].split() == ["x", "4", "30.00", "25.00", "50.00", "+25.00"]
