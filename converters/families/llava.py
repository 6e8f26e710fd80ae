"""LLaVA-1.5 and models of its form: CLIP or SigLIP, a two-layer projector, and Llama, Mistral, Qwen2 or Phi-3."""

from __future__ import annotations

import re

from converters.families import decoders, towers
from converters.families.family import CheckpointFiles, Family, HFConfig, prefixed
from converters.families.values import activation
from converters.families.whole import common_fields, part_rules
from converters.image_processor import image_config
from converters.ops import Copy, Flat, Linear, Rule
from lsg_jax.config import ModelConfig
from lsg_jax.errors import ConfigError

FIELDS = frozenset(
    {
        "vision_config", "text_config", "image_token_index", "image_token_id", "projector_hidden_act",
        "multimodal_projector_bias", "vision_feature_layer", "vision_feature_select_strategy", "tie_word_embeddings",
        "lsg_sinks",
        "ignore_index", "image_seq_length",  # a label, a fact about the processor
    }
)  # fmt: skip

_PROJECTOR = prefixed(
    "projector/",
    "multi_modal_projector.",
    (
        Rule("norm/scale", "projector_layernorm.weight", Copy()),
        Rule("norm/bias", "projector_layernorm.bias", Copy()),
        Rule("linear_1/kernel", "linear_1.weight", Linear()),
        Rule("linear_1/bias", "linear_1.bias", Flat()),
        Rule("linear_2/kernel", "linear_2.weight", Linear()),
        Rule("linear_2/bias", "linear_2.bias", Flat()),
    ),
)


def model_config(hf: HFConfig, files: CheckpointFiles) -> ModelConfig:
    """The configuration of a tower, a two-layer projector and a decoder; `hf` may state tiles, and a norm of the projector."""
    where = files.where
    fields = common_fields(hf, files)
    vision = fields["vision"]
    stated = hf.vision_feature_layer
    layers = (stated,) if isinstance(stated, int) else tuple(stated)
    states = vision.num_layers + 1
    if bad := [layer for layer in layers if not -states <= layer < states]:
        raise ConfigError(
            f"{where}: vision_feature_layer {bad[0]} does not exist, the tower has hidden states 0 to {states - 1}"
        )
    return ModelConfig(
        **fields,
        feature_layers=layers,
        feature_select=getattr(hf, "vision_feature_select_strategy", "default"),  # ViP-LLaVA has no such setting
        image=image_config(
            files.preprocessor,
            size=vision.image_size,
            tower=vision.family,
            pinpoints=getattr(hf, "image_grid_pinpoints", None),
        ),
        projector_hidden_act=activation(hf.projector_hidden_act, f"{where}: projector_hidden_act"),
        projector_bias=getattr(hf, "multimodal_projector_bias", True),
        projector_norm_eps=getattr(hf, "projector_layernorm_eps", None),
    )


def rules(config: ModelConfig) -> tuple[Rule, ...]:
    """The rules of the tower, the projector and the decoder."""
    return part_rules(config, _PROJECTOR)


def canonical_name(name: str) -> str:
    """The one name of a tensor in the three layouts that Hugging Face has used.

    | files on the Hub            | saved by transformers 5   | in memory                      |
    |-----------------------------|---------------------------|--------------------------------|
    | vision_tower.vision_model.* | vision_tower.*            | model.vision_tower.*           |
    | language_model.model.*      | language_model.model.*    | model.language_model.*         |
    | language_model.lm_head.*    | language_model.lm_head.*  | lm_head.*                      |
    | multi_modal_projector.*     | multi_modal_projector.*   | model.multi_modal_projector.*  |
    | image_newline               | image_newline             | model.image_newline            |

    The canonical name is that of the middle column.
    """
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    if name.startswith("model.language_model."):
        return f"language_model.model.{name.removeprefix('model.language_model.')}"
    if re.match(r"model\.(vision_tower\.|multi_modal_projector\.|image_newline$)", name):
        name = name.removeprefix("model.")
    if name.startswith("vision_tower.vision_model."):
        name = f"vision_tower.{name.removeprefix('vision_tower.vision_model.')}"
    return name


FAMILY = Family(
    model_type="llava",
    architecture="LlavaForConditionalGeneration",
    fields=FIELDS,
    parts={"vision_config": towers.VISION_PART, "text_config": decoders.TEXT_PART},
    model_config=model_config,
    rules=rules,
    canonical_name=canonical_name,
    carried=towers.CARRIED,
    ignored=towers.IGNORED + decoders.IGNORED,
)
