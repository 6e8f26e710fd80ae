"""What version 0.1.0 wrote is still read: its model folder and records, its half-finished runs, its gate file."""

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

import lsg_jax
from lsg_jax.checkpoint import read_manifest, read_run, verify_base
from lsg_jax.checkpoint.run import RunFolder
from lsg_jax.data.records import open_records
from lsg_jax.run_config import run_config
from lsg_jax.train.loop import METRICS, set_up, train

FIXTURES = Path(__file__).parent / "fixtures" / "v0.1"
EXPECTED = json.loads((FIXTURES / "expected.json").read_text())
"""method -> `losses` of six steps, and `logits` [2, V] under what is trained at step 3."""


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("v0.1")
    with tarfile.open(FIXTURES / "folders.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def question():
    """The input_ids and pixel_values that the logits are of."""
    rng = np.random.default_rng(0)
    ids = np.concatenate([np.full((2, 1), 1), np.full((2, 16), 3), rng.integers(4, 260, (2, 7))], 1)
    return ids, rng.standard_normal((2, 3, 32, 32)).astype(np.float32)


def test_folders_are_whole(work):
    assert read_manifest(work / "model").config.vision.num_patches == 16
    assert verify_base(work / "model") == []
    assert len(open_records(work / "records")) == 12 and open_records(work / "records").changed_files() == []
    for method in EXPECTED:
        run = read_run(work / "runs" / method, backbone=read_manifest(work / "model").digest)
        assert (run.method, run.total_steps, run.starts[0].from_step) == (method, 6, 0)
        assert RunFolder(work / "runs" / method).steps() == [3] and RunFolder(work / "runs" / method).verify() == []


@pytest.mark.parametrize("method", EXPECTED)
def test_what_is_trained_answers_as_it_did(work, method):
    expected = np.array(EXPECTED[method]["logits"])
    logits = lsg_jax.load(work / "model", work / "runs" / method).logits(*question())[:, -1]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    if method == "lsg":
        other = lsg_jax.load(work / "model", work / "gates.safetensors").logits(*question())[:, -1]
        np.testing.assert_array_equal(other, logits)


@pytest.mark.parametrize("method", EXPECTED)
def test_a_run_goes_on(work, tmp_path, monkeypatch, method):
    monkeypatch.chdir(work)  # paths in run.json are relative to it
    shutil.copytree(work / "runs" / method, tmp_path / "run")
    config = run_config({**read_run(tmp_path / "run").config, "output": str(tmp_path / "run")}, where="run.json")
    if method in ("lora", "full"):  # the state is restored; the steps would compile for long and add nothing
        run = RunFolder(tmp_path / "run")
        with run.lock():
            restored = set_up(config, run)
        assert restored.state.step == 3 and restored.data.get_state()["global_next_index"] == 6
        restored.data.close()
        return
    train(config)
    lines = [json.loads(line) for line in (tmp_path / "run" / METRICS).read_text().splitlines()]
    losses = EXPECTED[method]["losses"]
    np.testing.assert_allclose([line["loss"] for line in lines], losses, rtol=1e-5)
    assert [start.from_step for start in read_run(tmp_path / "run").starts] == [0, 3]
