"""A training run as a user has it: stopped, killed, resumed, started twice, fed with bad numbers."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import jax
import numpy as np
import pytest
from sinks_for_tests import Wandb, points

from lsg_jax.checkpoint import RunFolder, read_step
from lsg_jax.config import DataConfig, GateConfig, SinkConfig, TrainConfig
from lsg_jax.data.pipeline import TrainingData
from lsg_jax.errors import BusyError, ConfigError, InputError, NonFiniteError, Preempted
from lsg_jax.run_config import RunConfig
from lsg_jax.sharding import place_rows
from lsg_jax.train.loop import METRICS, _loop, set_up, train
from lsg_jax.types import VisualInput

STEPS = 9


@pytest.fixture(scope="module")
def config(tiny_model, records, tmp_path_factory):
    """Nine steps of two examples, a save every second step."""
    return RunConfig(
        model=str(tiny_model),
        output=str(tmp_path_factory.mktemp("runs") / "whole"),
        tables={"gate": GateConfig(layers=(1, 3))},
        sinks=SinkConfig(criterion="norm", vit_tau=10.0),
        data=DataConfig(records=str(records), max_length=256, max_answer_tokens=8),
        train=TrainConfig(batch_size=2, epochs=2, max_steps=STEPS, learning_rate=0.05, save_every=2),
    )


def losses(folder):
    lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))  # each step once, in order
    return [float(line["loss"]).hex() for line in lines]


@pytest.fixture(scope="module")
def whole(config):
    """The run that nobody interrupts."""
    return train(config)


def test_training_changes_the_gates_and_the_loss(whole):
    values = [float.fromhex(text) for text in losses(whole)]
    assert len(values) == STEPS and np.isfinite(values).all()
    lines = [json.loads(line) for line in (whole / METRICS).read_text().splitlines()]
    assert lines[0]["ratios"] == [[0.5, 0.5], [0.5, 0.5]]
    assert abs(lines[-1]["ratios"][0][0] - 0.5) > 0.05
    assert all(len(line["gate_grad_norm"]) == 2 for line in lines)


def test_resumed_in_the_same_process_equals_the_whole_run_and_compiles_nothing(config, whole, tmp_path):
    part = replace(config, output=str(tmp_path / "run"))
    run = RunFolder(part.output)
    with run.lock():
        trainer = set_up(part, run)
        trainer.step(trainer.state, trainer.vlm.frozen, place_rows(next(trainer.data), trainer.vlm.mesh, 2))
        compiled = trainer.step._cache_size()
    assert compiled == 1  # for all batches of the whole run too
    stops = iter([False] * 4 + [True])
    with run.lock():
        first = set_up(part, run)
        with pytest.raises(Exception, match=f"stopped at step 5 of {STEPS}"):
            _loop(first, lambda: next(stops), None)
    train(part)
    assert losses(run.path) == losses(whole)
    assert trainer.step is first.step and first.step._cache_size() == compiled
    (_, ours, _), (_, reference, _) = read_step(run.path), read_step(whole)
    jax.tree.map(np.testing.assert_array_equal, ours, reference)


def test_backbone_is_bit_identical_and_only_gates_have_optimiser_state(config, tmp_path):
    part = replace(config, output=str(tmp_path / "run"))
    run = RunFolder(part.output)
    with run.lock():
        trainer = set_up(part, run)
        before = jax.tree.map(np.array, trainer.vlm.frozen)
        gates = jax.tree.map(np.array, trainer.state.trained)
        _loop(trainer, lambda: False, None)
    assert int(trainer.state.step) == STEPS
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a.view(np.uint8), np.array(b).view(np.uint8)), before, trainer.vlm.frozen
    )
    assert all(
        (np.asarray(now) != then).any()
        for now, then in zip(jax.tree.leaves(trainer.state.trained), jax.tree.leaves(gates), strict=True)
    )
    slots = [leaf.shape for leaf in jax.tree.leaves(trainer.state.opt_state) if leaf.ndim]
    assert sorted(slots) == sorted(2 * [leaf.shape for leaf in jax.tree.leaves(gates)])  # two moments a gate leaf, no more


def toml(config, output):
    """The configuration as a user writes it."""
    return f"""
model = "{config.model}"
output = "{output}"
[gate]
layers = [1, 3]
[sinks]
criterion = "norm"
vit_tau = 10.0
[data]
records = "{config.data.records}"
max_length = 256
max_answer_tokens = 8
[train]
batch_size = 2
epochs = 2
max_steps = {STEPS}
learning_rate = 0.05
save_every = 2
"""


def start(path):
    command = [sys.executable, "-m", "lsg_jax", "train", str(path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)


def wait_for_steps(process, folder, count):
    deadline = time.monotonic() + 180
    while not (folder / METRICS).exists() or (folder / METRICS).read_text().count("\n") < count:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("stop, code", [(signal.SIGTERM, 75), (signal.SIGKILL, -signal.SIGKILL)])
def test_stopped_and_resumed_equals_the_whole_run(config, whole, tmp_path, stop, code):
    file, folder = tmp_path / "run.toml", tmp_path / "run"
    file.write_text(toml(config, folder))
    process = start(file)
    wait_for_steps(process, folder, 3)
    process.send_signal(stop)
    stderr = process.communicate(timeout=120)[1]
    assert process.returncode == code
    if stop == signal.SIGTERM:
        assert f"of {STEPS}, saved; run the same command to go on" in stderr.splitlines()[-1]
    assert len((folder / METRICS).read_text().splitlines()) < STEPS
    process = start(file)
    output, stderr = process.communicate(timeout=240)
    assert process.returncode == 0 and output.strip() == str(folder), stderr
    assert "resuming" in stderr
    assert losses(folder) == losses(whole)


def test_finished_run_is_left_alone(config, whole):
    before = {path: path.stat().st_mtime_ns for path in (whole / "checkpoints").rglob("*")}
    assert train(config) == whole
    assert {path: path.stat().st_mtime_ns for path in (whole / "checkpoints").rglob("*")} == before


def test_folder_in_use_is_refused(config, whole):
    with RunFolder(config.output).lock(), pytest.raises(BusyError, match=f"in use by (process|pid) {os.getpid()}"):
        train(config)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"seed": 1}, "seed"),
        ({"tables": {"gate": GateConfig(layers=(1,))}}, "gate.layers"),
        ({"sinks": SinkConfig(criterion="norm", vit_tau=11.0)}, "sinks.vit_tau"),
    ],
)
def test_run_of_another_meaning_is_not_continued(config, whole, change, named):
    with pytest.raises(ConfigError, match=named):
        train(replace(config, **change))


def test_run_may_go_on_with_other_bookkeeping(config, whole):
    train(replace(config, train=replace(config.train, save_every=3, log_every=2)))


@pytest.mark.parametrize(
    ("tau", "grouping", "said"),
    [
        (1e6, "v_sink_rest", "no V-sinks in steps 1 to 2 by norm at 1e\\+06, so there is nothing to gate; `lsg calibrate`"),
        (0.0, "v_sink_rest", "100 % of the visual tokens of steps 1 to 2 are V-sinks by norm at 0: the threshold is impl"),
        (1e6, "l_sink_rest", None),
    ],
)
def test_gates_that_see_no_or_too_many_v_sinks_are_warned_of_once(config, tmp_path, caplog, tau, grouping, said):
    sinks = SinkConfig(criterion="norm", vit_tau=tau, llm_criterion="norm")
    gate = GateConfig(layers=(1,), grouping=grouping, independent=grouping == "v_sink_rest" and tau > 0)
    few = replace(config, output=str(tmp_path / "run"), tables={"gate": gate}, sinks=sinks)
    train(replace(few, train=replace(few.train, max_steps=2)))
    lines = [json.loads(line) for line in (tmp_path / "run" / METRICS).read_text().splitlines()]
    assert all(line["v_sinks"] == (0 if tau else line["visual_tokens"]) and line["visual_tokens"] == 98 for line in lines)
    warnings = [entry.getMessage() for entry in caplog.records if "V-sinks" in entry.getMessage()]
    assert len(warnings) == (said is not None) and all(re.search(said, line) for line in warnings)


def test_bad_settings_are_refused_before_anything_is_written(config, tmp_path):
    out = str(tmp_path / "run")
    for change, message in [
        ({"tables": {"gate": GateConfig(layers=(99,))}}, "layer 99 does not exist, the model has layers 0 to 5"),
        ({"tables": {"gate": GateConfig(layers=())}}, "gate.layers is empty"),
        ({"tables": {"gate": GateConfig(layers=(3, 1))}}, "must ascend"),
        ({"sinks": SinkConfig()}, "no V-sink dimensions are known"),
        ({"train": replace(config.train, batch_size=64)}, "64"),
    ]:
        with pytest.raises((ConfigError, InputError), match=message):
            train(replace(config, output=out, **change))
        assert not (tmp_path / "run" / "run.json").exists()


def test_parts_of_a_batch_must_fill_the_devices(config, tmp_path, monkeypatch):
    monkeypatch.setattr("lsg_jax.sharding.batch_rows", lambda mesh: 2)
    part = replace(config, output=str(tmp_path / "run"), train=replace(config.train, accumulate=2))
    with pytest.raises(ConfigError, match=r"the 2 devices along data and fsdp times train\.accumulate 2"):
        train(part)


def test_bad_numbers_are_skipped_and_then_abort(config, tmp_path, monkeypatch):
    draw, drawn = TrainingData.__next__, []

    def poisoned(self):
        batch = draw(self)
        drawn.append(batch.row_id.tolist())
        patches = batch.images.patches.astype(np.float32)
        return batch.replace(images=VisualInput(np.full_like(patches, np.nan) if len(drawn) > 2 else patches))

    monkeypatch.setattr(TrainingData, "__next__", poisoned)
    part = replace(config, output=str(tmp_path / "run"), train=replace(config.train, max_skipped=3))
    with pytest.raises(
        NonFiniteError, match=r"step 5: loss or gradient is not finite, records (.*); 3 steps in a row"
    ) as error:
        train(part)
    assert len(drawn) == 6 and f"records {drawn[4]};" in str(error.value)  # the sixth was under way already
    lines = [json.loads(line) for line in (tmp_path / "run" / METRICS).read_text().splitlines()]
    assert [line["finite"] for line in lines] == [True] * 2 + [False] * 3
    assert lines[3]["loss"] is None  # NaN is no JSON
    (_, good, _), (last, after, _) = read_step(part.output, 2), read_step(part.output)
    jax.tree.map(np.testing.assert_array_equal, good["trained"], after["trained"])
    assert last == 4 and after["skipped"] == 2


def test_a_step_is_looked_at_when_the_next_one_is_under_way(config, whole, tmp_path):
    part, happened = replace(config, output=str(tmp_path / "run")), []
    run = RunFolder(part.output)
    with run.lock():
        trainer = set_up(part, run)
        step, save = trainer.step, trainer.run.save
        trainer.step = lambda *arguments: happened.append("start") or step(*arguments)
        trainer.run.save = lambda number, *rest, **meta: happened.append(f"save {number}") or save(number, *rest, **meta)
        _loop(trainer, lambda: False, lambda number, total, metrics: happened.append(f"told {number}"))
    expected = []
    for last in range(2, STEPS, 2):
        expected += ["start", "start", f"told {last - 1}", f"told {last}", f"save {last}"]
    assert happened == [*expected, "start", f"told {STEPS}", f"save {STEPS}"]
    assert losses(run.path) == losses(whole)


def test_a_record_that_cannot_be_read_does_not_hide_the_step_before(config, tmp_path, monkeypatch):
    draw, count = TrainingData.__next__, iter(range(100))

    def failing(self):
        if next(count) == 3:
            raise InputError("row 7: cannot be read")
        return draw(self)

    monkeypatch.setattr(TrainingData, "__next__", failing)
    part = replace(config, output=str(tmp_path / "run"))
    with pytest.raises(InputError, match="row 7"):
        train(part)
    assert len(losses(tmp_path / "run")) == 3


def watched(config, folder):
    """The same with everything that looks at a run."""
    return replace(config, output=str(folder), train=replace(config.train, tensorboard=True, wandb="sinks", profile=(4, 5)))


def test_a_run_is_told_once_however_often_it_is_started(config, whole, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", wandb := Wandb())
    part, began = watched(config, tmp_path / "run"), time.monotonic()
    run, stops = RunFolder(part.output), iter([False] * 4 + [True])
    with run.lock():
        with pytest.raises(Preempted):
            _loop(set_up(part, run), lambda: next(stops), None)
        with pytest.raises(InputError, match="told wrong"):
            _loop(set_up(part, run), lambda: False, fail_at(7))
    train(part)
    elapsed = time.monotonic() - began

    assert losses(run.path) == losses(whole)
    lines = [json.loads(line) for line in (run.path / METRICS).read_text().splitlines()]
    shown = points(run.path / "tensorboard")
    assert list(shown) == list(range(1, STEPS + 1))
    for line in lines:
        assert shown[line["step"]]["ratios/layer3/rest"] == np.float32(line["ratios"][1][1])
        assert shown[line["step"]]["loss"] == np.float32(line["loss"])
    assert [list(told.told) for told in wandb.runs] == [[1, 2, 3, 4, 5], [6, 7], [7, 8, 9]]
    assert len({told.settings["id"] for told in wandb.runs}) == 1
    assert len(list((run.path / "profile").rglob("*.xplane.pb"))) == 1
    assert [start["from_step"] for start in run.read_json("run.json")["starts"]] == [0, 5, 6]

    own, earlier = [line for line in lines if line["step"] > 6], [line for line in lines if line["step"] < 6]
    for told in (own, earlier):
        goodput = told[-1]["goodput"]
        share = goodput.pop("share")
        assert min(goodput.values()) >= 0 and min(goodput[part] for part in ("init", "compile", "step", "save")) > 0
        assert 0 < share < 1 and sum(goodput.values()) < elapsed
        assert sum(line["step_s"] for line in told) == pytest.approx(goodput["data"] + goodput["step"])
        assert sum(line["data_wait_s"] for line in told) == pytest.approx(goodput["data"])
    for line in lines:
        assert line["answer_tokens_per_s"] * line["step_s"] == pytest.approx(line["tokens"])
        assert line["positions_per_s"] * line["step_s"] == pytest.approx(2 * 256)


def fail_at(step):
    def on_step(number, total, metrics):
        if number == step:
            raise InputError("told wrong")

    return on_step


def test_no_failure_of_what_looks_at_a_run_stops_it(config, whole, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", Wandb(log=3))
    run, told = tmp_path / "run", []
    (run / METRICS).mkdir(parents=True)
    for name in ("tensorboard", "profile"):
        (run / name).write_text("a file where a folder should be")
    train(watched(config, run), on_step=lambda step, total, metrics: told.append(step))
    assert told == list(range(1, STEPS + 1))
    (_, ours, _), (_, reference, _) = read_step(run), read_step(whole)
    jax.tree.map(np.testing.assert_array_equal, ours, reference)
    warnings = [entry.getMessage() for entry in caplog.records if entry.levelname == "WARNING"]
    about = [
        "metrics.jsonl: metrics are",
        "TensorBoard: metrics are",
        f"{run}/profile: no trace",
        "Weights & Biases: metrics are",
        "the threshold is implausibly low",
    ]
    assert len(warnings) == 5 and {line for line in about if any(line in given for given in warnings)} == {*about}, warnings
