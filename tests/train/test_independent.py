"""Gates of several layers in one run: what separate runs compute, with less work; and how they are loaded, one by one."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

import lsg_jax
from lsg_jax.checkpoint import RunFolder, read_step
from lsg_jax.cli import main
from lsg_jax.config import DataConfig, GateConfig, SinkConfig, TrainConfig
from lsg_jax.data.pipeline import TrainingData
from lsg_jax.errors import ConfigError, InputError, NonFiniteError, Preempted
from lsg_jax.gating.portable import check_together, combine_gates, read_gates, write_gates
from lsg_jax.opening import open_gates
from lsg_jax.run_config import RunConfig, load_run_config
from lsg_jax.train.loop import METRICS, _loop, set_up, train

STEPS, LAYERS = 5, (0, 2, 5)


@pytest.fixture(scope="module")
def config(tiny_model, records, tmp_path_factory):
    """Five steps of two examples, with so small a bound on the gradients that clipping acts.

    It brings them down to Adam's epsilon: above it a gradient that is zero but for rounding moves a weight as far as any other,
    and then two programs that add in another order differ.
    """
    return RunConfig(
        model=str(tiny_model),
        output=str(tmp_path_factory.mktemp("runs") / "each"),
        tables={"gate": GateConfig(layers=LAYERS, independent=True)},
        sinks=SinkConfig(criterion="norm", vit_tau=10.0),
        data=DataConfig(records=str(records), max_length=256, max_answer_tokens=8),
        train=TrainConfig(
            batch_size=2,
            epochs=2,
            max_steps=STEPS,
            learning_rate=0.05,
            weight_decay=0.1,
            clip_norm=1e-6,
            max_skipped=2,
            save_every=2,
        ),
    )


@pytest.fixture(scope="module")
def each(config):
    """The run of all gates that nobody interrupts."""
    return train(config)


def metrics(folder):
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


@pytest.mark.parametrize("slot", [pytest.param(0, marks=pytest.mark.soak), 2])  # test_step has those below the top
def test_each_gate_is_what_a_run_of_its_own_gives(config, each, tmp_path, slot):
    alone = train(replace(config.with_settings(GateConfig(layers=(LAYERS[slot],))), output=str(tmp_path / "alone")))
    together, own = metrics(each), metrics(alone)
    assert len(together) == len(own) == STEPS
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    for line, expected in zip(together, own, strict=True):
        for name in ("loss", "grad_norm"):
            close(line[name][slot], expected[name])
        for name in ("ratios", "gate_norm", "gate_grad_norm"):
            close(line[name][slot], expected[name][0])
        assert (line["correct"][slot], line["finite"][slot]) == (expected["correct"], expected["finite"])
        assert (line["tokens"], line["learning_rate"]) == (expected["tokens"], expected["learning_rate"])
    assert own[0]["grad_norm"] > config.train.clip_norm and abs(own[-1]["ratios"][0][0] - 0.5) > 0.01
    (_, ours, _), (_, reference, _) = read_step(each), read_step(alone)
    jax.tree.map(lambda a, b: close(a[slot], b[0]), ours["trained"], reference["trained"])


def test_stopped_and_resumed_equals_whole_in_one_program_and_one_pass_over_the_data(config, each, tmp_path, monkeypatch):
    draw, drawn = TrainingData.__next__, []
    monkeypatch.setattr(TrainingData, "__next__", lambda data: drawn.append(draw(data)) or drawn[-1])
    part = replace(config, output=str(tmp_path / "run"))
    run, stops = RunFolder(part.output), iter([False, False, True])
    with run.lock():
        first = set_up(part, run)
        backbone = jax.tree.map(np.array, first.vlm.frozen)
        with pytest.raises(Preempted, match=f"stopped at step 3 of {STEPS}"):
            _loop(first, lambda: next(stops), None)
        second = set_up(part, run)
        _loop(second, lambda: False, None)
    assert len(drawn) == STEPS and second.step is first.step and first.step._cache_size() == 1
    (_, ours, _), (_, whole, _) = read_step(run.path), read_step(each)
    jax.tree.map(np.testing.assert_array_equal, ours, whole)
    assert [line["loss"] for line in metrics(run.path)] == [line["loss"] for line in metrics(each)]
    jax.tree.map(np.testing.assert_array_equal, backbone, second.vlm.frozen)
    gates = [leaf.shape for leaf in jax.tree.leaves(second.state.trained)]
    counters = {(len(LAYERS),)}  # each gate counts its own steps
    slots = [leaf.shape for leaf in jax.tree.leaves(second.state.opt_state) if leaf.shape not in counters]
    assert sorted(slots) == sorted(2 * gates)


def spoil(trainer, slots):
    """Gates whose forward pass overflows, though they are finite themselves."""
    scale = np.array(trainer.state.trained["norm_scale"])
    scale[slots] = 3e38
    scale = jax.device_put(scale, trainer.state.trained["norm_scale"].sharding)
    trainer.state = trainer.state.replace(trained=trainer.state.trained | {"norm_scale": scale})


def test_a_gate_that_fails_leaves_the_others_alone(config, each, tmp_path, caplog):
    part = replace(config, output=str(tmp_path / "run"))
    run = RunFolder(part.output)
    with run.lock():
        trainer = set_up(part, run)
        spoil(trainer, [1])
        before = jax.tree.map(np.array, trainer.state)
        _loop(trainer, lambda: False, None)
    lines, sound = metrics(run.path), metrics(each)
    assert [line["finite"] for line in lines] == [[True, False, True]] * STEPS
    assert all(line["loss"][1] is None for line in lines)  # NaN is no JSON
    assert [line["loss"][::2] for line in lines] == [line["loss"][::2] for line in sound]
    assert f"step {STEPS}: loss or gradient at layers [2] is not finite, records [" in caplog.text
    (_, ours, _), (_, whole, _) = read_step(run.path), read_step(each)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[::2], b[::2]), ours["trained"], whole["trained"])
    after = trainer.state
    for tree in ("trained", "opt_state"):
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[1], b[1]), getattr(after, tree), getattr(before, tree))
    assert after.skipped.tolist() == [0, STEPS, 0]


def test_a_run_of_which_every_gate_fails_is_aborted(config, tmp_path):
    part = replace(config, output=str(tmp_path / "run"))
    run = RunFolder(part.output)
    message = r"step 2: loss or gradient at layers \[0, 2, 5\] is not finite, records \[\d+, \d+\]; 2 steps in a row"
    with run.lock():
        trainer = set_up(part, run)
        spoil(trainer, [0, 1, 2])
        with pytest.raises(NonFiniteError, match=message):
            _loop(trainer, lambda: False, None)


def test_gates_are_loaded_by_layer(config, each, tmp_path, capsys):
    stored = read_step(each)[1]["trained"]
    vlm = lsg_jax.load(config.model, f"{each}@2")
    assert vlm.gate == GateConfig(layers=(2,))
    jax.tree.map(lambda ours, all_: np.testing.assert_array_equal(ours, all_[1:2]), vlm.trained, stored)
    stack = open_gates(f"{each}@5,0", backbone=vlm.digest)
    assert stack.gate == GateConfig(layers=(0, 5))
    jax.tree.map(lambda ours, all_: np.testing.assert_array_equal(ours, all_[[0, 2]]), stack.parameters, stored)

    one, both = tmp_path / "one.safetensors", tmp_path / "both@1.safetensors"
    assert main(["gates", "export", f"{each}@2", str(one)]) == 0
    assert main(["gates", "combine", f"{each}@0", str(one), f"{each}@5", str(both)]) == 0
    jax.tree.map(np.testing.assert_array_equal, read_gates(both).parameters, stored)
    assert open_gates(both).gate.layers == LAYERS and open_gates(f"{both}@5").gate.layers == (5,)
    assert main(["gates", "export", str(each), str(tmp_path / "all.safetensors")]) == 65
    assert (
        "the 3 gates, at layers 0 to 5, were trained each alone and are no stack until layers are chosen: RUN@0 for one of"
        in (capsys.readouterr().err)
    )
    unchosen = open_gates(each)
    assert unchosen.gate.independent
    for refused in (
        lambda: lsg_jax.load(config.model, each),
        lambda: combine_gates([unchosen, stack]),
        lambda: write_gates(tmp_path / "all.safetensors", unchosen),
    ):
        with pytest.raises(InputError, match="trained each alone"):
            refused()
    assert not (tmp_path / "all.safetensors").exists()
    check_together(replace(unchosen, gate=GateConfig(layers=(2,), independent=True)))  # one gate needs no choice
    for source, message in [
        (f"{each}@1", r"each: no gate at layer 1; there are 0, 2, 5"),
        (f"{each}@two", r"after @ come layers, for example .*each@10 or .*each@3,6,7"),
        (f"{tmp_path}/none@2", "none: no such run folder or gate file"),
    ]:
        with pytest.raises(InputError, match=message):
            open_gates(source)


def test_each_in_a_configuration(config, tmp_path):
    file = tmp_path / "c.toml"
    file.write_text('model = "m"\noutput = "o"\n[gate]\nlayers = "each"\nwidth = 8\n')
    read = lambda *overrides: load_run_config(file, overrides).gate
    assert read() == GateConfig(independent=True, width=8)
    assert read("gate.layers=[3, 10]") == GateConfig(layers=(3, 10), width=8)
    assert read("gate.layers=[3]", "gate.independent=true") == GateConfig(layers=(3,), independent=True, width=8)
    assert read("gate.layers=[3]", "gate.layers=each") == read()
    with pytest.raises(ConfigError, match='layers = "each" trains independent gates'):
        read("gate.independent=false")
    with pytest.raises(ConfigError, match=r"gate\.layers: expected a list, got 'all'"):
        read("gate.layers=all")
    assert read().for_depth(4).layers == (0, 1, 2, 3) and GateConfig().for_depth(4).layers == ()
    run = RunFolder(tmp_path / "run")
    with run.lock():
        trainer = set_up(replace(config.with_settings(GateConfig(independent=True)), output=str(run.path)), run)
    assert run.read_json("run.json")["config"]["gate"]["layers"] == [0, 1, 2, 3, 4, 5]
    kernel = np.asarray(trainer.state.trained["fc1_kernel"])
    assert kernel.shape[0] == 6 and (kernel == kernel[:1]).all()
