"""GQA (Hudson and Manning 2019), the balanced test-dev: compositional questions with answers of one word or two.

Files: `lmms-lab/GQA`, configurations testdev_balanced_instructions and testdev_balanced_images, in one folder or glob. Images
are joined by `imageId`.
"""

from __future__ import annotations

import string

from lsg_jax.config import Protocol
from lsg_jax.data.parquet import Row, as_label, read_rows
from lsg_jax.data.prompts import WORD_SUFFIX
from lsg_jax.errors import InputError
from lsg_jax.eval.benchmark import Benchmark, Graded, Item, Match, Metrics, by, check_unique, mean

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def read(path: str) -> list[Item]:
    """Items with the field `image` and, if the file has them, the types `structural` and `semantic`.

    Raises InputError: see `Benchmark.read`; also for a question whose image is missing.
    """
    questions = read_rows(path, needs=["id", "imageId", "question", "answer"], optional=["types"])
    try:
        shown = read_rows(path, needs=["id"], images=["image"])
    except InputError:
        raise InputError(
            f"{path}: no table with the columns id and image; give a folder or glob that holds testdev_balanced_images too"
        ) from None
    images = {str(row["id"]): row.images() for row in shown}
    items = []
    for row in questions:
        name = str(row["imageId"])
        if name not in images:
            raise InputError(f"{row.where}: image {name} of question {row['id']} is in no images table under {path}")
        items.append(
            Item(
                id=str(row["id"]),
                question=row.text("question"),
                answers=(_answer(row),),
                images=images[name],
                fields={"image": name, **_types(row)},
            )
        )
    check_unique(items, path)
    return items


def _answer(row: Row) -> str:
    if not (answer := row.text("answer")):
        raise InputError(f"{row.where}: answer is empty")
    return answer


def _types(row: Row) -> dict[str, str]:
    types = row.get("types") or {}
    if not isinstance(types, dict):
        raise InputError(f"{row.where}: types is {str(types)[:80]}, no table of types")
    return {name: kind for name in ("structural", "semantic") if (kind := as_label(types.get(name), row.where, "types"))}


def prompt(item: Item, protocol: Protocol) -> str:
    """Question and suffix, in all protocols."""
    return item.question + WORD_SUFFIX


def match(item: Item, output: str, protocol: Protocol) -> Match:
    """Equal up to case and, depending on the protocol, final periods or all punctuation."""
    text, answer = output.strip().lower(), item.answers[0].lower()
    if protocol == "lmms_eval":  # removes punctuation but not the space before it, so `dog .` is not `dog`
        text, answer = text.translate(_NO_PUNCTUATION), answer.translate(_NO_PUNCTUATION)
    elif protocol == "vlmevalkit":
        answer = answer.strip()
    else:  # LLaVA's `convert_gqa_for_eval.py` and GQA's own evaluation; Cambrian does the same
        text = text.rstrip(".")
    return Match(text, float(text == answer))


def metrics(graded: Graded) -> Metrics:
    """Accuracy over all questions and by structural and semantic type, percent."""
    types = {f"{kind}: {name}": score for kind in ("structural", "semantic") for name, score in by(graded, kind).items()}
    return {"accuracy": mean(graded), **types}


GQA = Benchmark(
    name="gqa",
    kind="general",
    read=read,
    prompt=prompt,
    match=match,
    metrics=metrics,
    official={"paper": "accuracy", "lmms_eval": "accuracy", "vlmevalkit": "accuracy", "cambrian": "accuracy"},
    size=12578,
    unit="image",
    max_new_tokens={"paper": 128, "lmms_eval": 16, "cambrian": 128},
)
