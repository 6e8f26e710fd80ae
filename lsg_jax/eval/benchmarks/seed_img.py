"""SEED-Bench (Li et al., 2023), its 14233 questions on images, in the layout of `lmms-lab/SEED-Bench`; videos are left out."""

from __future__ import annotations

from lsg_jax.config import Protocol
from lsg_jax.data.parquet import Row, read_rows
from lsg_jax.data.prompts import multiple_choice_prompt
from lsg_jax.errors import InputError
from lsg_jax.eval.benchmark import Benchmark, Graded, Item, Match, Metrics, by, check_unique, check_values, mean
from lsg_jax.eval.letters import (
    cambrian_letter,
    check_letter,
    chosen_letter,
    letter_match,
    lmms_first_character,
    vlmevalkit_letter,
    vlmevalkit_prompt,
)

DIMENSIONS = {
    "1": "scene understanding",
    "2": "instance identity",
    "3": "instance attribute",
    "4": "instance location",
    "5": "instance counting",
    "6": "spatial relation",
    "7": "instance interaction",
    "8": "visual reasoning",
    "9": "text recognition",
}
CHOICES = ("choice_a", "choice_b", "choice_c", "choice_d")


def read(path: str) -> list[Item]:
    """Items with fields `dimension` and `photo`, the image that questions share."""
    needs = ("question_id", "question", *CHOICES, "answer", "question_type_id", "data_type")
    rows = read_rows(path, needs=needs, images=("image",), optional=("data_id",))
    rows = [row for row in rows if row["data_type"] == "image"]
    if not rows:
        raise InputError(f"{path}: no row of data_type image")
    check_values((row["question_type_id"] for row in rows), DIMENSIONS, what="question_type_id", where=path)
    items = [_item(row) for row in rows]
    check_unique(items, path)
    return items


def _item(row: Row) -> Item:
    name = str(row["question_id"])
    return Item(
        id=name,
        question=row.text("question"),
        answers=(check_letter(row["answer"], len(CHOICES), row.where),),
        choices=tuple(row.label(column) or row.text(column) for column in CHOICES),
        images=row.images(),
        fields={"dimension": DIMENSIONS[str(row["question_type_id"])], "photo": str(row.get("data_id") or name)},
    )


def prompt(item: Item, protocol: Protocol) -> str:
    """The question, its four choices and a request for the letter; Cambrian adds `Options:` before the choices."""
    if protocol == "vlmevalkit":
        return vlmevalkit_prompt(item.question, item.choices)
    return multiple_choice_prompt(f"{item.question} Options:" if protocol == "cambrian" else item.question, item.choices)


def match(item: Item, output: str, protocol: Protocol) -> Match:
    """The letter as the protocol reads it."""
    if protocol == "lmms_eval":
        return letter_match(item, lmms_first_character(output))
    if protocol == "vlmevalkit":
        return letter_match(item, vlmevalkit_letter(output, item.choices))
    if protocol == "cambrian":
        return letter_match(item, cambrian_letter(output))
    return letter_match(item, chosen_letter(output, len(CHOICES)))


def metrics(graded: Graded) -> Metrics:
    """Accuracy, over all questions and by the nine dimensions."""
    return {"accuracy": mean(graded), **{f"dimension: {name}": value for name, value in by(graded, "dimension").items()}}


SEED_IMG = Benchmark(
    name="seed_img",
    kind="general",
    read=read,
    prompt=prompt,
    match=match,
    metrics=metrics,
    task="dimension",
    official=dict.fromkeys(("paper", "lmms_eval", "vlmevalkit", "cambrian"), "accuracy"),
    size=14233,
    groups={"dimension": tuple(DIMENSIONS.values())},
    unit="photo",
    max_new_tokens={"lmms_eval": 1024, "vlmevalkit": 2048, "cambrian": 512},
)
