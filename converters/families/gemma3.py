"""Gemma 3: SigLIP, 4 x 4 patches averaged to a token, and a decoder in which the tokens of an image see each other."""

from __future__ import annotations

import dataclasses
import math

from converters.families import decoders, llava, towers
from converters.families.family import CheckpointFiles, Family, HFConfig
from converters.families.values import positive
from converters.families.whole import LAST_LAYER, common_fields, part_rules
from converters.image_kinds import gemma_image_config
from converters.ops import Copy, Rule
from lsg_jax.config import ModelConfig
from lsg_jax.errors import ConfigError

_FIELDS = frozenset(
    {
        "vision_config", "text_config", "mm_tokens_per_image", "image_token_index", "image_token_id", "boi_token_index",
        "boi_token_id", "eoi_token_index", "eoi_token_id", "tie_word_embeddings", "lsg_sinks",
    }
)  # fmt: skip

_PROJECTOR = (
    Rule("projector/norm/scale", "multi_modal_projector.mm_soft_emb_norm.weight", Copy()),
    Rule("projector/linear_1/kernel", "multi_modal_projector.mm_input_projection_weight", Copy()),
)


def _model_config(hf: HFConfig, files: CheckpointFiles) -> ModelConfig:
    fields = common_fields(hf, files)
    vision = dataclasses.replace(fields.pop("vision"), final_norm=True)
    text = dataclasses.replace(fields.pop("text"), images_see_themselves=True)
    count = positive(hf.mm_tokens_per_image, f"{files.where}: mm_tokens_per_image")
    side, tokens = vision.image_size // vision.patch_size, math.isqrt(count)
    if tokens**2 != count or side % tokens:
        raise ConfigError(f"{files.where}: mm_tokens_per_image = {count} are no square that divides {side} x {side} patches")
    return ModelConfig(
        **fields,
        **LAST_LAYER,
        vision=vision,
        text=text,
        image=gemma_image_config(files.preprocessor, size=vision.image_size),
        projector_bias=False,
        projector_norm="rms_offset",
        projector_norm_eps=float(hf.vision_config.layer_norm_eps),
        projector_norm_merged=True,
        projector_layers=1,
        merge=side // tokens,
        merge_mean=True,
    )


def _rules(config: ModelConfig) -> tuple[Rule, ...]:
    return part_rules(config, _PROJECTOR)


FAMILY = Family(
    model_type="gemma3",
    architecture="Gemma3ForConditionalGeneration",
    fields=_FIELDS,
    parts={"vision_config": towers.part("siglip_vision_model"), "text_config": decoders.text_part("gemma3_text")},
    model_config=_model_config,
    rules=_rules,
    canonical_name=llava.canonical_name,
    carried=(),
    ignored=towers.IGNORED + decoders.IGNORED,
)
