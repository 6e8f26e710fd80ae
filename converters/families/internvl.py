"""InternVL3 and 3.5: InternViT on tiles of the image's aspect, 2 x 2 patches to a token, and Qwen2, Qwen3 or Llama."""

from __future__ import annotations

from converters.families import decoders, llava, towers
from converters.families.family import CheckpointFiles, Family, HFConfig, prefixed
from converters.families.known_sinks import sinks_of
from converters.families.values import activation, token_ids
from converters.image_kinds import tiles_image_config
from converters.ops import Copy, Flat, Linear, Rule
from lsg_jax.config import ModelConfig
from lsg_jax.errors import ConfigError

_FIELDS = frozenset(
    {
        "vision_config", "text_config", "image_token_id", "projector_hidden_act", "downsample_ratio", "vision_feature_layer",
        "vision_feature_select_strategy", "tie_word_embeddings", "lsg_sinks",
        "image_seq_length",  # a fact about the processor
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
    vision = towers.vision_config(hf.vision_config, f"{where}: vision_config")
    text = decoders.text_config(hf.text_config, tied=bool(hf.tie_word_embeddings), where=f"{where}: text_config")
    merge = round(1 / hf.downsample_ratio)
    if merge * hf.downsample_ratio != 1 or (vision.image_size // vision.patch_size) % merge:
        raise ConfigError(f"{where}: downsample_ratio = {hf.downsample_ratio} does not divide the grid of patches")
    if not isinstance(hf.vision_feature_layer, int) or hf.vision_feature_select_strategy != "default":
        raise ConfigError(f"{where}: vision_feature_layer must be one layer, and vision_feature_select_strategy default")
    eos = token_ids(hf, files, "eos_token_id", from_generation=True)
    pad = token_ids(hf, files, "pad_token_id", from_generation=False) or eos or (0,)
    sinks, sink_sources = sinks_of(vision, text, hf, files)
    return ModelConfig(
        vision=vision,
        text=text,
        feature_layers=(hf.vision_feature_layer,),
        feature_select="default",
        image_token_id=hf.image_token_id,
        eos_token_ids=eos,
        pad_token_id=pad[0],
        image=tiles_image_config(files.preprocessor, size=vision.image_size),
        projector_hidden_act=activation(hf.projector_hidden_act, f"{where}: projector_hidden_act"),
        projector_norm_eps=1e-5,  # of PyTorch's layer norm
        projector_norm_merged=True,
        merge=merge,
        sinks=sinks,
        sink_sources=sink_sources,
        family="internvl",
    )


def _rules(config: ModelConfig) -> tuple[Rule, ...]:
    return (*towers.TOWER_RULES[config.vision.family], *_PROJECTOR, *decoders.RULES[config.text.family])


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
