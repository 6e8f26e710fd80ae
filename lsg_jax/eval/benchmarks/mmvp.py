"""MMVP (Tong et al., 2024): 150 pairs of images that CLIP finds alike, one question a pair, whose two answers differ.

Files: the folder `MMVP/MMVP` of the Hub (Questions.csv and `MMVP Images/`), or `lmms-lab-eval/MMVP` as Parquet, in which the
answers of two pairs are corrected (99 and 100, 279 and 280). A pair is right if both of its questions are.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path

from lsg_jax.config import Protocol
from lsg_jax.data.parquet import named_files, read_rows
from lsg_jax.data.prompts import multiple_choice_prompt
from lsg_jax.errors import InputError
from lsg_jax.eval.benchmark import Benchmark, Graded, ImageSource, Item, Match, Metrics, check_unique, mean, mean_of_groups
from lsg_jax.eval.image_files import ImageFile, check_folder, with_their_images
from lsg_jax.eval.letters import cambrian_text, check_letter, chosen_letter, is_number, letter_match, lmms_mmvp_letter
from lsg_jax.files import is_file, read_regular

QUESTIONS = "Questions.csv"
COLUMNS = ("Index", "Question", "Options", "Correct Answer")


def read(path: str) -> list[Item]:
    """Items with the fields `pair`, from 1 to 150, and `options` as in the file. Raises InputError: see `Benchmark.read`."""
    table = _table(path)
    if table is None:
        check_folder(path, QUESTIONS)
        rows = read_rows(path, needs=COLUMNS, images=("image",))
        items = [_item([row.label(name) for name in COLUMNS], row.images(), row.where) for row in rows]
    else:
        images = table.parent / "MMVP Images"
        found = [
            _item(cells, (ImageFile(images / f"{cells[0].strip()}.jpg"),), f"{table}: row {number}")
            for number, cells in enumerate(_csv_rows(table), 1)
        ]
        items = with_their_images(found, path)
    check_unique(items, path)
    return items


def _table(path: str) -> Path | None:
    """The CSV file that `path` names or holds; None if it names Parquet files."""
    given = Path(path)
    table = given if given.suffix == ".csv" else given / QUESTIONS
    return table if is_file(table) else None


def _csv_rows(table: Path) -> list[list[str]]:
    """The cells of COLUMNS of every row. Raises InputError: no such columns, a row that lacks one, or no rows."""
    try:
        text = read_regular(table).decode("utf-8-sig")
        lines = [line for line in csv.reader(io.StringIO(text, newline=""), strict=True) if line]
    except (csv.Error, UnicodeDecodeError, ValueError) as error:
        raise InputError(f"{table}: no CSV table with a header: {error}") from None
    if not lines:
        raise InputError(f"{table}: the file is empty")
    header, *rows = lines
    names = ["Index" if name.strip() == "lndex" else name.strip() for name in header]  # the published file has this typo
    if missing := [name for name in COLUMNS if name not in names]:
        raise InputError(f"{table}: no column {', '.join(missing)}; there are {', '.join(names)}")
    for number, row in enumerate(rows, 1):
        if len(row) != len(names):
            raise InputError(f"{table}: row {number} has {len(row)} cells instead of {len(names)}")
    if not rows:
        raise InputError(f"{table}: no rows in it")
    return [[row[names.index(name)] for name in COLUMNS] for row in rows]


def _item(cells: Sequence[str], images: tuple[ImageSource, ...], where: str) -> Item:
    index, question, options, answer = (cell.strip() for cell in cells)
    if not question:
        raise InputError(f"{where}: Question is empty")
    if not is_number(index) or int(index) < 1:
        raise InputError(f"{where}: Index {index[:80]!r} is no number from 1")
    before, *texts = re.split(r"\([ab]\)", options)
    if before.strip() or len(texts) != 2:
        raise InputError(f"{where}: Options {options[:80]!r} are not `(a) text (b) text`")
    return Item(
        id=index,
        question=question,
        answers=(check_letter(answer.strip("()").upper(), 2, where),),
        choices=tuple(text.strip() for text in texts),
        images=images,
        fields={"pair": str((int(index) + 1) // 2), "options": options},
    )


def prompt(item: Item, protocol: Protocol) -> str:
    """The question, its two choices and a request for the letter; Cambrian adds `Options:`. The owner makes no request."""
    question = f"{item.question} Options:" if protocol == "cambrian" else item.question
    return multiple_choice_prompt(question, item.choices)


def match(item: Item, output: str, protocol: Protocol) -> Match:
    """The letter as the protocol reads it; for Cambrian also the text of the choice. The owner asks GPT-4 instead."""
    if protocol == "lmms_eval":
        return letter_match(item, lmms_mmvp_letter(output))
    if protocol == "cambrian":
        text = cambrian_text(output).rstrip(".:,").lstrip("(").rstrip(")")
        named = [letter for letter, choice in zip("AB", item.choices, strict=True) if text in (letter.lower(), choice.lower())]
        return letter_match(item, item.answers[0] if item.answers[0] in named else next(iter(named), None))
    return letter_match(item, chosen_letter(output, 2))


def metrics(graded: Graded) -> Metrics:
    """`pairs`: percent of the pairs in which both answers are right; `accuracy` over all questions."""
    return {"pairs": mean_of_groups(graded, "pair", _two), "accuracy": mean(graded)}


def _two(item: Item) -> int:
    """Questions of each pair."""
    return 2


MMVP = Benchmark(
    name="mmvp",
    kind="vision_centric",
    read=read,
    prompt=prompt,
    match=match,
    metrics=metrics,
    official=dict.fromkeys(("paper", "lmms_eval", "cambrian"), "pairs"),
    size=300,
    whole={"pair": _two},
    files=lambda path: [table] if (table := _table(path)) else named_files(path),
    note=lambda items: "the owner has GPT-4 compare free answers; here the letter is read by rule",
    unit="pair",
    max_new_tokens={"lmms_eval": 16, "cambrian": 512},
)
