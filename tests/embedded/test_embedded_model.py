"""The recipe of the embedded model, from random weights to a checkpoint, with hardly any training."""

import json

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

import lsg_jax
from converters.convert import convert
from lsg_jax.checkpoint import read_step
from lsg_jax.config import SinkConfig
from lsg_jax.data.drawing import draw
from lsg_jax.data.scene_questions import scene_question
from lsg_jax.opening import load_backbone
from lsg_jax.run_config import load_run_config
from recipes.embedded_model.alignment import AlignmentRecipe
from recipes.embedded_model.conversations import TEXT_ONLY
from recipes.embedded_model.make import LESSONS, SETTINGS, make
from recipes.embedded_model.tower import TowerRecipe

TOWER = TowerRecipe(scenes=8, steps=2, batch_size=4, warmup=1, save_every=1)
ALIGNMENT = AlignmentRecipe(steps=2, patches=64)
# one length for all lessons, so that two programs are compiled: with and without the projector
SHORT = ["train.batch_size=2", "train.max_steps=2", "train.save_every=1", "data.num_threads=1", "data.max_length=128"]


TAUGHT = ("pairs", "reading")  # one of text only, and the last


def make_short(out, **options):
    return make(out, TOWER, ALIGNMENT, conversations=4, overrides=SHORT, lessons=TAUGHT, **options)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_short(tmp_path_factory.mktemp("embedded"))


def test_the_checkpoint_is_what_was_trained(made, tmp_path):
    out = made.parent
    weights = {file.name: file.stat().st_size for file in made.glob("*.safetensors")}
    assert sum(weights.values()) < 8e6 and json.loads((made / "config.json").read_text())["lsg_sinks"]["vit_dims"] == [168]
    convert(made, tmp_path / "model", dtype="float32")
    vlm = load_backbone(tmp_path / "model")
    assert vlm.config.sinks == SinkConfig(vit_dims=(168,), vit_tau=33.0)
    rounded = lambda tree: jax.tree.map(lambda leaf: np.asarray(leaf, jax.numpy.bfloat16).astype(np.float32), tree)
    trained = read_step(out / TAUGHT[-1] / "run")[1]["trained"]
    assert set(trained) == {"projector", "language_model"}
    for part, leaves in trained.items():
        jax.tree.map(np.testing.assert_array_equal, vlm.frozen[part], rounded(leaves))
    start, untrained = load_backbone(out / "start").frozen, load_backbone(out / "untrained").frozen
    jax.tree.map(np.testing.assert_array_equal, vlm.frozen["vision_tower"], start["vision_tower"])
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), start["vision_tower"], untrained["vision_tower"])
    kernels = [value for path, value in jax.tree.leaves_with_path(moved) if "kernel" in str(path[-1])]
    assert kernels and min(kernels) > 0


def test_it_answers_and_its_prompts_are_short(made, tmp_path):
    convert(made, tmp_path / "model")
    vlm = lsg_jax.load(tmp_path / "model")
    asked = scene_question("test", 0)
    encoded = vlm.processor.encode_question(asked.prompt)
    assert vlm.processor.template == "chat_template" and len(encoded.ids) < 64 + 40
    (answer,) = vlm.generate([Image.fromarray(draw(asked.scene, 112))], [asked.prompt], max_new_tokens=2)
    assert isinstance(answer, str)


@pytest.mark.parametrize("lesson", LESSONS)
def test_the_settings_of_each_lesson_fit_its_run(lesson):
    config = load_run_config(SETTINGS, ['model="m"', 'data.records="r"', 'output="o"', *LESSONS[lesson][1]])
    assert config.method == "full" and config.data.conversations == "whole"
    assert config.tables["full"].parts == (("language_model",) if lesson in TEXT_ONLY else ("projector", "language_model"))


def test_with_tower_and_tokenizer_of_a_model_the_same_model_is_made_again(made, tmp_path):
    again = make_short(tmp_path, given=made)
    assert (again / "tokenizer.json").read_bytes() == (made / "tokenizer.json").read_bytes()
    first, second = (load_file(folder / "model.safetensors") for folder in (made, again))
    assert first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)


def test_attention_starts_as_a_search_for_what_is_alike(made):
    untrained = load_file(made.parent / "checkpoint-untrained" / "model.safetensors")
    queries = [name for name in untrained if name.startswith("language_model") and "q_proj" in name]
    assert len(queries) == 8
    for name in queries:
        key, value, out = (untrained[name.replace("q_proj", part)] for part in ("k_proj", "v_proj", "o_proj"))
        np.testing.assert_array_equal(untrained[name], key)
        np.testing.assert_array_equal(out, value.T)


def test_again_nothing_is_made_twice(made):
    before = {path: path.stat().st_mtime_ns for path in made.parent.rglob("*.safetensors")}
    assert make_short(made.parent) == made
    assert {path: path.stat().st_mtime_ns for path in made.parent.rglob("*.safetensors")} == before
