"""Vision towers that several families share: CLIP and SigLIP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from converters.families.family import HFConfig, Part, prefixed
from converters.families.values import activation, square_side
from converters.ops import Conv, Copy, Flat, Linear, Rule
from lsg_jax.config import VisionConfig
from lsg_jax.errors import ConfigError

_FIELDS = frozenset(
    {
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels", "image_size",
        "patch_size", "hidden_act", "layer_norm_eps",
        "projection_dim", "vision_use_head", "vocab_size", "tie_word_embeddings",  # about parts that the model does not use
    }
)  # fmt: skip

_LAYERS = prefixed(
    "layers/",
    "encoder.layers.{layer}.",
    (
        Rule("layer_norm1/scale", "layer_norm1.weight", Copy()),
        Rule("layer_norm1/bias", "layer_norm1.bias", Copy()),
        Rule("attention/q_proj/kernel", "self_attn.q_proj.weight", Linear()),
        Rule("attention/q_proj/bias", "self_attn.q_proj.bias", Flat()),
        Rule("attention/k_proj/kernel", "self_attn.k_proj.weight", Linear()),
        Rule("attention/k_proj/bias", "self_attn.k_proj.bias", Flat()),
        Rule("attention/v_proj/kernel", "self_attn.v_proj.weight", Linear()),
        Rule("attention/v_proj/bias", "self_attn.v_proj.bias", Flat()),
        Rule("attention/out_proj/kernel", "self_attn.out_proj.weight", Linear(in_axes=2)),
        Rule("attention/out_proj/bias", "self_attn.out_proj.bias", Flat()),
        Rule("layer_norm2/scale", "layer_norm2.weight", Copy()),
        Rule("layer_norm2/bias", "layer_norm2.bias", Copy()),
        Rule("fc1/kernel", "mlp.fc1.weight", Linear()),
        Rule("fc1/bias", "mlp.fc1.bias", Flat()),
        Rule("fc2/kernel", "mlp.fc2.weight", Linear()),
        Rule("fc2/bias", "mlp.fc2.bias", Flat()),
    ),
)

_CLIP = (
    Rule("class_embedding", "embeddings.class_embedding", Copy()),
    Rule("patch_embedding/kernel", "embeddings.patch_embedding.weight", Conv()),
    Rule("position_embedding", "embeddings.position_embedding.weight", Copy()),
    Rule("pre_norm/scale", "pre_layrnorm.weight", Copy()),  # the misspelling is CLIP's
    Rule("pre_norm/bias", "pre_layrnorm.bias", Copy()),
)

_SIGLIP = (
    Rule("patch_embedding/kernel", "embeddings.patch_embedding.weight", Conv()),
    Rule("patch_embedding/bias", "embeddings.patch_embedding.bias", Flat()),
    Rule("position_embedding", "embeddings.position_embedding.weight", Copy()),
)


@dataclass(frozen=True)
class Tower:
    """A kind of vision tower: its name in VisionConfig, and its rules."""

    name: Literal["clip", "siglip"]
    rules: tuple[Rule, ...]


TOWERS = {
    "clip_vision_model": Tower("clip", prefixed("vision_tower/", "vision_tower.", _CLIP + _LAYERS)),
    "siglip_vision_model": Tower("siglip", prefixed("vision_tower/", "vision_tower.", _SIGLIP + _LAYERS)),
}
"""By model_type of `vision_config`."""

TOWER_RULES = {tower.name: tower.rules for tower in TOWERS.values()}
"""By `VisionConfig.family`."""

VISION_PART = Part(default="clip_vision_model", fields=dict.fromkeys(TOWERS, _FIELDS))

CARRIED = (
    r"vision_tower\.post_layernorm\.(weight|bias)",  # feeds the pooled output only
    r"vision_tower\.head\..+",  # SigLIP's attention pooling
)

IGNORED = ((r"vision_tower\.embeddings\.position_ids", "a buffer that counts from 0; older transformers saved it"),)


def vision_config(hf: HFConfig, where: str) -> VisionConfig:
    """The configuration of a tower.

    Raises:
        ConfigError: a value is not supported.
    """
    if hf.num_channels != 3:
        raise ConfigError(f"{where}: num_channels = {hf.num_channels}, only 3 is supported")
    if hf.hidden_size % hf.num_attention_heads:
        raise ConfigError(f"{where}: hidden_size {hf.hidden_size} is no multiple of {hf.num_attention_heads} heads")
    return VisionConfig(
        family=TOWERS[hf.model_type].name,
        image_size=square_side(hf.image_size, f"{where}: image_size"),
        patch_size=square_side(hf.patch_size, f"{where}: patch_size"),
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        layer_norm_eps=float(hf.layer_norm_eps),
        hidden_act=activation(hf.hidden_act, f"{where}: hidden_act"),
    )
