"""Several processes through the command line compute what one does, also after a stop, a kill and a change of their number."""

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from processes import free_address, run_processes, start_commands

from lsg_jax.cli import main
from lsg_jax.errors import Preempted
from lsg_jax.run_config import load_run_config
from lsg_jax.train.loop import train

HEARTBEAT = 10
STEPS = 400  # more than any run here takes; they end by a signal
SAVE_EVERY = 5


@pytest.fixture
def config(tiny_model, records, scenes, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(f"""
model = "{tiny_model}"
output = "{tmp_path / "default"}"
[gate]
layers = [3]
[sinks]
criterion = "norm"
vit_tau = 19.0
[data]
records = "{records}"
max_length = 256
max_answer_tokens = 8
[train]
batch_size = 4
epochs = 200
max_steps = {STEPS}
learning_rate = 0.005
save_every = {SAVE_EVERY}
[eval]
max_new_tokens = 4
batch_size = 1
limit = 6
[eval.benchmarks]
made = "{scenes / "questions.jsonl"}"
""")
    return path


def losses(folder):
    """Losses of all logged steps, each once and in order."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def saved(folder):
    return max(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdecimal())


@contextlib.contextmanager
def training(config, folder, devices_each):
    """`lsg train` in two processes."""
    command = ["train", config, "--set", f"output={folder}"]
    processes = start_commands([command] * 2, devices_each=devices_each, heartbeat=HEARTBEAT)
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def wait_for_step(processes, folder, step):
    log, deadline = folder / "metrics.jsonl", time.monotonic() + 240
    while not log.exists() or log.read_text().count("\n") < step:
        for process in processes:
            assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def kill(victim, processes):
    """kill -9; the others must end soon, with an error."""
    victim.kill()
    deadline = time.monotonic() + HEARTBEAT + 15
    for process in processes:
        assert process.wait(max(0.0, deadline - time.monotonic())) != 0


def test_stopped_on_two_devices_killed_on_four_and_resumed_on_one(config, tmp_path):
    folder = tmp_path / "run"
    with training(config, folder, devices_each=1) as processes:
        wait_for_step(processes, folder, 1)
        processes[1].send_signal(signal.SIGTERM)
        ends = [process.communicate(timeout=240)[1] for process in processes]
        assert [process.returncode for process in processes] == [75, 75], ends
    stop = saved(folder)
    assert all(f"stopped at step {stop} of {STEPS}, saved" in end.splitlines()[-1] for end in ends)
    assert len(losses(folder)) == stop

    with training(config, folder, devices_each=2) as processes:
        wait_for_step(processes, folder, stop + SAVE_EVERY + 2)
        kill(processes[0], processes)  # the coordinator
    start = saved(folder)
    assert start > stop and start % SAVE_EVERY == 0

    run_alone(config, folder, start + 2)
    run_alone(config, tmp_path / "alone", start + 2)
    np.testing.assert_allclose(losses(folder)[: start + 2], losses(tmp_path / "alone")[: start + 2], rtol=1e-5)


def run_alone(config, folder, steps):
    """Trains in this process and stops itself, at this step or the next one."""

    def stop(step, total, metrics):
        if step == steps:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Preempted):
        train(load_run_config(config, [f"output={folder}"]), on_step=stop)


# One cluster for a whole run and answers; then a signal to one process, after which each command stops as soon as it can.
WORKER = """
import signal, sys
import jax
from lsg_jax.cli import main

assert (jax.process_count(), jax.device_count()) == (2, 4)
config, out = sys.argv[1:]

def train(folder):
    both_need_all_rows = "mesh.fsdp=1", "mesh.tensor=4"
    return main(["train", config, "--set", f"output={out}/{folder}", "train.max_steps=5", *both_need_all_rows])

assert train("whole") == 0
assert main(["eval", config, "--out", f"{out}/eval"]) == 0
if jax.process_index() == 1:
    signal.raise_signal(signal.SIGTERM)
codes = [train("resumed")]
while codes[-1] == 75:
    codes.append(train("resumed"))
assert len(codes) > 2 and codes[-1] == 0, codes
assert main(["sweep", config, "--out", f"{out}/sweep", "--layers", "4", "--coefficients", "0,1"]) == 75
"""


def test_two_processes_train_and_answer_as_one(config, tmp_path, capsys):
    run_processes(WORKER, 2, devices_each=2, args=[config, tmp_path], timeout=300)
    whole, resumed = losses(tmp_path / "whole"), losses(tmp_path / "resumed")
    assert len(whole) == 5 and [x.hex() for x in whole] == [x.hex() for x in resumed]
    train(load_run_config(config, [f"output={tmp_path / 'one'}", "train.max_steps=5"]))
    np.testing.assert_allclose(losses(tmp_path / "one"), whole, rtol=1e-5)

    assert main(["eval", str(config), "--out", str(tmp_path / "eval1")]) == 0
    for name in ("result.json", "made.base.jsonl"):
        two, one = (without_devices((tmp_path / folder / name).read_text()) for folder in ("eval", "eval1"))
        assert two == one

    answered = sum(len(path.read_text().splitlines()) for path in (tmp_path / "sweep/answers").iterdir())
    assert 0 < answered < 12 and not (tmp_path / "sweep/sweep.json").exists()
    sweep = ["sweep", str(config), "--layers", "4", "--coefficients", "0,1"]
    for folder in ("sweep", "sweep1"):
        assert main([*sweep, "--out", str(tmp_path / folder)]) == 0
    two, one = (json.loads((tmp_path / folder / "sweep.json").read_text()) for folder in ("sweep", "sweep1"))
    assert (two["base"], two["rows"]) == (one["base"], one["rows"])
    capsys.readouterr()


def without_devices(text):
    return [line for line in text.splitlines() if not any(name in line for name in ('"devices"', '"self_sha256"'))]


def ended(processes):
    """(exit code, last line of stderr) of each."""
    ends = [process.communicate(timeout=HEARTBEAT + 90)[1] for process in processes]
    return [(process.returncode, end.splitlines()[-1] if end else "") for process, end in zip(processes, ends, strict=True)]


def test_an_error_ends_every_process_with_its_own_code(config, tmp_path):
    """An error of all processes, and of one for which the other waits."""
    missing = tmp_path / "none.toml"
    both = ended(start_commands([["train", missing]] * 2, heartbeat=HEARTBEAT))
    assert all(code == 65 and line.startswith(f"lsg train: {missing}") for code, line in both), both
    one = ended(start_commands([["train", config], ["train", missing]], heartbeat=HEARTBEAT))
    assert one[1][0] == 65 and one[1][1].startswith(f"lsg train: {missing}") and one[0][0] != 0, one


# A process that only waits for the others.
WAITER = """
import sys
from lsg_jax.distributed import joined
with joined(sys.argv[1], 2, int(sys.argv[2]), heartbeat=int(sys.argv[3])):
    from jax.experimental.multihost_utils import sync_global_devices
    sync_global_devices("first")
    print("both are here", flush=True)
    while int(sys.argv[2]) == 0:
        sync_global_devices("again")
    sys.stdin.read()
"""


def test_the_coordinator_does_not_outlive_a_worker():
    address = free_address()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WAITER, address, str(rank), str(HEARTBEAT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        assert any("both are here" in line for line in processes[1].stdout)
        kill(processes[1], processes)
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_processes_that_do_not_join_are_one_line():
    code = "from lsg_jax.distributed import joined\nwith joined({}, start=2):\n    pass"
    here, nobody = free_address(), free_address()
    cases = {
        f"{here!r}, 2, 0": "--multihost: not all processes came within 2 s: check that all processes run",
        f"{nobody!r}, 2, 1": f"--multihost: the coordinator did not answer at {nobody} (Connection refused) within 2 s",
        "None": "--multihost: no cluster of several processes was found here (coordinator_address should be defined.): give",
    }
    started = [subprocess.Popen([sys.executable, "-c", code.format(case)], stderr=subprocess.PIPE, text=True) for case in cases]
    for process, (case, told) in zip(started, cases.items(), strict=True):
        stderr = process.communicate(timeout=120)[1]
        assert process.returncode == (1 if case == "None" else 65) and f"ConfigError: {told}" in stderr, stderr


def test_wrong_options_are_reported_before_anything_starts(config, capsys):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        for options, told in [
            (["--num-processes", "2"], "--num-processes and --process-id go with --multihost or --coordinator"),
            (["--process-id", "0"], "--num-processes and --process-id go with --multihost or --coordinator"),
            (["--coordinator", "host"], "--coordinator host: it must be HOST:PORT"),
            (
                ["--multihost", "--num-processes", "2", "--process-id", "2"],
                "--process-id 2: with 2 processes it is one of 0 to 1",
            ),
            (["--multihost", "--heartbeat", "0"], "--heartbeat is 0"),
            (
                ["--multihost", "--coordinator", f"localhost:{port}", "--num-processes", "2", "--process-id", "0"],
                f"port {port}: Address already in use; choose another one",
            ),
        ]:
            for command in ("train", "eval", "sweep"):
                assert main([command, str(config), *options]) == 65
                assert told in capsys.readouterr().err
