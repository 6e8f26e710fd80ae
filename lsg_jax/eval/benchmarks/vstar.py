"""V*Bench (Wu and Xie, 2023): 191 questions about small details of large photographs, answered by a letter.

Files: `craigwu/vstar_bench`, whose `test_questions.jsonl` lies beside the folders of its images, or `lmms-lab/vstar-bench`
(Parquet). The owner compares the likelihoods of the choices as answers instead; that is not done here.
"""

from __future__ import annotations

import re
from pathlib import Path

from lsg_jax.config import Protocol
from lsg_jax.data.parquet import named_files, read_rows
from lsg_jax.data.prompts import LETTER_SUFFIX
from lsg_jax.eval.benchmark import Benchmark, Graded, ImageSource, Item, Match, Metrics, by, check_unique, check_values, mean
from lsg_jax.eval.benchmarks.questions import json_rows
from lsg_jax.eval.image_files import ImageFile, check_folder, with_their_images
from lsg_jax.eval.letters import (
    check_letter,
    choice_match,
    vlmevalkit_prompt,
)
from lsg_jax.files import is_file

FILE = "test_questions.jsonl"
CATEGORIES = ("direct_attributes", "relative_position")
COLUMNS = ("question_id", "text", "label", "category")

_CHOICE = re.compile(r"\n\(([A-Z])\) (.*)")


def read(path: str) -> list[Item]:
    """Items with the field `category`; choices and request stay in the question. Raises InputError: see `Benchmark.read`."""
    file = _json_file(path)
    if file is None:
        check_folder(path, FILE)
        rows = read_rows(path, needs=COLUMNS, images=["image"])
        items = [_item(row.values, row.where, row.images()) for row in rows]
    else:
        image = lambda row: (ImageFile(file.parent / str(row["image"])),)
        items = [_item(row, where, image(row)) for row, where in json_rows(str(file), (*COLUMNS, "image"))]
        items = with_their_images(items, path)
    check_unique(items, path)
    check_values((item.fields["category"] for item in items), CATEGORIES, what="category", where=path)
    return items


def _json_file(path: str) -> Path | None:
    """The JSONL file that `path` names or holds; None if it names Parquet files."""
    if path.endswith(".jsonl"):
        return Path(path)
    file = Path(path) / FILE
    return file if is_file(file) else None


def _item(row: dict[str, object], where: str, images: tuple[ImageSource, ...]) -> Item:
    text = str(row["text"])
    letters, choices = zip(*_CHOICE.findall(text), strict=True) if _CHOICE.search(text) else ((), ())
    return Item(
        id=str(row["question_id"]),
        question=text,
        answers=(check_letter(row["label"], len(letters), where),),
        choices=choices,
        images=images,
        fields={"category": str(row["category"])},
    )


def prompt(item: Item, protocol: Protocol) -> str:
    """The text of the file, which ends in LLaVA-1.5's request.

    lmms-eval writes the choices as `A. ...` and adds the request, so it stands there twice.
    """
    if protocol == "vlmevalkit":
        return vlmevalkit_prompt(item.question.split("\n(A)")[0], item.choices)
    if protocol == "lmms_eval":
        choices = re.findall(r"\([A-D]\)\s*([^()]+?)(?=\s*\([A-D]\)|$)", item.question)
        listed = [f"{letter}. {choice.strip()}" for letter, choice in zip("ABCD", choices, strict=False)]
        text = "\n".join([item.question.split("(A)")[0].strip(), *listed]) if choices else item.question
        return text + LETTER_SUFFIX
    return item.question


_LMMS_PATTERNS = (
    r"^([A-D])\s*[\.)\]]*",
    r"(?:THE\s+)?(?:ANSWER|CHOICE|OPTION)(?:\s+IS)?[\s:]+([A-D])",
    r"\(([A-D])\)",
    r"([A-D])\s*(?:\.|\)|])",
    r"(?:^|\s)([A-D])(?:\s|$)",
)


def _lmms_letter(output: str) -> str | None:
    """lmms-eval: the first pattern that is found, else the only letter from A to D in the text; `Because` is B."""
    text = output.strip().upper()
    for pattern in _LMMS_PATTERNS:
        if found := re.search(pattern, text):
            return found[1]
    letters = re.findall("[A-D]", text)
    return letters[0] if len(letters) == 1 else None


def match(item: Item, output: str, protocol: Protocol) -> Match:
    """The letter as the protocol reads it."""
    return choice_match(item, output, protocol, lmms=_lmms_letter)


def metrics(graded: Graded) -> Metrics:
    """Accuracy, over all questions and by category."""
    return {"accuracy": mean(graded), **{f"category: {name}": score for name, score in by(graded, "category").items()}}


VSTAR = Benchmark(
    name="vstar",
    read=read,
    prompt=prompt,
    match=match,
    metrics=metrics,
    task="category",
    official=dict.fromkeys(("paper", "lmms_eval", "vlmevalkit", "cambrian"), "accuracy"),
    size=191,
    groups={"category": CATEGORIES},
    files=lambda path: [file] if (file := _json_file(path)) else named_files(path),
    guess_by="category",
    max_new_tokens={"lmms_eval": 16, "vlmevalkit": 2048, "cambrian": 32},
)
