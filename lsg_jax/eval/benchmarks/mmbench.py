"""MMBench (Liu et al., 2023) in English, split dev: each question is asked once for every rotation of its choices.

A question counts only if it is answered rightly under all rotations (circular evaluation). Official files hold the rotations as
rows: their index is that of the question plus a multiple of a million. Of a file without such rows they are made here.
Files: `lmms-lab/MMBench` or `lmms-lab/MMBench_EN`, split dev, or the owner's TSV with base64 images.
"""

from __future__ import annotations

from itertools import takewhile

from lsg_jax.config import Protocol
from lsg_jax.data.parquet import Row, as_label, read_rows
from lsg_jax.data.prompts import LETTER_SUFFIX, multiple_choice_prompt, question_with_options
from lsg_jax.data.tsv import TsvRow, read_tsv
from lsg_jax.errors import InputError
from lsg_jax.eval.benchmark import Benchmark, Graded, Item, Match, Metrics, check_unique, check_values, mean, mean_of_groups
from lsg_jax.eval.letters import (
    LETTERS,
    cambrian_letter,
    check_letter,
    chosen_letter,
    is_number,
    letter_match,
    lmms_letter,
    vlmevalkit_letter,
    vlmevalkit_prompt,
)

L2_CATEGORIES = (
    "coarse_perception",
    "finegrained_perception (instance-level)",
    "finegrained_perception (cross-instance)",
    "attribute_reasoning",
    "relation_reasoning",
    "logic_reasoning",
)
ROTATION = 1_000_000  # added to the index of a question, once for each rotation
CHOICES = "ABCD"
MISSING = "nan"  # how the Hub's files write an empty cell


def read(path: str) -> list[Item]:
    """Items with the fields `question` (its index), `rotation` (0 for the first), `category`, `l2_category` and `hint`.

    Raises InputError: see `Benchmark.read`; also if no row has an answer, as in the test split.
    """
    needs = ["index", "question", *CHOICES[:2], "answer", "category"]
    optional = [*CHOICES[2:], "hint", "split", "L2-category", "l2-category"]
    rows: list[Row] | list[TsvRow]
    if path.endswith(".tsv"):
        rows = read_tsv(path, needs=[*needs, "image"], optional=optional)
    else:
        rows = read_rows(path, needs=needs, images=["image"], optional=optional)
    items = [_item(row) for row in rows if _cell(row, "answer") and row.get("split", "dev") == "dev"]
    if not items:
        raise InputError(f"{path}: no row of split dev with an answer; answers of the test split are not public")
    if all(item.fields["rotation"] == "0" for item in items):
        items = [rotated for item in items for rotated in _rotations(item)]
    check_unique(items, path)
    check_values((item.fields["l2_category"] for item in items), L2_CATEGORIES, what="l2-category", where=path)
    return items


def _cell(row: Row | TsvRow, column: str) -> str:
    """The text of a cell; empty for a missing one."""
    text = as_label(row.get(column), row.where, column)
    return "" if text == MISSING else text


def _item(row: Row | TsvRow) -> Item:
    cells = [_cell(row, letter) for letter in CHOICES]
    choices = tuple(takewhile(bool, cells))
    if any(cells[len(choices) :]):
        raise InputError(f"{row.where}: {CHOICES[len(choices)]} is empty, but a choice after it is not")
    l2_category = _cell(row, "L2-category") or _cell(row, "l2-category")
    if not l2_category:
        raise InputError(f"{row.where}: no text in a column l2-category (or L2-category)")
    index = str(row["index"]).removesuffix(".0")
    if not is_number(index):
        raise InputError(f"{row.where}: index {index[:80]!r} is no number")
    return Item(
        id=index,
        question=row.text("question"),
        answers=(check_letter(row["answer"], len(choices), row.where),),
        choices=choices,
        images=row.images(),
        fields={
            "question": str(int(index) % ROTATION),
            "rotation": str(int(index) // ROTATION),
            "category": row.text("category"),
            "l2_category": l2_category,
            "hint": _cell(row, "hint"),
        },
    )


def _rotations(item: Item) -> list[Item]:
    """The question with its choices moved up by 0, 1, ... places; the first goes to the end."""
    count, answer = len(item.choices), LETTERS.index(item.answers[0])
    return [
        Item(
            id=str(int(item.id) + turn * ROTATION),
            question=item.question,
            answers=(LETTERS[(answer - turn) % count],),
            choices=item.choices[turn:] + item.choices[:turn],
            images=item.images,
            fields={**item.fields, "rotation": str(turn)},
        )
        for turn in range(count)
    ]


def prompt(item: Item, protocol: Protocol) -> str:
    """The hint, the question, its choices and a request for the letter."""
    hint = item.fields["hint"]
    if protocol == "lmms_eval":
        question = f"{hint} {item.question}" if hint else item.question
        return f"{question_with_options(f'{question} There are several options:', item.choices)}\n{LETTER_SUFFIX}"
    question = f"{hint}\n{item.question}" if hint else item.question
    if protocol == "vlmevalkit":
        return vlmevalkit_prompt(question, item.choices)
    return multiple_choice_prompt(f"{question} Options:" if protocol == "cambrian" else question, item.choices)


def match(item: Item, output: str, protocol: Protocol) -> Match:
    """The letter as the protocol reads it; `lmms_eval` as its task `mmbench_en_dev_static`, which asks no judge."""
    if protocol == "lmms_eval":
        return letter_match(item, _lmms_letter(output, (*item.choices, *[MISSING] * 4)[:4]))
    if protocol == "vlmevalkit":
        return letter_match(item, vlmevalkit_letter(output, item.choices))
    if protocol == "cambrian":
        return letter_match(item, cambrian_letter(output))
    return letter_match(item, chosen_letter(output, len(item.choices)))


_LMMS_MARKS = ("{}.", "{},", "{}:", "{})", "{}).", "({})", "({}).", ":{}", ":{},", ":{}.", ":{})", ":{}).")


def _lmms_letter(output: str, choices: tuple[str, ...]) -> str | None:
    """A single letter as a word, then with marks, then the text of a single choice, then lmms-eval's shared extractor.

    Missing choices have the text `nan`, so they count as part of `banana`.
    """
    words = output.split()
    alone = [letter for letter in "ABCDE" if letter in words]
    if len(alone) == 1 and not (alone == ["A"] and len(words) > 3):  # it may be an article
        return alone[0]
    for mark in _LMMS_MARKS:
        marked = [letter for letter in "ABCDE" if mark.format(letter) in words]
        if len(marked) == 1:
            return marked[0]
    named = [letter for letter, text in zip(CHOICES, choices, strict=True) if text.lower() in output.lower()]
    return named[0] if len(named) == 1 else lmms_letter(output)


def rotations(item: Item) -> int:
    """How many rotations the question of an item has."""
    return len(item.choices)


def metrics(graded: Graded) -> Metrics:
    """`circular` over the questions whose rotations are all there, `accuracy` over all rows, `plain` without the rotated rows.

    Groups are circular too. NaN where no question has all its rotations, as may be under `eval.limit`.
    """
    of = lambda name: {
        f"{name}: {value}": mean_of_groups(graded, "question", rotations, graded.where(name, value))
        for value in graded.values(name)
    }
    return {
        "circular": mean_of_groups(graded, "question", rotations),
        "accuracy": mean(graded),
        "plain": mean(graded, graded.where("rotation", "0")),
        **of("l2_category"),
        **of("category"),
    }


MMBENCH = Benchmark(
    name="mmbench",
    read=read,
    prompt=prompt,
    match=match,
    metrics=metrics,
    task="l2_category",
    official=dict.fromkeys(("paper", "lmms_eval", "vlmevalkit", "cambrian"), "circular"),
    size=4329,
    groups={"l2_category": L2_CATEGORIES},
    whole={"question": rotations},
    behind={"plain": lambda item: item.fields["rotation"] == "0"},
    unit="question",
    max_new_tokens={"paper": 1024, "lmms_eval": 1024, "vlmevalkit": 2048, "cambrian": 512},
)
