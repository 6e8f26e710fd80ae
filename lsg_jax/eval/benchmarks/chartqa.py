"""ChartQA (Masry et al. 2022), test: questions about charts, half written by people, half generated from their captions.

Files: `lmms-lab/ChartQA` (type, question, answer) or the test split of `HuggingFaceM4/ChartQA` (query, label,
human_or_machine).
"""

from __future__ import annotations

from typing import Any

from lsg_jax.config import Protocol
from lsg_jax.data.parquet import Row, as_label, open_files, parquet_files, read_rows
from lsg_jax.data.prompts import WORD_SUFFIX
from lsg_jax.errors import InputError
from lsg_jax.eval.benchmark import Benchmark, Graded, Item, Match, Metrics, by, check_values, mean
from lsg_jax.eval.short_answers import cambrian_relaxed_match, relaxed_match

CATEGORIES = ("human", "augmented")


def read(path: str) -> list[Item]:
    """Items with the field `category`, human or augmented; ids count the rows. Raises InputError: see `Benchmark.read`."""
    columns = {name for file in open_files(parquet_files(path)) for name in file.columns}
    if {"query", "label"} <= columns:
        rows = read_rows(path, needs=["query", "label", "human_or_machine"], images=["image"])
        kinds = [{"0": "human", "1": "augmented"}.get(str(row["human_or_machine"]), row["human_or_machine"]) for row in rows]
        parts = [(row.text("query"), row["label"]) for row in rows]
    else:
        rows = read_rows(path, needs=["type", "question", "answer"], images=["image"])
        kinds = [str(row["type"]).removesuffix("_test") for row in rows]
        parts = [(row.text("question"), row["answer"]) for row in rows]
    check_values(kinds, CATEGORIES, what="question type", where=path)
    return [
        Item(str(number), question, _answers(answer, row), images=row.images(), fields={"category": kind})
        for number, (row, kind, (question, answer)) in enumerate(zip(rows, kinds, parts, strict=True))
    ]


def _answers(value: Any, row: Row) -> tuple[str, ...]:
    answers = tuple(as_label(each, row.where, "answer") for each in (value if isinstance(value, list) else [value]))
    if not answers or not all(answers):
        raise InputError(f"{row.where}: no answer")
    return answers


def prompt(item: Item, protocol: Protocol) -> str:
    """Question and the protocol's suffix. LLaVA-1.5 was not evaluated on ChartQA: `paper` takes its usual suffix."""
    if protocol == "lmms_eval":
        return item.question + "\nAnswer the question with a single word."
    if protocol == "cambrian":
        return item.question + "\nAnswer the question using a single number or phrase."
    return item.question + WORD_SUFFIX


def match(item: Item, output: str, protocol: Protocol) -> Match:
    """Relaxed accuracy, 5 %; `paper` as lmms-eval, which follows the definition."""
    text = output.strip()
    if protocol == "vlmevalkit":
        # it swaps output and answer, so the tolerance is 5 % of the output, and an output of 0 is compared as text
        right = any(relaxed_match(answer, text) for answer in item.answers)
    elif protocol == "cambrian":
        right = any(cambrian_relaxed_match(text.lower(), answer.lower()) for answer in item.answers)
    else:
        right = any(relaxed_match(text, answer) for answer in item.answers)
    return Match(text, float(right))


def metrics(graded: Graded) -> Metrics:
    """Relaxed accuracy over all questions and by category, percent."""
    return {"accuracy": mean(graded), **{f"category: {name}": score for name, score in by(graded, "category").items()}}


CHARTQA = Benchmark(
    name="chartqa",
    kind="general",
    read=read,
    prompt=prompt,
    match=match,
    metrics=metrics,
    task="category",
    official={"paper": "accuracy", "lmms_eval": "accuracy", "vlmevalkit": "accuracy", "cambrian": "accuracy"},
    size=2500,
    groups={"category": CATEGORIES},
    max_new_tokens={"lmms_eval": 16, "cambrian": 128},
)
