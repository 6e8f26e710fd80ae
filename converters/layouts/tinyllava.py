"""TinyLLaVA's layout: `Zhang199/TinyLLaVA-Qwen2.5-3B-SigLIP` and others of TinyLLaVA_Factory.

Facts are from its code (`modeling_tinyllava.py`, `configuration_tinyllava.py`, `vision_tower/base.py`, `connector/mlp.py`,
`data/template`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converters.families.values import shortened
from converters.layouts.layout import Layout, Twin
from lsg_jax.errors import ConfigError

ARCHITECTURE = "TinyLlavaForConditionalGeneration"

_ONLY: dict[str, tuple[Any, ...]] = {
    "connector_type": ("mlp2x_gelu",),
    "image_aspect_ratio": ("square", "pad", None),
    "vision_model_name_or_path2": ("", None),
    "vision_feature_select_strategy": ("patch", "cls_patch"),
}

_NO_EFFECT = {
    "llm_model_name_or_path", "tokenizer_name_or_path", "vision_model_name_or_path",  # where the parts came from
    "hidden_size", "vocab_size", "vision_hidden_size", "text_config", "vision_config", "vision_feature_layer",
    "ignore_index", "image_token_index",  # -200 stands for an image in its code only
    "pad_token", "pad_token_id", "tokenizer_use_fast", "tokenizer_model_max_length", "tokenizer_padding_side",
    "cache_dir", "use_cache", "torch_dtype", "dtype", "tie_word_embeddings", "initializer_range", "gradient_checkpointing",
    "resampler_hidden_size", "num_queries", "num_resampler_layers",  # of other connectors
    "tune_type_llm", "tune_type_connector", "tune_type_vision_tower", "tune_vision_tower_from_layer",
    "model_type", "architectures", "auto_map", "_name_or_path", "transformers_version", "bos_token_id", "eos_token_id",
}  # fmt: skip

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite "
    "answers to the user's questions."
)


CHAT_TEMPLATE = (
    "{{ '" + SYSTEM.replace("'", "\\'") + " ' }}"
    "{% for message in messages %}"
    "{% if message['content'] is string %}{% set text = message['content'] %}{% set images = 0 %}{% else %}"
    "{% set text = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('') %}"
    "{% set images = message['content'] | selectattr('type', 'equalto', 'image') | list | length %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ 'USER: ' + '<image>\\n' * images + text + ' ' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'ASSISTANT: ' + text + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""The Jinja source of TinyLLaVA's prompts, the same for all its language models but for the token that ends an answer.

The system text, then for each question `USER: <image>\\n{question} ` and for each answer `ASSISTANT: {answer}` and the token.
"""


def _matches(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") == "tinyllava" or config.get("architectures") == [ARCHITECTURE]


def _twin(config: Mapping[str, Any], where: str) -> Twin:
    for name, allowed in _ONLY.items():
        if config.get(name, allowed[0]) not in allowed:
            raise ConfigError(f"{where}: the Hugging Face layout cannot express {name} = {shortened(config[name])}")
    parts = {name: config.get(name) for name in ("text_config", "vision_config")}
    for name, part in parts.items():
        if not isinstance(part, dict):
            raise ConfigError(f"{where}: {name} is missing")
    text, vision = dict(config["text_config"]), dict(config["vision_config"])
    tower = config.get("vision_model_name_or_path") or vision.get("model_name_or_path") or ""
    vision = {name: value for name, value in vision.items() if not name.startswith("model_name_or_path")}
    layer = config.get("vision_feature_layer", -2)
    if not isinstance(layer, int):
        raise ConfigError(f"{where}: vision_feature_layer = {shortened(layer)}: one layer is supported")
    unknown = {name: value for name, value in config.items() if name not in _NO_EFFECT | _ONLY.keys()}
    tied = bool(text.get("tie_word_embeddings", False))
    language = str(text.get("model_type", "llama"))
    return Twin(
        model_type="llava",
        text_config={"model_type": language, **text},
        vision_config=vision,
        fields={
            "projector_hidden_act": "gelu",
            "tie_word_embeddings": tied,
            "vision_feature_layer": layer,
            # `patch` drops the first token, though SigLIP has no class token: it is a patch there
            "vision_feature_select_strategy": "full"
            if config.get("vision_feature_select_strategy") == "cls_patch"
            else "default",
        },
        tower=str(tower).split(":")[-1],
        aspect="pad" if config.get("image_aspect_ratio") == "pad" else "processor",
        pad_token="<pad>" if language == "llama" else None,
        chat_template=CHAT_TEMPLATE,
        ignored={name: "TinyLLaVA does not define it" for name in unknown},
    )


_NAMES = (
    (r"vision_tower\._vision_tower\.(?:vision_model\.)?(.+)", r"vision_tower.\1"),
    (r"connector\._connector\.0\.(weight|bias)", r"multi_modal_projector.linear_1.\1"),
    (r"connector\._connector\.2\.(weight|bias)", r"multi_modal_projector.linear_2.\1"),
)


LAYOUT = Layout("TinyLLaVA's layout", _matches, _twin, _NAMES)
