"""Vision towers: those of squares (CLIP, SigLIP, InternViT, SmolVLM's), and the table of all kinds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from converters.families import native_towers
from converters.families.family import HFConfig, Part, prefixed
from converters.families.values import activation, square_side
from converters.ops import Conv, Copy, Flat, Linear, Rule, Unsqueezed
from lsg_jax.config import VisionConfig
from lsg_jax.errors import ConfigError

_FIELDS = frozenset(
    {
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels", "image_size",
        "patch_size", "hidden_act", "layer_norm_eps",
    }
)  # fmt: skip

_UNUSED = frozenset(
    {
        "projection_dim", "vision_use_head", "vocab_size", "tie_word_embeddings",  # about parts that the model does not use
    }
)  # fmt: skip

_INTERNVIT_FIELDS = _FIELDS | {
    "attention_bias", "use_qk_norm", "norm_type",
    "hidden_dropout_prob", "projection_dropout", "layer_scale_init_value",  # of training
}  # fmt: skip

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
    Rule("final_norm/scale", "post_layernorm.weight", Copy()),
    Rule("final_norm/bias", "post_layernorm.bias", Copy()),
)

_INTERNVIT = (
    Rule("class_embedding", "embeddings.cls_token", Unsqueezed(2)),
    Rule("patch_embedding/kernel", "embeddings.patch_embeddings.projection.weight", Conv()),
    Rule("patch_embedding/bias", "embeddings.patch_embeddings.projection.bias", Flat()),
    Rule("position_embedding", "embeddings.position_embeddings", Unsqueezed()),
    *prefixed(
        "layers/",
        "encoder.layer.{layer}.",
        (
            Rule("layer_norm1/scale", "layernorm_before.weight", Copy()),
            Rule("layer_norm1/bias", "layernorm_before.bias", Copy()),
            Rule("attention/q_proj/kernel", "attention.q_proj.weight", Linear()),
            Rule("attention/q_proj/bias", "attention.q_proj.bias", Flat()),
            Rule("attention/k_proj/kernel", "attention.k_proj.weight", Linear()),
            Rule("attention/k_proj/bias", "attention.k_proj.bias", Flat()),
            Rule("attention/v_proj/kernel", "attention.v_proj.weight", Linear()),
            Rule("attention/v_proj/bias", "attention.v_proj.bias", Flat()),
            Rule("attention/q_norm/scale", "attention.q_norm.weight", Copy()),
            Rule("attention/k_norm/scale", "attention.k_norm.weight", Copy()),
            Rule("attention/out_proj/kernel", "attention.projection_layer.weight", Linear(in_axes=2)),
            Rule("attention/out_proj/bias", "attention.projection_layer.bias", Flat()),
            Rule("layer_scale1", "lambda_1", Copy()),
            Rule("layer_norm2/scale", "layernorm_after.weight", Copy()),
            Rule("layer_norm2/bias", "layernorm_after.bias", Copy()),
            Rule("fc1/kernel", "mlp.fc1.weight", Linear()),
            Rule("fc1/bias", "mlp.fc1.bias", Flat()),
            Rule("fc2/kernel", "mlp.fc2.weight", Linear()),
            Rule("fc2/bias", "mlp.fc2.bias", Flat()),
            Rule("layer_scale2", "lambda_2", Copy()),
        ),
    ),
)


@dataclass(frozen=True)
class Tower:
    """A kind of vision tower: its name in VisionConfig, the fields of its configuration that are handled, and its rules."""

    name: Any  # VisionConfig.family
    fields: frozenset[str]
    rules: tuple[Rule, ...]


_in_tower = lambda rules: prefixed("vision_tower/", "vision_tower.", rules)

TOWERS: dict[str, Tower] = {
    "clip_vision_model": Tower("clip", _FIELDS | _UNUSED, _in_tower(_CLIP + _LAYERS)),
    "siglip_vision_model": Tower("siglip", _FIELDS | _UNUSED, _in_tower(_SIGLIP + _LAYERS)),
    "internvl_vision": Tower("internvit", _INTERNVIT_FIELDS, _in_tower(_INTERNVIT)),
    # transformers rounds fractions to find SmolVLM's positions; at 27 and 32 patches a side, as published, they are in order
    "smolvlm_vision": Tower("smolvlm", _FIELDS, _in_tower(_SIGLIP + _LAYERS)),
    **{
        f"{name}_vision": Tower(name, fields, _in_tower(native_towers.RULES[name]))
        for name, fields in native_towers.FIELDS.items()
    },
}
"""By model_type of `vision_config`, as transformers resolves it."""

TOWER_RULES: dict[str, tuple[Rule, ...]] = {tower.name: tower.rules for tower in TOWERS.values()}
"""By `VisionConfig.family`."""


PROJECTOR_RULES = native_towers.MERGER_RULES
"""By `ModelConfig.family`, of the models whose connector is a part of the tower there."""


def part(*kinds: str) -> Part:
    """The `vision_config` of a family whose tower is one of these kinds; the first where config.json states none."""
    return Part(default=kinds[0], fields={kind: TOWERS[kind].fields for kind in kinds})


VISION_PART = part("clip_vision_model", "siglip_vision_model")

CARRIED = (
    r"vision_tower\.post_layernorm\.(weight|bias)",  # feeds the pooled output only
    r"vision_tower\.head\..+",  # SigLIP's attention pooling
)

IGNORED = ((r"vision_tower\.embeddings\.position_ids", "a buffer that counts from 0; older transformers saved it"),)


def vision_config(hf: HFConfig, where: str) -> VisionConfig:
    """The configuration of a tower. SigLIP is without its last norm, which LLaVA does not use.

    Raises:
        ConfigError: a value is not supported.
    """
    kind = hf.model_type
    if TOWERS[kind].name in native_towers.RULES:
        return native_towers.vision_config(TOWERS[kind].name, hf, where)
    if hf.num_channels != 3:
        raise ConfigError(f"{where}: num_channels = {hf.num_channels}, only 3 is supported")
    if hf.hidden_size % hf.num_attention_heads:
        raise ConfigError(f"{where}: hidden_size {hf.hidden_size} is no multiple of {hf.num_attention_heads} heads")
    settings: dict[str, Any] = {"final_norm": kind == "smolvlm_vision"}
    if kind == "internvl_vision":
        settings = _internvit(hf, where)
    return VisionConfig(
        family=TOWERS[kind].name,
        image_size=square_side(hf.image_size, f"{where}: image_size"),
        patch_size=square_side(hf.patch_size, f"{where}: patch_size"),
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        layer_norm_eps=float(hf.layer_norm_eps),
        hidden_act=activation(hf.hidden_act, f"{where}: hidden_act"),
        **settings,
    )


def _internvit(hf: HFConfig, where: str) -> dict[str, Any]:
    norms = {"layer_norm": "layer", "rms_norm": "rms"}
    if hf.norm_type not in norms:
        raise ConfigError(f"{where}: norm_type = {hf.norm_type!r} is not supported; supported: {', '.join(norms)}")
    return {
        "norm": norms[hf.norm_type],
        "qkv_bias": hf.attention_bias,
        "qk_norm": hf.use_qk_norm,
        "layer_scale": True,
        "patch_bias": True,
    }


def merger(hf: HFConfig, where: str = "config.json: vision_config") -> dict[str, Any]:
    """The fields of ModelConfig about the connector that is a part of a native tower; `hf`: the tower's configuration.

    Raises:
        ConfigError: a value is not supported.
    """
    return native_towers.merger(TOWERS[hf.model_type].name, hf, where)
