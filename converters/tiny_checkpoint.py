"""A tiny LLaVA-1.5 in Hugging Face format with random weights, for trying every command without a download."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from converters.byte_tokenizer import BOS, EOS, IMAGE, PAD, VOCAB_SIZE, write_byte_tokenizer
from converters.families import rules_of
from converters.hf_config import model_config
from converters.rules import layout

CONFIG: dict[str, Any] = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "image_token_index": IMAGE,
    "projector_hidden_act": "gelu",
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "dtype": "float32",
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 56,
        "patch_size": 8,
    },
    "text_config": {
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    },
}

IMAGE_PROCESSOR: dict[str, Any] = {
    "image_processor_type": "CLIPImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 56},
    "do_center_crop": True,
    "crop_size": {"height": 56, "width": 56},
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "do_convert_rgb": True,
}

_SHARPER = {"q_proj": 2.0, "k_proj": 2.0, "o_proj": 1.5}


def write_tiny_checkpoint(folder: Path, *, seed: int = 0) -> None:
    """Writes weights, configuration, tokenizer and image processor (about 1.5 MB). Needs no torch."""
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(folder, CONFIG, random_weights(CONFIG, seed=seed))
    (folder / "preprocessor_config.json").write_text(json.dumps(IMAGE_PROCESSOR, indent=2), encoding="utf-8")
    write_byte_tokenizer(folder)


def random_weights(raw: dict[str, Any], *, seed: int, sharp: bool = True) -> dict[str, np.ndarray]:
    """Random float32 weights for a `config.json`: canonical tensor name -> array.

    Matrices have variance 1 / fan-in, norm scales are one, biases are small and embeddings of order one.

    Args:
        sharp: larger attention weights in the language model, so that its answers depend on the question and on the image.
    """
    config = model_config(raw)
    rng = np.random.default_rng(seed)
    return {name: _random(rng, name, shape, sharp) for name, shape in layout(config, rules_of(config)).tensors.items()}


def save_weights(folder: Path, raw: dict[str, Any], weights: dict[str, np.ndarray]) -> None:
    """Writes config.json and model.safetensors."""
    from safetensors.numpy import save_file

    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(raw, indent=2), encoding="utf-8")


def _random(rng: np.random.Generator, name: str, shape: tuple[int, ...], sharp: bool) -> np.ndarray:
    if "norm" in name:
        return np.full(shape, 1.0 if name.endswith("weight") else 0.0, np.float32)
    scale = 1.0 if "embed" in name else 0.02 if len(shape) == 1 else float(np.prod(shape[1:])) ** -0.5
    if sharp and name.startswith("language_model"):
        scale *= next((factor for part, factor in _SHARPER.items() if part in name), 1.0)
    return (scale * rng.standard_normal(shape)).astype(np.float32)
