"""VizWiz-VQA (Gurari et al., 2018), val: 4319 questions that blind people asked about their photographs, ten annotators each.

Many cannot be answered from the photograph. File: `lmms-lab/VizWiz-VQA`, split val; rows of the test split are left out.
"""

from __future__ import annotations

from lsg_jax.config import Protocol
from lsg_jax.data.parquet import Row, read_rows
from lsg_jax.data.prompts import WORD_SUFFIX
from lsg_jax.errors import InputError
from lsg_jax.eval.benchmark import Benchmark, Graded, Item, Match, Metrics, by, check_unique, check_values, mean
from lsg_jax.eval.short_answers import m4c_answer, soft_accuracy, vqa_answer

ANNOTATORS = 10
ANSWER_TYPES = ("yes/no", "number", "other", "unanswerable")
UNANSWERABLE_SUFFIX = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."


def read(path: str) -> list[Item]:
    """Items with ten answers, and the field `answer_type` where the file has it (as `category` or `answer_type`).

    Raises InputError: see `Benchmark.read`.
    """
    rows = read_rows(path, needs=["question_id", "question", "answers"], images=["image"], optional=["category", "answer_type"])
    items = [_item(row) for row in rows if "test" not in str(row["question_id"])]
    if not items:
        raise InputError(f"{path}: only rows of the test split, whose answers are not public; give split val")
    check_unique(items, path)
    kinds = (item.fields["answer_type"] for item in items if item.fields)
    check_values(kinds, ANSWER_TYPES, what="answer_type", where=path)
    return items


def _item(row: Row) -> Item:
    answers = row.texts("answers")
    if len(answers) != ANNOTATORS:
        raise InputError(f"{row.where}: question {row['question_id']} has {len(answers)} answers; expected {ANNOTATORS}")
    kind = row.get("answer_type") or row.get("category")
    fields = {"answer_type": kind} if kind else {}
    return Item(str(row["question_id"]), row.text("question"), answers, images=row.images(), fields=fields)


def prompt(item: Item, protocol: Protocol) -> str:
    """The question, what to say where it cannot be answered, and LLaVA-1.5's suffix; only the question in VLMEvalKit.

    lmms-eval writes the question with one capital, the first letter.
    """
    if protocol == "vlmevalkit":
        return item.question
    question = item.question.capitalize() if protocol == "lmms_eval" else item.question
    return question + UNANSWERABLE_SUFFIX + WORD_SUFFIX


def match(item: Item, output: str, protocol: Protocol) -> Match:
    """VQA accuracy after the protocol's normalisation."""
    normalise = vqa_answer if protocol == "vlmevalkit" else m4c_answer
    text = normalise(output.strip())
    return Match(text, soft_accuracy(text, [normalise(answer) for answer in item.answers]))


def metrics(graded: Graded) -> Metrics:
    """VQA accuracy over all questions and by type of answer, percent."""
    return {"accuracy": mean(graded), **{f"answer_type: {name}": score for name, score in by(graded, "answer_type").items()}}


VIZWIZ = Benchmark(
    name="vizwiz",
    read=read,
    prompt=prompt,
    match=match,
    metrics=metrics,
    task="answer_type",
    official=dict.fromkeys(("paper", "lmms_eval", "vlmevalkit", "cambrian"), "accuracy"),
    size=4319,
    max_new_tokens={"paper": 128, "cambrian": 128},  # lmms-eval and VLMEvalKit leave it to their model classes
)
