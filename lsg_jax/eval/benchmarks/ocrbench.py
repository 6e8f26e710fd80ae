"""OCRBench (Liu et al. 2023): 1,000 questions about text in five groups, one point each if the answer is in the output.

File: `echo840/OCRBench`, split test.
"""

from __future__ import annotations

from lsg_jax.config import Protocol
from lsg_jax.data.parquet import Row, as_label, read_rows
from lsg_jax.data.prompts import WORD_SUFFIX
from lsg_jax.errors import InputError
from lsg_jax.eval.benchmark import Benchmark, Graded, Item, Match, Metrics, by, check_values, mean

FORMULA = "Handwritten Mathematical Expression Recognition"
GROUPS = {
    "Regular Text Recognition": "Text Recognition",
    "Irregular Text Recognition": "Text Recognition",
    "Artistic Text Recognition": "Text Recognition",
    "Handwriting Recognition": "Text Recognition",
    "Digit String Recognition": "Text Recognition",
    "Non-Semantic Text Recognition": "Text Recognition",
    "Scene Text-centric VQA": "Scene Text-centric VQA",
    "Doc-oriented VQA": "Doc-oriented VQA",
    "Key Information Extraction": "Key Information Extraction",
    FORMULA: FORMULA,
}
_FULL_WIDTH = {0xFF00 + code: 0x20 + code for code in range(1, 0x5F)} | {0x3000: 0x20}


def read(path: str) -> list[Item]:
    """Items with the fields `category` (the question type), `group` and `dataset`; ids count the rows.

    Raises InputError: see `Benchmark.read`.
    """
    rows = read_rows(path, needs=["dataset", "question", "question_type", "answer"], images=["image"])
    check_values((row["question_type"] for row in rows), GROUPS, what="question_type", where=path)
    return [
        Item(
            id=str(number),
            question=row.text("question"),
            answers=_answers(row),
            images=row.images(),
            fields={"category": row["question_type"], "group": GROUPS[row["question_type"]], "dataset": row.label("dataset")},
        )
        for number, row in enumerate(rows)
    ]


def _answers(row: Row) -> tuple[str, ...]:
    value = row["answer"]
    answers = tuple(as_label(each, row.where, "answer") for each in (value if isinstance(value, list) else [value]))
    if not answers or not all(answers):  # an empty answer is part of every output
        raise InputError(f"{row.where}: no answer")
    return answers


def prompt(item: Item, protocol: Protocol) -> str:
    """Only the question in lmms-eval and VLMEvalKit. LLaVA-1.5 was not evaluated on it: `paper` takes its usual suffix."""
    if protocol == "lmms_eval":
        return item.question.strip()
    if protocol == "vlmevalkit":
        return item.question
    return item.question + ("\nGive the short answer directly." if protocol == "cambrian" else WORD_SUFFIX)


def match(item: Item, output: str, protocol: Protocol) -> Match:
    """Whether an answer is part of the output: without spaces for formulas, else ignoring case.

    lmms-eval recognises formulas by their data set, HME100k, the others by the question type; in the official file that is the
    same. Only lmms-eval converts full-width characters to ASCII.
    """
    if item.fields["dataset"] == "HME100k" if protocol == "lmms_eval" else item.fields["category"] == FORMULA:
        normalise = _without_spaces
    else:
        normalise = _lower_ascii if protocol == "lmms_eval" else _lower
    text = normalise(output.strip())
    return Match(text, float(any(normalise(answer) in text for answer in item.answers)))


def _without_spaces(text: str) -> str:
    return text.strip().replace("\n", " ").replace(" ", "")


def _lower(text: str) -> str:
    return text.lower().strip().replace("\n", " ")


def _lower_ascii(text: str) -> str:
    return _lower(text.translate(_FULL_WIDTH))


def metrics(graded: Graded) -> Metrics:
    """`points` (of 1,000 for the whole file) and the points of each group; `accuracy`, also by question type, in percent."""
    points = lambda mask=1.0: graded.weight @ (graded.score * mask)
    return {
        "points": points(),
        "accuracy": mean(graded),
        **{f"points: {group}": points(graded.where("group", group)) for group in graded.values("group")},
        **{f"category: {name}": score for name, score in by(graded, "category").items()},
    }


OCRBENCH = Benchmark(
    name="ocrbench",
    kind="general",
    read=read,
    prompt=prompt,
    match=match,
    metrics=metrics,
    task="category",
    points=lambda metric: metric.startswith("points"),
    official={"paper": "points", "lmms_eval": "accuracy", "vlmevalkit": "points", "cambrian": "accuracy"},
    size=1000,
    groups={"category": tuple(GROUPS)},
    max_new_tokens={"lmms_eval": 128, "cambrian": 512},
)
