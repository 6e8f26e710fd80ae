"""SIGTERM and Ctrl-C at any moment, once or more often: 75, one line, no traceback, and the next run completes the work."""

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import COMMANDS
from runs import Runner, contents, differences

from lsg_jax.cli import main


def said_once(said):
    """Whether the last line says that the command was stopped, no other does, and there is no traceback."""
    lines = said.strip().split("\n")
    stops = [line for line in lines if re.match(r"lsg\b.*stopped", line)]
    return "Traceback" not in said and len(stops) == 1 and stops[0] == lines[-1]


def final(found):
    """Without the steps of runs but their last: a stopped run saves one more, and an older one goes."""
    steps = {name: int(name.rsplit("/", 1)[1]) for name in found if re.fullmatch(r"(.*/)?checkpoints/\d+", name)}
    last = {name.rsplit("/", 1)[0]: name for name in sorted(steps, key=steps.__getitem__)}
    return {name: value for name, value in found.items() if name not in steps or name in last.values()}


SAVING = """
import os, signal, time
from lsg_jax.stopping import handle_signals, stop_signals, watch
handle_signals(); watch()
with stop_signals() as stopped:
    os.kill(os.getpid(), signal.SIGINT); os.kill(os.getpid(), signal.SIGTERM)
    while not stopped():
        pass
    time.sleep(0.2)
"""


def test_a_loop_that_saves_says_at_once_that_it_will_stop():
    done = subprocess.run([sys.executable, "-c", SAVING], capture_output=True, text=True)
    assert done.stderr.startswith("lsg: stopping once the step that runs is done and saved\nTraceback")
    assert "Preempted" in done.stderr and done.stderr.count("stopping once") == 1


def check_stops(command, count, server, inputs, tmp_path, seed=0):
    """Sends one to three signals at random moments; returns how each command ended."""
    argv, rng, ends = command.argv(inputs), random.Random(f"{command.name} {seed}"), []

    def fresh(name):
        (tmp_path / name).mkdir()
        return Runner(server, inputs, tmp_path / name, argv)

    first = fresh("reference")
    assert first.run()[0] == 0  # compiles
    expected = final(contents(first.folder))
    shutil.rmtree(first.folder)
    seconds = fresh("reference").run()[2]
    for number in range(count):
        stopped = fresh(f"stopped{number}")
        signals = [rng.choice([signal.SIGTERM, signal.SIGINT]) for _ in range(rng.randint(1, 3))]
        code, said, _ = stopped.run(stop_after=rng.random() * seconds, numbers=signals)
        ends.append(code)
        assert code == 0 or (code == 75 and said_once(said)), (signals, code, said)
        code, said, _ = stopped.run()
        different = differences(final(contents(stopped.folder)), expected)
        left = [path.name for path in server.scratch.iterdir()]
        assert (code == 0 or (command.then_refused and code == 65)) and not different and not left, (
            code,
            said,
            different,
            left,
        )
        shutil.rmtree(stopped.folder)
    return ends


@pytest.mark.parametrize("command", [each for each in COMMANDS if each.name in ("convert", "prepare")], ids=str)
def test_stop_and_run_again(command, server, inputs, tmp_path):
    check_stops(command, 2, server, inputs, tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_stop_and_run_again_long(command, server, inputs, tmp_path):
    ends = check_stops(command, int(os.environ.get("LSG_STOPS", "20")), server, inputs, tmp_path, seed=1)
    print(f"\n{command}: stopped {ends.count(75)} of {len(ends)} times, the others were done", flush=True)


# ------------------------------------------------------------------------------------------------ the first second of a process


def handles(pid, number):
    """Whether a process has installed a handler for a signal."""
    caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())[1]
    return bool(int(caught, 16) >> (number - 1) & 1)


def stopped_while_it_starts(after, numbers):
    """(exit code, stderr) of a command that gets signals `after` seconds after its first line of Python has run."""
    process = subprocess.Popen(
        [sys.executable, "-m", "lsg_jax", "sinks", "none", "--images", "none"], stderr=subprocess.PIPE, text=True
    )
    while not handles(process.pid, signal.SIGTERM):
        time.sleep(0.001)
        assert process.poll() is None
    time.sleep(after)
    for number in numbers:
        process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    return process.returncode, said


@pytest.mark.parametrize(("after", "numbers"), [(0.0, [signal.SIGINT]), (0.1, [signal.SIGTERM]), (0.4, [signal.SIGINT] * 2)])
def test_stop_while_it_imports(after, numbers):
    code, said = stopped_while_it_starts(after, numbers)
    assert code == 75 and said_once(said), (code, said)


def test_stop_within_an_import(tmp_path):
    """jaxlib imports Python modules from C++, which turned a KeyboardInterrupt into an abort, or into an ImportError."""
    (tmp_path / "interrupted.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    body = "try:\n    import interrupted\nexcept BaseException as error:\n    print(repr(error))"
    script = f"import sys\nfrom lsg_jax import stopping\nsys.path.append({str(tmp_path)!r})\nstopping.handle_signals()\n{body}"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 75 and said_once(ended.stderr) and not ended.stdout, ended


@pytest.mark.soak
def test_stop_while_it_imports_long():
    rng, ends = random.Random(0), []
    for _ in range(int(os.environ.get("LSG_STARTS", "50"))):
        numbers = [rng.choice([signal.SIGTERM, signal.SIGINT]) for _ in range(rng.randint(1, 3))]
        code, said = stopped_while_it_starts(after := rng.random() * 2, numbers)
        ends.append(code)
        assert code == 65 or (code == 75 and said_once(said)), (after, numbers, code, said)
    print(f"\nstopped {ends.count(75)} of {len(ends)} starts, the others had ended")


# ---------------------------------------------------------------------------------- a main thread that does not hear of signals

DEAF = {
    "library that drops the exception": "time.sleep(60)",
    "computation": "hashlib.pbkdf2_hmac('sha256', b'x', b'y', 10**9)",
}
SCRIPT = """
import hashlib, sys, time
from lsg_jax import stopping
stopping.GRACE = {grace}
stopping.handle_signals()
stopping.watch()
try:
    print("ready", flush=True)
    {body}
except KeyboardInterrupt:
    pass
{body}
"""


@pytest.mark.parametrize("body", DEAF.values(), ids=DEAF)
@pytest.mark.parametrize(
    ("grace", "numbers"), [(0.2, [signal.SIGTERM]), (1000, [signal.SIGINT] * 3)], ids=["after a while", "third Ctrl-C"]
)
def test_what_does_not_end_is_ended(body, grace, numbers):
    command = [sys.executable, "-c", SCRIPT.format(body=body, grace=grace)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    for number in numbers:
        process.send_signal(number)
        time.sleep(0.05)  # two signals of one kind that come at once are one
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 75 and said_once(said), (process.returncode, said)


def test_an_error_that_a_library_makes_of_a_stop_is_a_stop(monkeypatch, capfd):
    """C++ code may drop what is raised in a Python function that it calls, take that for an answer, and fail over it."""

    def describe(path):
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        raise AttributeError("'Leaf' object has no attribute 'keys'")

    monkeypatch.setattr("lsg_jax.inspection.describe", describe)
    assert main(["inspect", "model"]) == 75
    assert said_once(said := capfd.readouterr().err), said
