"""What is told of a run: sinks that fail, files that are read back, where the time went, and on what the run was."""

import json
import math
import os
import random
import re
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sinks_for_tests import Wandb, points
from tensorboardX import record_writer

from lsg_jax.checkpoint import Computation, RunFolder
from lsg_jax.checkpoint.run_record import GitRevision
from lsg_jax.checkpoint.step_log import step_line
from lsg_jax.config import GateConfig, MeshConfig, SinkConfig, TrainConfig, to_dict
from lsg_jax.errors import ConfigError
from lsg_jax.run_config import RunConfig
from lsg_jax.sharding import make_mesh
from lsg_jax.train.goodput import PARTS, Goodput, start_of_process
from lsg_jax.train.loop import train
from lsg_jax.train.metrics import METRICS, JsonLines, MetricsLog
from lsg_jax.train.profiler import StepProfiler
from lsg_jax.train.run_record import check_same, git_revision, record_start

BEFORE = time.monotonic()
CONFIG = RunConfig(model="m", output="o", tables={"gate": GateConfig(layers=(1, 10))}, train=TrainConfig(tensorboard=True))
COMPUTATION = Computation(CONFIG.as_dict(), SinkConfig(vit_tau=1.0), "b", "d", 9)


def record(step):
    """Of a step, as the loop gives it."""
    return {
        "step": step,
        "loss": 1 / step,
        "finite": True,
        "gate_norm": [0.5, math.nan],
        "ratios": [[0.5, 0.5], [0.25, 0.75]],
        "goodput": {"init": 2.0},
    }


def names_and_values(step):
    """The same, as TensorBoard and W&B get it."""
    return {
        "loss": np.float32(1 / step),
        "finite": 1.0,
        "gate_norm/layer1": 0.5,
        "ratios/layer1/v_sink": 0.5,
        "ratios/layer1/rest": 0.5,
        "ratios/layer10/v_sink": 0.25,
        "ratios/layer10/rest": 0.75,
        "goodput/init": 2.0,
    }


def steps_told(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_resumed_run_tells_each_step_once(tmp_path):
    for after, last in ((0, 6), (4, 9), (9, 11)):
        with MetricsLog(tmp_path, CONFIG, after=after) as log:
            for step in range(after + 1, last + 1):
                log.write(record(step))
    assert steps_told(tmp_path / METRICS) == list(range(1, 12))
    assert json.loads((tmp_path / METRICS).read_text().splitlines()[0])["gate_norm"] == [0.5, None]  # NaN is no JSON
    assert points(tmp_path / "tensorboard") == {step: names_and_values(step) for step in range(1, 12)}


@pytest.mark.parametrize("broken", [b'{"step": 2, "lo\n', b"[3]\n", b"\xff\n", b"{}\n", b'{"step": 4}\n', b'{"step": true}\n'])
@pytest.mark.parametrize("sealed", [False, True])
def test_a_line_that_is_no_record_is_left_out_and_later_ones_stay(tmp_path, broken, sealed):
    """Logs of earlier versions have no checksums; once read, all lines have one."""
    path = tmp_path / METRICS
    line = step_line if sealed else lambda record: json.dumps(record) + "\n"
    one, three = (line({"step": step}).encode() for step in (1, 3))
    path.write_bytes(one + broken + three + b'{"step": 3, "lo')
    lines = JsonLines(path, after=3)
    lines.write({"step": 9})
    lines.close()
    assert path.read_text() == "".join(step_line({"step": step}) for step in (1, 3, 9))


def test_a_full_disk_costs_lines_but_never_half_a_line(tmp_path, caplog):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    with MetricsLog(tmp_path, replace(CONFIG, train=TrainConfig()), after=0) as log:
        log.write(record(1))
        size = (tmp_path / METRICS).stat().st_size
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2 * size + size // 2, limit[1]))  # room for two lines and a half
            for step in range(2, 6):
                log.write(record(step))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert steps_told(tmp_path / METRICS) == [1, 2]
        log.write(record(6))
    assert steps_told(tmp_path / METRICS) == [1, 2, 6]
    assert [line.partition(" (")[0] for line in caplog.messages] == ["metrics.jsonl: metrics are not written"]


@pytest.fixture
def folder(tmp_path):
    """A run folder with run.json."""
    record_start(RunFolder(tmp_path), COMPUTATION, mesh=make_mesh(MeshConfig()), step=0, dropped={"image_truncated": 2})
    return tmp_path


def test_wandb_goes_on_with_the_same_run(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", wandb := Wandb())
    for after in (0, 2):
        with MetricsLog(folder, replace(CONFIG, train=TrainConfig(wandb="sinks")), after=after) as log:
            log.write(record(after + 1))
    first, second = wandb.runs
    assert first.settings == second.settings and first.ended == second.ended == 1
    assert first.settings["project"] == "sinks" and first.settings["resume"] == "allow" and first.settings["id"]
    assert first.settings["config"] == json.loads(json.dumps(CONFIG.as_dict()))
    assert first.told == {1: pytest.approx(names_and_values(1))} and second.told == {3: pytest.approx(names_and_values(3))}
    assert not (folder / "tensorboard").exists()


@pytest.mark.parametrize(
    "wandb, told",
    [
        (None, r'ModuleNotFoundError: .*wandb.*\); pip install "lsg_jax\[metrics\]"; training goes on'),
        (Wandb(init=0), "ValueError: init failed"),
        (Wandb(log=2), "ValueError: log failed"),
        (Wandb(finish=0), "ValueError: finish failed"),
    ],
)
def test_a_sink_that_fails_is_told_once_and_the_others_go_on(folder, monkeypatch, caplog, wandb, told):
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with MetricsLog(folder, replace(CONFIG, train=TrainConfig(wandb="sinks", tensorboard=True)), after=0) as log:
        for step in (1, 2, 3):
            log.write(record(step))
    assert steps_told(folder / METRICS) == list(points(folder / "tensorboard")) == [1, 2, 3]
    assert len(caplog.messages) == 1 and "\n" not in caplog.text.strip()
    assert caplog.messages[0].startswith("Weights & Biases: metrics are not written (")
    assert re.search(told, caplog.text)


@pytest.mark.parametrize(("sink", "package"), [({"wandb": "sinks"}, "wandb"), ({"tensorboard": True}, "tensorboardX")])
def test_a_sink_that_is_not_installed_is_told_before_anything_is_read(tmp_path, monkeypatch, sink, package):
    monkeypatch.setitem(sys.modules, package, None)
    config = replace(CONFIG, model=str(tmp_path / "none"), output=str(tmp_path / "run"), train=TrainConfig(**sink))
    with pytest.raises(ConfigError, match=rf'{package} is not installed; pip install "lsg_jax\[metrics\]"'):
        train(config)
    assert not (tmp_path / "run").exists()


def test_tensorboard_that_is_missing_or_fails_midway(folder, monkeypatch, caplog):
    write, count = record_writer.RecordWriter.write, iter(range(100))

    def failing(self, data):
        if next(count) == 4:  # the version, START, steps 1 and 2
            raise OSError(28, "No space left on device")
        write(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(record_writer.RecordWriter, "write", failing)
        with MetricsLog(folder, CONFIG, after=0) as log:
            for step in range(1, 6):
                log.write(record(step))
    assert list(points(folder / "tensorboard")) == [1, 2] and next(count) == 5  # it is left alone
    monkeypatch.setitem(sys.modules, "tensorboardX.record_writer", None)
    with MetricsLog(folder, CONFIG, after=5) as log:
        log.write(record(6))
    assert steps_told(folder / METRICS) == [1, 2, 3, 4, 5, 6]
    assert ["No space left on device" in line for line in caplog.messages] == [True, False]


def test_every_second_is_counted_once():
    rng = random.Random(0)
    goodput, moments = Goodput(100.0), [100.0]
    spent = []
    for _ in range(200):
        moments.append(moments[-1] + rng.uniform(-2, 3))  # also moments that have passed already
        spent.append(goodput.until(moments[-1], rng.choice(PARTS)))
    assert min(spent) == 0 and set(goodput.seconds) == set(PARTS) and min(goodput.seconds.values()) > 0
    told = goodput.as_metrics()
    assert sum(spent) == pytest.approx(max(moments) - 100) == pytest.approx(sum(told.values()) - told["share"])
    assert told["share"] * sum(spent) == pytest.approx(told["step"])
    assert Goodput().as_metrics() == dict.fromkeys([*PARTS, "share"], 0.0)
    assert Goodput(0.0).seconds is not goodput.seconds
    known = Goodput(0.0)
    known.until(25.0, "init")
    known.until(100.0, "step")
    assert known.summary() == "100 s: init 25 %, compile 0 %, data 0 %, step 75 %, save 0 %, other 0 %"
    assert start_of_process() < BEFORE


def profiled(folder):
    """Traces of some steps, and two that fail."""
    called = []

    def run(name, steps, made=range(1, 6)):
        with StepProfiler(folder / name, steps, lambda: called.append("settle")) as profiler:
            for step in made:
                profiler.before(step)
                called.append(step)
                jnp.arange(3).block_until_ready()
                profiler.after(step)

    run("none", ())
    assert called == [1, 2, 3, 4, 5] and not (folder / "none").exists()
    called.clear()
    run("some", (2, 3))
    assert called == [1, "settle", 2, 3, "settle", 4, 5]
    run("resumed", (2, 9), made=range(4, 6))  # and it ends before the range does
    run("past", (2, 3), made=range(4, 6))
    for name, traces in {"some": 1, "resumed": 1, "past": 0}.items():
        assert len(list((folder / name).rglob("*.xplane.pb"))) == traces
    (folder / "blocked").write_text("a file")
    run("blocked", (2, 3))
    jax.profiler.start_trace(folder / "other")  # nothing is left open
    try:
        run("second", (2, 3))
    finally:
        jax.profiler.stop_trace()


def test_profiler_traces_its_steps_and_its_failure_stops_nothing(tmp_path):
    """In a process of its own: a trace holds all programs of its process, and one that runs many tests has thousands."""
    command = "import pathlib, sys, test_metrics; test_metrics.profiled(pathlib.Path(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", command, tmp_path], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    warned = [line.split(": no trace of steps: ")[0] for line in done.stderr.splitlines() if ": no trace of steps: " in line]
    assert warned == [f"{tmp_path / name}" for name in ("blocked", "second")]


def git(folder, *arguments):
    identity = ["-c", "user.name=A", "-c", "user.email=a@b"]
    return subprocess.run(
        ["git", "-C", folder, *identity, *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_revision_of_the_checkout_that_tracks_the_package(tmp_path, monkeypatch):
    package, installed = tmp_path / "repo" / "package", tmp_path / "repo" / "site-packages"
    for folder in (package, installed):
        folder.mkdir(parents=True)
        (folder / "module.py").write_text("a = 1\n")
    assert git_revision(package) is None and git_revision(tmp_path / "missing") is None
    git(tmp_path / "repo", "init", "-q")
    assert git_revision(package) is None
    git(package, "add", ".")
    assert git_revision(package) is None  # no commit yet
    git(package, "commit", "-q", "-m", "first")
    head = git(package, "rev-parse", "HEAD")
    assert git_revision(package) == GitRevision(head, dirty=False)
    assert git_revision(installed) is None
    (package / "module.py").write_text("a = 2\n")
    assert git_revision(package) == GitRevision(head, dirty=True)
    monkeypatch.setenv("PATH", "")
    assert git_revision(package) is None


def test_run_json_lists_every_start_and_refuses_another_computation(tmp_path):
    run, mesh = RunFolder(tmp_path / "run"), make_mesh(MeshConfig())
    check_same(run, COMPUTATION)
    for step in (0, 4):
        record_start(run, COMPUTATION, mesh=mesh, step=step, dropped={})
        check_same(run, COMPUTATION)
    found, computed = run.read_json("run.json"), to_dict(COMPUTATION)
    assert found["format"] == "lsg-run-1" and {name: found[name] for name in computed} == computed
    assert found["devices"] == "1 cpu" and found["model_name"] == "m"
    first, second = found["starts"]
    assert (first["from_step"], second["from_step"]) == (0, 4) and first["time"] < second["time"]
    assert first["mesh"] == dict(mesh.shape) and set(first["mesh"].values()) == {1}
    assert (first["process_count"], first["device_count"], first["device_kind"]) == (1, 1, "cpu")
    assert first["versions"] == found["versions"] and first["versions"]["jax"] == jax.__version__
    assert set(first["git"] or {"revision", "dirty"}) == {"revision", "dirty"}
    moved = replace(CONFIG, model="elsewhere", train=replace(CONFIG.train, log_every=7, profile=(1, 2)))
    check_same(run, replace(COMPUTATION, config=moved.as_dict()))
    other = replace(CONFIG.with_settings(replace(CONFIG.gate, width=8)), seed=1)
    with pytest.raises(ConfigError, match=r"holds a run with another gate\.width, seed, backbone; choose another output"):
        check_same(run, replace(COMPUTATION, config=other.as_dict(), backbone="c"))
    longer = replace(CONFIG, train=replace(CONFIG.train, epochs=CONFIG.train.epochs + 1))
    with pytest.raises(ConfigError, match=r"another train\.epochs, .*cannot be made longer: its learning rate falls"):
        check_same(run, replace(COMPUTATION, config=longer.as_dict(), total_steps=COMPUTATION.total_steps + 1))


CACHE = """
import os, pathlib, sys, warnings
import jax, jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache
from lsg_jax.cli.compile_cache import use_compile_cache

warnings.filterwarnings("error", message="Error reading")  # which JAX says of what it cannot read
home = pathlib.Path(sys.argv[1])
def use(**environment):
    os.environ.update(environment)
    jax.config.update("jax_compilation_cache_dir", None)
    found = use_compile_cache()
    compilation_cache.reset_cache()
    jax.clear_caches()
    assert jax.jit(lambda x: jnp.sin(x) + 1)(0.0) == 1
    return found, jax.config.values["jax_compilation_cache_dir"]

folder = home / "lsg_jax" / "compiled"
entries = lambda: {path.name: path.read_bytes() for path in folder.glob("*-cache")}
assert use(XDG_CACHE_HOME=str(home), LSG_COMPILE_CACHE="off") == (None, None) and not folder.exists()
assert use(LSG_COMPILE_CACHE="") == (folder, str(folder))
whole = entries()
assert whole
for damage, index in [
    (lambda data: data[:-1], "[]"),
    (lambda data: b"", "{"),
    (lambda data: bytes(len(data)), "null"),
    (lambda data: data[:100], "{}"),
]:
    use()  # so that all of them are known as sound
    for name, data in whole.items():
        (folder / name).write_bytes(damage(data))
    use()
    healed = entries()
    assert healed.keys() == whole.keys() and all(healed[name] != damage(whole[name]) for name in whole)
    (folder / "checked.json").write_text(index)
    whole = healed
untouched = entries()
use()
assert entries() == untouched
(home / "file").write_text("")
assert use(XDG_CACHE_HOME=str(home / "file")) == (None, None)  # no folder can be made there
jax.config.update("jax_compilation_cache_dir", str(home / "own"))
assert use_compile_cache() is None and jax.config.values["jax_compilation_cache_dir"] == str(home / "own")
"""


def test_damaged_compiled_programs_are_compiled_again(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    subprocess.run([sys.executable, "-c", CACHE, tmp_path], env=environment, check=True, timeout=300)
