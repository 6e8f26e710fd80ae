"""HallusionBench (Guan et al., 2024): yes/no questions on figures and edited figures, and without any figure.

Files: the owner's folder (HallusionBench.json and the images `VD/...`, `VS/...`, in it or in `hallusion_bench/`), or
`lmms-lab/HallusionBench` as Parquet, both of its splits. Questions that need no figure (VS) are also asked without one, where
not to know is right. A figure is right if all questions on it are, a pair if a question is right on all of its figures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lsg_jax.config import Protocol
from lsg_jax.data.parquet import as_label, named_files, read_rows
from lsg_jax.data.prompts import WORD_SUFFIX
from lsg_jax.errors import InputError
from lsg_jax.eval.benchmark import (
    Benchmark,
    Graded,
    ImageSource,
    Item,
    Match,
    Metrics,
    by,
    check_unique,
    check_values,
    mean,
    mean_of_groups,
)
from lsg_jax.eval.image_files import check_folder, image_file, with_their_images
from lsg_jax.eval.short_answers import yes_or_no_word
from lsg_jax.files import is_file
from lsg_jax.json_files import read_json

FILE = "HallusionBench.json"
COLUMNS = ("category", "subcategory", "visual_input", "set_id", "figure_id", "question_id", "question", "gt_answer")
KINDS = {"VD": ("figure", "illusion", "math", "ocr", "video"), "VS": ("chart", "map", "ocr", "table")}
SUBCATEGORIES = tuple(f"{category} {name}" for category, names in KINDS.items() for name in names)
GROUPS = {"category": tuple(KINDS), "subcategory": SUBCATEGORIES, "visual_input": ("0", "1", "2")}
SETS = ("figure", "pair", "easy", "hard")
"""Fields whose equal values make a group that is right as a whole; `easy` and `hard` are the parts of a pair."""


def read(path: str) -> list[Item]:
    """Items with the fields of GROUPS and SETS, and `set`, the questions on related figures; `data`: the sizes of its groups.

    Raises InputError: see `Benchmark.read`.
    """
    file = _json_file(path)
    if file is not None:
        items = _of_json(file)
    else:
        check_folder(path, FILE)
        rows = read_rows(path, needs=COLUMNS)
        # the split without figures may have no such column
        images = lambda row: row.images(required=False) if "image" in row.file.columns else ()
        items = [_item(row.values, images(row), row.where) for row in rows]
    for name, known in GROUPS.items():
        check_values((item.fields[name] for item in items), known, what=name, where=path)
    check_unique(items, path)
    sizes = {name: Counter(item.fields.get(name) for item in items) for name in SETS}
    sized = [replace(item, data={name: sizes[name][item.fields.get(name)] for name in SETS}) for item in items]
    return with_their_images(sized, path) if file is not None else sized


def _json_file(path: str) -> Path | None:
    """The JSON file that `path` names or holds; None if it names Parquet files."""
    given = Path(path)
    file = given if given.suffix == ".json" else given / FILE
    return file if is_file(file) else None


def _of_json(file: Path) -> list[Item]:
    rows = read_json(file)
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{file}: expected a list of questions")
    folders = (file.parent / "hallusion_bench", file.parent)
    items = []
    for number, row in enumerate(rows):
        where = f"{file}: entry {number}"
        if missing := [name for name in (*COLUMNS, "filename") if name not in row]:
            raise InputError(f"{where}: no {', '.join(missing)}; there are {', '.join(row)}")
        images = (image_file(str(row["filename"]), folders),) if row["filename"] else ()
        items.append(_item(row, images, where))
    return items


def _item(row: Mapping[str, Any], images: Sequence[ImageSource], where: str) -> Item:
    if (answer := str(row["gt_answer"])) not in ("0", "1"):
        raise InputError(f"{where}: gt_answer {answer!r} is neither 0 nor 1")
    question = as_label(row["question"], where, "question")
    if not question:
        raise InputError(f"{where}: question is empty")
    category, figure, seen = str(row["category"]), str(row["figure_id"]), str(row["visual_input"])
    if (seen != "0") != bool(images):
        raise InputError(f"{where}: visual_input {seen}, but {len(images)} images")
    group = f"{category}_{row['subcategory']}_{row['set_id']}"
    pair = f"{group}_{row['question_id']}"
    fields = {"category": category, "subcategory": f"{category} {row['subcategory']}", "visual_input": seen, "set": group}
    fields |= {"pair": pair, "hard" if seen == "2" else "easy": pair}
    if not _without_figure(category, figure):
        fields["figure"] = f"{group}_{figure}"
    return Item(
        id=f"{group}_{figure}_{row['question_id']}",
        question=question,
        answers=("yes" if answer == "1" else "no",),
        images=tuple(images),
        fields=fields,
    )


def _without_figure(category: str, figure: str) -> bool:
    return category == "VS" and figure == "0"


def prompt(item: Item, protocol: Protocol) -> str:
    """The question and LLaVA-1.5's suffix."""
    return item.question + WORD_SUFFIX


def match(item: Item, output: str, protocol: Protocol) -> Match:
    """`yes` or `no` if exactly one of them is a word of the output; else it is unclear, which is right without a figure."""
    parsed = yes_or_no_word(output)
    unclear_is_right = "figure" not in item.fields
    return Match(parsed, float(parsed == item.answers[0] or (parsed is None and unclear_is_right)))


def metrics(graded: Graded) -> Metrics:
    """Percent: `aAcc` of questions, `fAcc` of figures, `qAcc` of pairs and their easy and hard parts; by category and kind."""
    of = lambda name, mask=None: mean_of_groups(graded, name, GROUP_SIZE[name], mask)
    parts: Metrics = {"easy: qAcc": of("easy"), "hard: qAcc": of("hard")}
    for category in KINDS:
        mask = graded.where("category", category)
        scores = {"aAcc": mean(graded, mask), "fAcc": of("figure", mask), "qAcc": of("pair", mask)}
        parts |= {f"{category}: {name}": value for name, value in scores.items()}
    kinds = {f"subcategory: {name}": value for name, value in by(graded, "subcategory").items()}
    return {"aAcc": mean(graded), "fAcc": of("figure"), "qAcc": of("pair"), **parts, **kinds}


GROUP_SIZE = {name: (lambda item, name=name: item.data[name]) for name in SETS}

HALLUSIONBENCH = Benchmark(
    name="hallusionbench",
    kind="hallucination",
    read=read,
    prompt=prompt,
    match=match,
    metrics=metrics,
    official={"paper": "aAcc"},
    size=1129,
    groups=GROUPS,
    whole={name: GROUP_SIZE[name] for name in ("figure", "pair")},
    files=lambda path: [file] if (file := _json_file(path)) else named_files(path),
    note=lambda items: "the owner has GPT-4 read free answers; here an answer is yes, no or unclear by rule",
    unit="set",
    task="subcategory",
)
