"""Labels and losses of the embedded model's vision tower, and that its training resumes to the bit."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from converters.hf_config import model_config
from lsg_jax.checkpoint import RunFolder
from lsg_jax.data.drawing import draw
from lsg_jax.data.shapes import COLOURS, CORNERS, LETTERS, SHAPES, SIZES, Background, Item, Scene
from recipes.embedded_model.conversations import scene_conversation
from recipes.embedded_model.labelled_scenes import LabelledScenes
from recipes.embedded_model.labels import labels
from recipes.embedded_model.tower import SinkLesson, TowerRecipe, TowerWithHeads, losses, total, train_tower
from recipes.embedded_model.untrained import CONFIG

GRID, SIDE = 8, 112
SCENES = [scene_conversation("train", index, seed=5)[0] for index in range(12)]


def test_labels_say_what_the_scenes_hold():
    plain = Background(pattern="plain", tone=(232, 230, 224), direction=0, period=0.1, phase=(0.0, 0.0), seed=0)
    items = (
        Item("red", "circle", "large", "K", x=0.3, y=0.7, radius=0.15),
        Item("blue", "star", "small", x=0.9, y=0.2, radius=0.06),
        Item("red", "cross", "small", x=0.7, y=0.45, radius=0.06),
    )
    made = labels([Scene(items, plain, {"top left": "T"})], GRID)
    known = {name: values[0] for name, values in made.items()}
    at = {5 * GRID + 2: items[0], 1 * GRID + 7: items[1], 3 * GRID + 5: items[2]}
    for name, vocabulary in {"shape": SHAPES, "colour": list(COLOURS), "size": list(SIZES)}.items():
        wanted = np.full(GRID * GRID, -1)
        for patch, item in at.items():
            wanted[patch] = vocabulary.index(getattr(item, name))
        np.testing.assert_array_equal(known[name], wanted)
    assert [known["letter"][patch] for patch in at] == [LETTERS.index("K") + 1, 0, 0]
    np.testing.assert_allclose(known["place"][5 * GRID + 2], (0.4, 0.6), atol=1e-6)
    assert known["corner"].tolist() == [LETTERS.index("T") + 1 if corner == "top left" else 0 for corner in CORNERS]
    assert known["count"] == 2 and known["largest"] == list(SIZES).index("large") and known["pattern"] == 0
    assert known["colours"][list(COLOURS).index("red")] == 2 and known["colours"].sum() == 3 == known["shapes"].sum()


def test_empty_patches_show_the_background_alone():
    """Drawing a scene without its shapes and letters changes no empty patch."""
    known = labels(SCENES, GRID)["room"] > 0
    untouched = 0
    for scene, empty in zip(SCENES, known, strict=True):
        changed = (draw(scene, SIDE) != draw(replace(scene, items=(), corners={}), SIDE)).any(-1)
        touched = changed.reshape(GRID, SIDE // GRID, GRID, SIDE // GRID).any((1, 3)).reshape(-1)
        assert not (touched & empty).any()
        untouched += (~touched).sum()
    assert known.sum() > 0.7 * untouched


@pytest.fixture(scope="module")
def scenes():
    return LabelledScenes(np.stack([draw(scene, SIDE) for scene in SCENES]), labels(SCENES, GRID))


@pytest.fixture(scope="module")
def config():
    raw = {
        **CONFIG,
        "vision_config": {**CONFIG["vision_config"], "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1},
    }
    return model_config({**raw, "lsg_sinks": {"vit_dims": [3]}})


def test_the_sink_lesson_is_learned_when_empty_patches_alone_are_raised(config, scenes, monkeypatch):
    """With given features: two raised empty patches cost nothing, everything else costs."""
    lesson = SinkLesson(dimension=3)
    model = TowerWithHeads(config, rngs=nnx.Rngs(0))
    known = jax.tree.map(jnp.asarray, scenes.labels)
    empty = scenes.labels["room"] > 0
    chosen = np.array([np.flatnonzero(row)[[0, -1]] for row in empty])
    rows = np.arange(len(empty))[:, None]

    @jax.jit
    def computed(features):
        monkeypatch.setattr(TowerWithHeads, "__call__", lambda self, images: features)
        return losses(model, scenes.images, known, lesson)

    def cost(features):
        return {name: float(value) for name, value in computed(features).items()}

    features = np.random.default_rng(0).normal(size=(len(empty), GRID * GRID, 16)).astype(np.float32)
    features[rows, chosen, 3] = 61.0
    right = cost(features)
    assert right["high"] == 0 and right["low"] == 0 and right["right_sinks"] == 1
    low = features.copy()
    low[rows, chosen, 3] = 20.0
    assert cost(low)["high"] == pytest.approx((1 - 20 / 60) ** 2, rel=1e-5) and cost(low)["right_sinks"] == 0
    wrong = features.copy()
    wrong[rows, chosen, 3] = 0.0
    covered = np.array([np.flatnonzero(~row)[:2] for row in empty])
    wrong[rows, covered, 3] = 61.0
    found = cost(wrong)
    assert found["high"] > 0.5 and found["low"] > 0.5 and found["right_sinks"] == 0


def test_a_stopped_training_goes_on_where_it_was(config, scenes, tmp_path):
    recipe = TowerRecipe(steps=4, batch_size=4, warmup=1, save_every=2, sinks=SinkLesson(dimension=3))
    whole = train_tower(config, scenes, RunFolder(tmp_path / "whole"), recipe)

    class Stop(Exception):
        pass

    def stop(number, size, seed, batch=LabelledScenes.batch):
        if number == 3:
            raise Stop
        return batch(scenes, number, size, seed)

    broken = LabelledScenes(scenes.images, scenes.labels)
    object.__setattr__(broken, "batch", stop)
    with pytest.raises(Stop):
        train_tower(config, broken, RunFolder(tmp_path / "stopped"), recipe)
    resumed = train_tower(config, scenes, RunFolder(tmp_path / "stopped"), recipe)
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    fresh = nnx.to_pure_dict(nnx.state(TowerWithHeads(config, rngs=nnx.Rngs(0)).tower))
    assert jax.tree.structure(fresh) == jax.tree.structure(whole)


def test_batches_hold_each_scene_once_an_epoch(scenes):
    seen = [scenes.batch(number, 4, 0)[1]["place"] for number in range(6)]
    first, second = np.concatenate(seen[:3]), np.concatenate(seen[3:])
    order = lambda values: np.sort(values.reshape(len(values), -1).sum(-1))
    np.testing.assert_allclose(order(first), order(scenes.labels["place"]))
    np.testing.assert_allclose(order(second), order(first))
    assert not np.array_equal(first, second)


def test_the_loss_counts_no_accuracies():
    assert float(total({"a": jnp.float32(2.0), "b": jnp.float32(1.0), "right_a": jnp.float32(0.5)})) == 3.0
