"""InternVL3 and 3.5: InternViT on tiles of the image's aspect, 2 x 2 patches to a token, and Qwen2, Qwen3 or Llama."""

from __future__ import annotations

from converters.families import decoders, llava, towers
from converters.families.family import CheckpointFiles, Family, HFConfig, prefixed
from converters.families.values import activation, shortened
from converters.families.whole import common_fields, part_rules
from converters.image_kinds import tiles_image_config
from converters.ops import Copy, Flat, Linear, Rule
from lsg_jax.config import ModelConfig
from lsg_jax.errors import ConfigError

_FIELDS = frozenset(
    {
        "vision_config", "text_config", "image_token_id", "projector_hidden_act", "downsample_ratio", "vision_feature_layer",
        "vision_feature_select_strategy", "tie_word_embeddings", "lsg_sinks",
        "image_seq_length",
    }
)  # fmt: skip

_PROJECTOR = prefixed(
    "projector/",
    "multi_modal_projector.",
    (
        Rule("norm/scale", "layer_norm.weight", Copy()),
        Rule("norm/bias", "layer_norm.bias", Copy()),
        Rule("linear_1/kernel", "linear_1.weight", Linear()),
        Rule("linear_1/bias", "linear_1.bias", Flat()),
        Rule("linear_2/kernel", "linear_2.weight", Linear()),
        Rule("linear_2/bias", "linear_2.bias", Flat()),
    ),
)


def _model_config(hf: HFConfig, files: CheckpointFiles) -> ModelConfig:
    where = files.where
    fields = common_fields(hf, files)
    vision = fields["vision"]
    merge = round(1 / hf.downsample_ratio)
    if merge * hf.downsample_ratio != 1 or (vision.image_size // vision.patch_size) % merge:
        raise ConfigError(f"{where}: downsample_ratio = {hf.downsample_ratio} does not divide the grid of patches")
    if not isinstance(hf.vision_feature_layer, int) or hf.vision_feature_select_strategy != "default":
        raise ConfigError(f"{where}: vision_feature_layer must be one layer, and vision_feature_select_strategy default")
    tokens = (vision.image_size // vision.patch_size // merge) ** 2
    if (stated := files.config.get("image_seq_length", tokens)) != tokens:
        raise ConfigError(f"{where}: image_seq_length = {shortened(stated)}, but a tile becomes {tokens} tokens")
    return ModelConfig(
        **fields,
        feature_layers=(hf.vision_feature_layer,),
        feature_select="default",
        image=tiles_image_config(files.preprocessor, size=vision.image_size),
        projector_hidden_act=activation(hf.projector_hidden_act, f"{where}: projector_hidden_act"),
        projector_norm_eps=1e-5,  # of PyTorch's layer norm
        projector_norm_merged=True,
        merge=merge,
    )


def _rules(config: ModelConfig) -> tuple[Rule, ...]:
    return part_rules(config, _PROJECTOR)


FAMILY = Family(
    model_type="internvl",
    architecture="InternVLForConditionalGeneration",
    fields=_FIELDS,
    parts={"vision_config": towers.part("internvl_vision"), "text_config": decoders.text_part("qwen2", "qwen3", "llama")},
    model_config=_model_config,
    rules=_rules,
    canonical_name=llava.canonical_name,
    carried=(),
    ignored=decoders.IGNORED,
)
