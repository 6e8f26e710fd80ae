"""MME (Fu et al. 2023): two yes/no questions per image, one with each answer, in 14 subtasks.

A subtask scores accuracy + accuracy over pairs (both correct), 0 to 200; perception sums ten of them, cognition four.
File: `lmms-lab/MME`, split test.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from lsg_jax.config import Protocol
from lsg_jax.data.parquet import read_rows
from lsg_jax.data.prompts import WORD_SUFFIX
from lsg_jax.errors import InputError
from lsg_jax.eval.benchmark import Benchmark, Graded, Item, Match, Metrics, check_values, mean, mean_of_groups
from lsg_jax.eval.short_answers import yes_or_no, yes_or_no_word

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
ASKS = " Please answer yes or no."


def read(path: str) -> list[Item]:
    """Items with the fields `category` and `pair`. Raises InputError: see `Benchmark.read`; also if a pair is none."""
    rows = read_rows(path, needs=["question_id", "question", "answer", "category"], images=["image"])
    check_values((row["category"] for row in rows), PERCEPTION + COGNITION, what="category", where=path)
    questions: dict[str, list[str]] = defaultdict(list)
    items = []
    for row in rows:
        category, question = row["category"], row.text("question")
        pair = f"{category}/{str(row['question_id']).removeprefix(category + '/')}"
        questions[pair].append(question)
        items.append(
            Item(
                id=f"{pair}#{len(questions[pair])}",
                question=question,
                answers=(yes_or_no(row["answer"], row.where),),
                images=row.images(),
                fields={"category": category, "pair": pair},
            )
        )
    for pair, asked in questions.items():
        if len(asked) > 2 or len(set(asked)) < len(asked):
            raise InputError(f"{path}: question_id {pair} has {len(set(asked))} questions in {len(asked)} rows; MME asks 2")
    return items


def prompt(item: Item, protocol: Protocol) -> str:
    """The data set's request for yes or no: LLaVA and lmms-eval replace it by their suffix, Cambrian appends its own to it."""
    if protocol == "vlmevalkit":
        return item.question
    if protocol == "cambrian":
        return item.question + WORD_SUFFIX
    question = item.question.strip().replace(ASKS, "")
    # some questions have two spaces before the request; lmms-eval keeps one of them
    return (question if protocol == "lmms_eval" else question.rstrip()) + WORD_SUFFIX


def match(item: Item, output: str, protocol: Protocol) -> Match:
    """`yes`, `no`, or None for outputs that the protocol cannot read."""
    text = output.strip().lower()
    if protocol == "vlmevalkit":
        parsed = yes_or_no_word(output.strip())
    elif protocol == "cambrian":
        parsed = text.rstrip(".") if text.rstrip(".") in ("yes", "no") else None
    elif protocol == "lmms_eval":
        text = text.replace(".", "")
        parsed = {"y": "yes", "n": "no"}.get(text) or _start(text)
    else:
        parsed = _start(text)
    return Match(parsed, float(parsed == item.answers[0]))


def _start(text: str) -> str | None:
    """As in MME's `calculation.py`: `yes`, else `no` in the first four characters. `Not a dog` and `Knot` are no."""
    return next((word for word in ("yes", "no") if word in text[:4]), None)


def metrics(graded: Graded) -> Metrics:
    """Points: `perception` 0 to 2000, `cognition` 0 to 800, `total`, subtasks 0 to 200; `accuracy`, `acc`, `acc_plus`: percent.

    A subtask without a pair is NaN, and so are the sums.
    """
    parts: Metrics = {}
    points: Metrics = {}
    for category in PERCEPTION + COGNITION:
        mask = graded.where("category", category)
        acc, acc_plus = mean(graded, mask), mean_of_groups(graded, "pair", _two, mask)
        points[category] = acc + acc_plus
        parts |= {f"{category}: acc": acc, f"{category}: acc_plus": acc_plus}
    perception = sum((points[name] for name in PERCEPTION), np.zeros(len(graded.weight)))
    cognition = sum((points[name] for name in COGNITION), np.zeros(len(graded.weight)))
    total = perception + cognition
    return {"perception": perception, "cognition": cognition, "total": total, "accuracy": mean(graded), **points, **parts}


def _two(item: Item) -> int:
    """Questions of each image."""
    return 2


MME = Benchmark(
    name="mme",
    kind="general",
    behind={
        "perception": lambda item: item.fields["category"] in PERCEPTION,
        "cognition": lambda item: item.fields["category"] in COGNITION,
    },
    read=read,
    prompt=prompt,
    match=match,
    metrics=metrics,
    task="category",
    points=lambda metric: metric != "accuracy" and not metric.endswith((": acc", ": acc_plus")),
    # Cambrian pairs rows by their order; for a complete file, where pairs are adjacent, the result is the same
    official={"paper": "perception", "lmms_eval": "perception", "vlmevalkit": "perception", "cambrian": "perception"},
    size=2374,
    groups={"category": PERCEPTION + COGNITION},
    whole={"pair": _two},
    unit="pair",
    max_new_tokens={"paper": 128, "lmms_eval": 16, "cambrian": 32},
)
