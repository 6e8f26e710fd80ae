"""Makes the embedded model: a small LLaVA in Hugging Face format, trained from nothing on drawn scenes.

    XLA_FLAGS=--xla_force_host_platform_device_count=2 python -m converters.embedded_model OUT

First the vision tower learns what is in each patch and to keep the whole in V-sinks (`lsg_jax.embedded.tower`), then the
projector is aligned with the language model's words (`lsg_jax.embedded.alignment`), then both learn to
answer and to describe, with the tower frozen, as `lsg train configs/embedded.toml` does. Finished parts are kept:
the same command goes on after a stop. OUT/checkpoint is what the package ships. `--from CHECKPOINT` takes tower and
tokenizer of a model that was made before.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from converters.convert import convert
from converters.export import export, trained_leaves
from converters.hf_config import model_config
from converters.tiny_checkpoint import IMAGE_PROCESSOR, write_weights
from lsg_jax.checkpoint import RunFolder
from lsg_jax.config import load_run_config
from lsg_jax.data.byte_tokenizer import BOS, EOS, IMAGE, PAD, write_bpe_tokenizer
from lsg_jax.data.conversation import IMAGE_TAG
from lsg_jax.data.records import prepare_llava
from lsg_jax.data.scene_conversations import Lesson, listing, scene_conversation, write_conversations
from lsg_jax.embedded.alignment import WORDS, AlignmentRecipe, align_projector, kinds_of_patches, targets
from lsg_jax.embedded.lessons import Lessons, draw_lessons
from lsg_jax.embedded.tower import TowerRecipe, train_tower
from lsg_jax.model.llava import assemble
from lsg_jax.opening import load_backbone
from lsg_jax.train.loop import train
from lsg_jax.vlm import VLM

logger = logging.getLogger(__name__)


RECIPE, ALIGNMENT = TowerRecipe(), AlignmentRecipe()
GOES_ON = ("train.final_lr_fraction=0.5",)
TEXT = (*GOES_ON, 'full.parts=["language_model"]', "train.learning_rate=1e-3")
LESSONS: dict[Lesson, tuple[int, tuple[str, ...]]] = {
    "finding": (16_000, (*GOES_ON, "data.max_length=240", "train.max_steps=2000")),
    "pairs": (4_000, (*TEXT, "data.max_length=128", "train.max_steps=400")),
    "letters": (8_000, (*TEXT, "data.max_length=160", "train.max_steps=700")),
    "choosing": (8_000, (*GOES_ON, "data.max_length=272", "train.max_steps=1000")),
    "answering": (12_800, ()),
    "reading": (6_400, ("data.max_length=224", "train.max_steps=800", "train.learning_rate=1e-3")),
}
"""Of projector and language model: conversations, and settings that differ from SETTINGS."""
SEED = 1  # of the scenes: those of seed 0 are for gates and for tests
SETTINGS = Path(__file__).parent.parent / "configs" / "embedded.toml"

VOCAB_SIZE = 512
IMAGE_SIZE, PATCH_SIZE, VISION_WIDTH = 112, 14, 128

CONFIG: dict[str, Any] = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "image_token_index": IMAGE,
    "projector_hidden_act": "gelu",
    "vision_feature_layer": [0, -1],  # where a patch is, which the last layer hardly tells; what is in it
    "vision_feature_select_strategy": "default",
    "tie_word_embeddings": True,
    "dtype": "float32",
    "lsg_sinks": {
        "criterion": "dim_abs",
        "vit_dims": [VISION_WIDTH + RECIPE.sinks.dimension],  # of the last layer, which comes behind the first
        "vit_tau": (RECIPE.sinks.high + RECIPE.sinks.low) / 2,
    },
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": VISION_WIDTH,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
    },
    "text_config": {
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
        "max_position_embeddings": 2048,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    },
}

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}USER: {% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %} ASSISTANT:{% else %} {% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}</s>"
    "{% endif %}{% endfor %}"
)
"""The generation prompt is part of each question."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--scenes", type=int, default=RECIPE.scenes, help="scenes that the tower sees")
    parser.add_argument("--steps", type=int, default=RECIPE.steps, help="steps of the tower")
    parser.add_argument("--conversations", type=int, default=16_000, help="at most, of each lesson of the language model")
    parser.add_argument("--from", type=Path, metavar="CHECKPOINT", dest="given", help="take its vision tower and tokenizer")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="as `lsg train` takes it")
    options = parser.parse_args()
    logging.basicConfig(format="%(asctime)s %(message)s")
    for name in (__name__, "lsg_jax"):
        logging.getLogger(name).setLevel(logging.INFO)
    recipe = TowerRecipe(scenes=options.scenes, steps=options.steps)
    keywords = {"given": options.given, "conversations": options.conversations, "overrides": options.set}
    print(make(options.out, recipe, **keywords))


def make(
    out: Path, recipe: TowerRecipe, *, given: Path | None = None, conversations: int, overrides: Sequence[str] = ()
) -> Path:
    """Makes the model in `out` and returns the folder of its checkpoint.

    Args:
        given: a checkpoint whose vision tower and tokenizer are taken; None to make them.
        overrides: settings that differ from configs/embedded.toml.
    """
    if not (out / "untrained").exists():
        write_untrained(out / "checkpoint-untrained", given)
        convert(out / "checkpoint-untrained", out / "untrained")
    if not (out / "start").exists():
        _write_start(out, recipe, given)
    model = out / "start"
    for lesson in LESSONS:
        model = _taught(out / lesson, model, lesson, conversations, overrides)
    if not (out / "rounded").exists():
        convert(model.parent / "checkpoint", out / "rounded", dtype="bfloat16")
    if not (out / "checkpoint").exists():
        export(out / "rounded", out / "checkpoint")
    return out / "checkpoint"


def _write_start(out: Path, recipe: TowerRecipe, given: Path | None) -> None:
    """The model with its vision tower and a projector for it, which the language model begins with."""
    config, grid = model_config(CONFIG), IMAGE_SIZE // PATCH_SIZE
    scenes = min(ALIGNMENT.scenes, recipe.scenes) if given else recipe.scenes
    logger.info("drawing %d scenes", scenes)
    lessons = draw_lessons("train", scenes, side=IMAGE_SIZE, grid=grid, seed=SEED)
    if given:
        if not (out / "given").exists():
            convert(given, out / "given", dtype="float32")
        tower = load_backbone(out / "given").frozen["vision_tower"]
    else:
        tower = train_tower(config, lessons, RunFolder(out / "tower"), recipe, on_step=_tell)
    # what reads the tower learns from the one that is shipped
    tower = jax.tree.map(lambda leaf: np.asarray(leaf, jnp.bfloat16).astype(np.float32), tower)
    vlm = load_backbone(out / "untrained")
    vlm = VLM(vlm.config, {**vlm.frozen, "vision_tower": tower}, folder=vlm.folder)
    leaves = jax.tree.leaves_with_path({"vision_tower": tower, "projector": _aligned(vlm, lessons)})
    named = {"/".join(key.key for key in path): np.asarray(leaf) for path, leaf in leaves}
    export(out / "untrained", out / "checkpoint-start", trained=named)
    convert(out / "checkpoint-start", out / "start")


def _taught(folder: Path, model: Path, lesson: Lesson, conversations: int, overrides: Sequence[str]) -> Path:
    """Teaches a model a lesson in `folder` and returns the folder of the model that has learned it."""
    records, run, checkpoint = folder / "records", folder / "run", folder / "checkpoint"
    most, settings = LESSONS[lesson]
    if not records.exists():
        count, drawn = min(most, conversations), folder / "conversations"
        logger.info("%s: writing %d conversations", lesson, count)
        processes = os.cpu_count() or 1
        source = write_conversations(drawn, "train", count, lesson=lesson, seed=SEED, side=IMAGE_SIZE, processes=processes)
        prepare_llava(source, drawn, records)
    paths = [f'model="{model}"', f'data.records="{records}"', f'output="{run}"']
    train(load_run_config(SETTINGS, [*paths, *settings, *overrides]), on_step=_tell)
    if not checkpoint.exists():
        export(model, checkpoint, trained=trained_leaves(model, run))
    if not (folder / "model").exists():
        convert(checkpoint, folder / "model")
    return folder / "model"


def _aligned(vlm: VLM, lessons: Lessons) -> dict[str, Any]:
    """The projector, aligned with the embeddings of the words."""
    seen = jax.jit(lambda params, images: assemble(vlm.graphdef, params).image_features(images))
    images = lessons.images[: ALIGNMENT.scenes]
    pairs = [seen(vlm.params, images[start : start + 250]) for start in range(0, len(images), 250)]
    features, v_sinks = (np.concatenate([np.asarray(pair[part]) for pair in pairs]) for part in (0, 1))
    embeddings, encode = np.asarray(vlm.frozen["language_model"]["embed_tokens"]), vlm.processor.tokenizer.encode
    words = {word: embeddings[encode(f" {word}", add_special_tokens=False)].sum(0) for word in WORDS}
    labels = {name: values[: ALIGNMENT.scenes] for name, values in lessons.labels.items()}
    flat = lambda of_patches: of_patches.reshape(-1, *of_patches.shape[2:])
    wanted, kinds = flat(targets(labels, v_sinks, words)), flat(kinds_of_patches(labels, v_sinks))
    projector, explained = align_projector(vlm.config, vlm.frozen["projector"], flat(features), wanted, kinds, ALIGNMENT)
    logger.info("the aligned projector explains %.0f %% of the variance", 100 * explained)
    return projector


def write_untrained(folder: Path, given: Path | None = None, *, seed: int = 0) -> None:
    """Writes weights, configuration, image processor, and a tokenizer, that of the checkpoint `given` if there is one."""
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder, CONFIG, seed=seed, attention="matching")
    size = {"size": {"shortest_edge": IMAGE_SIZE}, "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}}
    (folder / "preprocessor_config.json").write_text(json.dumps({**IMAGE_PROCESSOR, **size}, indent=2), encoding="utf-8")
    processor = {"processor_class": "LlavaProcessor", "image_token": IMAGE_TAG, "num_additional_image_tokens": 1}
    processor |= {"patch_size": PATCH_SIZE, "vision_feature_select_strategy": CONFIG["vision_feature_select_strategy"]}
    (folder / "processor_config.json").write_text(json.dumps(processor, indent=2), encoding="utf-8")
    if given:
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(given / name, folder)
    else:
        write_bpe_tokenizer(folder, _texts(), vocab_size=VOCAB_SIZE, chat_template=CHAT_TEMPLATE)


def _texts(scenes: int = 2000) -> Iterator[str]:
    for index in range(scenes):
        scene, exchanges = scene_conversation("train", index, seed=SEED)
        for question, answer in [*exchanges, listing(scene)]:
            yield f"USER: \n{question} ASSISTANT: {answer}"


def _tell(step: int, total: int, told: dict[str, Any]) -> None:
    if step % 50 == 0 or step == total:
        logger.info("%d of %d: %s", step, total, ", ".join(f"{k} {v:.3g}" for k, v in told.items() if isinstance(v, float)))


if __name__ == "__main__":
    main()
