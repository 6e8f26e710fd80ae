"""`calibrate` finds planted dimensions, says if there are none, and writes TOML that a configuration reads."""

import dataclasses

import numpy as np
import pytest
from PIL import Image
from planted import planted_model

from lsg_jax.analysis.calibrate import as_toml, calibrate
from lsg_jax.config import SinkConfig
from lsg_jax.errors import InputError
from lsg_jax.opening import load_backbone
from lsg_jax.run_config import load_run_config
from lsg_jax.vlm import VLM


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Five images of noise, and a broken one among them."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for index in range(5):
        Image.fromarray(rng.integers(0, 256, (56, 56, 3), np.uint8)).save(folder / f"{index}.png")
    (folder / "2b.png").write_bytes(b"<!doctype html>")
    return sorted(folder.iterdir())


def run_config(folder, table):
    path = folder / "run.toml"
    path.write_text(f'model = "m"\noutput = "o"\n{table}[gate]\nlayers = [1]\n')
    return load_run_config(path)


def test_planted_dimensions_are_found(tiny_model, photos, tmp_path):
    vlm, truth = planted_model(tiny_model)
    unknown = VLM(dataclasses.replace(vlm.config, sinks=SinkConfig()), vlm.frozen, folder=vlm.folder, digest=vlm.digest)
    result = calibrate(unknown, photos, "What is it?")
    vit, llm = result["vit"], result["llm"]
    assert vit["dims"] == [truth.vit_dim] and sorted(llm["dims"]) == sorted(truth.llm_dims)
    assert 1 < vit["tau"] < 135 and 1 < llm["tau"] < 380
    # two of each in five images, in two of the three middle layers; BOS has the language model's dimensions, too
    assert (vit["sinks"], vit["images_with_sinks"]) == (10, 5) and vit["share"] == pytest.approx(2 / 49, abs=1e-5)
    assert (llm["sinks"], llm["images_with_sinks"], llm["text_sinks"]) == (20, 5, 10)
    assert llm["flagged"] == [0.0] * truth.first_layer + [pytest.approx(2 / 49, abs=1e-5)] * 4
    assert vit["norm"]["gap"][0] < 5 and vit["norm"]["gap"][1] > 130
    assert (vit["confidence"], llm["confidence"]) == ("medium", "high") and result["layers"] == [1, 2, 3]
    assert any("both halves of the images give the same" in reason for reason in llm["reasons"])
    assert result["images"] == 5 and len(result["skipped"]) == 1 and "2b.png: an HTML page" in result["skipped"][0]
    assert result["warnings"] == []
    proposed = SinkConfig(vit_dims=(truth.vit_dim,), vit_tau=vit["tau"], llm_dims=tuple(llm["dims"]), llm_tau=llm["tau"])
    assert run_config(tmp_path, as_toml(result)).sinks == proposed


def test_a_model_without_sinks(tiny_model, photos, tmp_path):
    base = load_backbone(tiny_model, verify=False)
    result = calibrate(base, photos[:1], "What is it?")
    for stage in ("vit", "llm"):
        assert result[stage]["confidence"] == "none" and result[stage]["dims"] is result[stage]["tau"] is None
    assert result["sinks"] == {} and ["no V-sink dimensions" in w or "no L-sink dimensions" in w for w in result["warnings"]]
    text = as_toml(result)
    assert all(line.startswith("#") for line in text.splitlines()) and run_config(tmp_path, text).sinks is None

    # known settings of the folder are kept; norms with two modes are used if there is nothing else
    known = result | {"sinks": {"llm_criterion": "dim_abs", "llm_dims": [7], "llm_tau": 50.0}}
    assert run_config(tmp_path, as_toml(known)).sinks == SinkConfig(llm_dims=(7,), llm_tau=50.0)
    by_norm = result | {"sinks": {"criterion": "norm", "vit_tau": 80.0}}
    by_norm["vit"] = by_norm["vit"] | {"norm": {"tau": 80.0, "gap": [60.0, 105.0], "share": 0.01}}
    assert "norms have two modes with a gap from 60 to 105" in as_toml(by_norm)
    assert run_config(tmp_path, as_toml(by_norm)).sinks == SinkConfig(criterion="norm", vit_tau=80.0)

    with pytest.raises(InputError, match=r"none of the 1 images can be read, the first: .*2b\.png"):
        calibrate(base, [path for path in photos if path.name == "2b.png"], "What is it?")
