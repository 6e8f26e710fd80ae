"""Training on batches of several lengths: few programs, the gates of rows of full length, exact resume."""

import json
import logging
import re
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from lsg_jax.checkpoint import RunFolder, read_step
from lsg_jax.config import DataConfig, GateConfig, SinkConfig, TrainConfig
from lsg_jax.data.pipeline import TrainingData
from lsg_jax.data.records import prepare_llava
from lsg_jax.errors import ConfigError, Preempted
from lsg_jax.methods.lora import LoraConfig
from lsg_jax.run_config import RunConfig
from lsg_jax.train.loop import METRICS, _loop, set_up, train

STEPS = 5


@pytest.fixture(scope="module")
def config(tiny_model, scenes, tmp_path_factory):
    """Questions of two sizes; gradients clipped to Adam's epsilon, where rounding moves no weight as far as a gradient does."""
    folder, records = tmp_path_factory.mktemp("buckets"), []
    for i in range(12):
        human, gpt = "<image>\n" + "Which colour is it? " * (1, 6)[i % 4 == 0], f"colour {i}"
        turns = [{"from": "human", "value": human}, {"from": "gpt", "value": gpt}]
        records.append({"id": str(i), "image": f"images/{i}.png", "conversations": turns})
    (folder / "r.json").write_text(json.dumps(records))
    prepare_llava(folder / "r.json", scenes, folder / "records")
    return RunConfig(
        model=str(tiny_model),
        output=str(folder / "whole"),
        tables={"gate": GateConfig(layers=(1, 3))},
        sinks=SinkConfig(criterion="norm", vit_tau=10.0),
        data=DataConfig(records=str(folder / "records"), max_length=400, max_answer_tokens=12, buckets=3),
        train=TrainConfig(
            batch_size=2,
            epochs=2,
            max_steps=STEPS,
            learning_rate=0.05,
            clip_norm=1e-6,
            save_every=2,
            remat="auto",
            accumulate=2,
        ),
    )


@pytest.fixture(scope="module")
def whole(config):
    """The run that nobody interrupts: its folder, and what was logged."""
    messages, handler = [], logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    loggers = [logging.getLogger(name) for name in ("jax", "lsg_jax")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel("INFO")
    with jax.log_compiles():
        folder = train(config)
    for logger, level in zip(loggers, before, strict=True):
        logger.removeHandler(handler)
        logger.setLevel(level)
    return SimpleNamespace(folder=folder, messages=messages)


def metrics(folder):
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


@pytest.fixture
def padded(monkeypatch):
    """The same batches, each row padded to `max_length`."""
    arranged = TrainingData._in_buckets

    def long(data, *args):
        place, data.lengths = arranged(data, *args), (data._data.max_length,)
        return lambda batch, row: (place(batch, row)[0], data._data.max_length)

    return lambda: monkeypatch.setattr(TrainingData, "_in_buckets", long)


def same(ours, theirs):
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, read_step(ours)[1]["trained"], read_step(theirs)[1]["trained"])
    for line, long in zip(metrics(ours), metrics(theirs), strict=True):
        for name in ("tokens", "correct", "visual_tokens", "v_sinks", "finite", "learning_rate"):
            assert line[name] == long[name]
        for name in {"loss", "grad_norm", "ratios"} & line.keys():
            close(line[name], long[name])
        assert line["padding"] < long["padding"]


def test_gates_are_those_of_rows_of_full_length(config, whole, padded, tmp_path):
    padded()
    full = train(replace(config, output=str(tmp_path / "full")))
    same(whole.folder, full)
    lines, long = metrics(whole.folder), metrics(full)
    positions = [round(line["positions_per_s"] * line["step_s"]) for line in lines]
    assert len({*positions}) > 1 and {round(line["positions_per_s"] * line["step_s"]) for line in long} == {2 * 400}
    for line, count, other in zip(lines, positions, long, strict=True):  # the same tokens that are no padding
        assert count * (1 - line["padding"]) == pytest.approx(800 * (1 - other["padding"]), abs=0.01)
    assert np.mean([line["padding"] for line in lines]) < 0.1 < 0.3 < np.mean([line["padding"] for line in long])


@pytest.mark.parametrize("method", ["independent gates", "LoRA, two seeds, whole conversations"])
def test_so_are_other_methods(config, padded, tmp_path, method):
    short = replace(config, output=str(tmp_path / "run"), train=replace(config.train, accumulate=1, remat="full", max_steps=2))
    short = replace(short, data=replace(short.data, buckets=2))
    if method == "independent gates":
        short = short.with_settings(GateConfig(layers=(2, 5), independent=True))
    else:
        short = replace(short.with_settings(LoraConfig(layer=3)), method="lora", train=replace(short.train, seeds=2))
        short = replace(short, data=replace(short.data, conversations="whole"))
    ours = train(short)
    padded()
    full = train(replace(short, output=str(tmp_path / "full")))
    one = "." if short.train.seeds == 1 else "seed1"
    same(ours / one, full / one)


def test_a_program_for_each_length_is_compiled_before_the_first_step(config, whole):
    said = whole.messages
    compiled = [message for message in said if "Compiling jit(step)" in message]
    lengths = [max(map(int, re.findall(r"int32\[\d+,(\d+)\]", message))) for message in compiled]  # of tokens, and of answers
    assert len(lengths) > 1 and lengths == sorted(lengths, reverse=True)  # the longest first, for its memory
    assert any(f"{len(lengths)} lengths: {', '.join(map(str, reversed(lengths)))}; " in message for message in said)


def test_a_finished_run_compiles_nothing(config, whole, monkeypatch):
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda *_, **__: pytest.fail("compiled"))
    assert train(config) == whole.folder


@pytest.mark.parametrize("stop", range(1, STEPS))
def test_stopped_and_resumed_equals_whole_and_compiles_nothing(config, whole, tmp_path, stop, caplog):
    part = replace(config, output=str(tmp_path / "run"))
    run, stops = RunFolder(part.output), iter([False] * (stop - 1) + [True])
    with jax.log_compiles():
        with run.lock(), pytest.raises(Preempted):
            _loop(set_up(part, run), lambda: next(stops), None)
        train(part)
    assert not any("Compiling jit(step)" in message for message in caplog.messages)
    jax.tree.map(np.testing.assert_array_equal, read_step(run.path)[1], read_step(whole.folder)[1])
    assert [line["loss"] for line in metrics(run.path)] == [line["loss"] for line in metrics(whole.folder)]


def test_other_buckets_are_another_run(config, whole):
    with pytest.raises(ConfigError, match=r"holds a run with another data\.buckets; choose another output, or undo"):
        train(replace(config, data=replace(config.data, buckets=2)))
