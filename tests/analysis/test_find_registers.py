"""`lsg calibrate --registers` finds the neuron that makes the outliers of a planted model, and a register takes it over."""

import json
import tomllib

import numpy as np
import pytest
from PIL import Image
from planted import LOUD, WRITER, planted_model

from lsg_jax.analysis.registers import as_toml, find_registers, growth_layer, most_active
from lsg_jax.cli import main
from lsg_jax.config import SinkConfig
from lsg_jax.errors import InputError
from lsg_jax.methods.registers import RegistersConfig
from lsg_jax.opening import load_backbone
from lsg_jax.run_config import load_run_config


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Five images of noise, and a broken one among them."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for index in range(5):
        Image.fromarray(rng.integers(0, 256, (56, 56, 3), np.uint8)).save(folder / f"{index}.png")
    (folder / "2b.png").write_bytes(b"<!doctype html>")
    return folder


def test_a_planted_neuron_is_found_and_a_register_takes_it_over(tiny_model, photos, tmp_path):
    vlm, truth = planted_model(tiny_model)
    result = find_registers(vlm, sorted(photos.iterdir()), "What is it?", 1)
    assert result["layer"] == WRITER and result["registers"] == {"neurons": [[WRITER, 0]]}
    assert result["neurons"][0]["activation"] == pytest.approx(LOUD / 2, rel=0.1)
    assert (result["images"], result["images_with_outliers"], len(result["skipped"])) == (5, 5, 1)
    assert result["share"] == pytest.approx(2 / 49, abs=1e-5) and 5 < result["norm"] < 150

    path = tmp_path / "run.toml"
    path.write_text(f'model = "m"\noutput = "o"\nmethod = "registers"\n{as_toml(result)}')
    method = load_run_config(path).get_method()
    assert method.settings == RegistersConfig(((WRITER, 0),))
    sinks = SinkConfig(criterion="norm", vit_tau=result["norm"])
    pixels = np.random.default_rng(1).normal(size=(2, 3, 56, 56)).astype(np.float32)
    before, after = (vlm.with_method(each, sinks=sinks).v_sinks(pixels) for each in (vlm.method, method))
    assert (np.flatnonzero(before[0]) == truth.v_sinks).all() and not after.any()


def test_a_model_without_outliers(tiny_model, photos):
    base = load_backbone(tiny_model, verify=False)
    images = sorted(photos.glob("[01].png"))
    with pytest.raises(InputError, match=r"have no two modes, so none is an outlier \(they reach .*\); name a norm, --norm X"):
        find_registers(base, images, "What is it?", 3)
    with pytest.raises(InputError, match=r"no patch has a norm of 1e\+06, the largest is .*: lower --norm"):
        find_registers(base, images, "What is it?", 3, norm=1e6)


def test_on_the_command_line(tiny_model, photos, tmp_path, capfd):
    given = ["calibrate", str(tiny_model), "--images", str(photos), "--limit", "2"]
    assert main([*given, "--norm", "3"]) == 65 and "--norm goes with --registers" in capfd.readouterr().err
    assert main([*given, "--registers", "4", "--norm", "3", "--out", str(tmp_path / "registers.toml"), "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert len(result["neurons"]) == 4 and "of the patches are outliers: 3 is implausibly low" in result["warnings"][0]
    assert result["layer"] == 0 and result["format"] == "lsg-registers-1"
    assert tomllib.loads((tmp_path / "registers.toml").read_text())["registers"] == result["registers"]


def test_layers_and_neurons_by_hand():
    """Three outliers over four layers; two layers of three neurons."""
    assert growth_layer(np.array([[1, 1, 9], [9, 2, 9], [9, 9, 9], [9, 9, 9]]), 5.0) == 1
    sizes = np.array([[0.5, 3.0, 1.0], [2.0, 0.1, 3.0], [9.0, 9.0, 9.0]])
    assert most_active(sizes, 1, 3) == [(0, 1, 3.0), (1, 2, 3.0), (1, 0, 2.0)]
    assert len(most_active(sizes, 0, 5)) == 3
