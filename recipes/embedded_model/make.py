"""The stages of the recipe, each in a folder of its own below OUT; a folder that exists is not made again."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from converters.convert import convert
from converters.export import export, trained_leaves
from converters.hf_config import model_config
from lsg_jax.checkpoint import RunFolder
from lsg_jax.data.images import to_patches
from lsg_jax.data.records import prepare_llava
from lsg_jax.methods.method_model import assemble
from lsg_jax.opening import load_backbone
from lsg_jax.run_config import load_run_config
from lsg_jax.train.loop import train
from lsg_jax.types import VisualInput
from lsg_jax.vlm import VLM
from recipes.embedded_model.alignment import WORDS, AlignmentRecipe, align_projector, patch_kinds, targets
from recipes.embedded_model.conversations import Lesson, write_conversations
from recipes.embedded_model.labelled_scenes import LabelledScenes, draw_labelled_scenes
from recipes.embedded_model.tower import TowerRecipe, train_tower
from recipes.embedded_model.untrained import CONFIG, IMAGE_SIZE, PATCH_SIZE, SEED, write_untrained

logger = logging.getLogger(__name__)

RECIPE, ALIGNMENT = TowerRecipe(), AlignmentRecipe()
SETTINGS = Path(__file__).parents[2] / "configs" / "embedded.toml"

_NOT_LAST = ("train.final_lr_fraction=0.5",)
_TEXT_ONLY = (*_NOT_LAST, 'full.parts=["language_model"]', "train.learning_rate=1e-3")
LESSONS: dict[Lesson, tuple[int, tuple[str, ...]]] = {
    "finding": (16_000, (*_NOT_LAST, "data.max_length=240", "train.max_steps=2000")),
    "pairs": (4_000, (*_TEXT_ONLY, "data.max_length=128", "train.max_steps=400")),
    "letters": (8_000, (*_TEXT_ONLY, "data.max_length=160", "train.max_steps=700")),
    "choosing": (8_000, (*_NOT_LAST, "data.max_length=272", "train.max_steps=1000")),
    "answering": (12_800, ()),
    "reading": (6_400, ("data.max_length=224", "train.max_steps=800", "train.learning_rate=1e-3")),
}
"""The curriculum, in order: number of conversations, and settings that differ from SETTINGS."""


def make(
    out: Path,
    recipe: TowerRecipe,
    alignment: AlignmentRecipe = ALIGNMENT,
    *,
    given: Path | None = None,
    conversations: int,
    overrides: Sequence[str] = (),
    lessons: Sequence[Lesson] = tuple(LESSONS),
) -> Path:
    """Makes the model in `out` and returns the folder of its checkpoint.

    Args:
        recipe: of the vision tower. alignment: of the projector.
        given: a checkpoint whose vision tower and tokenizer are taken; None trains new ones.
        conversations: at most, in each lesson.
        overrides: settings that differ from configs/embedded.toml, for every lesson.
        lessons: those that are taught, in this order.
    """
    if not (out / "untrained").exists():
        write_untrained(out / "checkpoint-untrained", given)
        convert(out / "checkpoint-untrained", out / "untrained")
    if not (out / "start").exists():
        _write_start(out, recipe, alignment, given)
    model = out / "start"
    for lesson in lessons:
        model = _teach(out / lesson, model, lesson, conversations, overrides)
    if not (out / "rounded").exists():
        convert(model.parent / "checkpoint", out / "rounded", dtype="bfloat16")
    if not (out / "checkpoint").exists():
        export(out / "rounded", out / "checkpoint")
    return out / "checkpoint"


def _write_start(out: Path, recipe: TowerRecipe, alignment: AlignmentRecipe, given: Path | None) -> None:
    """Writes the model that the curriculum starts from: trained vision tower, aligned projector, random language model."""
    config, grid = model_config(CONFIG), IMAGE_SIZE // PATCH_SIZE
    count = min(alignment.scenes, recipe.scenes) if given else recipe.scenes
    logger.info("drawing %d scenes", count)
    scenes = draw_labelled_scenes("train", count, side=IMAGE_SIZE, grid=grid, seed=SEED)
    if given:
        if not (out / "given").exists():
            convert(given, out / "given", dtype="float32")
        tower = load_backbone(out / "given").frozen["vision_tower"]
    else:
        tower = train_tower(config, scenes, RunFolder(out / "tower"), recipe, on_step=_log_step)
    # projector and language model are trained on the tower as it is shipped, in bfloat16
    tower = jax.tree.map(lambda leaf: np.asarray(leaf, jnp.bfloat16).astype(np.float32), tower)
    vlm = load_backbone(out / "untrained")
    vlm = VLM(vlm.config, {**vlm.frozen, "vision_tower": tower}, folder=vlm.folder)
    leaves = jax.tree.leaves_with_path({"vision_tower": tower, "projector": _aligned(vlm, scenes, alignment)})
    named = {"/".join(key.key for key in path): np.asarray(leaf) for path, leaf in leaves}
    export(out / "untrained", out / "checkpoint-start", trained=named)
    convert(out / "checkpoint-start", out / "start")


def _teach(folder: Path, model: Path, lesson: Lesson, conversations: int, overrides: Sequence[str]) -> Path:
    """Trains a model on one lesson in `folder` and returns the folder of the trained model."""
    records, run, checkpoint = folder / "records", folder / "run", folder / "checkpoint"
    most, settings = LESSONS[lesson]
    if not records.exists():
        count, drawn = min(most, conversations), folder / "conversations"
        logger.info("%s: writing %d conversations", lesson, count)
        processes = min(os.cpu_count() or 1, -(-count // 100))
        source = write_conversations(drawn, "train", count, lesson=lesson, seed=SEED, side=IMAGE_SIZE, processes=processes)
        prepare_llava(source, drawn, records)
    paths = [f'model="{model}"', f'data.records="{records}"', f'output="{run}"']
    train(load_run_config(SETTINGS, [*paths, *settings, *overrides]), on_step=_log_step)
    if not checkpoint.exists():
        export(model, checkpoint, trained=trained_leaves(model, run))
    if not (folder / "model").exists():
        convert(checkpoint, folder / "model")
    return folder / "model"


def _aligned(vlm: VLM, scenes: LabelledScenes, recipe: AlignmentRecipe) -> dict[str, Any]:
    """Parameters of the projector, aligned with the word embeddings."""
    image_features = jax.jit(lambda params, images: assemble(vlm.graphdef, params).image_features(images))
    patches = np.stack([to_patches(image, vlm.config.vision.patch_size)[None] for image in scenes.images[: recipe.scenes]])
    starts = range(0, len(patches), 250)
    pairs = [image_features(vlm.params, VisualInput(patches[start : start + 250])) for start in starts]
    features, v_sinks = (np.concatenate([np.asarray(pair[part]) for pair in pairs]) for part in (0, 1))
    embeddings, encode = np.asarray(vlm.frozen["language_model"]["embed_tokens"]), vlm.processor.tokenizer.encode
    words = {word: embeddings[encode(f" {word}", add_special_tokens=False)].sum(0) for word in WORDS}
    labels = {name: values[: recipe.scenes] for name, values in scenes.labels.items()}
    flat = lambda of_patches: of_patches.reshape(-1, *of_patches.shape[2:])
    wanted, kinds = flat(targets(labels, v_sinks, words)), flat(patch_kinds(labels, v_sinks))
    projector, explained = align_projector(vlm.config, vlm.frozen["projector"], flat(features), wanted, kinds, recipe)
    logger.info("the aligned projector explains %.0f %% of the variance", 100 * explained)
    return projector


def _log_step(step: int, total: int, metrics: Mapping[str, Any]) -> None:
    if step % 50 == 0 or step == total:
        shown = ", ".join(f"{name} {value:.3g}" for name, value in metrics.items() if isinstance(value, float))
        logger.info("%d of %d: %s", step, total, shown)
