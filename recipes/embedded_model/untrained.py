"""The model before any training: configuration, random weights, image processor, tokenizer and chat template."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from converters.byte_tokenizer import BOS, EOS, IMAGE, PAD, byte_level, save_tokenizer, special_tokens
from converters.tiny_checkpoint import IMAGE_PROCESSOR, random_weights, save_weights
from lsg_jax.data.conversation import IMAGE_TAG
from recipes.embedded_model.conversations import listing, scene_conversation
from recipes.embedded_model.tower import SinkLesson

SEED = 1  # of the scenes; those of gates and of the benchmark have seed 0
VOCAB_SIZE = 512
IMAGE_SIZE, PATCH_SIZE, VISION_WIDTH = 112, 14, 128
SINKS = SinkLesson()

CONFIG: dict[str, Any] = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "image_token_index": IMAGE,
    "projector_hidden_act": "gelu",
    "vision_feature_layer": [
        0,
        -1,
    ],  # the first for the place of a patch, which the last hardly encodes; the last for its content
    "vision_feature_select_strategy": "default",
    "tie_word_embeddings": True,
    "dtype": "float32",
    "lsg_sinks": {
        "criterion": "dim_abs",
        "vit_dims": [VISION_WIDTH + SINKS.dimension],  # in the last layer, whose features follow those of the first
        "vit_tau": (SINKS.high + SINKS.low) / 2,
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


def write_untrained(folder: Path, given: Path | None = None, *, seed: int = 0) -> None:
    """Writes the untrained checkpoint in Hugging Face format; the tokenizer is copied from the checkpoint `given`, if any."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = random_weights(CONFIG, seed=seed, sharp=False)
    _match_attention(weights)
    save_weights(folder, CONFIG, weights)
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


def write_bpe_tokenizer(folder: Path, texts: Iterable[str], *, vocab_size: int, chat_template: str) -> None:
    """Writes a byte-level BPE tokenizer: ids as in the byte tokenizer, then merges learned from `texts`, up to `vocab_size`."""
    from tokenizers import pre_tokenizers, trainers

    tokenizer = byte_level(IMAGE_TAG)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special_tokens(IMAGE_TAG),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    save_tokenizer(folder, tokenizer, IMAGE_TAG, chat_template=chat_template)


def _texts(scenes: int = 2000) -> Iterator[str]:
    for index in range(scenes):
        scene, exchanges = scene_conversation("train", index, seed=SEED)
        for question, answer in [*exchanges, listing(scene)]:
            yield f"USER: \n{question} ASSISTANT: {answer}"


def _match_attention(weights: dict[str, np.ndarray]) -> None:
    """Initialises attention in place, so that a small model soon finds in an image what the question names.

    In each layer the query projection equals the key projection, so that a token attends to similar tokens, and the output
    projection is the transpose of the value projection, so that it copies what they hold. Every head has keys of its own. The
    output head is tied to the embeddings: the scale of the final norm makes the first logits of order one.
    """
    for name, weight in list(weights.items()):
        if name.startswith("language_model") and name.endswith("k_proj.weight"):
            weights[name.replace("k_proj", "q_proj")] = weight.copy()
            weights[name.replace("k_proj", "o_proj")] = np.ascontiguousarray(weights[name.replace("k_proj", "v_proj")].T)
    weights["language_model.model.norm.weight"] *= weights["language_model.model.norm.weight"].size ** -0.5
