"""Kept files rot: bits flip, ends are cut, files change places. What is read again is the same, left out, or refused by name.

A kind is a folder that is made once, its files that are damaged, and how it is read. Of a log, damaged lines may be left out.
"""

import contextlib
import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_vlm import gates

from lsg_jax.checkpoint import RunFolder, iter_base, read_manifest, read_run, read_step, read_steps, verify_base
from lsg_jax.checkpoint.manifest import Manifest, write_manifest
from lsg_jax.checkpoint.run_record import RUN, RunRecord
from lsg_jax.checkpoint.step_log import METRICS, step_line
from lsg_jax.checkpoint.writer import BaseWriter, LeafSpec
from lsg_jax.config import SinkConfig
from lsg_jax.data.records import open_records
from lsg_jax.digest import bytes_sha256, file_sha256
from lsg_jax.errors import LsgError
from lsg_jax.eval.answering import Answer
from lsg_jax.eval.answers import AnswerLog
from lsg_jax.eval.benchmark import Item
from lsg_jax.eval.results import (
    BenchmarkResult,
    Estimate,
    EvaluationResult,
    MethodSettings,
    QuestionRow,
    questions_bytes,
    read_questions,
    read_result,
    write_questions,
    write_result,
)
from lsg_jax.gating.portable import read_gates, write_gates
from lsg_jax.inspection import problems
from lsg_jax.json_files import read_sealed, write_sealed
from lsg_jax.train.metrics import JsonLines

ITEMS = [Item(str(i), "?", ("yes",)) for i in range(6)]
PROMPTS = [f"question {i}" for i in range(6)]
ROWS = [QuestionRow(str(i), f"q {i}", "yes", "yes", ("yes",), 1.0, [[0.25, 0.75]], {"kind": "a"}) for i in range(6)]
LEAVES = {"a/kernel": LeafSpec((4, 6), "float32", stacked=True), "b": LeafSpec((5,), "bfloat16"), "c": LeafSpec((), "float32")}


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of kept file.

    Attributes:
        make: writes it into a folder.
        read: everything of it, as plain data.
        log: it may come back with fewer entries; reading it counts or recomputes those.
        verified: `lsg verify` finds what reading it finds.
        alone: each file stands for itself, so two sound ones that change places are two sound ones.
    """

    make: Callable[[Path], None]
    read: Callable[[Path], object]
    log: bool = False
    verified: bool = True
    alone: bool = False


def answers(folder, name="made.base"):
    return AnswerLog(folder / "answers", name, {"weights": 1}, ITEMS, PROMPTS)


def make_answers(folder):
    for name, text in (("made.base", "yes"), ("made.lsg", "no")):
        ratios = None if name == "made.base" else np.array([[0.25, 0.75]], np.float32)
        answers(folder, name).add({i: Answer(f"{text} {i}", ratios) for i in range(6)})


def known(folder):
    found = {name: answers(folder, name).known() for name in ("made.base", "made.lsg")}
    plain = lambda one: [one.text, None if one.ratios is None else one.ratios.tolist()]
    return {(name, i): plain(one) for name, of in found.items() for i, one in of.items()}


def make_evaluation(folder):
    one = {"accuracy": Estimate(50.0, 40.0, 60.0)}
    files = {"base": ROWS, "lsg": [dataclasses.replace(row, output="no", score=0.0) for row in ROWS]}
    rows = {method: bytes_sha256(questions_bytes(of)) for method, of in files.items()}
    made = BenchmarkResult(protocol="paper", questions=6, of=6, methods={"base": one, "lsg": one}, rows=rows)
    methods = {"base": MethodSettings(), "lsg": MethodSettings(gate={"layers": [1]})}
    for method, of in files.items():
        write_questions(folder / f"made.{method}.jsonl", of)
    write_result(folder, EvaluationResult(model="m", backbone="b", methods=methods, settings={}, benchmarks={"made": made}))


def evaluation(folder):
    result = read_result(folder / "result.json")
    rows = result.benchmarks["made"].rows
    return [result, *(read_questions(folder / f"made.{method}.jsonl", rows[method]) for method in result.methods)]


def make_studies(folder):
    for name in ("sweep", "probe"):
        write_sealed(
            folder / f"{name}.json", {"format": f"lsg-{name}-1", "rows": [{"layer": i, "value": i / 3} for i in range(9)]}
        )


def studies(folder):
    return [read_sealed(folder / f"{name}.json") for name in ("sweep", "probe")]


def make_run(folder):
    record = RunRecord({"gate": {"layers": [1]}}, SinkConfig(), "b", "d", 6, "m", versions={}, devices="1 cpu", starts=())
    RunFolder(folder).write_json(RUN, record.as_json())
    with RunFolder(folder).lock() as run:
        for step in (1, 2):
            run.save(
                step, {"trained": {"fc1": np.full((3, 4), step, np.float32), "fc2": np.arange(step, step + 5, dtype=np.int32)}}
            )
    (folder / METRICS).write_text("".join(step_line(record_of(step)) for step in range(1, 7)))


def record_of(step):
    return {"step": step, "loss": 1 / step, "ratios": [[0.5, 0.5], [0.25, 0.75]], "goodput": {"init": 2.0}}


def run(folder):
    plain = lambda tree: {name: array.tobytes() for name, array in tree["trained"].items()}
    return [read_run(folder), *(plain(read_step(folder, step)[1]) for step in (1, 2))]


def make_metrics(folder):
    (folder / METRICS).write_text("".join(step_line(record_of(step)) for step in range(1, 7)))


def metrics(folder):
    """Read, and read after a resume at step 5, which drops step 6 and writes 9."""
    before = read_steps(folder / METRICS)[0]
    log = JsonLines(folder / METRICS, after=5)
    log.write(record_of(9))
    log.close()
    after, damaged = read_steps(folder / METRICS)
    assert not damaged and [record for record in before if record["step"] < 6] == after[:-1] and after[-1] == record_of(9)
    return {record["step"]: record for record in before}


def make_model(folder):
    writer = BaseWriter(folder / "base", LEAVES)
    put_all(writer)
    leaves, files = writer.finish()
    (folder / "hf").mkdir()
    for name in ("tokenizer.json", "chat_template.jinja"):
        (folder / "hf" / name).write_text(f"{name} of this model")
    hf = {path.name: file_sha256(path) for path in (folder / "hf").iterdir()}
    config = read_manifest(make_model.like).config
    write_manifest(folder, Manifest(config, leaves, files, hf=hf))


def put_all(writer):
    rng = np.random.default_rng(0)
    for name, spec in LEAVES.items():
        for offset in spec.offsets():
            writer.put(name, offset, rng.normal(size=spec.block_shape(offset)).astype(spec.numpy_dtype))


def model(folder):
    found = [(name, offset, block.tobytes()) for name, offset, block in iter_base(folder)]
    if wrong := verify_base(folder):
        raise LsgError(f"{folder}: {wrong[0]}")
    return found


def make_conversion(folder):
    """A conversion that was killed after its last block."""
    put_all(BaseWriter(folder / "base", LEAVES))


def conversion(folder):
    writer = BaseWriter(folder / "base", LEAVES)
    put_all(writer)
    return writer.finish()


def make_gates(folder):
    for seed in (0, 1):
        write_gates(folder / f"{seed}.safetensors", gates(width=8, seed=seed))


def portable(folder):
    found = [read_gates(folder / f"{seed}.safetensors") for seed in (0, 1)]
    arrays = lambda one: {name: array.tobytes() for name, array in one.parameters.items()}
    return [(one.gate, one.sinks, one.backbone, arrays(one)) for one in found]


def make_records(folder):
    shutil.copytree(make_records.like, folder, dirs_exist_ok=True)
    (folder / "rejects.jsonl").unlink()  # people alone read it


def rows(folder):
    opened = open_records(folder)
    return [opened.digest, opened.manifest.report, [opened[i] for i in range(len(opened))]]


KINDS = {
    "answers": Kind(make_answers, known, log=True, verified=False),
    "evaluation": Kind(make_evaluation, evaluation),
    "studies": Kind(make_studies, studies, alone=True),
    "run": Kind(make_run, run),
    "metrics": Kind(make_metrics, metrics, log=True, verified=False),
    "model": Kind(make_model, model),
    "conversion": Kind(make_conversion, conversion, verified=False),
    "gates": Kind(make_gates, portable, verified=False, alone=True),
    "records": Kind(make_records, rows),
}
WAYS = ("flip", "flips", "cut", "swap", "lines", "gone", "zeros", "added")


@pytest.fixture(scope="module")
def kept(tiny_model, records, tmp_path_factory):
    """kind -> (its folder, {file: content}, what was written)."""
    make_model.like, make_records.like = tiny_model, records
    made = {}
    for name, kind in KINDS.items():
        folder = tmp_path_factory.mktemp("kept") / name
        folder.mkdir()
        kind.make(folder)
        contents = contents_of(folder)
        made[name] = folder, contents, kind.read(folder)
        restore(folder, contents)
    return made


def contents_of(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "lock"}


def restore(folder, contents):
    for path in contents_of(folder).keys() - contents.keys():
        path.unlink()
    for path, data in contents.items():
        if not path.is_file() or path.read_bytes() != data:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


def damage(contents, way, seed):
    """Damages one file, or swaps two; returns those that differ now."""
    rng = random.Random(seed)
    path = rng.choice(list(contents))
    data = bytearray(contents[path])
    if way == "swap":
        other = rng.choice(list(contents))
        path.write_bytes(contents[other])
        other.write_bytes(data)
        return [each for each in {path, other} if contents[path] != contents[other]]
    if way == "gone":
        path.unlink()
        return [path]
    if way in ("flip", "flips"):
        for _ in range(1 if way == "flip" else rng.randint(2, 20)):
            bit = rng.randrange(max(1, len(data)) * 8)
            data[bit // 8 : bit // 8 + 1] = bytes([(data[bit // 8] if data else 0) ^ 1 << bit % 8])
    elif way == "cut":
        del data[rng.randint(0, len(data)) :]
    elif way == "zeros":  # what a crash of the file system leaves
        start = rng.randint(0, len(data))
        data[start : start + 64] = bytes(len(data[start : start + 64]))
    elif way == "added":
        data += bytes(rng.randrange(256) for _ in range(rng.randint(1, 40)))
    else:
        lines = bytes(data).split(b"\n")
        a, b = rng.randrange(len(lines)), rng.randrange(len(lines))
        lines[a], lines[b] = lines[b], lines[a]
        data = bytearray(b"\n".join(lines))
    path.write_bytes(data)
    return [path] if bytes(data) != contents[path] else []


def check(kept, name, way, seed):
    """Returns the outcome: `same`, `left out` or `refused`."""
    kind, (folder, contents, written) = KINDS[name], kept[name]
    way = "flip" if kind.alone and way == "swap" else way
    try:
        changed = damage(contents, way, seed)
        refused = None
        try:
            found = kind.read(folder)
        except LsgError as error:
            refused = str(error)
            assert "\n" not in refused and str(folder) in refused, refused
        whole = refused is None and found == written
        if refused is None and not whole:
            assert kind.log and found.items() <= written.items(), (name, way, seed, changed)
        if kind.verified and not whole and not (kind.alone and way == "gone"):
            with contextlib.suppress(LsgError):
                assert problems(folder)[0], (name, way, seed, changed)
        return "refused" if refused else "same" if whole else "left out"
    finally:
        restore(folder, contents)


PARQUET = """
import random, sys
from pathlib import Path
import pyarrow, pyarrow.parquet
from lsg_jax.data.parquet import read_rows
from lsg_jax.errors import InputError

folder, first, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
images = [{"bytes": bytes(range(200)), "path": f"{i}.png"} for i in range(40)]
kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
columns = {"id": [str(i) for i in range(40)], "question": ["what?"] * 40, "image": pyarrow.array(images, kind)}
pyarrow.parquet.write_table(pyarrow.table(columns), folder / "sound", row_group_size=20, write_page_checksum=True)
sound, path = (folder / "sound").read_bytes(), folder / "damaged.parquet"
outcomes = {"refused": 0, "read": 0}
for seed in range(first, first + count):
    rng, data = random.Random(seed), bytearray(sound)
    bit = rng.randrange(len(data) * 8)
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data if seed % 4 else data[: rng.randrange(len(data))])
    try:
        rows = read_rows(str(path), needs=["id", "question"], images=["image"])
        for row in rows:
            for image in row.images():
                image.read()
        outcomes["read"] += 1
    except InputError as error:
        assert str(path) in str(error) and "\\n" not in str(error), error
        outcomes["refused"] += 1
print(outcomes)
"""


def read_damaged_parquet(tmp_path, first, count):
    """In a process of its own, which must live. What has no checksum, such as the values of a footer, may read as another."""
    command = [sys.executable, "-c", PARQUET, str(tmp_path), str(first), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_damaged_parquet(tmp_path):
    assert "refused" in read_damaged_parquet(tmp_path, 0, 6)


@pytest.mark.soak
def test_damaged_parquet_long(tmp_path):
    print(read_damaged_parquet(tmp_path, 100, int(os.environ.get("LSG_SOAK_EXAMPLES", "2000")) // 4))


DRAWN = {"name": st.sampled_from(sorted(KINDS)), "way": st.sampled_from(WAYS), "seed": st.integers(0, 2**32)}


@example(name="evaluation", way="lines", seed=964)  # the line of the checksum changes places with one of a table inside
@settings(max_examples=120)
@given(**DRAWN)
def test_rot(kept, name, way, seed):
    check(kept, name, way, seed)


@pytest.mark.soak
@pytest.mark.parametrize("name", sorted(KINDS))
def test_rot_long(kept, name):
    """LSG_SOAK_EXAMPLES damages of each kind, counted; `pytest -s` shows the table."""
    counts = {}
    for number in range(int(os.environ.get("LSG_SOAK_EXAMPLES", "2000"))):
        way = WAYS[number % len(WAYS)]
        outcome = check(kept, name, way, number)
        counts[outcome] = counts.get(outcome, 0) + 1
    print(f"\n{name}: {json.dumps(counts, sort_keys=True)}")
