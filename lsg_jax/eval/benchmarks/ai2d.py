"""AI2D (Kembhavi et al., 2016): 3088 test questions on diagrams, in the layout of `lmms-lab/ai2d` (and `ai2d-no-mask`)."""

from __future__ import annotations

from lsg_jax.config import Protocol
from lsg_jax.data.parquet import read_rows
from lsg_jax.data.prompts import multiple_choice_prompt
from lsg_jax.eval.benchmark import Benchmark, Graded, Item, Match, Metrics, mean
from lsg_jax.eval.letters import (
    LETTERS,
    answer_letter,
    cambrian_letter,
    cambrian_text,
    chosen_letter,
    letter_match,
    lmms_dotted_letter,
    row_choices,
    vlmevalkit_letter,
    vlmevalkit_prompt,
)


def read(path: str) -> list[Item]:
    """Items; the position in the file is the id."""
    return [
        Item(
            id=str(number),
            question=row.text("question"),
            answers=(answer_letter(row["answer"], row_choices(row, "options"), row.where),),
            choices=row_choices(row, "options"),
            images=row.images(),
        )
        for number, row in enumerate(read_rows(path, needs=("question", "options", "answer"), images=("image",)))
    ]


def prompt(item: Item, protocol: Protocol) -> str:
    """The question and its choices, and a request for the letter; the same under every protocol, in English."""
    if protocol == "vlmevalkit":
        return vlmevalkit_prompt(item.question, item.choices)
    return multiple_choice_prompt(item.question, item.choices)


def match(item: Item, output: str, protocol: Protocol) -> Match:
    """The letter as the protocol reads it."""
    if protocol == "lmms_eval":
        return letter_match(item, lmms_dotted_letter(output))
    if protocol == "vlmevalkit":
        return letter_match(item, vlmevalkit_letter(output, item.choices))
    if protocol == "cambrian":
        # It compares positions, so an output that begins with a digit counts as an answer: `1` is B.
        digit = "0123".find(cambrian_text(output).lstrip("(")[:1] or "-")
        return letter_match(item, LETTERS[digit] if digit >= 0 else cambrian_letter(output))
    return letter_match(item, chosen_letter(output, len(item.choices)))


def metrics(graded: Graded) -> Metrics:
    """Accuracy."""
    return {"accuracy": mean(graded)}


AI2D = Benchmark(
    name="ai2d",
    kind="general",
    read=read,
    prompt=prompt,
    match=match,
    metrics=metrics,
    official=dict.fromkeys(("paper", "lmms_eval", "vlmevalkit", "cambrian"), "accuracy"),
    size=3088,
    max_new_tokens={"lmms_eval": 16, "vlmevalkit": 2048, "cambrian": 512},
)
