"""Pooled hidden states against means over the states of all tokens, the images of the study, and `lsg probe` as a whole."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from PIL import Image

import lsg_jax
from lsg_jax.analysis import probe as probe_module
from lsg_jax.analysis.probe import ProbeSettings, collect, ordinary_first, probe_study, token_orders
from lsg_jax.analysis.probe_images import clevr_data, scene_data
from lsg_jax.cli import main
from lsg_jax.config import MeshConfig, SinkConfig
from lsg_jax.data import clevr, shapes
from lsg_jax.data.shapes import ATTRIBUTES
from lsg_jax.errors import ConfigError, InputError, NonFiniteError
from lsg_jax.methods.method_model import assemble
from lsg_jax.sharding import make_mesh
from lsg_jax.vlm import VLM

SINKS = SinkConfig(criterion="norm", vit_tau=19.0, llm_criterion="norm", llm_tau=25.0)
SETTINGS = ProbeSettings(draws=3, tokens=3, seed=4, batch_size=8)
IMAGES = 40
SILENT = lambda *_: None


@pytest.fixture(scope="module")
def vlm(tiny_model):
    return lsg_jax.load(tiny_model, mesh=make_mesh(MeshConfig()), sinks=SINKS)


def test_pooled_states_are_means_over_tokens(vlm, tmp_path):
    data = scene_data(IMAGES, side=56, seed=SETTINGS.seed)
    pooled = collect(vlm, data, SETTINGS, tmp_path, SILENT)
    assert pooled.features.shape == (6, IMAGES, 2 + 3, 64) and not list(tmp_path.iterdir())

    encoded = vlm.processor.encode_question(SETTINGS.prompt)
    pixels = [vlm.processor.pixels(data.read(i)[0]) for i in range(IMAGES)]
    batch = vlm.pad_questions([encoded] * IMAGES, pixels)

    @jax.jit
    def everything(params, batch):
        model = assemble(vlm.graphdef, params)
        return model.image_features(batch.images)[0], model(batch, observe=lambda view: view.hidden).observed

    features, states = map(np.asarray, everything(vlm.params, batch))
    v_sinks = np.linalg.norm(features, axis=-1) >= SINKS.vit_tau
    short = 0
    for i in range(IMAGES):
        tokens = states[:, i, np.asarray(batch.input_ids[i]) == vlm.config.image_token_id]
        l_sinks = (np.linalg.norm(tokens, axis=-1) >= SINKS.llm_tau) & ~v_sinks[i]
        never = ~v_sinks[i] & ~l_sinks.any(0)
        drawn = [[p for p in order if never[p]][:3] for order in token_orders(SETTINGS, i, 49)]
        short += any(set(few) - set(order[:6]) for few, order in zip(drawn, token_orders(SETTINGS, i, 49), strict=True))
        for layer in range(6):
            groups = [v_sinks[i], l_sinks[layer], *drawn]
            there = [v_sinks[i].any(), l_sinks[layer].any(), never.sum() >= 3]
            assert pooled.present[layer, i].tolist() == there
            for pool, group, known in zip(pooled.features[layer, i], groups, there[:2] + there[2:] * 3, strict=True):
                expected = tokens[layer][group].mean(0) if known else pool
                np.testing.assert_allclose(pool, expected, atol=1e-5 * np.abs(tokens[layer]).max())
        assert pooled.values[i] == data.read(i)[1]
    assert short > 0 and 0 < pooled.present[:, :, 1].mean() < 1  # a second run was needed for some; some layers have no L-sinks


def test_ordinary_tokens_are_never_sinks_and_all_equally_likely():
    rng = np.random.default_rng(0)
    ordinary = rng.random((1, 12)) < 0.6
    settings = ProbeSettings(draws=2000, tokens=3)
    drawn = ordinary_first(token_orders(settings, 7, 12)[None], ordinary)[0, :, :3]
    assert ordinary[0, drawn].all() and all(len(set(few)) == 3 for few in drawn.tolist())
    counts = np.bincount(drawn.ravel(), minlength=12)[ordinary[0]]
    share = 3 / ordinary.sum()
    assert np.abs(counts / 2000 - share).max() < 4 * (share * (1 - share) / 2000) ** 0.5
    few = ordinary_first(token_orders(settings, 0, 12)[None, :1], np.arange(12)[None] == 5)
    assert few[0, 0, 0] == 5 and sorted(few[0, 0]) == list(range(12))


def lsg(capfd, *arguments):
    capfd.readouterr()
    return main([str(a) for a in arguments]), *capfd.readouterr()


def test_command(vlm, tiny_model, tmp_path, capfd):
    sinks = [f"{name}={getattr(SINKS, name)}" for name in ("criterion", "vit_tau", "llm_criterion", "llm_tau")]
    common = ["probe", tiny_model, "--data", "scenes", "--sinks", *sinks]
    out = tmp_path / "o"
    options = ["--images", IMAGES, "--draws", 3, "--tokens", 3, "--seed", 4, "--layers", 5, 0, "--out", out]
    code, stdout, err = lsg(capfd, *common, *options)
    assert code == 0, err
    assert stdout.startswith("attribute  group") and "l_sink" in stdout
    text = (out / "probe.json").read_text()
    result = json.loads(text)
    assert next(iter(result)) == "format" and result["format"] == "lsg-probe-1" and "NaN" not in text
    assert result["images"] == {"train": 32, "test": 8} and result["layers"] == [0, 5] and result["backbone"] == vlm.digest
    keys = {"attribute", "layer", "group", "metric", "mean", "std", "chance", "draws", "train", "test"}
    assert {(r["attribute"], r["layer"], r["group"], r["metric"]) for r in result["rows"]} == {
        (attribute, layer, group, metric)
        for attribute in ATTRIBUTES
        for layer in (0, 5)
        for group in ("v_sink", "l_sink", "ordinary")
        for metric in ("accuracy", "f1")
    }
    for row in result["rows"]:
        numbers = [row[name] for name in ("mean", "std", "chance")]
        if "reason" in row:
            assert set(row) == keys | {"reason"} and numbers == [None] * 3
        else:
            assert set(row) == keys and all(0 <= number <= 1 for number in numbers) and row["train"] >= 20
    for group, layer in (("v_sink", 0), ("ordinary", 0), ("l_sink", 5)):
        assert any(r["mean"] is not None for r in result["rows"] if (r["group"], r["layer"]) == (group, layer))
    assert all(row["reason"] for row in result["rows"] if row["group"] == "l_sink" and row["layer"] == 0)
    assert {path.name for path in out.iterdir()} == {"probe.json", "probe.csv", "probe.svg", "probe.png"}

    for arguments, message in [
        (["--draws", "1"], "--draws is 1: it must lie in [2, 1e4]"),
        (["--test-data", tmp_path], "--test-data goes with a folder"),
        (["--data", tmp_path / "none"], "run `lsg prepare`"),
    ]:
        code, stdout, err = lsg(capfd, *common, *arguments, "--out", tmp_path / "bad")
        assert code == 65 and stdout == "" and message in err and err.count("\n") == 1, arguments
        assert not (tmp_path / "bad" / "probe.json").exists()


def test_groups_without_tokens_have_a_reason(vlm, tmp_path, monkeypatch):
    """Every token is a sink, and one kind of sink has no criterion."""
    data = scene_data(IMAGES, side=56, seed=0)

    def pool(vlm, encoded, pixels, orders, tokens):
        states = np.random.default_rng(0).normal(size=(6, len(pixels), 5, 64)).astype(np.float32)
        return states, np.concatenate([np.zeros((6, len(pixels), 49), bool), np.ones((1, len(pixels), 49), bool)])

    monkeypatch.setattr(probe_module, "_pool", pool)
    only_v = SinkConfig(criterion="norm", vit_tau=0.0)

    def study(sinks, layers=(0, 5)):
        settings = dataclasses.replace(SETTINGS, layers=layers)
        model = VLM(dataclasses.replace(vlm.config, sinks=sinks), vlm.frozen, folder=vlm.folder, mesh=vlm.mesh)
        return probe_study(model, data, settings, tmp_path, SILENT)

    result = study(only_v)
    assert len(result["warnings"]) == 2 and "100% of the visual tokens are a sink" in result["warnings"][1]
    for row in result["rows"]:
        if row["group"] == "v_sink":
            assert (row["train"], row["test"]) == (32, 8) and math.isfinite(row["mean"])
        else:
            assert row["mean"] is None and (row["train"], row["test"]) == (0, 0)
            assert ("no L-sink dimensions" if row["group"] == "l_sink" else "have such tokens") in row["reason"]
    monkeypatch.setattr(probe_module, "_pool", lambda *a: (np.full((6, 8, 5, 64), np.nan), pool(*a)[1]))
    with pytest.raises(NonFiniteError, match="enter layer 0 are not finite for images 0 to 7"):
        study(only_v)
    with pytest.raises(ConfigError, match="run `lsg calibrate`"):
        study(SinkConfig())
    with pytest.raises(ConfigError, match="layer 6 does not exist, the model has layers 0 to 5"):
        study(only_v, (5, 6))


def published(folder, split, count):
    """CLEVR as published: `count` scenes."""
    (folder / "images" / split).mkdir(parents=True)
    (folder / "scenes").mkdir(exist_ok=True)
    colours, scenes = ("red", "blue"), []
    for i in range(count):
        name = f"CLEVR_{split}_{i:06d}.png"
        Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / "images" / split / name)
        thing = {
            "size": "large",
            "pixel_coords": [1, 1, 9.0 + i],
            "shape": "cube",
            "material": "metal",
            "color": colours[i % 2],
        }
        scenes.append({"image_filename": name, "objects": [thing] * (1 + i % 10)})
    (folder / "scenes" / f"CLEVR_{split}_scenes.json").write_text(json.dumps({"scenes": scenes}))


def test_images(tmp_path):
    source = tmp_path / "CLEVR_v1.0"
    for split, count in (("train", 30), ("val", 12)):
        published(source, split, count)
        clevr.prepare_clevr(source, tmp_path / split, split=split)
    names = lambda data, where: {data.read(i)[1]["name"] for i in where}
    data = clevr_data(tmp_path / "train", None, None, seed=0)
    assert (data.train, data.test, data.vocabularies) == (24, 6, clevr.ATTRIBUTES)
    assert len(names(data, range(24)) | names(data, range(24, 30))) == 30
    assert names(data, range(24)) != names(clevr_data(tmp_path / "train", None, None, seed=1), range(24))
    two = clevr_data(tmp_path / "train", tmp_path / "val", None, seed=0)
    assert (two.train, two.test) == (30, 12) and all("_val_" in name for name in names(two, range(30, 42)))
    assert all("_train_" in name for name in names(two, range(30)))
    for arguments, message in [
        ((source, None, None), r"CLEVR as published; run `lsg prepare .* --format clevr` first"),
        ((tmp_path / "train", None, 31), "train: 5 images, but 6 are wanted"),
        ((tmp_path / "val", None, None), "12 images are too few: 25 at least"),
        ((tmp_path / "train", tmp_path / "train", None), "the same scenes"),
        ((tmp_path / "train", tmp_path / "val", 80), "train: 30 images, but 64 are wanted"),
    ]:
        with pytest.raises(InputError, match=message):
            clevr_data(*arguments, seed=0)

    with pytest.raises(InputError, match="24 images are too few: 25 at least"):
        scene_data(24, side=56, seed=0)
    drawn = scene_data(50, side=20, seed=3)
    images = [drawn.read(i) for i in range(50)]
    assert (drawn.train, drawn.test) == (40, 10) and drawn.vocabularies is shapes.ATTRIBUTES
    assert images[0][0].size == (56, 56) and sorted(values["count"] for _, values in images[:10]) == list(range(1, 11))
    assert len({image.tobytes() for image, _ in images}) == 50
