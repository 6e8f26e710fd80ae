"""SmolVLM2: SigLIP on tiles of an image that is split, squares of patches to a token, and Llama."""

from __future__ import annotations

import re

from converters.families import decoders, towers
from converters.families.family import CheckpointFiles, Family, HFConfig
from converters.families.values import positive
from converters.families.whole import LAST_LAYER, common_fields, part_rules
from converters.image_kinds import split_image_config
from converters.ops import Linear, Rule
from lsg_jax.config import ModelConfig
from lsg_jax.errors import ConfigError

_FIELDS = frozenset(
    {
        "vision_config", "text_config", "image_token_id", "scale_factor", "tie_word_embeddings", "lsg_sinks",
    }
)  # fmt: skip

_PROJECTOR = (Rule("projector/linear_1/kernel", "multi_modal_projector.modality_projection.proj.weight", Linear()),)


def _model_config(hf: HFConfig, files: CheckpointFiles) -> ModelConfig:
    fields = common_fields(hf, files)
    vision = fields["vision"]
    if (vision.image_size // vision.patch_size) % positive(hf.scale_factor, f"{files.where}: scale_factor"):
        raise ConfigError(f"{files.where}: scale_factor = {hf.scale_factor} does not divide the grid of patches")
    return ModelConfig(
        **fields,
        **LAST_LAYER,
        image=split_image_config(files.preprocessor, size=vision.image_size),
        projector_bias=False,
        projector_layers=1,
        merge=hf.scale_factor,
    )


def _rules(config: ModelConfig) -> tuple[Rule, ...]:
    return part_rules(config, _PROJECTOR)


_PARTS = {
    "vision_model.": "vision_tower.",
    "connector.": "multi_modal_projector.",
    "text_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
}


def _canonical_name(name: str) -> str:
    """`model.vision_model.*`, `model.connector.*`, `model.text_model.*`, `lm_head.*` -> LLaVA's names."""
    name = re.sub(r"^model\.", "", name)
    for own, canonical in _PARTS.items():
        if name.startswith(own):
            return canonical + name.removeprefix(own)
    return name


FAMILY = Family(
    model_type="smolvlm",
    architecture="SmolVLMForConditionalGeneration",
    fields=_FIELDS,
    parts={"vision_config": towers.part("smolvlm_vision"), "text_config": decoders.text_part("llama")},
    model_config=_model_config,
    rules=_rules,
    canonical_name=_canonical_name,
    carried=(),
    ignored=towers.IGNORED + decoders.IGNORED,
)
