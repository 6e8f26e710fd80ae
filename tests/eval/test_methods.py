"""Which model an evaluation means by a method."""

import dataclasses
import json

import numpy as np
import pytest
from test_vlm import SINKS, gates

import lsg_jax
from lsg_jax.config import EvalConfig
from lsg_jax.errors import ConfigError, InputError
from lsg_jax.eval.answering import Answer
from lsg_jax.eval.methods import open_methods
from lsg_jax.eval.results import read_result
from lsg_jax.eval.runner import ask_all, evaluate
from lsg_jax.gating.portable import write_gates
from lsg_jax.methods.fixed import FixedConfig
from lsg_jax.methods.var import VarConfig
from lsg_jax.run_config import RunConfig

CONFIG = RunConfig(
    model="model", output="run", sinks=SINKS, tables={"fixed": FixedConfig(layers=(1, 4), coefficients=(0.5,) * 2)}
)


@pytest.fixture(scope="module")
def base(tiny_model):
    return lsg_jax.load(tiny_model)


@pytest.fixture(scope="module")
def fresh_gates(tmp_path_factory):
    """Gates before their first step: every ratio is a half."""
    made = gates()
    zero = {name: np.zeros_like(made.parameters[name]) for name in ("fc2_kernel", "fc2_bias")}
    file = tmp_path_factory.mktemp("gates") / "fresh.safetensors"
    settings = dataclasses.replace(made.gate, key_scale=1.0)
    write_gates(file, dataclasses.replace(made, gate=settings, parameters={**made.parameters, **zero}))
    return file


def test_what_is_asked_for_is_opened_once_and_base_comes_first(base, fresh_gates):
    models = open_methods(base, CONFIG, ["fixed", f"lsg={fresh_gates}", "base"])
    assert list(models) == ["base", "fixed", "lsg"] and models["base"] is base
    assert models["fixed"].method == CONFIG.get_method("fixed") and models["lsg"].gate.layers == (1, 4)
    assert list(open_methods(base, CONFIG, [], fresh_gates)) == ["base", "lsg"]
    assert list(open_methods(base, CONFIG, [])) == ["base"]


@pytest.mark.parametrize(
    "wanted, error, message",
    [
        (["vra"], ConfigError, "--method vra: unknown; known are base, lsg, var, "),
        (
            ["fixed=run"],
            ConfigError,
            r"--method fixed=run: fixed is not trained; its settings are those of the table \[fixed\]",
        ),
        (["fixed", "fixed"], ConfigError, "--method fixed: named twice"),
        (["lora"], InputError, "method lora: there is no trained run; name one as --method lora=RUN"),
        (["var"], ConfigError, "set sinks.llm_dims"),
    ],
)
def test_wrong_methods_are_refused(base, wanted, error, message):
    with pytest.raises(error, match=message):
        open_methods(base, CONFIG, wanted)


def test_fresh_gates_answer_as_fixed_halves(base, fresh_gates, scenes, tmp_path):
    models = open_methods(base, CONFIG, ["fixed", f"lsg={fresh_gates}"])
    settings = EvalConfig(benchmarks={"mine": str(scenes / "questions.jsonl")}, batch_size=6, max_new_tokens=4)
    result = evaluate(models, settings, tmp_path)
    answers = {m: [json.loads(line)["output"] for line in (tmp_path / f"mine.{m}.jsonl").open()] for m in models}
    assert answers["lsg"] == answers["fixed"] != answers["base"]
    entry = result.benchmarks["mine"]
    assert entry.change["lsg"] == entry.change["fixed"] and entry.change.keys() == {"lsg", "fixed"}
    assert result.methods["fixed"].method["coefficients"] == [0.5, 0.5]
    assert {(row.method, row.mean, row.std) for row in result.ratios} == {("lsg", 0.5, 0.0)}
    assert {row.task for row in result.ratios} == {"colour", "count"}


def test_settings_by_kind_of_benchmark_are_used_and_recorded(base, scenes, tmp_path, monkeypatch):
    """VAR's rho on two benchmarks, its own value, and the answers' identity; nothing is computed."""
    asked_under = {}

    def answers(models, name, test, *_):
        asked_under.update({f"{name}.{method}": model.method.settings for method, model in models.items()})
        return dict.fromkeys(models, [Answer("red")] * len(test.items)), {}

    monkeypatch.setattr("lsg_jax.eval.runner._answers", answers)
    settings = EvalConfig(benchmarks={"mine": str(scenes / "questions.jsonl")})
    (general,) = ask_all(settings).values()
    asked = {"mine": general}
    asked["pope-like"] = dataclasses.replace(general, benchmark=dataclasses.replace(general.benchmark, kind="hallucination"))
    sinks = dataclasses.replace(SINKS, llm_dims=(1,))
    config = dataclasses.replace(CONFIG, sinks=sinks)
    result = evaluate(open_methods(base, config, ["var"]), settings, tmp_path, asked=asked)
    assert {name: getattr(used, "rho", None) for name, used in asked_under.items()} == {
        "mine.base": None, "mine.var": 0.8, "pope-like.base": None, "pope-like.var": 0.5,
    }  # fmt: skip
    assert result.methods["var"].method["rho"] is None
    assert {name: entry.settings["var"].method["rho"] for name, entry in result.benchmarks.items()} == {
        "mine": 0.8,
        "pope-like": 0.5,
    }
    assert read_result(tmp_path / "result.json") == result
    own = config.with_settings(VarConfig(rho=0.3))
    evaluate(open_methods(base, own, ["var"]), settings, tmp_path, asked=asked)
    assert asked_under["mine.var"].rho == asked_under["pope-like.var"].rho == 0.3
