"""Strict configuration: what is read, what is refused, and in which words."""

import dataclasses
import re
from pathlib import Path

import pytest

from lsg_jax.config import GateConfig, SinkConfig, TrainConfig, from_dict
from lsg_jax.errors import ConfigError
from lsg_jax.run_config import RunConfig, load_run_config, run_config

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.toml"))

GOOD = """
model = "m"
output = "o"
[gate]
layers = [3, 10]
[train]
learning_rate = 1e-4
"""


def read(tmp_path, text, *overrides):
    path = tmp_path / "c.toml"
    path.write_text(text)
    return load_run_config(path, overrides)


def test_values_and_overrides(tmp_path):
    config = read(tmp_path, GOOD, "train.learning_rate=1", "gate.layers=[1]", "sinks.criterion=norm", "model=/a/b", "seed = 7")
    assert config.gate == GateConfig(layers=(1,))
    assert (config.train.learning_rate, config.sinks, config.model, config.seed) == (1.0, SinkConfig("norm"), "/a/b", 7)
    assert read(tmp_path, GOOD).train.learning_rate == 1e-4
    default = read(tmp_path, GOOD, "train.learning_rate=unset", "eval.limit=unset", "dtype=unset")
    assert default.train == TrainConfig() and default.eval.limit is default.dtype is None
    assert read(tmp_path, GOOD, 'model="unset"').model == "unset"


def test_round_trip():
    config = RunConfig(model="m", output="o", tables={"gate": GateConfig(layers=(1, 2))}, sinks=SinkConfig(vit_dims=(650,)))
    assert run_config(config.as_dict(), where="x") == config


@pytest.mark.parametrize(
    "text, overrides, message",
    [
        ("model = 'm'", (), "missing field output"),
        (GOOD + "learning_rat = 1.0", (), "train: unknown field learning_rat; did you mean learning_rate?"),
        (GOOD, ("trian.epochs=3",), "unknown field trian; did you mean train?"),
        (GOOD, ("train.epochs=many",), "train.epochs: expected int, got 'many'"),
        (GOOD, ("train.epochs=true",), "train.epochs: expected int, got True"),
        (GOOD, ("gate.layers=[1.5]",), "gate.layers[0]: expected int, got 1.5"),
        (GOOD, ("gate.grouping=both",), "gate.grouping: 'both' is not one of v_sink_rest, l_sink_rest, three"),
        (GOOD, ("gate=3",), "gate: expected a table, got 3"),
        (GOOD, ("gate.layers.x=3",), "--set gate.layers.x=3: layers is not a table"),
        (GOOD, ("epochs",), "--set epochs: write it as a.b=value"),
        ("model = ", (), "not valid TOML"),
        (GOOD, ("train.save_every=0",), "c.toml: train.save_every is 0: it must lie in [1, 1e9]"),
        (GOOD, ("train.max_steps=0",), "train.max_steps is 0: it must lie in [1, 1e9]"),
        (GOOD, ("data.max_length=-1",), "data.max_length is -1: it must lie in [1, 1e8]"),
        (GOOD, ("eval.batch_size=0",), "eval.batch_size is 0: it must lie in [1, 1e6]"),
        (GOOD, ("gate.width=0",), "gate.width is 0: it must lie in [1, 1e6]"),
    ],
)
def test_refusals(tmp_path, text, overrides, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        read(tmp_path, text, *overrides)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 65


def test_any_dataclass_is_read_as_strictly():
    @dataclasses.dataclass
    class Plain:
        count: int
        share: float

    assert from_dict(Plain, {"count": 3, "share": 1}, where="x") == Plain(3, 1.0)
    for wrong in (True, 3.0, "3"):
        with pytest.raises(ConfigError, match="x: count: expected int, got"):
            from_dict(Plain, {"count": wrong, "share": 1.0}, where="x")


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        load_run_config(tmp_path / "nothing.toml")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_shipped_configs_are_read(path):
    config = load_run_config(path)
    assert config.method in ("lora", "diysink", "full") or config.gate.layers or config.gate.independent


def test_there_are_shipped_configs():
    assert {"tiny.toml", "llava15_7b.toml", "llava15_13b.toml"} <= {path.name for path in CONFIGS}


def test_the_old_name_of_a_criterion_is_read_as_what_it_meant():
    """In configurations, model folders and gate files, which all come through `from_dict`; not in Python."""
    sinks = from_dict(SinkConfig, {"criterion": "attention", "vit_tau": 0.2, "llm_criterion": "attention"}, where="old.toml")
    assert sinks == SinkConfig(criterion="attention_share", vit_tau=0.2, llm_criterion="attention_share")
    with pytest.raises(ConfigError, match=r"sinks.criterion: 'attention' is not one of dim_abs, .*attention_share"):
        SinkConfig(criterion="attention")
    with pytest.raises(ConfigError, match=r"c.toml: criterion: 'l2' is not one of dim_abs"):
        from_dict(SinkConfig, {"criterion": "l2"}, where="c.toml")
