"""ScienceQA-IMG (Lu et al., 2022): the 2017 test questions with an image, in the layout of `lmms-lab/ScienceQA`.

`derek-thomas/ScienceQA` has the same columns. Questions without an image are left out.
"""

from __future__ import annotations

import string

from lsg_jax.config import Protocol
from lsg_jax.data.parquet import read_rows
from lsg_jax.data.prompts import multiple_choice_prompt
from lsg_jax.errors import InputError
from lsg_jax.eval.benchmark import Benchmark, Graded, Item, Match, Metrics, by, mean
from lsg_jax.eval.letters import (
    LETTERS,
    answer_letter,
    cambrian_text,
    letter_match,
    llava_letter,
    lmms_scienceqa_letter,
    row_choices,
    vlmevalkit_letter,
    vlmevalkit_prompt,
)


def read(path: str) -> list[Item]:
    """Items with field `hint`, and `subject` where the file has it. The position in the file is the id."""
    rows = read_rows(path, needs=("question", "choices", "answer", "hint"), images=("image",), optional=("subject",))
    items = [
        Item(
            id=str(number),
            question=row.text("question"),
            answers=(answer_letter(row["answer"], row_choices(row, "choices"), row.where),),
            choices=row_choices(row, "choices"),
            images=images,
            fields={"hint": row.label("hint")} | ({"subject": subject} if (subject := row.label("subject")) else {}),
        )
        for number, row in enumerate(rows)
        if (images := row.images(required=False))
    ]
    if not items:
        raise InputError(f"{path}: no question has an image")
    return items


def prompt(item: Item, protocol: Protocol) -> str:
    """Hint, question and choices; LLaVA-1.5 and lmms-eval call the hint a context."""
    hint = item.fields["hint"]
    if protocol == "vlmevalkit":
        question = f"{hint}\n{item.question}" if hint else item.question
        return vlmevalkit_prompt(question, item.choices)
    if protocol == "cambrian":
        listed = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, item.choices, strict=False))
        question = f"{hint} {item.question}" if hint else item.question
        return f"{question}{listed}\nPlease answer directly with only the letter of the correct option and nothing else."
    return multiple_choice_prompt(f"Context: {hint}\n{item.question}" if hint else item.question, item.choices)


def match(item: Item, output: str, protocol: Protocol) -> Match:
    """The letter as the protocol reads it; for Cambrian also the text of the choice."""
    if protocol == "lmms_eval":
        return letter_match(item, lmms_scienceqa_letter(output))
    if protocol == "vlmevalkit":
        return letter_match(item, vlmevalkit_letter(output, item.choices))
    if protocol == "cambrian":
        return _match_cambrian(item, output)
    return letter_match(item, llava_letter(output, len(item.choices)))


def _match_cambrian(item: Item, output: str) -> Match:
    """Correct by the letter before the first period, or by the text of the choice without case and punctuation."""
    text = cambrian_text(output)
    bare = lambda s: s.lower().translate(str.maketrans("", "", string.punctuation)).strip()
    named = [
        letter
        for letter, choice in zip(LETTERS, item.choices, strict=False)
        if text.split(".")[0] == letter.lower() or bare(text) == bare(choice)
    ]
    return letter_match(item, item.answers[0] if item.answers[0] in named else next(iter(named), None))


def metrics(graded: Graded) -> Metrics:
    """Accuracy, over all questions and by subject."""
    return {"accuracy": mean(graded), **{f"subject: {name}": value for name, value in by(graded, "subject").items()}}


SCIENCEQA_IMG = Benchmark(
    name="scienceqa_img",
    kind="general",
    read=read,
    prompt=prompt,
    match=match,
    metrics=metrics,
    task="subject",
    official=dict.fromkeys(("paper", "lmms_eval", "vlmevalkit", "cambrian"), "accuracy"),
    size=2017,
    max_new_tokens={"lmms_eval": 16, "vlmevalkit": 2048, "cambrian": 512},
)
