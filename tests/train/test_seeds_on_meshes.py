"""Several seeds on meshes of devices and in several processes: what one device computes, also after stops."""

import json
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from processes import run_processes

from lsg_jax.checkpoint import read_run, read_seeds, read_step
from lsg_jax.errors import Preempted
from lsg_jax.run_config import load_run_config
from lsg_jax.train.loop import METRICS, train
from lsg_jax.train.seeds import seed_runs

SEEDS, STEPS = (7, 8), 3
ORDERS = {"shared": "data.order=7", "own": "data.order=-1"}  # of the records


@pytest.fixture(scope="module")
def config(tiny_model, records, tmp_path_factory):
    """Gradients are clipped to Adam's epsilon, where rounding moves no weight as far as a gradient does."""
    path = tmp_path_factory.mktemp("seeds") / "run.toml"
    path.write_text(f"""
model = "{tiny_model}"
output = "{path.parent / "default"}"
seed = {SEEDS[0]}
[gate]
layers = [2, 4]
[sinks]
criterion = "norm"
vit_tau = 19.0
[data]
records = "{records}"
max_length = 256
max_answer_tokens = 8
[train]
batch_size = 8
epochs = 3
max_steps = {STEPS}
learning_rate = 0.01
clip_norm = 1e-6
save_every = 2
seeds = {len(SEEDS)}
""")
    return path


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    """Each seed in a run by itself on one device, in either order."""
    folder = tmp_path_factory.mktemp("alone")
    for name, order in ORDERS.items():
        for run in seed_runs(load_run_config(config, [f"output={folder / name}", order])).values():
            train(run)
    return folder


def metrics(run):
    lines = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return lines


def same_runs(ours, theirs, close=lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)):
    """Losses, gate ratios and the last saved state, gates and optimiser, of two run folders."""
    for line, other in zip(metrics(ours), metrics(theirs), strict=True):
        for name in ("loss", "grad_norm", "ratios", "gate_norm", "tokens", "correct"):
            close(line[name], other[name])
    (step, state, meta), (_, other, their_meta) = read_step(ours), read_step(theirs)
    assert step == STEPS and meta == their_meta
    jax.tree.map(close, state, other)


ON_EIGHT = """
import sys
import jax
from lsg_jax.run_config import load_run_config
from lsg_jax.train.loop import train

assert jax.device_count() == 8
config, out, shared, own = sys.argv[1:]
for name, order, sizes in [("shared", shared, (2, 2, 2)), ("own", own, (1, 8, 1))]:
    mesh = [f"mesh.{axis}={size}" for axis, size in zip(("data", "fsdp", "tensor"), sizes)]
    train(load_run_config(config, [f"output={out}/{name}", order, *mesh]))
"""


def test_each_seed_on_a_mesh_is_a_run_on_one_device(config, alone, tmp_path):
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8"
    command = [sys.executable, "-c", ON_EIGHT, str(config), str(tmp_path), *ORDERS.values()]
    done = subprocess.run(command, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for order in ORDERS:
        assert read_seeds(tmp_path / order) == SEEDS
        for seed in SEEDS:
            same_runs(tmp_path / order / f"seed{seed}", alone / order / f"seed{seed}")
    gates = [read_step(tmp_path / "shared" / f"seed{seed}")[1]["trained"]["fc1_kernel"] for seed in SEEDS]
    assert np.abs(gates[0] - gates[1]).max() > 0.01
    assert read_run(tmp_path / "shared" / "seed8").starts[0].mesh == {"data": 2, "fsdp": 2, "tensor": 2}


# One cluster; after whole runs a signal to one process, after which each command stops as soon as it can.
WORKER = """
import shutil, signal, sys
from pathlib import Path
import jax
from lsg_jax.cli import main

assert (jax.process_count(), jax.device_count()) == (2, 4)
config, out, *orders = sys.argv[1:]
shared = orders[0]

def train(folder, order):
    both_need_all_rows = "mesh.fsdp=2", "mesh.tensor=2"
    return main(["train", config, "--set", f"output={out}/{folder}", order, *both_need_all_rows])

assert train("begun", shared) == 0  # on one device
assert train("whole", shared) == 0
if jax.process_index() == 1:
    signal.raise_signal(signal.SIGTERM)
assert all(train(name, order) == 75 for name, order in zip(("shared", "own"), orders))
codes = [train("resumed", shared)]
if jax.process_index() == 0:  # as a kill between the saves of two seeds leaves them
    newest = max(Path(out, "resumed", "seed8", "checkpoints").iterdir(), key=lambda step: int(step.name))
    shutil.rmtree(newest)
while codes[-1] == 75:
    codes.append(train("resumed", shared))
assert len(codes) > 2 and codes[-1] == 0, codes
"""


@pytest.mark.parametrize("long", [False, pytest.param(True, marks=pytest.mark.soak)], ids=["short", "long"])
def test_two_processes_train_seeds_as_one(config, alone, tmp_path, long):
    """Seeds that share the order of records; `pytest -m soak` has those with their own too, which a mesh has above."""
    orders = ORDERS if long else {"shared": ORDERS["shared"]}

    def stop(step, total, metrics):
        signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Preempted):
        train(load_run_config(config, [f"output={tmp_path / 'begun'}", ORDERS["shared"]]), on_step=stop)
    run_processes(WORKER, 2, devices_each=2, args=[config, tmp_path, *orders.values()], timeout=400)
    for name, order in orders.items():  # what both processes left is trained on in one, on one device
        assert read_seeds(tmp_path / name) == SEEDS
        assert not all((tmp_path / name / f"seed{seed}" / "checkpoints" / str(STEPS)).exists() for seed in SEEDS)
        train(load_run_config(config, [f"output={tmp_path / name}", order]))
    for seed in (f"seed{seed}" for seed in SEEDS):
        same_runs(tmp_path / "resumed" / seed, tmp_path / "whole" / seed, np.testing.assert_array_equal)
        for folder in ("whole", "begun", *orders):
            same_runs(tmp_path / folder / seed, alone / ("own" if folder == "own" else "shared") / seed)
    for folder, counts in {"begun": [1, 2], "shared": [2, 1]}.items():
        assert [start.process_count for start in read_run(tmp_path / folder / "seed8").starts] == counts
