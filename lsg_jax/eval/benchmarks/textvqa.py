"""TextVQA (Singh et al. 2019), validation: questions about text in photographs, ten annotators each.

File: `lmms-lab/textvqa`, split validation. Rows of other splits in the same folder are left out by `set_name`.
"""

from __future__ import annotations

from lsg_jax.config import Protocol
from lsg_jax.data.parquet import Row, read_rows
from lsg_jax.data.prompts import WORD_SUFFIX
from lsg_jax.errors import InputError
from lsg_jax.eval.benchmark import Benchmark, Graded, Item, Match, Metrics, check_unique, mean
from lsg_jax.eval.short_answers import m4c_answer, soft_accuracy, vqa_answer

ANNOTATORS = 10


def read(path: str) -> list[Item]:
    """Items with ten answers and the fields `image` and `ocr_tokens` (one text). Raises InputError: see `Benchmark.read`."""
    needs = ["question_id", "image_id", "question", "answers", "ocr_tokens"]
    rows = read_rows(path, needs=needs, images=["image"], optional=["set_name"])
    kept = [row for row in rows if row.get("set_name", "val") == "val"]
    if not kept:
        there = ", ".join(sorted({str(row["set_name"]) for row in rows}))
        raise InputError(f"{path}: no rows of set_name val, only of {there}; the score is that of the validation split")
    items = [_item(row) for row in kept]
    check_unique(items, path)
    return items


def _item(row: Row) -> Item:
    answers = row.texts("answers")
    if len(answers) != ANNOTATORS:
        raise InputError(f"{row.where}: question {row['question_id']} has {len(answers)} answers; expected {ANNOTATORS}")
    return Item(
        id=str(row["question_id"]),
        question=row.text("question"),
        answers=answers,
        images=row.images(),
        fields={"image": str(row["image_id"]), "ocr_tokens": ", ".join(row.texts("ocr_tokens"))},
    )


def prompt(item: Item, protocol: Protocol) -> str:
    """LLaVA-1.5 and Cambrian show the dataset's OCR tokens; lmms-eval and VLMEvalKit do not.

    lmms-eval writes the question with one capital, the first letter: NASA becomes nasa.
    """
    tokens = item.fields["ocr_tokens"]
    if protocol == "lmms_eval":
        return item.question.capitalize() + WORD_SUFFIX
    if protocol == "vlmevalkit":
        return item.question + WORD_SUFFIX
    if protocol == "cambrian":
        return f"{item.question}\nReference OCR tokens:{' ' * bool(tokens)}{tokens}{WORD_SUFFIX}"
    return f"{item.question}\nReference OCR token: {tokens}{WORD_SUFFIX}"


def match(item: Item, output: str, protocol: Protocol) -> Match:
    """VQA accuracy after the protocol's normalisation."""
    normalise = vqa_answer if protocol == "vlmevalkit" else m4c_answer
    text = normalise(output.strip())
    return Match(text, soft_accuracy(text, [normalise(answer) for answer in item.answers]))


def metrics(graded: Graded) -> Metrics:
    """VQA accuracy, percent."""
    return {"accuracy": mean(graded)}


TEXTVQA = Benchmark(
    name="textvqa",
    kind="general",
    read=read,
    prompt=prompt,
    match=match,
    metrics=metrics,
    official={"paper": "accuracy", "lmms_eval": "accuracy", "vlmevalkit": "accuracy", "cambrian": "accuracy"},
    size=5000,
    unit="image",
    max_new_tokens={"paper": 128, "cambrian": 512},  # lmms-eval and VLMEvalKit leave it to their model classes
)
