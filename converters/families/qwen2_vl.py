"""Qwen2-VL and Qwen2.5-VL: images of any size, 2 x 2 patches to a token, and rotary positions of frame, row and column."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from converters.families import decoders, towers
from converters.families.family import CheckpointFiles, Family, HFConfig
from converters.families.whole import LAST_LAYER, common_fields, part_rules
from converters.image_kinds import native_image_config
from converters.ops import Rule
from lsg_jax.config import ModelConfig

FIELDS = frozenset(
    {
        "vision_config", "text_config", "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id",
        "tie_word_embeddings", "lsg_sinks",
        "vision_token_id",  # of no part of the model
    }
)  # fmt: skip


def model_config(hf: HFConfig, files: CheckpointFiles) -> ModelConfig:
    """The configuration of a native tower, its merger and a decoder."""
    fields = common_fields(hf, files)
    vision = fields["vision"]
    return ModelConfig(
        **fields,
        **LAST_LAYER,
        image=native_image_config(
            files.preprocessor,
            size=vision.image_size,
            patch=vision.patch_size,
            merge=hf.vision_config.spatial_merge_size,
            frames=vision.frames,
        ),
        **towers.merger(hf.vision_config, f"{files.where}: vision_config"),
    )


def rules(config: ModelConfig) -> tuple[Rule, ...]:
    """The rules of the tower, the merger and the decoder."""
    return part_rules(config, towers.PROJECTOR_RULES[config.family])


def canonical_name(name: str) -> str:
    """The one name of a tensor in the layouts that Hugging Face has used.

    | files on the Hub, and of Qwen3-VL          | in memory                     | here                       |
    |--------------------------------------------|-------------------------------|----------------------------|
    | visual.*, model.visual.*                   | model.visual.*                | vision_tower.*             |
    | visual.merger.*, model.visual.merger.*     | model.visual.merger.*         | multi_modal_projector.*    |
    | model.layers.*, model.language_model.*     | model.language_model.*        | language_model.model.*     |
    | lm_head.*                                  | lm_head.*                     | language_model.lm_head.*   |
    """
    name = re.sub(r"^model\.visual\.", "visual.", name)
    for own, canonical in (("visual.merger.", "multi_modal_projector."), ("visual.", "vision_tower.")):
        if name.startswith(own):
            return canonical + name.removeprefix(own)
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    return re.sub(r"^model\.(language_model\.)?", "language_model.model.", name)


def _restated(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Qwen2-VL and Qwen2.5-VL on the Hub state the decoder's fields at the top, and the tower's model_type otherwise.

    Files that transformers 4.52 to 4.55 wrote state the decoder's fields twice. What is in `text_config` counts there.
    """
    family, vision, text = config["model_type"], config.get("vision_config"), config.get("text_config")
    top = FIELDS | {"model_type", "architectures", "transformers_version", "torch_dtype", "dtype"}
    if text is None:
        text = {name: value for name, value in config.items() if name not in top}
        config = {name: value for name, value in config.items() if name in top}
    elif isinstance(text, Mapping):
        config = {name: value for name, value in config.items() if name in top or not _copied(name, value, text)}
    if isinstance(text, Mapping) and text.get("model_type", family) == family:
        text = {**text, "model_type": f"{family}_text"}
    if isinstance(vision, Mapping) and vision.get("model_type", family) == family:
        vision = {**vision, "model_type": f"{family}_vision"}
    return {**config, "vision_config": vision, "text_config": text}


def _copied(name: str, value: Any, text: Mapping[str, Any]) -> bool:
    """Whether a field at the top says what `text_config` says. A window there may be that of a file that uses none."""
    return name in text and (value == text[name] or (name == "sliding_window" and text[name] is None))


def _family(model_type: str, architecture: str, vision: str, text: str) -> Family:
    return Family(
        model_type=model_type,
        architecture=architecture,
        fields=FIELDS,
        parts={"vision_config": towers.part(vision), "text_config": decoders.text_part(text)},
        model_config=model_config,
        rules=rules,
        canonical_name=canonical_name,
        carried=(),
        ignored=decoders.IGNORED,
        restated=_restated,
    )


QWEN2_VL = _family("qwen2_vl", "Qwen2VLForConditionalGeneration", "qwen2_vl_vision", "qwen2_vl_text")
QWEN2_5_VL = _family("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl_vision", "qwen2_5_vl_text")
QWEN3_VL = _family("qwen3_vl", "Qwen3VLForConditionalGeneration", "qwen3_vl_vision", "qwen3_vl_text")
