"""POPE (Li et al. 2023): is there a ... in the image? Three ways to choose the absent objects, 3,000 questions each.

File: `lmms-lab/POPE`, split test of the default configuration.
"""

from __future__ import annotations

import numpy as np

from lsg_jax.config import Protocol
from lsg_jax.data.parquet import read_rows
from lsg_jax.data.prompts import WORD_SUFFIX
from lsg_jax.eval.benchmark import Benchmark, Graded, Item, Match, Metrics, check_unique, check_values, macro, mean
from lsg_jax.eval.short_answers import yes_or_no, yes_or_no_word
from lsg_jax.eval.yes_no import harmonic_mean, share, yes_no_scores

SPLITS = ("random", "popular", "adversarial")


def read(path: str) -> list[Item]:
    """Items with the fields `category` and `image`. Raises InputError: see `Benchmark.read`."""
    rows = read_rows(path, needs=["question_id", "question", "answer", "category", "image_source"], images=["image"])
    check_values((row["category"] for row in rows), SPLITS, what="category", where=path)
    items = [
        Item(
            id=f"{row['category']}/{row['question_id']}",  # each split counts from 1
            question=row.text("question"),
            answers=(yes_or_no(row["answer"], row.where),),
            images=row.images(),
            fields={"category": row["category"], "image": str(row["image_source"])},
        )
        for row in rows
    ]
    check_unique(items, path)
    return items


def prompt(item: Item, protocol: Protocol) -> str:
    """Question and suffix; VLMEvalKit asks without a suffix."""
    if protocol == "vlmevalkit":
        return item.question
    question = item.question.strip() if protocol == "lmms_eval" else item.question
    return question + WORD_SUFFIX


def match(item: Item, output: str, protocol: Protocol) -> Match:
    """`yes`, `no`, or None for outputs that the protocol cannot read."""
    output = output.strip()
    if protocol == "lmms_eval":  # the word alone: `Yes.` is wrong
        parsed = output.lower() if output.lower() in ("yes", "no") else None
    elif protocol == "vlmevalkit":
        parsed = yes_or_no_word(output)
    elif protocol == "cambrian":
        first = (output.lower().split() or [""])[0].rstrip(".:,")  # the original fails on an empty output
        parsed = first if first in ("yes", "no") else None
    else:
        parsed = _first_sentence(output)
    return Match(parsed, float(parsed == item.answers[0]))


def _first_sentence(output: str) -> str:
    """As in LLaVA's `eval_pope.py`: no if the first sentence has the word No, no or not; else yes, even if empty or NO."""
    words = output.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def metrics(graded: Graded) -> Metrics:
    """Accuracy, precision, recall, F1 and share of yes answers, over all questions and over each split; percent.

    `f1_macro` is the mean over the splits, as in the LLaVA-1.5 paper. lmms-eval counts an unread answer to a `yes` question
    only in the accuracy; `recall_of_read` and `f1_of_read` do the same. Its "yes ratio" is that of the correct answers, a
    constant, and left out.
    """
    splits = {name: _scores(graded, graded.where("category", name)) for name in SPLITS}
    overall = _scores(graded, np.ones(len(graded.items), bool))
    by_split = {f"{name}: {metric}": value for name, scores in splits.items() for metric, value in scores.items()}
    return {"f1_macro": macro({name: scores["f1"] for name, scores in splits.items()}), **overall, **by_split}


def _scores(graded: Graded, mask: np.ndarray) -> Metrics:
    there = np.array([item.answers[0] == "yes" for item in graded.items], bool)
    says_yes = np.array([parsed == "yes" for parsed in graded.parsed], bool)
    read_at_all = np.array([parsed is not None for parsed in graded.parsed], bool)
    scores = yes_no_scores(graded, mask, "yes")
    recall_of_read = share(graded.weight * mask, says_yes, there & read_at_all)
    return {
        **scores,
        "yes_ratio": mean(graded, mask, score=says_yes.astype(np.float64)),
        "recall_of_read": recall_of_read,
        "f1_of_read": harmonic_mean(scores["precision"], recall_of_read),
    }


POPE = Benchmark(
    name="pope",
    kind="hallucination",
    read=read,
    prompt=prompt,
    match=match,
    metrics=metrics,
    task="category",
    official={"paper": "f1_macro", "lmms_eval": "f1_of_read", "vlmevalkit": "f1", "cambrian": "accuracy"},
    size=9000,
    groups={"category": SPLITS},
    unit="image",
    max_new_tokens={"paper": 128, "lmms_eval": 128, "cambrian": 128},
)
