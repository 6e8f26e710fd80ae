import io
import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from lsg_jax.data.conversation import Turn
from lsg_jax.data.records import MANIFEST, REJECTS, open_records, prepare_llava
from lsg_jax.errors import InputError


def jpeg(seed=0):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(file, "JPEG")
    return file.getvalue()


def record(record_id, *texts, image="coco/a.jpg"):
    turns = [{"from": ("human", "gpt")[i % 2], "value": t} for i, t in enumerate(texts or ("<image>\nWhat?", "A ball."))]
    return {"id": record_id, "conversations": turns, **({"image": image} if image else {})}


@pytest.fixture
def images(tmp_path):
    root = tmp_path / "images"
    (root / "coco").mkdir(parents=True)
    (root / "coco/a.jpg").write_bytes(jpeg(0))
    (root / "coco/b.jpg").write_bytes(jpeg(1))
    return root


GOOD = [
    record("0", "<image>\nWhat?", "A ball.", "Colour?", "Red."),
    record("1", image="coco/b.jpg"),
    record("2", "Hello", "Hi.", image=None),
    record("0", "no tag", "naïve 🔴"),
]


def as_text(kind, records):
    lines = "\n".join(json.dumps(r) for r in records)
    return {
        "array": json.dumps(records),
        "pretty": json.dumps(records, indent=2),
        "lines": lines,
        "lines_crlf": lines.replace("\n", "\r\n") + "\r\n\r\n",
        "array_bom": "\ufeff" + json.dumps(records),
        "lines_bom": "\ufeff" + lines,
    }[kind]


@pytest.mark.parametrize("name", ["records.json", "records.jsonl"])
@pytest.mark.parametrize("kind", ["array", "pretty", "lines", "lines_crlf", "array_bom", "lines_bom"])
def test_rows_round_trip(tmp_path, images, name, kind):
    (tmp_path / name).write_text(as_text(kind, GOOD), encoding="utf-8", newline="")
    report = prepare_llava(tmp_path / name, images, tmp_path / "out")
    assert (report.records, report.rows, report.rejected, report.without_image, report.answers) == (4, 4, 0, 1, [2, 1, 1, 1])
    assert report.notes == {"duplicate_id": 1, "image_without_tag": 1}
    rows = open_records(tmp_path / "out")
    assert [rows[i]["record_id"] for i in range(len(rows))] == ["0", "1", "2", "0"]
    assert [rows[i]["image"] for i in range(4)] == [jpeg(0), jpeg(1), b"", jpeg(0)]
    assert rows[0]["turns"] == [
        Turn("human", "<image>\nWhat?"), Turn("gpt", "A ball."), Turn("human", "Colour?"), Turn("gpt", "Red."),
    ]  # fmt: skip
    assert rows[3]["turns"] == [Turn("human", "<image>\nno tag"), Turn("gpt", "naïve 🔴")]
    with pytest.raises(IndexError):
        rows[4]


def test_same_records_give_the_same_content_digest(tmp_path, images):
    digests = []
    for number, kind in enumerate(["array", "lines"]):
        (tmp_path / f"{kind}.json").write_text(as_text(kind, GOOD))
        digests.append(prepare_llava(tmp_path / f"{kind}.json", images, tmp_path / f"o{number}").content_sha256)
    (tmp_path / "other.json").write_text(json.dumps(GOOD[:3]))
    other = prepare_llava(tmp_path / "other.json", images, tmp_path / "o2").content_sha256
    assert digests[0] == digests[1] != other


def test_rejects_are_counted_and_listed(tmp_path, images):
    (images / "coco/broken.jpg").write_bytes(jpeg()[:300])
    (images / "coco/empty.jpg").write_bytes(b"")
    (images / "coco/page.jpg").write_bytes(b"<html>not found</html>")
    (images / "coco/lfs.jpg").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    bad = [
        (record("x0", image="coco/A.JPG"), "missing_image", "did you mean coco/a.jpg?"),
        (record("x1", image="COCO/b.jpg"), "missing_image", "did you mean coco/b.jpg?"),
        (record("x2", image="coco/a.png"), "missing_image", "did you mean coco/a.jpg?"),
        (record("x3", image="coco/zzz.jpg"), "missing_image", "coco/zzz.jpg: no such image"),
        (record("x4", image="coco"), "missing_image", "no such image"),
        (record("x5", image="../images/coco/a.jpg"), "image_outside", "out of the image folder"),
        (record("x6", image=str(images / "coco/a.jpg")), "image_outside", "out of the image folder"),
        (record("x7", image="coco/broken.jpg"), "broken_image", "coco/broken.jpg: broken image file"),
        (record("x8", image="coco/empty.jpg"), "broken_image", "empty"),
        (record("x9", image="coco/page.jpg"), "broken_image", "HTML"),
        (record("x10", image="coco/lfs.jpg"), "broken_image", "Git LFS"),
        (record("x11", "<image>\nq", ""), "empty_answer", "turn 1"),
        (record("x12", "<image>\nq", "a", image=None), "tag_without_image", "no image"),
        ("text", "not_a_record", "str"),
    ]
    records = [GOOD[0], *(r for r, _, _ in bad), GOOD[1]]
    broken = json.dumps(GOOD[0])[:-20]
    (tmp_path / "r.jsonl").write_text(as_text("lines", records) + "\n" + broken)
    report = prepare_llava(tmp_path / "r.jsonl", images, tmp_path / "out", max_bad_fraction=0.95)
    assert (report.records, report.rows, report.rejected) == (17, 2, 15)
    assert report.rejects == {
        "missing_image": 5, "broken_image": 4, "image_outside": 2, "empty_answer": 1, "tag_without_image": 1, "not_a_record": 1,
        "bad_json": 1,
    }  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "out" / REJECTS).read_text().splitlines()]
    assert [line["line"] for line in lines] == [*range(2, 16), 17]
    for line, (raw, reason, message) in zip(lines, bad, strict=False):
        assert line["reason"] == reason and message in line["message"]
        assert line["id"] == (raw["id"] if isinstance(raw, dict) else None)
    assert lines[-1]["reason"] == "bad_json" and "line 17" in lines[-1]["message"]
    assert [open_records(tmp_path / "out")[i]["record_id"] for i in range(2)] == ["0", "1"]
    assert json.loads((tmp_path / "out" / MANIFEST).read_text())["rejects"] == report.rejects


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        (" \n", "is empty"),
        ("id,image\n", "neither a JSON array nor JSONL"),
        ("version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (json.dumps(GOOD, indent=1)[:-30], r"broken JSON array at line \d\d"),
        ("[]", "no usable record"),
        ("[" * 100_000, "nested too deeply|broken JSON"),
        (json.dumps([*GOOD, record("x", image="coco/zzz.jpg")]), r"1 of 5 records are bad.*1 missing_image; first at line 5"),
        (as_text("lines", GOOD) + '\n{"id": ', r"1 of 5 records are bad.*bad_json; first at line 5"),
    ],
)
def test_nothing_is_left_behind_on_failure(tmp_path, images, text, message):
    (tmp_path / "r.json").write_text(text)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(InputError, match=message) as caught:
        prepare_llava(tmp_path / "r.json", images, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == before


def test_wrong_paths(tmp_path, images):
    source = tmp_path / "r.json"
    with pytest.raises(InputError, match="no such file"):
        prepare_llava(source, images, tmp_path / "out")
    source.write_bytes(b'[{"id": "\xff"}]')
    with pytest.raises(InputError, match="not UTF-8"):
        prepare_llava(source, images, tmp_path / "out")
    source.write_text(json.dumps(GOOD))
    with pytest.raises(InputError, match="no such image folder"):
        prepare_llava(source, tmp_path / "absent", tmp_path / "out")
    with pytest.raises(InputError, match="not empty"):
        prepare_llava(source, images, images)
    assert (images / "coco/a.jpg").exists()
    with pytest.raises(InputError, match="cannot be written"):
        prepare_llava(source, images, source / "out")
    (tmp_path / "out").mkdir()
    prepare_llava(source, images, tmp_path / "out")  # an empty folder is fine


def test_full_disk_leaves_nothing(tmp_path, images, monkeypatch):
    (tmp_path / "r.json").write_text(json.dumps(GOOD))
    before = sorted(os.listdir(tmp_path))

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lsg_jax.data.records._write_tfds", full)
    with pytest.raises(InputError, match="out: cannot be written: No space left on device"):
        prepare_llava(tmp_path / "r.json", images, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == before


def test_only_the_callers_progress_is_shown(tmp_path, images, capfd):
    (tmp_path / "r.json").write_text(json.dumps(GOOD))
    prepare_llava(tmp_path / "r.json", images, tmp_path / "out", progress=lambda n: print(n, file=sys.stderr))
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err.split() == ["1", "2", "3", "4"]


def prepared(tmp_path, images):
    (tmp_path / "r.json").write_text(json.dumps(GOOD))
    prepare_llava(tmp_path / "r.json", images, tmp_path / "out")
    return tmp_path / "out"


def test_damaged_folder_is_refused(tmp_path, images):
    out = prepared(tmp_path, images)
    (shard,) = out.glob("llava_records/1.0.0/*array_record*")
    data = shard.read_bytes()
    for damage, message in [
        (lambda: shard.write_bytes(data[:1000]), "truncated or changed"),
        (lambda: shard.unlink(), "missing"),
        (lambda: shard.write_bytes(bytes(len(data))), "cannot be opened|rows, but|damaged"),
    ]:
        damage()
        with pytest.raises(InputError, match=message):
            rows = open_records(out)
            rows[0]
    shard.write_bytes(data)
    assert len(open_records(out)) == 4
    manifest = (out / MANIFEST).read_text()
    for text, message in [("{", "damaged"), ("[]", "damaged"), (manifest.replace('"format": 1', '"format": 9'), "format 9")]:
        (out / MANIFEST).write_text(text)
        with pytest.raises(InputError, match=message):
            open_records(out)
    with pytest.raises(InputError, match="no prepared records"):
        open_records(tmp_path / "absent")


def test_folder_can_be_moved(tmp_path, images):
    out = prepared(tmp_path, images)
    out.rename(tmp_path / "elsewhere")
    assert open_records(tmp_path / "elsewhere")[1]["image"] == jpeg(1)
    for file in (tmp_path / "elsewhere").rglob("*"):
        if file.is_file():
            assert str(tmp_path).encode() not in file.read_bytes()


def test_offline_and_home_untouched(tmp_path, images):
    """In a fresh process: no connection, nothing in the home folder, no TensorFlow, no slow import with the module."""
    (tmp_path / "r.json").write_text(json.dumps(GOOD))
    (tmp_path / "home").mkdir()
    script = f"""
import socket, sys
def refuse(*args, **kwargs): raise RuntimeError("network")
socket.socket.connect = socket.getaddrinfo = refuse
from lsg_jax.data.records import open_records, prepare_llava
assert "tensorflow_datasets" not in sys.modules
prepare_llava({str(tmp_path / "r.json")!r}, {str(images)!r}, {str(tmp_path / "out")!r})
assert len(open_records({str(tmp_path / "out")!r})) == 4
assert "tensorflow" not in sys.modules
"""
    assert socket.socket.connect  # only the child is cut off
    environment = {**os.environ, "HOME": str(tmp_path / "home"), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert not list((tmp_path / "home").rglob("*"))
