"""Makes the embedded model: a small LLaVA in Hugging Face format, trained from nothing on drawn scenes.

    XLA_FLAGS=--xla_force_host_platform_device_count=2 python -m converters.embedded_model OUT

First the vision tower learns what is in each patch and to keep the whole in V-sinks (`lsg_jax.embedded.tower`), then the
projector is aligned with the language model's words (`lsg_jax.embedded.alignment`), then both learn to
describe and to answer, with the tower frozen, as `lsg train configs/embedded.toml` does. Finished parts are kept:
the same command goes on after a stop. OUT/checkpoint is what the package ships.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
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
from lsg_jax.data.scene_conversations import listing, scene_conversation, write_conversations
from lsg_jax.embedded.alignment import WORDS, AlignmentRecipe, align_projector, targets
from lsg_jax.embedded.lessons import Lessons, draw_lessons
from lsg_jax.embedded.tower import TowerRecipe, train_tower
from lsg_jax.model.llava import assemble
from lsg_jax.opening import load_backbone
from lsg_jax.train.loop import train
from lsg_jax.vlm import VLM

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lesson:
    """What the language model is taught in a run.

    Attributes:
        questions: most of them to a scene, before the listing of all that is in it.
        settings: what differs from SETTINGS.
    """

    name: str
    conversations: int
    questions: int
    settings: tuple[str, ...] = ()


RECIPE, ALIGNMENT = TowerRecipe(), AlignmentRecipe()
LESSONS = (
    # many words to an image teach to look; then a question's few words suffice
    Lesson("captions", 16_000, 0, ("data.max_length=136", "train.max_steps=1000")),
    Lesson("questions", 32_000, 9),
)
SEED = 1  # of the scenes: those of seed 0 are for gates and for tests
SETTINGS = Path(__file__).parent.parent / "configs" / "embedded.toml"

VOCAB_SIZE = 512
IMAGE_SIZE, PATCH_SIZE = 112, 14

CONFIG: dict[str, Any] = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "image_token_index": IMAGE,
    "projector_hidden_act": "gelu",
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
    "dtype": "float32",
    "lsg_sinks": {
        "criterion": "dim_abs",
        "vit_dims": [RECIPE.sinks.dimension],
        "vit_tau": (RECIPE.sinks.high + RECIPE.sinks.low) / 2,
    },
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 128,
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
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
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
    parser.add_argument("--conversations", type=int, default=32_000, help="at most, of each lesson of the language model")
    parser.add_argument(
        "--set", action="append", default=[], metavar="a.b=c", help="as `lsg train` takes it, for these lessons"
    )
    options = parser.parse_args()
    logging.basicConfig(format="%(asctime)s %(message)s")
    for name in (__name__, "lsg_jax"):
        logging.getLogger(name).setLevel(logging.INFO)
    recipe = TowerRecipe(scenes=options.scenes, steps=options.steps)
    print(make(options.out, recipe, conversations=options.conversations, overrides=options.set))


def make(out: Path, recipe: TowerRecipe, *, conversations: int, overrides: list[str]) -> Path:
    """Makes the model in `out` and returns the folder of its checkpoint."""
    config = model_config(CONFIG)
    grid = IMAGE_SIZE // PATCH_SIZE
    if not (out / "untrained").exists():
        write_untrained(out / "checkpoint-untrained")
        convert(out / "checkpoint-untrained", out / "untrained")
    if not (out / "start").exists():
        logger.info("drawing %d scenes for the vision tower", recipe.scenes)
        lessons = draw_lessons("train", recipe.scenes, side=IMAGE_SIZE, grid=grid, seed=SEED)
        tower = train_tower(config, lessons, RunFolder(out / "tower"), recipe, on_step=_tell)
        vlm = load_backbone(out / "untrained")
        vlm = VLM(vlm.config, {**vlm.frozen, "vision_tower": tower}, folder=vlm.folder)
        leaves = jax.tree.leaves_with_path({"vision_tower": tower, "projector": _aligned(vlm, lessons)})
        named = {"/".join(key.key for key in path): np.asarray(leaf) for path, leaf in leaves}
        export(out / "untrained", out / "checkpoint-tower", trained=named)
        convert(out / "checkpoint-tower", out / "start")
    model = out / "start"
    for lesson in LESSONS:
        model = _taught(out / lesson.name, model, lesson, min(conversations, lesson.conversations), overrides)
    if not (out / "rounded").exists():
        convert(out / LESSONS[-1].name / "checkpoint", out / "rounded", dtype="bfloat16")
    if not (out / "checkpoint").exists():
        export(out / "rounded", out / "checkpoint")
    return out / "checkpoint"


def _taught(folder: Path, model: Path, lesson: Lesson, conversations: int, overrides: list[str]) -> Path:
    """Teaches a model a lesson in `folder` and returns the folder of the model that has learned it."""
    records, run, checkpoint = folder / "records", folder / "run", folder / "checkpoint"
    if not records.exists():
        logger.info("writing %d %s", conversations, lesson.name)
        scenes = {"seed": SEED, "side": IMAGE_SIZE, "most": lesson.questions, "processes": os.cpu_count() or 1}
        source = write_conversations(folder / "conversations", "train", conversations, **scenes)
        prepare_llava(source, folder / "conversations", records)
    paths = [f'model="{model}"', f'data.records="{records}"', f'output="{run}"']
    train(load_run_config(SETTINGS, [*paths, *lesson.settings, *overrides]), on_step=_tell)
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
    wanted, known = targets(labels, v_sinks, words)
    kinds = np.select([labels["shape"] >= 0, v_sinks, labels["room"] > 0], [0, 1, 2], 3)[known]
    projector, explained = align_projector(
        vlm.config, vlm.frozen["projector"], features[known], wanted[known], kinds, ALIGNMENT
    )
    logger.info("the aligned projector explains %.0f %% of the variance", 100 * explained)
    return projector


def write_untrained(folder: Path, *, seed: int = 0) -> None:
    """Writes weights, configuration, tokenizer and image processor."""
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder, CONFIG, seed=seed, sharp=False)
    size = {"size": {"shortest_edge": IMAGE_SIZE}, "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}}
    (folder / "preprocessor_config.json").write_text(json.dumps({**IMAGE_PROCESSOR, **size}, indent=2), encoding="utf-8")
    processor = {"processor_class": "LlavaProcessor", "image_token": IMAGE_TAG, "num_additional_image_tokens": 1}
    processor |= {"patch_size": PATCH_SIZE, "vision_feature_select_strategy": CONFIG["vision_feature_select_strategy"]}
    (folder / "processor_config.json").write_text(json.dumps(processor, indent=2), encoding="utf-8")
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
