"""The greedy stack: the rule against a literal implementation, and a study with known gains, interrupted and resumed."""

import json
import os
import random
import signal
from dataclasses import replace

import numpy as np
import pytest
from scripted import script_answers

import lsg_jax
from lsg_jax.analysis.scores import Selection, selection
from lsg_jax.analysis.stack import StackConfig, first_best, greedy_stacks, open_singles, stack_name, stack_study
from lsg_jax.checkpoint import read_manifest
from lsg_jax.cli import main
from lsg_jax.config import DataConfig, EvalConfig, GateConfig, MeshConfig, SinkConfig, TrainConfig
from lsg_jax.errors import ConfigError, InputError, Preempted
from lsg_jax.eval.benchmark import LOWER, Benchmark, Item, Match, mean
from lsg_jax.eval.results import BenchmarkResult, Estimate, EvaluationResult
from lsg_jax.eval.runner import ask, evaluate
from lsg_jax.gating.portable import PortableGates, combine_gates, read_gates, write_gates
from lsg_jax.json_files import read_sealed
from lsg_jax.opening import load_backbone, with_gates
from lsg_jax.run_config import RunConfig
from lsg_jax.sharding import make_mesh

SINKS = SinkConfig(criterion="norm", vit_tau=10.0)


def made_gates(layers, seed=0, width=64, **settings):
    """Gates far from their initial values, which change the answers of the tiny model."""
    rng = np.random.default_rng(seed)
    n, inner = len(layers), 64
    shapes = {
        "norm_scale": (n, width),
        "norm_bias": (n, width),
        "fc1_kernel": (n, width, inner),
        "fc1_bias": (n, inner),
        "fc2_kernel": (n, inner, 2),
        "fc2_bias": (n, 2),
    }
    parameters = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    gate = GateConfig(layers=tuple(layers), **settings)
    return PortableGates(gate=gate, sinks=SINKS, parameters=parameters)


# ------------------------------------------------------------------------------------------------------------------- the rule


def read_literally(gains, max_gates):
    """The rule literally: take the best remaining gate, of equal ones that of the lowest layer, until there are enough."""
    left, stack, tried = sorted(gains), [], []
    while left and len(stack) < max_gates:
        best = left[0]
        for layer in left[1:]:
            if gains[layer] > gains[best]:
                best = layer
        left.remove(best)
        stack = [*stack, best]
        tried.append(stack)
    return tried


def test_greedy_stacks_are_those_of_the_rule():
    rng = random.Random(0)
    for _ in range(300):
        layers = rng.sample(range(32), rng.randint(1, 9))
        exact = {layer: rng.randint(-3, 3) / 4 for layer in layers}  # many ties, and gains below zero
        noisy = {layer: gain + rng.uniform(-1e-12, 1e-12) for layer, gain in exact.items()}
        for max_gates in (1, 3, 40):
            assert greedy_stacks(noisy, max_gates) == read_literally(exact, max_gates)
    assert greedy_stacks({7: 0.5, 3: 0.5, 10: 2.0, 2: -1.0}, 9) == [[10], [10, 3], [10, 3, 7], [10, 3, 7, 2]]


def test_the_best_size_is_the_first_of_equal_ones():
    for changes, index in [([1.0], 0), ([0.1 + 0.2, 0.3, 0.3], 0), ([-1.0, 0.0, 2.0, 2.0, 1.0], 2), ([-2.0, -1.0], 1)]:
        assert first_best(changes) == index


# -------------------------------------------------------------------------------------------------------------- what decides


def made(unit=1.0, **changes):
    """A benchmark of four questions whose metric is the percentage right times `unit`."""
    items = [Item(str(i), "?", ("yes",), fields={"kind": "ab"[i % 2]}) for i in range(4)]
    benchmark = Benchmark(
        name="made",
        read=lambda path: items,
        prompt=lambda item, protocol: "?",
        match=lambda item, output, protocol: Match(output, float(output == "yes")),
        metrics=lambda graded: {"accuracy": unit * mean(graded), "b": mean(graded, graded.where("kind", "b"))},
        official={"paper": "b"},
    )
    return ask(replace(benchmark, **changes), "", EvalConfig())


def scored(**benchmarks):
    """An evaluation whose only other method is L3; each benchmark as (metric, value, change, low, high)."""
    entries = {}
    for name, (metric, value, change, low, high) in benchmarks.items():
        methods, changes = {metric: Estimate(value, None, None)}, {metric: Estimate(change, low, high)}
        scores = {"methods": {"L3": methods}, "change": {"L3": changes}}
        entries[name] = BenchmarkResult(protocol="paper", questions=4, of=4, **scores)
    return EvaluationResult(model=None, backbone="", methods={}, settings={}, benchmarks=entries)


def test_selection_is_the_official_score_else_the_first_metric():
    asked = {"one": made(), "other": made(official={})}
    assert selection(asked, "one") == Selection({"one": "b"})
    both = selection(asked, None)
    assert both.metrics == {"one": "b", "other": "accuracy"}
    assert (both.name, both.metric) == ("mean", "mean of one b and other accuracy")
    with pytest.raises(ConfigError, match="--select two: no such benchmark is given; given are one, other"):
        selection(asked, "two")


def test_a_mean_over_benchmarks_and_its_interval():
    result = scored(one=("b", 40.0, 2.0, -1.0, 5.0), other=("a", 60.0, 4.0, 0.0, 8.0))
    assert Selection({"one": "b"}).score(result, "L3") == {"value": 40.0, "change": 2.0, "low": -1.0, "high": 5.0}
    # bounds 3 and 4 away from their changes: the mean of two independent changes has bounds 5 / 2 away
    score = Selection({"one": "b", "other": "a"}).score(result, "L3")
    assert score == {"value": 50.0, "change": 3.0, "low": pytest.approx(0.5), "high": pytest.approx(5.5)}
    unknown = scored(one=("b", 40.0, 2.0, None, None))
    assert Selection({"one": "b"}).score(unknown, "L3") == {"value": 40.0, "change": 2.0, "low": None, "high": None}
    with pytest.raises(InputError, match="one: b has no value under L3: choose another by --select"):
        Selection({"one": "b"}).score(scored(one=("b", None, None, None, None)), "L3")


def test_what_cannot_decide_is_refused():
    points = made(unit=20.0, official={})
    assert selection({"points": points}, None).metrics == {"points": "accuracy"}  # alone it may be in any unit
    with pytest.raises(InputError, match="points: accuracy is in points up to 2000, a mean with percentages"):
        selection({"one": made(), "points": points}, None)
    errors = made(metrics=lambda graded: {"errors" + LOWER: 100 - mean(graded)}, official={})
    assert selection({"errors": errors}, None).metrics == {"errors": "errors" + LOWER}
    with pytest.raises(InputError, match=r"errors: errors \(lower is better\) is in no mean with metrics that should rise"):
        selection({"one": made(), "errors": errors}, None)
    nothing = made(metrics=lambda graded: {"b": mean(graded, np.zeros(4, bool))})
    with pytest.raises(InputError, match="nothing: b has no value on these questions, so it cannot decide"):
        selection({"nothing": nothing}, "nothing")


# ------------------------------------------------------------------------------------------------------------------ the study

LAYERS = (1, 3, 5)
COUNT = 8
RIGHT = {"base": 2, "L1": 4, "L3": 6, "L5": 4, "L3+L1": 8, "L3+L1+L5": 7, "joint": 5}
"""Number of questions that each method answers correctly in the studies with scripted answers."""


def outputs(folder, method):
    return [json.loads(line)["output"] for line in (folder / f"mine.{method}.jsonl").read_text().splitlines()]


def write_questions(path, scenes, answers):
    rows = [
        {"id": str(i), "image": str(scenes / "images" / f"{i}.png"), "question": "Which?", "answer": accepted}
        for i, accepted in enumerate(answers)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def singles():
    return {layer: made_gates([layer], seed=layer) for layer in LAYERS}


@pytest.fixture(scope="module")
def sources(singles, tmp_path_factory):
    """The gate of layer 1 in a file, those of layers 3 and 5 in another."""
    folder = tmp_path_factory.mktemp("gates")
    write_gates(folder / "one.safetensors", singles[1])
    write_gates(folder / "two.safetensors", combine_gates([singles[5], singles[3]]))
    return [str(folder / name) for name in ("one.safetensors", "two.safetensors")]


@pytest.fixture(scope="module")
def config(tiny_model, records, scenes, tmp_path_factory):
    """Eight questions; the training is that of tests/train/test_loop.py, which compiles the same step."""
    folder = tmp_path_factory.mktemp("questions")
    write_questions(folder / "q.jsonl", scenes, ["right"] * COUNT)
    return RunConfig(
        model=str(tiny_model),
        output=str(folder / "run"),
        data=DataConfig(records=str(records), max_length=256, max_answer_tokens=8),
        train=TrainConfig(batch_size=2, epochs=2, max_steps=9, learning_rate=0.05, save_every=2),
        eval=EvalConfig(benchmarks={"mine": str(folder / "q.jsonl")}, batch_size=4, max_new_tokens=4, near_tie=0.0),
    )


def toml(config, folder):
    """The configuration as a user writes it, without benchmarks."""
    path = folder / "run.toml"
    path.write_text(
        f'model = "{config.model}"\noutput = "{config.output}"\n'
        f'[data]\nrecords = "{config.data.records}"\nmax_length = 256\nmax_answer_tokens = 8\n'
        "[train]\nbatch_size = 2\nepochs = 2\nmax_steps = 9\nlearning_rate = 0.05\nsave_every = 2\n"
        "[eval]\nbatch_size = 4\nmax_new_tokens = 4\nnear_tie = 0.0\n"
    )
    return str(path)


@pytest.fixture
def script(singles, monkeypatch):
    """Replaces the answers of every model by scripted ones: as many correct as RIGHT says for the gates it has."""

    def method(vlm):
        if vlm.gate is None:
            return "base"
        for row, layer in enumerate(vlm.gate.layers):
            if any((np.asarray(leaf)[row] != singles[layer].parameters[name][0]).any() for name, leaf in vlm.trained.items()):
                return "joint"
        return next(m for m in RIGHT if set(m.split("+")) == {f"L{layer}" for layer in vlm.gate.layers})

    script_answers(monkeypatch, RIGHT, method)


SETTINGS = StackConfig(max_gates=3, joint=True)


def test_study_and_command(script, config, sources, singles, tmp_path, capsys):
    out = tmp_path / "out"
    study = stack_study(config, sources, SETTINGS, out)
    share = {method: 100 * right / COUNT for method, right in RIGHT.items()}
    assert [(row["layer"], row["value"], row["change"]) for row in study["singles"]] == [
        (layer, share[f"L{layer}"], share[f"L{layer}"] - share["base"]) for layer in LAYERS
    ]
    steps = [[3], [3, 1], [3, 1, 5]]  # layers 1 and 5 gain the same
    assert [(row["layers"], row["value"]) for row in study["steps"]] == [(s, share[stack_name(s)]) for s in steps]
    assert study["chosen"] == study["joint"]["layers"] == [3, 1] and study["joint"]["value"] == share["joint"]
    assert {row["method"]: row["value"] for row in study["by_benchmark"]} == share
    assert (study["format"], study["selection"], study["metric"]) == ("lsg-stack-1", "mine", "accuracy")
    assert read_sealed(out / "stack.json") == study
    assert all(row["low"] <= row["change"] <= row["high"] for row in study["singles"] + study["steps"])
    direct, written = combine_gates([singles[1], singles[3]]), read_gates(out / "stack.safetensors")
    assert written.gate == direct.gate and written.sinks == SINKS
    for name, leaf in direct.parameters.items():
        np.testing.assert_array_equal(written.parameters[name], leaf)
    run = json.loads((out / "joint" / "L1+L3" / "run.json").read_text())
    assert run["config"]["gate"]["layers"] == [1, 3] and run["sinks"]["criterion"] == "norm"
    first = json.loads((out / "joint" / "L1+L3" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["ratios"] == [[0.5, 0.5]] * 2  # from scratch

    before = (out / "stack.json").read_bytes()
    common = ["stack", toml(config, tmp_path), "--benchmark", f"mine={config.eval.benchmarks['mine']}"]
    assert main([*common, "--max-gates", "3", "--joint", "--gates", *sources, "--out", str(out)]) == 0
    assert (out / "stack.json").read_bytes() == before  # all of it was known
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "selection: mine, accuracy"
    assert [line.split()[:2] for line in lines[6:9]] == [["L3", "75.00"], ["L3+L1", "100.00"], ["L3+L1+L5", "87.50"]]
    assert lines[9].split() == ["L3+L1", "trained", "together", "62.50", *lines[9].split()[4:]]
    assert lines[10] == f"chosen: L3+L1, written to {out / 'stack.safetensors'}"
    for stem in ("stack", "gains"):
        assert all((out / f"{stem}.{suffix}").stat().st_size for suffix in ("csv", "svg", "png"))

    # stopped in the stack, and in training
    events = []
    for stop_at in ("mine.L3+L1", "training joint", None):

        def progress(done, total, what, stop_at=stop_at):
            what = what.partition(" loss")[0]
            events.append((what, done))
            if what == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)

        if stop_at is None:
            assert stack_study(config, sources, SETTINGS, tmp_path / "again", progress=progress) == study
            break
        with pytest.raises(Preempted, match="run the same command to go on"):
            stack_study(config, sources, SETTINGS, tmp_path / "again", progress=progress)
    for name in ("stack.json", "mine.joint.jsonl", "result.json"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()
    assert len(events) == len(set(events)) == 7 * 2 + 9  # nothing was answered or trained twice


def test_one_gate_is_not_trained_together(script, config, sources, tmp_path, monkeypatch):
    monkeypatch.setitem(RIGHT, "L3", 8)
    study = stack_study(config, sources, StackConfig(max_gates=2, joint=True), tmp_path)
    assert study["chosen"] == [3]
    assert study["joint"]["value"] is None and study["joint"]["reason"].startswith("one gate was chosen")
    assert not (tmp_path / "joint").exists()


def test_refusals_of_the_command(config, sources, tmp_path, capsys):
    common = ["stack", toml(config, tmp_path), "--benchmark", f"mine={config.eval.benchmarks['mine']}", "--joint"]
    for arguments, message in [
        (["--gates", *sources, "--max-gates", "0"], "--max-gates is 0: it must lie in [1, 1e4]"),
        (["--gates", *sources, "--max-gates", "1"], "--joint trains several gates together"),
        (["--gates", *sources, "--select", "yours"], "--select yours: no such benchmark is given; given are mine"),
        (["--gates", *sources, "--set", 'data.records=""'], "--joint trains, but data.records is empty"),
        (["--gates", *sources, "--set", "data.records=none"], "none: no prepared records here"),
        (["--gates", sources[0], sources[0]], "layer 1 has two gates, in "),
        (["--gates", str(tmp_path)], "neither a run folder (no readable run.json) nor a gate file"),
    ]:
        assert main([*common, *arguments, "--out", str(tmp_path / "refused")]) == 65
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    assert not (tmp_path / "refused").exists()


def test_gates_are_taken_apart_and_must_go_together(config, sources, singles, tiny_model, tmp_path):
    digest = read_manifest(tiny_model).digest
    gates, origin = open_singles(sources, backbone=digest, sinks=replace(SINKS, vit_tau=12.0))
    assert origin == {"1": sources[0], "3": sources[1], "5": sources[1]}
    for layer, gate in gates.items():
        assert gate.gate.layers == (layer,) and gate.sinks.vit_tau == 12.0
        for name, leaf in singles[layer].parameters.items():
            np.testing.assert_array_equal(gate.parameters[name], leaf)
    others = {"scale": made_gates([2], key_scale=2.0), "deep": made_gates([9]), "wide": made_gates([2], width=128)}
    for name, other in others.items():
        write_gates(tmp_path / f"{name}.safetensors", other)
    for given, message in [
        ([], "no gates to stack"),
        ([*sources, str(tmp_path / "scale.safetensors")], "differ in gate or sink settings"),
        ([str(tmp_path / "deep.safetensors")], "the gates are for layer 9, the language model has layers 0 to 5"),
        ([str(tmp_path / "wide.safetensors")], "they belong to another backbone"),
    ]:
        with pytest.raises(InputError, match=message):
            stack_study(config, given, StackConfig(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_real_answers_of_the_stack_are_those_of_the_joined_gates(config, scenes, tiny_model, tmp_path):
    """Answers are accepted so that the stack of layers 3 and 1 has all right, layer 3 a half, layer 1 a quarter."""
    base = load_backbone(tiny_model, mesh=make_mesh(MeshConfig()))
    parts = {layer: made_gates([layer], seed=layer, key_scale=8.0) for layer in (1, 3)}
    direct = {"L1": parts[1], "L3": parts[3], "L3+L1": combine_gates([parts[1], parts[3]])}
    write_questions(tmp_path / "q.jsonl", scenes, ["?"] * COUNT)
    questions = replace(config.eval, benchmarks={"mine": str(tmp_path / "q.jsonl")})
    evaluate({"base": base, **{m: with_gates(base, gates) for m, gates in direct.items()}}, questions, tmp_path / "direct")
    said = {method: outputs(tmp_path / "direct", method) for method in direct}
    counts = {"L3+L1": COUNT, "L3": COUNT // 2, "L1": COUNT // 4}
    accepted = [[said[method][i] for method, count in counts.items() if i < count] for i in range(COUNT)]
    write_questions(tmp_path / "q.jsonl", scenes, accepted)

    for layer, gates in parts.items():
        write_gates(tmp_path / f"L{layer}.safetensors", gates)
    sources = [str(tmp_path / f"L{layer}.safetensors") for layer in parts]
    study = stack_study(replace(config, eval=questions), sources, StackConfig(), tmp_path / "out")
    assert study["chosen"] == [3, 1] and study["steps"][1]["value"] == 100.0 > study["steps"][0]["value"]
    for method in direct:
        assert outputs(tmp_path / "out", method) == said[method]
    loaded = lsg_jax.load(tiny_model, tmp_path / "out" / "stack.safetensors", mesh=base.mesh)
    evaluate({"stack": loaded}, questions, tmp_path / "loaded")
    assert outputs(tmp_path / "loaded", "stack") == said["L3+L1"] != said["L3"]
