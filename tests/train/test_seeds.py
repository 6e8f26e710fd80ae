"""Several seeds of a method in one run: what runs of one seed compute, with less work."""

import json
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
from llava_7b import CONFIG, ROWS, TOKENS, abstract_step, alone

import lsg_jax
from lsg_jax.checkpoint import RunFolder, read_run, read_step
from lsg_jax.cli import main
from lsg_jax.config import DataConfig, GateConfig, MeshConfig, SinkConfig, TrainConfig
from lsg_jax.errors import CheckpointError, ConfigError, InputError
from lsg_jax.methods.lora import LoraConfig
from lsg_jax.plan.traced import traced_flops
from lsg_jax.run_config import RunConfig
from lsg_jax.sharding import make_mesh
from lsg_jax.train.loop import METRICS, train
from lsg_jax.train.seeds import seed_runs, together
from lsg_jax.train.step import compiled_step

STEPS, SEEDS = 4, (7, 8, 9)


@pytest.fixture(scope="module")
def config(tiny_model, records, tmp_path_factory):
    """Four steps; gradients are clipped to Adam's epsilon, where rounding moves no weight as far as a gradient does."""
    return RunConfig(
        model=str(tiny_model),
        output=str(tmp_path_factory.mktemp("runs") / "seeds"),
        seed=SEEDS[0],
        tables={"gate": GateConfig(layers=(2, 4))},
        sinks=SinkConfig(criterion="norm", vit_tau=10.0),
        data=DataConfig(records=str(records), max_length=256, max_answer_tokens=8),
        train=TrainConfig(
            batch_size=2, epochs=2, max_steps=STEPS, learning_rate=0.01, clip_norm=1e-6, save_every=2, keep=1, seeds=len(SEEDS)
        ),
    )


@pytest.fixture(scope="module")
def whole(config):
    """The run of all seeds that nobody interrupts."""
    return train(config)


def metrics(folder):
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def folders(run):
    return [run / f"seed{seed}" for seed in SEEDS]


def test_each_seed_is_what_a_run_of_it_alone_gives(config, whole, tmp_path):
    runs = seed_runs(config)
    assert list(runs) == list(SEEDS) and [run.data.order for run in runs.values()] == [SEEDS[0]] * len(SEEDS)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    kernels = []
    for run, folder in zip(runs.values(), folders(whole), strict=True):
        alone = train(replace(run, output=str(tmp_path / folder.name)))
        ours, expected = read_run(folder), read_run(alone)
        assert replace(ours, config=ours.config | {"output": ""}, starts=()) == replace(
            expected, config=expected.config | {"output": ""}, starts=()
        )
        for line, own in zip(metrics(folder), metrics(alone), strict=True):
            assert line.keys() == own.keys()
            for name in ("loss", "grad_norm", "ratios", "gate_norm", "tokens", "correct", "finite", "learning_rate"):
                close(line[name], own[name])
        (_, ours, meta), (_, reference, other) = read_step(folder), read_step(alone)
        assert meta == other
        jax.tree.map(close, ours, reference)
        kernels.append(ours["trained"]["fc1_kernel"])
    assert np.abs(kernels[0] - kernels[1]).max() > 0.01
    assert abs(metrics(folder)[-1]["ratios"][0][0] - 0.5) > 0.01


@pytest.mark.parametrize("method", [pytest.param("lora", marks=pytest.mark.soak), "independent gates"])
def test_so_is_each_seed_of_other_methods(config, tmp_path, method):
    """Of LoRA by `pytest -m soak`: by default test_bucketed_training trains two seeds of it."""
    short = replace(config, train=replace(config.train, seeds=2, max_steps=2), output=str(tmp_path / "seeds"))
    gates = GateConfig(layers=(2, 5), independent=True)
    short = replace(short.with_settings(LoraConfig(layer=3)), method="lora") if method == "lora" else short.with_settings(gates)
    run = train(short) / "seed8"
    alone = train(replace(seed_runs(short)[8], output=str(tmp_path / "alone")))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, read_step(run)[1], read_step(alone)[1])
    close([line["loss"] for line in metrics(run)], [line["loss"] for line in metrics(alone)])


class Killed(BaseException):
    """Stands for a kill."""


def test_killed_between_the_saves_of_two_seeds_and_resumed_equals_whole(config, whole, tmp_path, monkeypatch):
    part, write = replace(config, output=str(tmp_path / "run")), RunFolder.write

    def killed(folder, step, state, *, meta):
        if (step, folder.path.name) == (STEPS, "seed8"):
            raise Killed
        write(folder, step, state, meta=meta)

    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "write", killed)
        with pytest.raises(Killed):
            train(part)
    run = tmp_path / "run"
    assert [RunFolder(folder).steps() for folder in folders(run)] == [[2, STEPS], [2], [2]]
    damaged = tmp_path / "damaged"
    shutil.copytree(run, damaged)
    shutil.rmtree(damaged / "seed8" / "checkpoints" / "2")
    with pytest.raises(CheckpointError, match="the seeds hold no saved step in common"):
        train(replace(config, output=str(damaged)))
    train(part)
    for ours, theirs in zip(folders(run), folders(whole), strict=True):
        assert RunFolder(ours).steps() == [STEPS]
        jax.tree.map(np.testing.assert_array_equal, read_step(ours), read_step(theirs))
        assert [start.from_step for start in read_run(ours).starts] == [0, 2]
        assert [line["loss"] for line in metrics(ours)] == [line["loss"] for line in metrics(theirs)]


def test_other_seeds_are_refused_and_one_of_several_is_named(config, whole, capsys, tmp_path):
    seeds = lambda **changed: replace(config, **{"train": replace(config.train, **changed)})
    for changed, message in [
        (seeds(seeds=2), "holds the seeds 7, 8, 9, not 7, 8;"),
        (replace(config, seed=8), "holds the seeds 7, 8, 9, not 8, 9, 10;"),
        (seeds(seeds=1), "holds runs of several seeds"),
        (seeds(learning_rate=0.1), r"seed7: holds a run with another train\.learning_rate"),
        (replace(config, output=str(whole / "seed7")), "holds a run of one seed"),
    ]:
        with pytest.raises(ConfigError, match=message):
            train(changed)
    with pytest.raises(ConfigError, match="end at 4294967296, above 4294967295"):
        replace(config, seed=2**32 - 2)
    with pytest.raises(InputError, match=r"holds the seeds 7, 8, 9, each a run of its own: name one, as .*seeds/seed7"):
        lsg_jax.load(config.model, whole)
    file = tmp_path / "gates.safetensors"
    assert main(["gates", "export", str(whole), str(file)]) == 65
    assert main(["gates", "export", str(whole / "seed8"), str(file)]) == 0
    assert main(["verify", str(whole)]) == 0
    capsys.readouterr()
    assert main(["inspect", str(whole), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["seeds"] == list(SEEDS) and found["seed 9"]["saved steps"] == [STEPS]


def test_which_seeds_share_an_order_and_their_passes(config):
    def orders(**changed):
        runs = replace(config, **changed)
        return together(runs), [(run.seed, run.order_seed) for run in seed_runs(runs).values()]

    data = lambda order: replace(config.data, order=order)
    own = [(seed, seed) for seed in SEEDS]
    assert orders() == orders(method="lora") == (True, [(seed, 7) for seed in SEEDS])
    assert orders(data=data(3)) == (True, [(seed, 3) for seed in SEEDS])
    assert orders(data=data(-1)) == orders(method="diysink") == orders(method="full") == (False, own)
    assert orders(data=data(3), method="diysink") == (False, [(seed, 3) for seed in SEEDS])
    alone = seed_runs(replace(config, data=data(-1)))[8]
    assert alone == replace(config, seed=8, output=f"{config.output}/seed8", train=replace(config.train, seeds=1))


def test_seeds_one_after_the_other(config, tmp_path):
    """Each is the run of that seed, to the bit; a second start finds them complete."""
    short = replace(config, train=replace(config.train, seeds=2, max_steps=1), data=replace(config.data, order=-1))
    run = train(replace(short, output=str(tmp_path / "run")))
    single = replace(short.train, seeds=1)
    alone = train(replace(short, seed=8, output=str(tmp_path / "alone"), train=single, data=config.data))
    jax.tree.map(np.testing.assert_array_equal, read_step(run / "seed8"), read_step(alone))
    assert metrics(run / "seed7")[0]["loss"] != metrics(run / "seed8")[0]["loss"]
    before = (run / "seed7" / "run.json").read_bytes()
    train(replace(short, output=str(run)))
    assert (run / "seed7" / "run.json").read_bytes() == before


def flops(gate, seeds):
    """FLOPs of a step of LLaVA-1.5-7B."""
    step, (state, frozen, batch) = abstract_step(gate)
    if seeds > 1:
        stacked = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((seeds, *leaf.shape), leaf.dtype), state)
        state = stacked.replace(step=state.step)
    compiled = compiled_step(step.keywords["graphdef"], TrainConfig(seeds=seeds), 100, make_mesh(MeshConfig()))
    return traced_flops(compiled, state, frozen, batch)


def test_the_layers_below_the_gate_run_once_for_all_seeds():
    one, three, text = flops(alone(24), 1), flops(alone(24), 3), CONFIG.text
    forward = 2 * ROWS * TOKENS * (4 * text.hidden_size**2 + 3 * text.hidden_size * text.intermediate_size)
    shared = (3 * one - three) / 2  # of a step of n seeds, which costs shared + n * own
    assert 24 * forward < shared < 29 * forward  # the layers below, their attention, and the vision tower
