"""Functions of `cv_bench_official.yaml`. Prompt, matcher and formula are those of `lsg eval --benchmark cv_bench=...`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from lsg_jax.data.images import open_image
from lsg_jax.eval.benchmark import Graded, Item
from lsg_jax.eval.benchmarks.cv_bench import CV_BENCH

METRICS = ("official", "accuracy", "2D", "3D")  # named as in the results of `lsg eval`

Doc = Mapping[str, Any]
Row = dict[str, Any]


def keep_files(docs: Any) -> Any:
    """The `datasets.Dataset` with encoded images: its own decoder would rotate them by their EXIF orientation."""
    import datasets

    return docs.cast_column("image", datasets.Image(decode=False))


def visual(doc: Doc) -> list[Image.Image]:
    """The image, decoded as for `lsg eval`."""
    return [open_image(doc["image"]["bytes"])]


def item(doc: Doc) -> Item:
    """The item that the benchmark's reader makes of a row, without the image."""
    return Item(
        id=f"{doc['type']}-{doc['idx']}",
        question=doc["question"],
        answers=(doc["answer"].strip("()"),),
        choices=tuple(doc["choices"]),
        fields={name: doc[name] for name in ("type", "task", "source", "prompt")},
    )


def text(doc: Doc) -> str:
    """The user's turn under protocol `paper`."""
    return CV_BENCH.prompt(item(doc), "paper")


def target(doc: Doc) -> str:
    """The letter of the correct choice."""
    return item(doc).answers[0]


def grade(doc: Doc, outputs: Sequence[str]) -> dict[str, Row]:
    """How the output was read and whether that is correct, for every metric."""
    asked = item(doc)
    match = CV_BENCH.match(asked, outputs[0], "paper")
    fields = {name: asked.fields[name] for name in ("type", "task", "source")}
    row = {"id": asked.id, "fields": fields, "parsed": match.parsed, "correct": match.score}
    return dict.fromkeys(METRICS, row)


def aggregate(metric: str, rows: Sequence[Row]) -> float:
    """One metric in percent; nan if a source has no questions."""
    items = [Item(id=row["id"], question="", answers=(), fields=row["fields"]) for row in rows]
    score = np.array([row["correct"] for row in rows], np.float64)
    graded = Graded(items, [row["parsed"] for row in rows], score, np.ones((1, len(rows))))
    return float(CV_BENCH.metrics(graded)[metric][0])


def official(rows: Sequence[Row]) -> float:
    """((ADE20K + COCO) / 2 + Omni3D) / 2; nan unless the whole benchmark was asked."""
    if len(rows) != CV_BENCH.size:
        logging.getLogger(__name__).warning("%d of %s questions: no official score", len(rows), CV_BENCH.size)
        return float("nan")
    return aggregate("official", rows)


# lmms-eval needs one function per metric.


def accuracy(rows: Sequence[Row]) -> float:
    """Mean over all questions."""
    return aggregate("accuracy", rows)


def two_d(rows: Sequence[Row]) -> float:
    """Mean of ADE20K and COCO."""
    return aggregate("2D", rows)


def three_d(rows: Sequence[Row]) -> float:
    """Omni3D."""
    return aggregate("3D", rows)
