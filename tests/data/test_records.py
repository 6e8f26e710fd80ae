import io
import json
import os
import socket
import subprocess
import sys
import threading
from dataclasses import asdict

import numpy as np
import pytest
from PIL import Image

from lsg_jax.data.cambrian import prepare_cambrian
from lsg_jax.data.conversation import Turn
from lsg_jax.data.paper_records import prepare_paper
from lsg_jax.data.records import LAYOUT, open_records, prepare_llava
from lsg_jax.data.sources import AHEAD, in_order
from lsg_jax.errors import ConfigError, InputError


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


@pytest.mark.parametrize("share", [float("nan"), -0.1, 1.1])
@pytest.mark.parametrize("prepare", [prepare_llava, prepare_cambrian, prepare_paper])
def test_the_share_of_bad_records_has_a_range(tmp_path, prepare, share):
    with pytest.raises(InputError, match=r"must lie in \[0, 1\]"):
        prepare(tmp_path / "none.json", tmp_path, tmp_path / "out", max_bad_fraction=share)


def test_rows_round_trip(tmp_path, images):
    (tmp_path / "r.json").write_text(json.dumps(GOOD))
    report = prepare_llava(tmp_path / "r.json", images, tmp_path / "out")
    assert (report.records, report.rows, report.rejected, report.without_image, report.answers) == (4, 4, 0, 1, [2, 1, 1, 1])
    assert report.notes == {"duplicate_id": 1, "image_without_tag": 1}
    rows = open_records(tmp_path / "out")
    assert [rows[i].record_id for i in range(len(rows))] == ["0", "1", "2", "0"]
    assert [rows[i].images for i in range(4)] == [(jpeg(0),), (jpeg(1),), (), (jpeg(0),)]
    assert [rows[i].image_sizes for i in range(4)] == [((40, 30),), ((40, 30),), (), ((40, 30),)]
    assert rows[0].turns == (
        Turn("human", "<image>\nWhat?"), Turn("gpt", "A ball."), Turn("human", "Colour?"), Turn("gpt", "Red."),
    )  # fmt: skip
    assert rows[3].turns == (Turn("human", "<image>\nno tag"), Turn("gpt", "naïve 🔴"))
    assert rows.manifest.format == 4 and rows.manifest.report == report
    with pytest.raises(IndexError):
        rows[4]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """60 records with images of very different sizes, so that threads finish out of order. Every seventh image is missing."""
    folder = tmp_path_factory.mktemp("mixed")
    lines = []
    for i in range(60):
        if i % 7:
            side = 8 if i % 3 else 600
            Image.new("RGB", (side, side), (i, 0, 0)).save(folder / f"{i}.png")
        lines.append(json.dumps(record(str(i), image=f"{i}.png")))
    (folder / "r.jsonl").write_text("\n".join(lines))
    return folder


def test_threads_change_nothing(mixed, tmp_path):
    results = []
    for threads in (1, 2, 7):
        out = tmp_path / str(threads)
        report = prepare_llava(mixed / "r.jsonl", mixed, out, max_bad_fraction=0.2, threads=threads)
        assert report.rejects == {"missing_image": 9} and report.rows == 51
        files = {p.relative_to(out): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}
        results.append((asdict(report), files))
    assert results[0] == results[1] == results[2]
    assert [open_records(tmp_path / "7")[i].record_id for i in range(51)] == [str(i) for i in range(60) if i % 7]
    with pytest.raises(ConfigError, match="0 threads: must be at least 1"):
        prepare_llava(mixed / "r.jsonl", mixed, tmp_path / "0", threads=0)


def test_read_ahead_is_bounded_and_ends_early():
    """At most AHEAD items per thread are read before a result is consumed, and none after the iterator is closed."""
    taken = []
    results = in_order(str, (taken.append(i) or i for i in range(1000)), threads=3)
    for i in range(20):
        assert next(results) == str(i) and len(taken) <= i + 3 * AHEAD
    results.close()
    assert len(taken) <= 20 + 3 * AHEAD
    assert not [t for t in threading.enumerate() if t.name.startswith("ThreadPoolExecutor")]


def test_same_records_give_the_same_content_digest(tmp_path, images):
    texts = [json.dumps(GOOD), "\n".join(map(json.dumps, GOOD)), json.dumps(GOOD[:3])]
    digests = []
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.json").write_text(text)
        digests.append(prepare_llava(tmp_path / f"{number}.json", images, tmp_path / f"o{number}").content_sha256)
    assert digests[0] == digests[1] != digests[2]


def test_wrong_paths(tmp_path, images):
    source = tmp_path / "r.json"
    with pytest.raises(InputError, match="no such file"):
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

    for error in (OSError(28, "No space left on device"), RuntimeError("write() failed: No space left on device; writing x")):

        def full(*args, error=error):
            raise error

        monkeypatch.setattr("tensorflow_datasets.core.SequentialWriter.add_examples", full)
        with pytest.raises(InputError, match=r"out: cannot be written: .*No space left on device"):
            prepare_llava(tmp_path / "r.json", images, tmp_path / "out")
        assert sorted(os.listdir(tmp_path)) == before


def test_only_the_callers_progress_is_shown(tmp_path, images, capfd):
    (tmp_path / "r.json").write_text(json.dumps(GOOD))
    prepare_llava(
        tmp_path / "r.json", images, tmp_path / "out", progress=lambda done, total, what: print(done, file=sys.stderr)
    )
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
    shard.unlink()
    with pytest.raises(InputError, match="missing"):
        open_records(out)
    shard.write_bytes(data[:-1] + b"x")
    with pytest.raises(InputError, match=f"{shard} does not match its sha256; run `lsg prepare` again"):
        open_records(out)
    shard.write_bytes(data)
    assert len(open_records(out)) == 4
    manifest = (out / LAYOUT.manifest).read_text()
    for text, message in [
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object"),
        (manifest.replace('"format": 4', '"format": 9'), "does not fit its checksum"),
    ]:
        (out / LAYOUT.manifest).write_text(text)
        with pytest.raises(InputError, match=message):
            open_records(out)
    with pytest.raises(InputError, match="no prepared records"):
        open_records(tmp_path / "absent")


def test_folder_can_be_moved(tmp_path, images):
    out = prepared(tmp_path, images)
    out.rename(tmp_path / "elsewhere")
    assert open_records(tmp_path / "elsewhere")[1].images == (jpeg(1),)
    for file in (tmp_path / "elsewhere").rglob("*"):
        if file.is_file():
            assert str(tmp_path).encode() not in file.read_bytes()


def test_offline_and_home_untouched(tmp_path, images):
    """In a new process: no connection, no file in the home folder, no TensorFlow, no slow import with the module."""
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
