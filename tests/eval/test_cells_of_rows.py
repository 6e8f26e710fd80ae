"""A cell of a benchmark's file that is empty, or of a kind that its column cannot hold, is named with its row and column."""

import base64
import gzip
import json
from pathlib import Path

import pytest
import test_mixed_benchmarks
from test_choice_benchmarks import TABLES, encoded
from test_choice_benchmarks import write as write_file
from test_hallucination_benchmarks import amber_folder, chair_folder, hallusion_rows, mmvp_folder, mmvp_rows, write_json
from test_short_benchmarks import IMAGE, ROWS, gqa_rows
from test_short_benchmarks import write as write_folder

from lsg_jax.config import EvalConfig
from lsg_jax.errors import InputError
from lsg_jax.eval.batches import _sizes, read_images
from lsg_jax.eval.registry import BENCHMARKS
from lsg_jax.eval.runner import ask, grade, summary

pytestmark = pytest.mark.usefixtures("no_process_that_reads_first")

MANY = [*"abcdefghijklmnopqrstuvwxyz", "too many"]
MIXED = {"mmmu", "mathvista"}

WRONG = [
    ("cv_bench", {"prompt": None}, "prompt is empty, no text"),
    ("cv_bench", {"source_filename": ["x"]}, r"source_filename is \['x'\], neither a text nor a number"),
    ("cv_bench", {"choices": MANY}, "choices holds 27 choices; only 26 have a letter"),
    ("scienceqa_img", {"hint": ["x"]}, r"hint is \['x'\], neither a text nor a number"),
    ("scienceqa_img", {"subject": {"a": 1}}, "subject is {'a': 1}, neither a text nor a number"),
    ("scienceqa_img", {"choices": MANY}, "choices holds 27 choices"),
    ("ai2d", {"options": MANY}, "options holds 27 choices"),
    ("seed_img", {"choice_c": None}, "choice_c is empty, no text"),
    ("realworldqa", {"answer": ["x"]}, r"answer is \['x'\], neither a text nor a number"),
    ("gqa", {"types": "query"}, "types is query, no table of types"),
    ("gqa", {"answer": ""}, "answer is empty"),
    ("textvqa", {"ocr_tokens": [None]}, "ocr_tokens is empty, no text"),
    ("textvqa", {"ocr_tokens": "STOP"}, "ocr_tokens is 'STOP', no list of texts"),
    ("ocrbench", {"dataset": ["x"]}, r"dataset is \['x'\], neither a text nor a number"),
    ("ocrbench", {"answer": [None]}, "no answer"),
    ("mmvp", {"Question": None}, "Question is empty"),
    ("hallusionbench", {"question": None}, "question is empty"),
    ("mmbench", {"A": ["x"]}, r"A is \['x'\], neither a text nor a number"),
    ("mmmu", {"options": str(MANY)}, "options holds 27 choices"),
    ("mmmu", {"options": "[None, 'b']"}, "is no list of texts"),
    ("mathvista", {"choices": MANY}, "choices holds 27 choices"),
]


def rows_of(name):
    if name in test_mixed_benchmarks.BENCHMARKS:
        return [test_mixed_benchmarks.row_of(name)]
    if name == "mmvp":
        return mmvp_rows()
    if name == "hallusionbench":
        return [row for row in hallusion_rows() if row["visual_input"] != "0"]
    return [dict(row) for row in (TABLES[name] if name in TABLES else gqa_rows() if name == "gqa" else ROWS[name]())]


@pytest.mark.parametrize(("name", "cells", "message"), WRONG)
def test_a_cell_that_cannot_be_used_is_named(name, cells, message, tmp_path):
    if name in MIXED and "choices" in cells:
        rows = [test_mixed_benchmarks.row_of(name, **cells)]
    else:
        rows = [{**row, **cells} for row in rows_of(name)[:1]]
    if name in ("mmvp", "hallusionbench"):
        rows = [{**row, "image": {"bytes": b"x", "path": "x.png"}} for row in rows]
    if name == "gqa":
        write_folder(tmp_path, [{"id": "n1", "image": IMAGE}], "images.parquet")
    write_file(tmp_path / "q.parquet", rows)
    with pytest.raises(InputError, match=f"q.parquet: row 0: .*{message}"):
        ask(BENCHMARKS[name], str(tmp_path), EvalConfig())


@pytest.mark.parametrize(("kind", "pack"), [("gzip", gzip.compress), ("zip", lambda data: b"PK\x03\x04" + data)])
def test_a_compressed_file_is_to_be_unpacked(kind, pack, tmp_path):
    file = tmp_path / "q.parquet.packed"
    file.write_bytes(pack(Path(write_file(tmp_path / "q.parquet", TABLES["ai2d"])).read_bytes()))
    with pytest.raises(InputError, match=f"{file}: compressed with {kind}; unpack it"):
        ask(BENCHMARKS["ai2d"], str(file), EvalConfig())


def test_an_image_that_cannot_be_used_is_named_with_its_file_and_row(tmp_path):
    def read(image, name="q.parquet"):
        (item,) = ask(
            BENCHMARKS["ai2d"], write_file(tmp_path / name, [{**TABLES["ai2d"][0], "image": image}]), EvalConfig()
        ).items
        return _sizes(item, read_images(item))

    png = encoded()
    address = "data:image/png;base64," + base64.b64encode(png).decode()
    assert read(address) == read(base64.b64encode(png).decode()) == read(png)
    for image, message in (
        (b"no image", "q.parquet: row 0: image: not an image of a known format"),
        (
            "http://somewhere/1.jpg",
            r"row 0: image is text, 'http://somewhere/1.jpg', but no base64 image; paths and addresses are",
        ),
    ):
        with pytest.raises(InputError, match=f"question 0: .*{message}"):
            read(image)
    folder = mmvp_folder(tmp_path / "mmvp")
    item = ask(BENCHMARKS["mmvp"], str(folder), EvalConfig()).items[0]
    with pytest.raises(InputError, match=r"question 1: .*MMVP Images/1\.jpg: image: not an image of a known format"):
        _sizes(item, read_images(item))


@pytest.mark.parametrize(("name", "file"), [("chair", "instances_val2014.json"), ("amber", "annotations.json")])
def test_a_file_in_place_of_its_folder_is_told(name, file, tmp_path):
    (tmp_path / file).write_text("{}")
    with pytest.raises(InputError, match=f"{file}: a file; give its folder: no {file} in it"):
        ask(BENCHMARKS[name], str(tmp_path / file), EvalConfig())


def test_an_empty_request_of_amber_is_named(tmp_path):
    folder = amber_folder(tmp_path)
    file = next(folder.rglob("query_*.json"))
    rows = json.loads(file.read_text())
    rows[0]["query"] = None
    write_json(file, rows)
    with pytest.raises(InputError, match=f"{file.name}: id {rows[0]['id']}: query is empty"):
        ask(BENCHMARKS["amber"], str(folder), EvalConfig())


@pytest.mark.parametrize(
    ("column", "value"), [("source_filename", 7), ("source_filename", None), ("source_filename", float("nan"))]
)
def test_an_unused_label_may_be_a_number_or_empty(column, value, tmp_path):
    rows = [{**row, column: value} for row in TABLES["cv_bench"]]
    asked = ask(BENCHMARKS["cv_bench"], write_file(tmp_path / "q.parquet", rows), EvalConfig())
    assert summary(asked, {"base": grade(asked, ["A"] * len(rows))}).questions == len(rows)
    assert all(isinstance(item.fields["photo"], str) for item in asked.items)


def test_chair_reads_ids_as_numbers_and_as_text(tmp_path):
    def as_text(tree):
        for row in tree["annotations"]:
            row["image_id"] = str(row["image_id"])

    plain, mixed = (
        BENCHMARKS["chair"].read(str(chair_folder(tmp_path / str(at), change))) for at, change in enumerate((list, as_text))
    )
    assert [(item.id, item.answers) for item in plain] == [(item.id, item.answers) for item in mixed]
