"""LLaVA's own layout: `liuhaotian/llava-v1.5-*` and `-v1.6-*`, and its fork LLaVA-NeXT with `lmms-lab/llava-onevision-*`.

Facts are from the code of haotian-liu/LLaVA and LLaVA-VL/LLaVA-NeXT (`llava_arch.py`, `clip_encoder.py`, `siglip_encoder.py`)
and from the conversion scripts of transformers.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from typing import Any

from converters.families.values import shortened
from converters.layouts.fields import check_only, text_fields
from converters.layouts.layout import Aspect, Layout, Twin
from lsg_jax.errors import ConfigError

_LANGUAGE_MODELS = {
    "LlavaLlamaForCausalLM": "llama",
    "LlavaMistralForCausalLM": "mistral",
    "LlavaQwenForCausalLM": "qwen2",
}
_MODEL_TYPES = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2"}
_OF_BASE = {
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    None,
}  # what a pretrained projector's config.json states

_READ = {
    "mm_vision_tower", "vision_tower", "mm_vision_select_layer", "mm_vision_select_feature", "mm_patch_merge_type",
    "image_aspect_ratio", "image_grid_pinpoints", "mm_projector_type",
}  # fmt: skip

_ONLY: dict[str, tuple[Any, ...]] = {
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_resampler_type": (None,),
    "mm_use_im_start_end": (False, None),
    "s2": (False, None),
    "add_faster_video": (False, None),
}

_NO_EFFECT = {
    "mm_hidden_size",  # a copy of the tower's
    "image_token_index", "mm_use_im_patch_token",  # tokens come from the tokenizer; `<im_patch>` is in no prompt
    "ignore_index", "use_mm_proj", "image_crop_resolution", "image_split_resolution", "vision_tower_pretrained",
    # videos only
    "mm_newline_position", "mm_spatial_pool_mode", "mm_spatial_pool_stride", "mm_spatial_pool_out_channels",
    "faster_token_stride", "add_time_instruction", "force_sample",
    # how it was trained
    "mm_projector_lr", "mm_vision_tower_lr", "mm_tunable_parts", "tune_mm_mlp_adapter", "tune_mm_vision_resampler",
    "freeze_mm_mlp_adapter", "freeze_mm_vision_resampler", "unfreeze_mm_vision_tower", "use_pos_skipping", "pos_skipping_range",
    "tokenizer_model_max_length", "tokenizer_padding_side", "unfreeze_language_model",
}  # fmt: skip

_OWN = frozenset(_READ | _ONLY.keys() | _NO_EFFECT)


def _matches(config: Mapping[str, Any]) -> bool:
    return "text_config" not in config and ("mm_vision_tower" in config or _architecture(config) in _LANGUAGE_MODELS)


def _architecture(config: Mapping[str, Any]) -> str | None:
    named = config.get("architectures")
    return named[0] if isinstance(named, list) and named and isinstance(named[0], str) else None


def _twin(config: Mapping[str, Any], where: str) -> Twin:
    architecture = _architecture(config)
    language = _LANGUAGE_MODELS.get(architecture or "")
    if architecture in _OF_BASE:
        language = _MODEL_TYPES.get(str(config.get("model_type")))
    if language is None:
        supported = ", ".join(_LANGUAGE_MODELS)
        raise ConfigError(f"{where}: architecture {architecture!r} of LLaVA's layout is not supported; supported: {supported}")
    check_only(config, _ONLY, where)
    if config.get("mm_projector_type") is None:
        raise ConfigError(f"{where}: no mm_projector_type, so its projector is one matrix; only mlp2x_gelu is supported")
    tower = config.get("mm_vision_tower") or config.get("vision_tower")
    if not isinstance(tower, str) or not tower:
        raise ConfigError(f"{where}: mm_vision_tower = {tower!r} names no vision tower")
    model_type, aspect = _images(config, where)
    siglip = "siglip" in tower.lower()  # LLaVA-NeXT's code tells its towers by this name
    text = text_fields(config, _OWN, where) | {"model_type": language}
    fields: dict[str, Any] = {
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
        **_features(config, siglip, where),
    }
    if aspect == "anyres":
        fields["image_grid_pinpoints"] = _pinpoints(config, where)
    if model_type == "llava_onevision":
        fields["vision_aspect_ratio"] = config["image_aspect_ratio"]
    return Twin(
        model_type,
        text,
        None,
        fields,
        tower,
        unused_layers=1 if siglip else 0,
        aspect=aspect,
        video_token=model_type == "llava_onevision",
        pad_token=None if language == "qwen2" else "<pad>",
    )


def _images(config: Mapping[str, Any], where: str) -> tuple[str, Aspect]:
    """The twin's model_type, and how an image is made to fit."""
    ratio, merge = config.get("image_aspect_ratio"), config.get("mm_patch_merge_type") or "flat"
    if ratio in (None, "square", "pad"):  # one square an image, which no merge type changes
        return "llava", "pad" if ratio == "pad" else "processor"
    if ratio == "anyres" and merge == "spatial_unpad":
        return "llava_next", "anyres"
    if re.fullmatch(r"anyres_max_\d+", str(ratio)) and merge == "spatial_unpad":
        return "llava_onevision", "anyres"
    raise ConfigError(
        f"{where}: the Hugging Face layout cannot express image_aspect_ratio = {ratio!r} with mm_patch_merge_type = {merge!r}"
    )


def _features(config: Mapping[str, Any], siglip: bool, where: str) -> dict[str, Any]:
    """Which features of the tower the projector gets."""
    if siglip:  # the code removes the last layer and ignores the settings
        return {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    select, layer = config.get("mm_vision_select_feature", "patch"), config.get("mm_vision_select_layer", -2)
    if select not in ("patch", "cls_patch") or not isinstance(layer, int):
        raise ConfigError(
            f"{where}: mm_vision_select_feature = {shortened(select)}, mm_vision_select_layer = {shortened(layer)}: "
            "patch or cls_patch and one layer are supported"
        )
    return {"vision_feature_layer": layer, "vision_feature_select_strategy": "default" if select == "patch" else "full"}


def _pinpoints(config: Mapping[str, Any], where: str) -> list[list[int]]:
    """`image_grid_pinpoints`, which older files hold as the text of a list, or of a range."""
    stated = config.get("image_grid_pinpoints")
    value: Any = stated
    if isinstance(stated, str):
        try:
            value = ast.literal_eval(stated)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            value = _grids(stated)
    pairs = [list(pair) for pair in value if isinstance(pair, (list, tuple))] if isinstance(value, (list, tuple)) else []
    if (
        not pairs
        or len(pairs) != len(value)
        or not all(len(p) == 2 and all(type(n) is int and n > 0 for n in p) for p in pairs)
    ):
        raise ConfigError(f"{where}: image_grid_pinpoints = {shortened(stated)} is not a list of [height, width]")
    return pairs


def _grids(text: str) -> list[list[int]] | None:
    """`(1x1),...,(6x6)`: all grids of tiles of 384 pixels between the two, as LLaVA-NeXT's `process_anyres_image` reads it."""
    found = [tuple(map(int, pair)) for pair in re.findall(r"\((\d{1,3})x(\d{1,3})\)", text)]
    if len(found) < 2 or "..." not in text:
        return None
    (low_a, low_b), (high_a, high_b) = found[0], found[-1]
    return [[384 * a, 384 * b] for a in range(low_a, high_a + 1) for b in range(low_b, high_b + 1)]


_NAMES = (
    (r"model\.vision_tower\.(?:vision_tower\.)?(?:vision_model\.)?(.+)", r"vision_tower.\1"),
    (r"model\.mm_projector\.0\.(weight|bias)", r"multi_modal_projector.linear_1.\1"),
    (r"model\.mm_projector\.2\.(weight|bias)", r"multi_modal_projector.linear_2.\1"),
    (r"model\.image_newline", "image_newline"),
    (r"model\.((?:embed_tokens|layers|norm)\..+)", r"language_model.model.\1"),
    (r"lm_head\.(.+)", r"language_model.lm_head.\1"),
)


LAYOUT = Layout("LLaVA's own layout", _matches, _twin, _NAMES)
