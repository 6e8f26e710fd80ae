"""The targets of the projector's alignment, and that training reaches them."""

import numpy as np
import pytest
from flax import nnx

from converters.hf_config import model_config
from lsg_jax.data.shapes import CORNERS, Background, Item, Scene
from lsg_jax.model.projector import Projector
from recipes.embedded_model.alignment import WORDS, AlignmentRecipe, align_projector, patch_kinds, targets
from recipes.embedded_model.conversations import scene_conversation
from recipes.embedded_model.labels import labels
from recipes.embedded_model.untrained import CONFIG

GRID, WIDTH = 8, 128
RNG = np.random.default_rng(0)
EMBEDDINGS = {word: RNG.standard_normal(WIDTH).astype(np.float32) for word in sorted(WORDS)}


def of(*words):
    return sum(EMBEDDINGS[word] for word in words)


def test_patches_become_the_words_for_them():
    background = Background(pattern="dots", tone=(232, 230, 224), direction=0, period=0.1, phase=(0.0, 0.0), seed=0)
    items = (
        Item("red", "circle", "large", "K", x=0.3, y=0.7, radius=0.15),
        Item("blue", "star", "small", x=0.9, y=0.4, radius=0.06),
        Item("red", "cross", "small", x=0.7, y=0.45, radius=0.06),
    )
    known = labels([Scene(items, background, {"top right": "T"})], GRID)
    v_sinks = np.zeros((1, GRID * GRID), bool)
    v_sinks[0, 10] = True  # nothing is there
    (wanted,), (kinds,) = targets(known, v_sinks, EMBEDDINGS), patch_kinds(known, v_sinks)
    at = {
        5 * GRID + 2: of("red", "circle", "large", "K"),
        3 * GRID + 7: of("blue", "star", "small"),
        3 * GRID + 5: of("red", "cross", "small"),
        7: of("T", "corner", "top", "right"),
        10: of("3", "dots") + (2 * of("red") + of("blue", "circle", "star", "cross")) / 4,
        0: of("background"),
    }
    where = {5 * GRID + 2: (0.3, 0.7), 3 * GRID + 7: (0.9, 0.4), 3 * GRID + 5: (0.7, 0.45)}
    for patch in range(GRID * GRID):
        x, y = where.get(patch, (0.5, 0.5))
        place = (x - 0.5) * (of("right") - of("left")) + (y - 0.5) * (of("bottom") - of("top"))
        value = at.get(patch, of("background") if known["room"][0, patch] > 0 else np.zeros(WIDTH))
        np.testing.assert_allclose(wanted[patch], value + place, rtol=1e-5, atol=1e-5)
    assert [kinds[patch] for patch in at] == [0, 0, 0, 3, 1, 2]
    touched = (known["room"][0] == 0) & ~np.isin(np.arange(GRID * GRID), list(at))
    assert touched.any() and (kinds[touched] == 4).all()


def test_every_corner_has_its_patch():
    scenes = [scene_conversation("train", index, seed=5)[0] for index in range(20)]
    known = labels(scenes, GRID)
    wanted = targets(known, np.zeros((20, GRID * GRID), bool), EMBEDDINGS)
    patches = dict(zip(CORNERS, (0, GRID - 1, GRID * (GRID - 1), GRID * GRID - 1), strict=True))
    for scene, row in zip(scenes, wanted, strict=True):
        for corner, letter in scene.corners.items():
            np.testing.assert_allclose(row[patches[corner]], of(letter, "corner", *corner.split()), rtol=1e-5, atol=1e-5)


def test_the_projector_learns_a_linear_map():
    """Kinds of patches count alike: one of a hundred is learned as well."""
    config = model_config(CONFIG)
    kinds = np.repeat([0, 1], [990, 10])
    width = config.vision.hidden_size * len(config.feature_layers)
    features = RNG.standard_normal((1000, width)).astype(np.float32) + 3 * kinds[:, None].astype(np.float32)
    wanted = np.where(kinds[:, None] == 1, of("red"), of("background")).astype(np.float32)
    start = nnx.to_pure_dict(nnx.state(Projector(config, rngs=nnx.Rngs(0), dtype=np.float32)))
    recipe = AlignmentRecipe(steps=800, patches=256)
    trained, explained = align_projector(config, start, features, wanted, kinds, recipe)
    assert explained > 0.95
    graphdef = nnx.graphdef(Projector(config, rngs=nnx.Rngs(0), dtype=np.float32))
    given = np.asarray(nnx.merge(graphdef, trained)(features))
    for kind in (0, 1):
        rows = kinds == kind
        assert np.square(given[rows] - wanted[rows]).mean() < 0.05 * np.square(wanted[rows]).mean()
    assert align_projector(config, start, features, wanted, kinds, recipe)[1] == pytest.approx(explained)
