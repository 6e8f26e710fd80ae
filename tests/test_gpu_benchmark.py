"""`benchmarks/gpu.py --tiny` runs everywhere: what is measured on a GPU is the same program at another size."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from processes import with_torch

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def gpu():
    spec = importlib.util.spec_from_file_location("gpu", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu"] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gpu"]


def test_every_task_runs_without_a_gpu(gpu):
    found = {(side, task): run(True, 1) for side, tasks in gpu.TASKS.items() for task, run in tasks.items()}
    assert found.pop(("lsg_jax", "attention"))["cudnn"] == "cuDNN is for NVIDIA GPUs, this is a cpu"
    for result in found.values():
        assert result["median_s"] > 0
    for task in ("train", "generate"):
        assert found["lsg_jax", task]["attention"].startswith("plain, since cuDNN is for NVIDIA GPUs")
    assert found["lsg_jax", "train"]["remat"] == "none"


def test_tasks_run_in_processes_and_say_why_they_have_no_result(gpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "TASKS", {"pytorch": {"train": gpu.torch_step}})
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--repeats", "1", "--out", str(tmp_path / "gpu.json")])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("PYTHONPATH", with_torch())
    gpu.main()
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert results == {"train": {"pytorch": {"none": "PyTorch finds no GPU"}}}
    assert capsys.readouterr().out.split() == ["train", "pytorch", "none", "PyTorch", "finds", "no", "GPU"]


def test_it_takes_at_most_ten_minutes(gpu):
    assert sum(gpu.SECONDS[task] for tasks in gpu.TASKS.values() for task in tasks) <= 600
