"""MathVista (Lu et al., 2024), testmini: 1000 questions of mathematics about figures, answered by a choice, a number or a list.

File: `AI4Math/MathVista`, split testmini. Its owner, lmms-eval and VLMEvalKit ask GPT-4 what an output answers, so their scores
cannot be compared with those here: the answer is found by rule, then scored as the owner does. Only Cambrian asks no judge.
"""

from __future__ import annotations

import re
from typing import Any

from lsg_jax.config import Protocol
from lsg_jax.data.parquet import Row, read_rows
from lsg_jax.data.prompts import LETTER_SUFFIX, WORD_SUFFIX
from lsg_jax.errors import InputError
from lsg_jax.eval.benchmark import Benchmark, Graded, Item, Match, Metrics, by, check_unique, check_values, mean
from lsg_jax.eval.letters import LETTERS, chosen_letter, letter_match, row_choices
from lsg_jax.eval.short_answers import cambrian_relaxed_match

ANSWER_TYPES = ("text", "integer", "float", "list")  # text: a choice
TASKS = (
    "figure question answering",
    "geometry problem solving",
    "math word problem",
    "textbook question answering",
    "visual question answering",
)
SKILLS = (
    "algebraic reasoning",
    "arithmetic reasoning",
    "geometry reasoning",
    "logical reasoning",
    "numeric commonsense",
    "scientific reasoning",
    "statistical reasoning",
)

MINUS = "\N{MINUS SIGN}"  # as some models write it

NOTE = "the owner has GPT-4 find the answer in an output; here rules do, and under cambrian the whole output is the answer"


def read(path: str) -> list[Item]:
    """Items with the fields `answer_type`, `task`, `precision` (digits), and `skill: NAME` for each skill that it tests.

    The question is the owner's `query`: a hint about the form of the answer, the question and its choices. Raises InputError:
    see `Benchmark.read`.
    """
    needs = ["pid", "query", "choices", "precision", "answer", "answer_type", "metadata"]
    rows = [row for row in read_rows(path, needs=needs, images=["decoded_image"]) if _about(row)["split"] == "testmini"]
    if not rows:
        raise InputError(f"{path}: no row of split testmini; answers of the test split are not public")
    about = [row["metadata"] for row in rows]
    check_values((row["answer_type"] for row in rows), ANSWER_TYPES, what="answer_type", where=path)
    check_values((each["task"] for each in about), TASKS, what="task", where=path)
    check_values((skill for each in about for skill in each["skills"] or ()), SKILLS, what="skill", where=path)
    items = [_item(row) for row in rows]
    check_unique(items, path)
    return items


def _about(row: Row) -> dict[str, Any]:
    about = row["metadata"]
    if not isinstance(about, dict) or not {"split", "task", "skills"} <= about.keys():
        raise InputError(f"{row.where}: metadata without split, task or skills")
    return about


def _digits(row: Row) -> int:
    """`precision`, 0 for an empty cell, which some writers make NaN."""
    value = row["precision"]
    if value is None or value != value:
        return 0
    if not isinstance(value, int | float) or not 0 <= value <= 100:
        raise InputError(f"{row.where}: precision {str(value)[:80]!r} is no number of digits")
    return int(value)


def _item(row: Row) -> Item:
    kind, about = row["answer_type"], row["metadata"]
    answer, choices = str(row["answer"]), row_choices(row, "choices")
    if kind == "text":
        if answer not in choices:
            raise InputError(f"{row.where}: answer {answer[:80]!r} is none of the choices")
        answer = LETTERS[choices.index(answer)]
    return Item(
        id=str(row["pid"]),
        question=row.text("query"),
        answers=(answer,),
        choices=choices,
        images=row.images("decoded_image"),
        fields={
            "answer_type": kind,
            "task": about["task"],
            "precision": str(_digits(row)),
            **{f"skill: {skill}": "yes" for skill in about["skills"] or ()},
        },
    )


def prompt(item: Item, protocol: Protocol) -> str:
    """The owner's query and a request: LLaVA-1.5's usual one, or Cambrian's, which asks for the reasoning behind a choice."""
    if item.fields["answer_type"] != "text":
        return item.question + WORD_SUFFIX
    if protocol == "cambrian":
        return item.question + "\nFirst show your reasoning process and then give the final answer."
    return item.question + LETTER_SUFFIX


def match(item: Item, output: str, protocol: Protocol) -> Match:
    """The answer by rule (`choice_of`, `number_of`, `list_of`), compared as text, as the owner does.

    `cambrian`: the whole output is the letter, or a number that is off by at most 5 % of itself; the last of equal choices.
    """
    answer = item.answers[0]
    if protocol == "cambrian":
        text = output.lower().strip()
        if item.fields["answer_type"] == "text":
            same = [at for at, choice in enumerate(item.choices) if choice == item.choices[LETTERS.index(answer)]]
            answer = LETTERS[same[-1]]
        return Match(text, float(cambrian_relaxed_match(answer.lower(), text)))
    kind = item.fields["answer_type"]
    if kind == "text":
        letter = choice_of(output, item.choices)
        right = letter is not None and item.choices[LETTERS.index(letter)] == item.choices[LETTERS.index(answer)]
        return Match(letter, float(right))
    if kind == "list":
        return letter_match(item, list_of(output))
    return letter_match(item, number_of(output, int(item.fields["precision"]) if kind == "float" else None))


def _said(output: str) -> str:
    """What follows the last `answer is` or `answer:`, or the whole output."""
    return re.split(r"answer(?: is)?:|answer is", output, flags=re.IGNORECASE)[-1].strip()


def choice_of(output: str, choices: tuple[str, ...]) -> str | None:
    """The choice of an output: a letter alone, the text of a choice, a leading letter (`B. ...`), or the only one in brackets.

    A letter comes before a text, as for the owner: where the choices are E, A, B, the output `A` is E.
    """
    said = _said(output)
    letters = LETTERS[: len(choices)]
    for text in (output.strip(), said, said.rstrip(".")):
        if text in tuple(letters):
            return text
        if text in choices:
            return letters[choices.index(text)]
    if letter := chosen_letter(said, len(choices)):
        return letter
    named = set(re.findall(r"\(([A-Z])\)", said)) & set(letters)
    return named.pop() if len(named) == 1 else None


_NUMBER = re.compile(r"(?:(?<!\d)-)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+)?")


def number_of(output: str, precision: int | None) -> str | None:
    """The first number after `answer is`, else the last of the output; cut to an integer, or rounded to `precision` digits.

    The owner rounds and compares in this way: `14.7` answers 14 where an integer is asked for.
    """
    output = output.replace(MINUS, "-")
    said = _said(output)
    found = _NUMBER.findall(said)
    if not found:
        return None
    number = float(found[-1 if said == output.strip() else 0].replace(",", ""))
    try:
        return str(int(number) if precision is None else round(number, precision))
    except OverflowError:
        return None


def list_of(output: str) -> str | None:
    """The last list of numbers in brackets, written as Python would."""
    lists = re.findall(r"\[[^\[\]]*\]", output.replace(MINUS, "-"))
    return f"[{', '.join(_NUMBER.findall(lists[-1]))}]" if lists else None


def metrics(graded: Graded) -> Metrics:
    """Accuracy over all questions, by type of answer, task and skill; a question may test several skills."""
    groups = {name: by(graded, name) for name in ("answer_type", "task")}
    skills = [name for name in (f"skill: {skill}" for skill in SKILLS) if graded.values(name)]
    return {
        "accuracy": mean(graded),
        **{f"{name}: {value}": score for name, scores in groups.items() for value, score in scores.items()},
        **{name: mean(graded, graded.where(name, "yes")) for name in skills},
    }


MATHVISTA = Benchmark(
    name="mathvista",
    read=read,
    prompt=prompt,
    match=match,
    metrics=metrics,
    task="task",
    official={"cambrian": "accuracy"},
    size=1000,
    groups={"answer_type": ANSWER_TYPES, "task": TASKS},
    note=lambda items: NOTE,
    guess_by="answer_type",
    max_new_tokens={"paper": 128, "cambrian": 512},
)
