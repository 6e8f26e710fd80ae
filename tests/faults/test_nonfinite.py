"""Values that become NaN or infinite on the way: exit 70, one line that names what was asked and the method, nothing kept."""

import jax
import numpy as np
import pytest

import lsg_jax
from lsg_jax import opening
from lsg_jax.cli import main
from lsg_jax.config import EvalConfig, GateConfig, SinkConfig
from lsg_jax.errors import NonFiniteError
from lsg_jax.eval.likelihood import log_likelihoods
from lsg_jax.eval.runner import ask_all
from lsg_jax.gating.portable import PortableGates
from lsg_jax.methods.finite import check_finite
from lsg_jax.methods.gates import Gates
from lsg_jax.methods.method import BASE

SINKS = ["--sinks", "criterion=norm", "vit_tau=1", "llm_criterion=norm", "llm_tau=1"]


def scaled(monkeypatch, factor):
    """Models load with one weight of each layer multiplied."""

    def load(*arguments, **settings):
        frozen = real(*arguments, **settings)
        mlp = frozen["language_model"]["layers"]["mlp"]
        mlp["down_proj"]["kernel"] = mlp["down_proj"]["kernel"] * factor
        return frozen

    real = opening.load_base
    monkeypatch.setattr(opening, "load_base", load)


@pytest.fixture
def overflowing(monkeypatch):
    """The states stay finite, but their norms do not: a norm layer makes zeros of them, and the logits are finite and wrong."""
    scaled(monkeypatch, 1e38)


@pytest.fixture
def infinite(monkeypatch):
    """The states themselves become NaN."""
    scaled(monkeypatch, np.inf)


@pytest.fixture
def config(tiny_model, scenes, tmp_path):
    path = tmp_path / "c.toml"
    path.write_text(
        f'model = "{tiny_model}"\noutput = "{tmp_path}/run"\n[sinks]\ncriterion = "norm"\nvit_tau = 1.0\n'
        f'[eval]\nmax_new_tokens = 2\nbatch_size = 4\nlimit = 4\nbenchmarks.mine = "{scenes}/questions.jsonl"\n'
    )
    return str(path)


def refused(arguments, capsys, *named):
    assert main(arguments) == 70
    out, error = capsys.readouterr()
    assert out == "" and all(each in error for each in named), error
    assert [line for line in error.splitlines() if line.startswith("lsg ")] == error.splitlines()[-1:], error


def kept(folder):
    """The answers in the logs below a folder, whatever their format."""
    return [line for path in folder.rglob("*.jsonl") for line in path.read_text().splitlines() if '"output' in line]


def test_questions_of_an_evaluation(overflowing, config, capsys, tmp_path):
    refused(["eval", config], capsys, "question 0: the base model computes NaN or infinity", 'dtype = "float32"')
    assert not kept(tmp_path / "run")
    assert not list((tmp_path / "run").rglob("eval.json")) and not list((tmp_path / "run").rglob("result.json"))


def test_cells_of_a_sweep(infinite, config, capsys, tmp_path):
    refused(["sweep", config, "--layers", "3", "--coefficients", "0,1"], capsys, "question 0: the base model computes")
    assert not kept(tmp_path / "run")


@pytest.mark.parametrize("command", ["generate", "sinks", "calibrate", "probe", "pointing"])
def test_commands_of_images(command, infinite, tiny_model, scenes, capsys, tmp_path):
    image, out = str(scenes / "images/0.png"), str(tmp_path / "out")
    arguments, named = {
        "generate": (["--image", image, "--prompt", "?", "--max-new-tokens", "2"], "prompt 1: the base model"),
        "sinks": (["--images", image, "--max-new-tokens", "0", *SINKS, "--out", out], "0.png: the base model"),
        "calibrate": (["--images", str(scenes / "images"), "--limit", "2"], "scenes0/images: the base model"),
        "probe": (["--data", "scenes", "--images", "25", "--layers", "5", *SINKS, "--out", out], "layer 5 are not finite"),
        "pointing": (["--questions", "2", "--kinds", "exists", *SINKS, "--out", out], "question 'Is there"),
    }[command]
    refused([command, str(tiny_model), *arguments], capsys, named)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_likelihoods(overflowing, tiny_model, scenes):
    settings = EvalConfig(benchmarks={"mine": str(scenes / "questions.jsonl")}, batch_size=2, limit=2)
    (asked,) = ask_all(settings).values()
    with pytest.raises(NonFiniteError, match="question 0: the base model computes NaN"):
        log_likelihoods(lsg_jax.load(tiny_model), asked.items, asked.prompts, ["yes", "no"], settings)


def test_gates_that_hold_nan(tiny_model):
    vlm, gate = lsg_jax.load(tiny_model, sinks=SinkConfig(criterion="norm")), GateConfig(layers=(3,), width=4)
    made = Gates(gate).for_model(vlm.config).initial(vlm.config, vlm.frozen, jax.random.key(0))
    broken = jax.tree.map(lambda leaf: np.full(leaf.shape, np.nan, np.float32), made)
    with pytest.raises(NonFiniteError, match=r"gates at layers \[3\] hold NaN"):
        opening.with_gates(vlm, PortableGates(gate=gate, sinks=SinkConfig(criterion="norm"), parameters=broken))


def test_the_line_names_the_method():
    with pytest.raises(NonFiniteError, match=r"^question b: the base model computes NaN"):
        check_finite(np.array([[1.0, 2.0], [np.inf, 0.0], [np.nan, 0.0]]), ["question a", "question b", "question c"], BASE)
    assert check_finite(np.zeros((0, 3)), [], BASE) is None
