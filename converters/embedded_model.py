"""The embedded model's checkpoint before training: a small LLaVA in Hugging Face format with a tokenizer of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from converters.tiny_checkpoint import IMAGE_PROCESSOR, write_weights
from lsg_jax.data.byte_tokenizer import BOS, EOS, IMAGE, PAD, write_bpe_tokenizer
from lsg_jax.data.scene_conversations import scene_conversation

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


def write_untrained(folder: Path, *, seed: int = 0) -> None:
    """Writes weights, configuration, tokenizer and image processor."""
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder, CONFIG, seed=seed)
    size = {"size": {"shortest_edge": IMAGE_SIZE}, "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}}
    (folder / "preprocessor_config.json").write_text(json.dumps({**IMAGE_PROCESSOR, **size}, indent=2), encoding="utf-8")
    write_bpe_tokenizer(folder, _texts(), vocab_size=VOCAB_SIZE, chat_template=CHAT_TEMPLATE)


def _texts(scenes: int = 2000) -> Iterator[str]:
    for index in range(scenes):
        for question, answer in scene_conversation("train", index, seed=1)[1]:
            yield f"USER: \n{question} ASSISTANT: {answer}"
