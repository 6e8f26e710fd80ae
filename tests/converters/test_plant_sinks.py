"""Planted sinks: the direction in closed form, which weights change, and what that does to attention."""

import json
import logging
from dataclasses import replace

import numpy as np
import pytest

import lsg_jax
from converters.convert import convert
from converters.plant_sinks import K_PROJ, PlantSettings, _batch, _seen, direction_of, plant
from lsg_jax.analysis.pointing import measure, scene_target
from lsg_jax.checkpoint import iter_base, read_manifest, verify_base
from lsg_jax.cli import main
from lsg_jax.data.scene_targets import questions_with_target
from lsg_jax.errors import ConfigError, InputError
from lsg_jax.inspection import describe
from lsg_jax.methods.method_model import assemble
from lsg_jax.progress import silent
from lsg_jax.quickstart import CHECKPOINT, check_planted

LAYERS, STRENGTH, SCENES = (2, 5), 5.0, 16


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embedded") / "model"
    convert(CHECKPOINT, folder, dtype="float32")
    return folder


@pytest.fixture(scope="module")
def planted(embedded, tmp_path_factory):
    """The folder, and what `plant` returned."""
    folder = tmp_path_factory.mktemp("planted") / "model"
    record = plant(embedded, folder, PlantSettings(layers=LAYERS, strength=STRENGTH, scenes=SCENES))
    return folder, record


def kernels(folder):
    """float32 [L, D, K, H], k_proj of all layers."""
    return np.concatenate([block for name, _, block in iter_base(folder) if name == K_PROJ])


def test_direction_has_least_spill():
    """d·m is 1, and among the directions with d·m = 1 none has a smaller quadratic form."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(600, 12)) * rng.uniform(0.3, 3, 12)
    v_sink, visual = np.arange(600) < 40, np.arange(600) < 400
    x[v_sink] += 3 * rng.normal(size=12)
    d, mean = direction_of(x, visual, v_sink, within=0.25)
    np.testing.assert_allclose(mean, x[v_sink].mean(0), rtol=1e-5)
    assert d @ mean == pytest.approx(1, abs=1e-5)
    spill = lambda d: (
        (np.square(x[visual & ~v_sink] @ d).mean() + np.square(x[~visual] @ d).mean()) / 2
        + 0.25 * np.square((x[v_sink] - mean) @ d).mean()
    )
    for _ in range(50):
        aside = rng.normal(size=12)
        aside -= (aside @ mean) / (mean @ mean) * mean
        assert spill(d + 0.1 * np.linalg.norm(d) * aside / np.linalg.norm(aside)) > spill(d)


def test_only_the_named_key_projections_change(embedded, planted):
    folder, record = planted
    assert not verify_base(folder)
    before, after = read_manifest(embedded), read_manifest(folder)
    changed = {name for name, leaf in after.leaves.items() if leaf != before.leaves[name]}
    assert changed == {K_PROJ} and after.config.sinks == before.config.sinks
    difference = kernels(folder) - kernels(embedded)
    for layer, change in enumerate(difference.reshape(8, 128, -1)):
        assert np.linalg.matrix_rank(change, tol=1e-4 * max(np.abs(change).max(), 1e-6)) == (layer in LAYERS)
    # the note is read again, lists what happened, and is no field that the conversion fails to understand
    assert json.loads((folder / "hf" / "config.json").read_text())["lsg_planted_sinks"] == record
    assert describe(folder)["planted sinks"] == record and "planted sinks" not in describe(embedded)
    assert not any("lsg_planted_sinks" in name for name in after.ignored)
    assert record["source"] == before.digest and [row["layer"] for row in record["keys"]] == [2, 5]
    for row in record["keys"]:
        assert 0.8 < row["v_sink"]["mean"] < 1.2 and row["ordinary"]["rms"] < 0.25 and row["text"]["rms"] < 0.25


def test_the_note_says_what_tokens_get_in_the_planted_model(embedded, planted):
    """Sinks in layer 2 change what enters layer 5, so that more of the planted key spills there."""
    folder, record = planted
    before, after = (
        _seen(lsg_jax.load(path), split, scenes, 0, silent)
        for path, split, scenes in ((embedded, "train", SCENES), (folder, "validation", SCENES // 2))
    )
    for row in record["keys"]:
        layer = row["layer"]
        direction, _ = direction_of(before.x[layer], before.visual, before.v_sink, within=0.25)
        found, ordinary = after.x[layer] @ direction, after.visual & ~after.v_sink
        assert row["v_sink"]["mean"] == pytest.approx(found[after.v_sink].mean(), abs=1e-4)
        assert row["ordinary"]["rms"] == pytest.approx(np.sqrt(np.mean(np.square(found[ordinary]))), abs=1e-4)
        assert row["text"]["max"] == pytest.approx(np.abs(found[~after.visual]).max(), abs=1e-4)


def test_sinks_draw_attention_in_planted_layers_and_not_below(embedded, planted):
    asked = [scene_target(question) for question in questions_with_target("test", "smallest_colour", 8)]
    before, after = (measure(lsg_jax.load(folder), asked, ("raw",)) for folder in (embedded, planted[0]))
    np.testing.assert_array_equal(before.sink_share[:, :2], after.sink_share[:, :2])  # nothing below is touched
    rise = after.sink_share.mean(0) - before.sink_share.mean(0)
    assert rise[2] > 0.2 and rise[5] > 0.2
    # text alone passes the same weights, so it changes a little: far less than the layers' keys of V-sinks do
    ids = np.array([lsg_jax.load(embedded).processor.encode_question("How many shapes are there?", image_sizes=()).ids])
    base, other = (lsg_jax.load(folder).logits(ids) for folder in (embedded, planted[0]))
    assert 0 < np.abs(base - other).max() < 0.1 * np.abs(base).max()


@pytest.fixture(scope="module")
def marked(embedded, tmp_path_factory):
    """The folder of a model whose V-sinks were marked, and what `plant` returned."""
    folder = tmp_path_factory.mktemp("marked") / "model"
    return folder, plant(embedded, folder, PlantSettings(layers=LAYERS, strength=STRENGTH, mark=1.0, text=30.0, scenes=SCENES))


def test_a_mark_changes_the_tokens_of_v_sinks_alone(embedded, planted, marked):
    """Tokens that the connector makes of ordinary patches stay as they were, and the planted key spills less."""
    folder, record = marked
    before, after = read_manifest(embedded), read_manifest(folder)
    changed = {name for name, leaf in after.leaves.items() if leaf != before.leaves[name]}
    assert {name.rpartition("/")[0] for name in changed - {K_PROJ}} == {"projector/linear_1", "projector/linear_2"}
    question = questions_with_target("test", "smallest_colour", 1)[0]
    made = []
    for vlm in (lsg_jax.load(embedded), lsg_jax.load(folder)):
        model = assemble(vlm.graphdef, vlm.params)
        features, v_sink = model.image_features(_batch(vlm, [question]).images)
        made.append(np.asarray(model.projector(features))[0])
    v_sink = np.asarray(v_sink)[0]
    moved = np.linalg.norm(made[1] - made[0], axis=1) / np.linalg.norm(made[0], axis=1)
    assert v_sink.any() and moved[v_sink].min() > 0.3 and np.median(moved[~v_sink]) < 1e-3
    assert record["unit_share"] < 1e-4
    for mine, unmarked in zip(record["keys"], planted[1]["keys"], strict=True):
        assert mine["ordinary"]["rms"] < unmarked["ordinary"]["rms"] / 2 and mine["text"]["rms"] < unmarked["text"]["rms"] / 2
        assert 0.8 < mine["v_sink"]["mean"] < 1.2


def test_same_settings_give_the_same_model(embedded, planted, tmp_path):
    plant(embedded, tmp_path / "again", PlantSettings(layers=LAYERS, strength=STRENGTH, scenes=SCENES))
    assert read_manifest(tmp_path / "again").digest == read_manifest(planted[0]).digest


def test_errors_and_command(embedded, tiny_model, tmp_path, capfd, caplog):
    settings = PlantSettings(layers=(1,), scenes=8)
    for model, out, given, error, message in [
        (tiny_model, "a", settings, InputError, "no V-sinks in 8 scenes, so there is nothing to plant"),
        (embedded, "b", PlantSettings(layers=(8,)), ConfigError, r"plant.layers is \[8\]: give some of the layers 0 to 7"),
        (embedded, "b", PlantSettings(layers=(1, 5, 2)), ConfigError, "plant.layers must ascend and name no layer twice"),
        (embedded, "b", PlantSettings(layers=()), ConfigError, r"plant.layers is \[\]"),
    ]:
        with pytest.raises(error, match=message):
            plant(model, tmp_path / out, given)
    assert not list(tmp_path.iterdir())
    with caplog.at_level(logging.WARNING):
        code = main(["plant", str(embedded), str(tmp_path / "m"), "--layers", "4", "--strength", "2", "--scenes", "8"])
    stdout, err = capfd.readouterr()
    assert code == 0 and stdout.endswith(f"\n{tmp_path / 'm'}\n") and stdout.startswith("layer"), err
    assert "lsg_planted_sinks" not in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_the_quickstart_refuses_a_control_of_other_settings(embedded, planted):
    folder, settings = planted[0], PlantSettings(layers=LAYERS, strength=STRENGTH, scenes=SCENES)
    digest = read_manifest(embedded).digest
    check_planted(folder, settings, digest)
    for changed, source, message in (
        (replace(settings, strength=8.0), digest, "with strength 5.0 instead of 8.0"),
        (replace(settings, layers=(2,)), digest, r"with layers \[2, 5\] instead of \[2\]"),
        (settings, "0" * 64, "into another model"),
    ):
        with pytest.raises(InputError, match=f"{folder}: its sinks were planted {message}; remove {folder.parent} and run"):
            check_planted(folder, changed, source)
    with pytest.raises(InputError, match="planted into another model"):  # nothing was planted there
        check_planted(embedded, settings, digest)


def test_a_planted_model_is_not_planted_again(planted, tmp_path):
    """What inspect says of a model would leave out what was done before."""
    with pytest.raises(InputError, match="sinks were planted there already; plant into the model that it was made from"):
        plant(planted[0], tmp_path / "twice", PlantSettings(layers=(1,), scenes=SCENES))
    assert not (tmp_path / "twice").exists()
