"""The seam of methods: one class and one row of the registry, and a method trains, resumes, is evaluated and is planned."""

from dataclasses import dataclass, field
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lsg_jax.checkpoint import RunFolder, read_step
from lsg_jax.cli import main
from lsg_jax.config.ranges import Range, Table
from lsg_jax.errors import Preempted
from lsg_jax.gating.gate import GateParam
from lsg_jax.methods.method import Method
from lsg_jax.methods.registry import METHODS
from lsg_jax.model.multimodal import ConnectorTokens
from lsg_jax.opening import load_backbone, open_trained
from lsg_jax.plan.programs import eval_prompts, train_program
from lsg_jax.run_config import load_run_config
from lsg_jax.sharding import make_mesh
from lsg_jax.train.loop import _loop, set_up


@dataclass(frozen=True)
class ShiftConfig(Table, name="shift"):
    size: Annotated[float, Range("(0, 10]")] = 1.0


class Shift(nnx.Module):
    def __init__(self, width):
        self.offset = GateParam(jnp.zeros((width,)))


@dataclass(frozen=True)
class ShiftMethod(Method):
    """Adds one trained vector to every visual token."""

    settings: ShiftConfig = field(default_factory=ShiftConfig)

    Settings = ShiftConfig
    trains = True
    trains_inputs = True

    def module(self, config, key):
        return Shift(config.text.hidden_size)

    def connect(self, model, features, v_sink, batch, text):
        return ConnectorTokens(model.projector(features) + self.settings.size * model.trained.offset[...], v_sink)


@pytest.fixture
def config_file(tiny_model, records, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "shift", ShiftMethod)
    path = tmp_path / "run.toml"
    path.write_text(
        f'model = "{tiny_model}"\noutput = "{tmp_path / "run"}"\nmethod = "shift"\n[shift]\nsize = 2.0\n'
        f'[data]\nrecords = "{records}"\nmax_length = 256\nmax_answer_tokens = 8\n'
        "[train]\nbatch_size = 4\nepochs = 2\nlearning_rate = 0.03\nsave_every = 2\n"
        "[eval]\nmax_new_tokens = 4\n"
    )
    return path


def test_a_method_is_one_class_and_one_row(config_file, tiny_model, scenes, tmp_path, capfd):
    assert main(["train", str(config_file), "--set", "shift.size=20"]) == 65
    assert "shift.size is 20: it must lie in (0, 10]" in capfd.readouterr().err

    config, run = load_run_config(config_file), RunFolder(tmp_path / "run")
    stops = iter([False, False, True])
    with run.lock(), pytest.raises(Preempted, match="stopped at step 3 of 6"):
        _loop(set_up(config, run), lambda: next(stops), None)
    assert main(["train", str(config_file)]) == 0  # resumes at step 3
    step, tree, _ = read_step(run.path)
    assert step == 6 and tree["trained"]["offset"].shape == (64,) and np.abs(tree["trained"]["offset"]).max() > 0
    whole = ["--set", f"output={tmp_path / 'whole'}"]
    assert main(["train", str(config_file), *whole]) == 0
    np.testing.assert_array_equal(read_step(tmp_path / "whole")[1]["trained"]["offset"], tree["trained"]["offset"])

    base = load_backbone(tiny_model)
    vlm = open_trained(base, run.path)
    assert vlm.method == ShiftMethod(ShiftConfig(2.0)) and vlm.gate is None
    image = [scenes / "images/0.png"]
    assert vlm.plain().generate(image, ["How many?"], 4) == base.generate(image, ["How many?"], 4)

    asked = ["--benchmark", f"mine={scenes / 'questions.jsonl'}", "--method", "base", f"shift={run.path}"]
    assert main(["eval", str(config_file), *asked, *whole]) == 0
    assert "shift" in capfd.readouterr().out

    mesh = make_mesh(config.mesh)
    step = train_program(config, base.config, mesh, dtype=jnp.float32)
    assert step.name == "train" and [leaf.shape for leaf in jax.tree.leaves(step.arguments[0].trained)] == [(64,)]
    for program in (step, eval_prompts(config, base.config, mesh, max_new_tokens=4, dtype=jnp.float32)):
        assert program.compile().memory_analysis() is not None
