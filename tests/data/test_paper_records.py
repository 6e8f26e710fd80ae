"""The paper's own records: rows as Hub data sets store them, from every kind of file, with their categories."""

import base64
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from image_files import encoded
from PIL import Image

from lsg_jax.cli import main
from lsg_jax.data.conversation import Turn
from lsg_jax.data.paper_records import RowImages, prepare_paper
from lsg_jax.data.records import REJECTS, open_records
from lsg_jax.data.reports import PaperReport
from lsg_jax.errors import InputError

NOISE = np.random.default_rng(0).integers(0, 256, (12, 30, 40, 3), dtype=np.uint8)
JPEGS = [encoded(Image.fromarray(pixels), "JPEG") for pixels in NOISE]
CATEGORIES = ["OCR", "General VQA", "counting", "code", "Math", "science"]


def row(number: int, image) -> dict:
    turns = [{"from": "human", "value": f"<image>\nWhat is {number}?"}, {"from": "gpt", "value": f"It is {number}."}]
    labels = {"source": f"source_{number % 4}.json", "category": CATEGORIES[number % 6]}
    unused = {"model": "", "original_caption": None, "url": "", "type": "", "qtype": None, "task": "", "token_count": 20}
    return {"id": f"id{number}", "image": image, "conversations": turns, **labels, **unused}


def by_path(number: int) -> dict:
    return row(number, f"{number}.jpg")


def embedded(number: int) -> dict:
    return row(number, {"bytes": JPEGS[number], "path": f"{number}.jpg"})


def write_parquet(path, rows, group=5):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=group)


@pytest.fixture
def folder(tmp_path):
    """A folder of images."""
    root = tmp_path / "set"
    root.mkdir()
    for number, data in enumerate(JPEGS):
        (root / f"{number}.jpg").write_bytes(data)
    return root


def _json(folder):
    (folder / "train.json").write_text(json.dumps([by_path(n) for n in range(12)]))
    return folder


def _jsonl(folder):
    lines = [json.dumps({**by_path(n), "image": {"bytes": None, "path": f"{n}.jpg"}}) for n in range(12)]
    (folder / "train.jsonl").write_text("\n".join(lines))
    return folder / "train.jsonl"


def _base64(folder):
    rows = [row(n, {"bytes": base64.b64encode(JPEGS[n]).decode(), "path": None}) for n in range(12)]
    (folder / "train.json").write_text(json.dumps(rows))
    return folder / "train.json"


def _shards(folder):
    write_parquet(folder / "data" / "train-00000.parquet", [embedded(n) for n in range(7)])
    write_parquet(folder / "data" / "train-00001.parquet", [embedded(n) for n in range(7, 12)])
    (folder / "dataset_infos.json").write_text("{}")
    return folder


def _paths_in_parquet(folder):
    write_parquet(folder / "train.parquet", [row(n, {"bytes": None, "path": f"{n}.jpg"}) for n in range(12)])
    return folder / "train.parquet"


def _turns_as_columns(folder):
    rows = [embedded(n) for n in range(12)]
    for each in rows:
        each["conversations"] = {name: [turn[name] for turn in each["conversations"]] for name in ("from", "value")}
    write_parquet(folder / "train.parquet", rows)
    return folder / "train.parquet"


def _turns_as_text(folder):
    rows = [embedded(n) for n in range(12)]
    for each in rows:
        each["conversations"] = json.dumps(each["conversations"])
    write_parquet(folder / "train.parquet", rows)
    return folder / "train.parquet"


@pytest.mark.parametrize("write", [_json, _jsonl, _base64, _shards, _paths_in_parquet, _turns_as_columns, _turns_as_text])
def test_all_kinds_of_files_give_the_same_records(tmp_path, folder, write):
    report = prepare_paper(write(folder), folder, tmp_path / "out", threads=2)
    rows = open_records(tmp_path / "out")
    assert [(rows[n].record_id, rows[n].images, rows[n].image_sizes) for n in range(12)] == [
        (f"id{n}", (JPEGS[n],), ((40, 30),)) for n in range(12)
    ]
    assert rows[3].turns == (Turn("human", "<image>\nWhat is 3?"), Turn("gpt", "It is 3."))
    assert report.categories["general"] == {"source_1.json": 1, "source_3.json": 1}
    assert sorted(report.categories) == ["code", "counting", "general", "math", "ocr", "science"]
    assert isinstance(rows.manifest.report, PaperReport) and rows.manifest.report == report
    listing = [json.loads(line) for line in (tmp_path / "out" / "sample.jsonl").read_text().splitlines()]
    assert listing[4] == {"line": 5, "id": "id4", "category": "math", "source": "source_0.json", "row": 4}


def test_rejects_keep_their_category_and_rows_their_numbers(tmp_path, folder):
    rows = [by_path(0), row(1, "none.jpg"), row(2, {"bytes": JPEGS[2][:300], "path": None}), {**by_path(3), "category": None}]
    rows += [{**by_path(4), "category": "Charts", "source": None}, row(5, 7), {**by_path(6), "conversations": "[{"}]
    rows[2]["image"]["bytes"] = base64.b64encode(rows[2]["image"]["bytes"]).decode()
    (folder / "r.jsonl").write_text("\n".join(json.dumps(each) for each in rows) + "\n\n{broken")
    report = prepare_paper(folder / "r.jsonl", folder, tmp_path / "out", max_bad_fraction=1.0)
    assert (report.records, report.rows) == (8, 3)
    assert report.categories == {"ocr": {"source_0.json": 1}, "(none)": {"source_3.json": 1}, "Charts": {"(none)": 1}}
    rejects = [json.loads(line) for line in (tmp_path / "out" / REJECTS).read_text().splitlines()]
    assert [(each["line"], each["reason"]) for each in rejects] == [
        (2, "missing_image"), (3, "broken_image"), (6, "bad_image_field"), (7, "no_turns"), (9, "bad_json"),
    ]  # fmt: skip
    assert rejects[1]["message"].startswith("image of row 3: ")
    assert "Charts: 1 from 1 source\n" in report.summary()


def test_a_row_that_names_its_picture_elsewhere_is_not_read_as_text(tmp_path, folder):
    """Columns that training does not use are dropped; others are left for `parse_record` to judge."""
    from lsg_jax.data.paper_records import _plain

    plain = _plain({**row(0, None), "images": ["0.jpg"]}, 1, RowImages(folder))
    assert plain["images"] == ["0.jpg"] and not {"model", "url", "task"} & plain.keys()


def test_the_image_of_a_row_is_held_until_it_is_read_or_its_row_rejected(folder):
    held = RowImages(folder)
    names = [held.hold(number, JPEGS[number]) for number in range(3)]
    assert held.pending == sum(map(len, JPEGS[:3]))
    assert held.read(names[1]) == (JPEGS[1], (40, 30))
    assert held.read("0.jpg") == (JPEGS[0], (40, 30))
    held.drop(0)
    assert held.pending == len(JPEGS[2])
    with pytest.raises(Exception, match="no such image"):
        held.read(names[0])


def test_files_that_hold_no_records_are_refused(tmp_path, folder):
    write_parquet(folder / "a" / "x.parquet", [{"question": "q"}])
    with pytest.raises(InputError, match=r"x\.parquet: no column conversations, image; there are question"):
        prepare_paper(folder / "a", folder, tmp_path / "out")
    data = bytearray((_shards(folder / "a") / "data" / "train-00000.parquet").read_bytes())
    data[200:4000] = bytes(3800)
    (folder / "damaged.parquet").write_bytes(data)
    with pytest.raises(InputError, match=r"damaged\.parquet: row 0: column image: cannot be read: "):
        prepare_paper(folder / "damaged.parquet", folder, tmp_path / "out")
    (folder / "b").mkdir()
    with pytest.raises(InputError, match=r"not just one JSON or JSONL file \(none\)"):
        prepare_paper(folder / "b", folder, tmp_path / "out")
    for name in ("one.json", "two.jsonl"):
        (folder / "b" / name).write_text("[]")
    with pytest.raises(InputError, match=r"\(one.json, two.jsonl\): give the file"):
        prepare_paper(folder / "b", folder, tmp_path / "out")
    with pytest.raises(InputError, match="no such file or folder of records"):
        prepare_paper(folder / "none", folder, tmp_path / "out")
    with pytest.raises(InputError, match="no usable record"):
        prepare_paper(folder / "b" / "one.json", folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_takes_the_images_of_the_folder(tmp_path, folder, capsys):
    _json(folder)
    assert main(["prepare", str(folder), str(tmp_path / "out"), "--format", "paper"]) == 0
    out = capsys.readouterr().out
    assert "12 of 12 records written" in out and "science: 2 from 2 sources" in out
    assert main(["prepare", str(folder), str(tmp_path / "more"), "--format", "paper", "--sample", "6"]) == 65
    assert "--sample does not go with --format paper" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "out")]) == 0 and "categories" in capsys.readouterr().out
