"""MMStar (Chen et al., 2024): 1500 questions that need the image, six categories of 250, in the layout of `Lin-Chen/MMStar`.

The options are part of the question. Accuracy over all questions equals the mean over the six categories, since these have
the same size; lmms-eval's mean over the 18 sub-categories differs, since those have not.
"""

from __future__ import annotations

import re

from lsg_jax.config import Protocol
from lsg_jax.data.parquet import read_rows
from lsg_jax.data.prompts import LETTER_SUFFIX
from lsg_jax.eval.benchmark import Benchmark, Graded, Item, Match, Metrics, by, check_unique, check_values, macro, mean
from lsg_jax.eval.letters import (
    LETTERS,
    cambrian_word,
    check_letter,
    chosen_letter,
    letter_match,
    lmms_letter,
    mmstar_letter,
    vlmevalkit_letter,
    vlmevalkit_prompt,
)

CATEGORIES = {
    "coarse perception": ("image scene and topic", "image style & quality", "image emotion"),
    "fine-grained perception": ("object counting", "recognition", "localization"),
    "instance reasoning": (
        "single-instance reasoning", "cross-instance attribute reasoning", "cross-instance relation reasoning",
    ),
    "logical reasoning": ("code & sequence reasoning", "diagram reasoning", "common reasoning"),
    "science & technology": (
        "biology & chemistry & physics", "electronics & energy & mechanical eng.", "geography & earth science & agriculture",
    ),
    "math": ("geometry", "numeric commonsense and calculation", "statistical reasoning"),
}  # fmt: skip
SUB_CATEGORIES = tuple(name for names in CATEGORIES.values() for name in names)


def read(path: str) -> list[Item]:
    """Items with fields `category` and `l2_category`; the options stay in the question."""
    rows = read_rows(path, needs=("index", "question", "answer", "category", "l2_category"), images=("image",))
    items = [
        Item(
            id=str(row["index"]),
            question=row.text("question"),
            answers=(check_letter(row["answer"], 4, row.where),),
            images=row.images(),
            fields={"category": row["category"], "l2_category": row["l2_category"]},
        )
        for row in rows
    ]
    check_unique(items, path)
    check_values((item.fields["category"] for item in items), CATEGORIES, what="category", where=path)
    check_values((item.fields["l2_category"] for item in items), SUB_CATEGORIES, what="l2_category", where=path)
    return items


def split_question(question: str) -> tuple[str, tuple[str, ...]]:
    """(question without its options, the options A first); the whole question and () where none are found.

    They are written as `Options: A: x, B: y, C: z, D: w`, or as lines `(A) x` after `Choices:`. Questions with fewer than four
    options are padded with `nan`.
    """
    for start, option in (("\nOptions:", r"(?:^|,\s*|\n\s*)([A-D]): "), ("\nChoices:", r"(?:^|\n)\(([A-D])\) ")):
        stem, found, listed = question.rpartition(start)
        parts = re.split(option, listed.strip())[1:]  # A, x, B, y, ...
        letters, options = parts[::2], parts[1::2]
        if found and options and "".join(letters) == LETTERS[: len(letters)]:
            return stem, tuple(text.strip() for text in options if text.strip() != "nan")
    return question, ()


def prompt(item: Item, protocol: Protocol) -> str:
    """The question with the protocol's request."""
    if protocol == "lmms_eval":  # no final period, and without the request at the end of some questions
        return item.question.strip().replace(" Please answer yes or no.", "") + LETTER_SUFFIX.removesuffix(".")
    if protocol == "cambrian":
        return f"{item.question}\nPlease answer directly with only the letter of the correct option and nothing else."
    if protocol == "mmstar":  # the options are no columns of its file, so its code takes these for open questions
        return f"{item.question}\nAnswer the question directly."
    if protocol == "vlmevalkit":
        stem, options = split_question(item.question)
        return vlmevalkit_prompt(stem, options) if options else item.question + LETTER_SUFFIX
    return item.question + LETTER_SUFFIX


def match(item: Item, output: str, protocol: Protocol) -> Match:
    """The letter from A to D as the protocol reads it."""
    if protocol == "lmms_eval":
        return letter_match(item, lmms_letter(output))
    if protocol == "cambrian":
        return letter_match(item, cambrian_word(output))
    if protocol == "mmstar":
        return letter_match(item, mmstar_letter(output))
    if protocol == "vlmevalkit":
        return letter_match(item, vlmevalkit_letter(output, split_question(item.question)[1] or ("",) * 4))
    return letter_match(item, chosen_letter(output, 4))


def metrics(graded: Graded) -> Metrics:
    """Accuracy, the mean over the 18 sub-categories, the six categories, and the sub-categories."""
    sub_categories = by(graded, "l2_category")
    return {
        "accuracy": mean(graded),
        "mean_of_18": macro({name: mean(graded, graded.where("l2_category", name)) for name in SUB_CATEGORIES}),
        **{f"category: {name}": value for name, value in by(graded, "category").items()},
        **{f"sub-category: {name}": value for name, value in sub_categories.items()},
    }


MMSTAR = Benchmark(
    name="mmstar",
    kind="general",
    read=read,
    prompt=prompt,
    match=match,
    metrics=metrics,
    task="category",
    official={
        "paper": "accuracy",
        "lmms_eval": "mean_of_18",
        "vlmevalkit": "accuracy",
        "cambrian": "accuracy",
        "mmstar": "accuracy",
    },
    size=1500,
    groups={"category": tuple(CATEGORIES), "l2_category": SUB_CATEGORIES},
    max_new_tokens={"lmms_eval": 1024, "vlmevalkit": 2048, "cambrian": 128, "mmstar": 512},
)
