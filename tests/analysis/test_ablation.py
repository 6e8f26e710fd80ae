"""Ablations: the variants and which of them are possible, and a study end to end, interrupted and resumed."""

import json
import os
import signal
from dataclasses import replace

import pytest
from scripted import script_answers

from lsg_jax.analysis.ablation import ablation_study, plan_variants
from lsg_jax.checkpoint import read_manifest
from lsg_jax.cli import main
from lsg_jax.config import DataConfig, EvalConfig, GateConfig, SinkConfig, TrainConfig
from lsg_jax.errors import ConfigError, InputError, Preempted
from lsg_jax.json_files import read_sealed
from lsg_jax.methods.registry import name_of
from lsg_jax.run_config import RunConfig

SINKS = SinkConfig(criterion="norm", vit_tau=10.0)
ALL = ["reference", "mean_all", "mean_visual", "l_sink_rest", "three", "lora"]


@pytest.fixture(scope="module")
def config(tiny_model, records, scenes, tmp_path_factory):
    """One gate, two steps, four questions."""
    questions = tmp_path_factory.mktemp("questions") / "q.jsonl"
    rows = [
        {"id": str(i), "image": str(scenes / "images" / f"{i}.png"), "question": "How many?", "answer": "right"}
        for i in range(4)
    ]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return RunConfig(
        model=str(tiny_model),
        output=str(questions.parent / "run"),
        tables={"gate": GateConfig(layers=(1,))},
        sinks=SINKS,
        data=DataConfig(records=str(records), max_length=256, max_answer_tokens=8),
        train=TrainConfig(batch_size=2, epochs=1, max_steps=3),
        eval=EvalConfig(benchmarks={"mine": str(questions)}, batch_size=4, max_new_tokens=4, near_tie=0.0),
    )


@pytest.fixture(scope="module")
def model(tiny_model):
    return read_manifest(tiny_model).config


def test_variants_differ_from_the_reference_in_one_thing(config, model):
    able = replace(config, sinks=replace(SINKS, llm_criterion="norm", llm_tau=12.0))
    runs, skipped = plan_variants(able, (), model)
    assert list(runs) == ALL and not skipped and runs["reference"] == able
    gates = {name: (run.gate.signal, run.gate.grouping) for name, run in runs.items() if name != "lora"}
    assert gates == {
        "reference": ("last", "v_sink_rest"),
        "mean_all": ("mean_all", "v_sink_rest"),
        "mean_visual": ("mean_visual", "v_sink_rest"),
        "l_sink_rest": ("last", "l_sink_rest"),
        "three": ("last", "three"),
    }
    assert runs["lora"].method == "lora" and runs["lora"].get_method().settings.layer == 1
    for name, run in runs.items():
        assert replace(run, tables=able.tables, method="lsg") == able, name
    other = able.with_settings(replace(able.gate, signal="mean_visual", grouping="three"))
    assert list(plan_variants(other, ("signal", "grouping"), model)[0])[1:] == [
        "last",
        "mean_all",
        "v_sink_rest",
        "l_sink_rest",
    ]
    assert list(plan_variants(able, ("three", "lora", "three"), model)[0]) == ["reference", "three", "lora"]


def test_what_the_model_cannot_carry_is_skipped_with_the_reason(config, model):
    runs, skipped = plan_variants(config, (), model)
    assert list(runs) == ["reference", "mean_all", "mean_visual", "lora"]
    assert [row["variant"] for row in skipped] == ["l_sink_rest", "three"]
    assert all("no L-sink dimensions are known" in row["reason"] for row in skipped)
    two = config.with_settings(GateConfig(layers=(1, 3)))
    assert plan_variants(two, ("signal", "lora"), model)[1] == [
        {"variant": "lora", "reason": "LoRA is at one layer, the gates are at 1, 3"}
    ]
    assert plan_variants(config, ("lora", "last"), model)[1] == [{"variant": "last", "reason": "this is the reference itself"}]


def test_refusals(config, model, tmp_path):
    for given, wanted, message in [
        (config, ("grouping",), "nothing is left to compare with the reference: l_sink_rest: no L-sink dimensions"),
        (config, ("last", "v_sink_rest"), "nothing is left .* this is the reference itself"),
        (config, ("layers",), "--variants layers: unknown; known are signal, grouping, lora, last, mean_all"),
        (replace(config, method="lora"), (), 'method = "lora": the reference of `lsg ablate` is gates'),
        (config.with_settings(GateConfig(independent=True)), (), "name one layer"),
        (config.with_settings(GateConfig(layers=(9,))), (), "layer 9 does not exist"),
        (replace(config, sinks=SinkConfig()), (), "no V-sink dimensions are known"),
    ]:
        with pytest.raises(ConfigError, match=message):
            plan_variants(given, wanted, model)
    for given, message in [
        (replace(config, data=replace(config.data, records="")), "data.records is empty"),
        (replace(config, data=replace(config.data, records="none")), "none: no prepared records here"),
        (replace(config, eval=replace(config.eval, benchmarks={})), "nothing to evaluate"),
    ]:
        with pytest.raises(InputError, match=message):
            ablation_study(given, (), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_study_stopped_and_resumed_and_as_a_command(config, model, tmp_path, capsys, monkeypatch):
    """Training is real; the answers are scripted by the method that a model has."""
    right = {"base": 1, "lsg": 2, "lora": 4}
    script_answers(monkeypatch, right, lambda vlm: name_of(vlm.method))
    out, events = tmp_path / "out", []

    def run(stop_at):
        def progress(done, total, what):
            what = what.partition(" loss")[0]
            events.append((what, done))
            if (what, done) == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)

        return ablation_study(config, ("lora", "three"), out, progress=progress)

    with pytest.raises(Preempted, match="stopped at step 2 of 3, saved"):
        run(("training lora", 1))
    study = run(None)
    assert events[-3:] == [("mine.base", 4), ("mine.reference", 8), ("mine.lora", 12)]
    assert events[:-3] == [(f"training {name}", step) for name in ("reference", "lora") for step in (1, 2, 3)]  # each step once

    assert study["format"] == "lsg-ablate-1" and read_sealed(out / "ablate.json") == study
    assert [row["variant"] for row in study["skipped"]] == ["three"]
    assert study["parameters"]["reference"] == 2 * 64 + (64 * 64 + 64) + (64 * 2 + 2)  # norm, first and second layer
    heads, keys = model.text.num_heads * model.text.head_dim, model.text.num_kv_heads * model.text.head_dim
    assert study["parameters"]["lora"] == 8 * (4 * 64 + 2 * heads + 2 * keys)  # in and out of the q, k, v and o projections
    result = json.loads((out / "result.json").read_text())["benchmarks"]["mine"]
    assert [(row["variant"], row["value"]) for row in study["rows"]] == [("base", 25.0), ("reference", 50.0), ("lora", 100.0)]
    for row in study["rows"]:
        method = row["variant"]
        assert list(row) == ["variant", "benchmark", "metric", "value", "change", "low", "high"]
        assert row["value"] == result["methods"][method]["accuracy"]["value"]
        change = result["change"].get(method, {"accuracy": dict.fromkeys(("value", "low", "high"))})["accuracy"]
        assert (row["change"], row["low"], row["high"]) == (change["value"], change["low"], change["high"])
    trained = {name: json.loads((out / name / "run.json").read_text())["config"] for name in ("reference", "lora")}
    assert trained["reference"]["gate"]["layers"] == [1] and trained["lora"]["lora"]["layer"] == 1
    assert [trained[name]["method"] for name in ("reference", "lora")] == ["lsg", "lora"]

    toml = tmp_path / "run.toml"
    toml.write_text(
        f'model = "{config.model}"\noutput = "{tmp_path}"\n[gate]\nlayers = [1]\n[sinks]\ncriterion = "norm"\nvit_tau = 10.0\n'
        f'[data]\nrecords = "{config.data.records}"\nmax_length = 256\nmax_answer_tokens = 8\n'
        "[train]\nbatch_size = 2\nepochs = 1\nmax_steps = 3\n"
        "[eval]\nbatch_size = 4\nmax_new_tokens = 4\nnear_tie = 0.0\n"
    )
    given = [str(toml), "--benchmark", f"mine={config.eval.benchmarks['mine']}"]
    before = (out / "ablate.json").read_bytes()
    code = main(["ablate", *given, "--variants", "lora", "three", "--out", str(out)])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert (out / "ablate.json").read_bytes() == before
    lines = printed.out.splitlines()
    assert lines[0] == "mine, accuracy" and [line.split()[0] for line in lines[2:5]] == ["base", "reference", "lora"]
    assert lines[-1].startswith("skipped three: no L-sink dimensions are known")
    assert all((out / f"gains.{suffix}").stat().st_size for suffix in ("csv", "svg", "png"))
    assert main(["ablate", *given, "--variants", "grouping", "--out", str(tmp_path / "refused")]) == 65
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "nothing is left" in error and not (tmp_path / "refused").exists()
