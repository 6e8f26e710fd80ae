"""Shared settings and fixtures. Tests run on CPU, without a network, on tiny models that are made here."""

import gc
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
# nearly all the time of a tiny model is its compilation
os.environ["XLA_FLAGS"] = " ".join(
    ["--xla_backend_optimization_level=0", "--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
)
os.environ["HF_HUB_OFFLINE"] = "1"
# one cache of compiled programs for all workers and for the processes that tests start, for the length of this run
OWN_CACHE = None
if "LSG_TEST_CACHE" not in os.environ:
    OWN_CACHE = os.environ["LSG_TEST_CACHE"] = tempfile.mkdtemp(prefix="lsg-jax-tests-")
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ["LSG_TEST_CACHE"]
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
gc.set_threshold(100_000)  # tracing makes millions of short-lived objects, among all those that many tests leave in caches
sys.path.insert(0, str(Path(__file__).parent))
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers themselves are started with this environment too, and need PyTorch
    hidden = str(Path(__file__).parent / "without_torch")
    os.environ["PYTHONPATH"] = os.pathsep.join([hidden, *filter(None, [os.environ.get("PYTHONPATH")])])


def pytest_unconfigure():
    if OWN_CACHE is not None:
        shutil.rmtree(OWN_CACHE, ignore_errors=True)


@pytest.fixture(scope="session")
def tiny_hf_folder(tmp_path_factory):
    """A tiny random LLaVA in Hugging Face format."""
    from converters.tiny_checkpoint import write_tiny_checkpoint

    folder = tmp_path_factory.mktemp("hf") / "tiny-llava"
    write_tiny_checkpoint(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tiny_hf_folder, tmp_path_factory):
    """The same, converted. Read-only: tests that damage it copy it first."""
    from converters.convert import convert

    folder = tmp_path_factory.mktemp("models") / "tiny"
    convert(tiny_hf_folder, folder)
    return folder


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """Twelve drawn scenes with short questions: questions.jsonl for evaluation, llava.jsonl for training, images/."""
    from PIL import Image

    from lsg_jax.data.drawing import draw
    from lsg_jax.data.scene_questions import KINDS, scene_question

    folder = tmp_path_factory.mktemp("scenes")
    (folder / "images").mkdir()
    questions, records = [], []
    for index in range(12):
        kind = ("count", "smallest_colour")[index % 2]
        asked = scene_question("train", index * len(KINDS) + list(KINDS).index(kind))
        image = f"images/{index}.png"
        Image.fromarray(draw(asked.scene, side=64)).save(folder / image)
        common = {"id": str(index), "image": image}
        if kind == "count":
            row = {"question": "How many?", "answer": asked.answer, "category": "count"}
        else:
            row = {"question": "Colour?", "choices": asked.choices, "answer": asked.answer, "category": "colour"}
        turns = [{"from": "human", "value": f"<image>\n{row['question']}"}, {"from": "gpt", "value": row["answer"]}]
        questions.append(common | row)
        records.append(common | {"conversations": turns})
    for name, rows in {"questions": questions, "llava": records}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def records(scenes, tmp_path_factory):
    """The scenes as prepared training records."""
    from lsg_jax.data.records import prepare_llava

    folder = tmp_path_factory.mktemp("records") / "scenes"
    prepare_llava(scenes / "llava.jsonl", scenes, folder)
    return folder


@pytest.fixture
def no_process_that_reads_first(monkeypatch):
    """Parquet files are read in this process alone: what ends a process is tested in tests/faults, and small files are many."""
    monkeypatch.setattr("lsg_jax.data.parquet.fatal_file", lambda paths: None)


@pytest.fixture(autouse=True)
def no_lines_of_slow_machines(monkeypatch):
    """Progress and compilations are not told: what a command prints would depend on how busy the machine is.

    The tests of these lines set their own seconds.
    """
    monkeypatch.setattr("lsg_jax.cli.options.SECONDS_TO_FIRST_LINE", 1e9)
    monkeypatch.setattr("lsg_jax.cli.compiling.SLOW", 1e9)
