"""The rule tables: which Hugging Face tensor holds which leaf. Data, no code beyond putting tables together.

A table may hold rules for leaves that a model of the family lacks (biases, an untied head): those are not used. Rules that name
the same tensor share its rows in the order of the table.
"""

from __future__ import annotations

from converters.ops import Conv, Copy, Flat, Linear, Op, Rule
from lsg_jax.config import ModelConfig

EMBEDDING = "language_model.model.embed_tokens.weight"
HEAD = "language_model.lm_head.weight"

COPY, FLAT, CONV, INTO, OUT_OF_HEADS = Copy(), Flat(), Conv(), Linear(), Linear(in_axes=2)


def _rules(leaf_prefix: str, source_prefix: str, table: tuple[tuple[str, str, Op], ...]) -> tuple[Rule, ...]:
    return tuple(Rule(leaf_prefix + leaf, source_prefix + source, op) for leaf, source, op in table)


_VISION_LAYERS = _rules(
    "vision_tower/layers/",
    "vision_tower.encoder.layers.{layer}.",
    (
        ("layer_norm1/scale", "layer_norm1.weight", COPY),
        ("layer_norm1/bias", "layer_norm1.bias", COPY),
        ("attention/q_proj/kernel", "self_attn.q_proj.weight", INTO),
        ("attention/q_proj/bias", "self_attn.q_proj.bias", FLAT),
        ("attention/k_proj/kernel", "self_attn.k_proj.weight", INTO),
        ("attention/k_proj/bias", "self_attn.k_proj.bias", FLAT),
        ("attention/v_proj/kernel", "self_attn.v_proj.weight", INTO),
        ("attention/v_proj/bias", "self_attn.v_proj.bias", FLAT),
        ("attention/out_proj/kernel", "self_attn.out_proj.weight", OUT_OF_HEADS),
        ("attention/out_proj/bias", "self_attn.out_proj.bias", FLAT),
        ("layer_norm2/scale", "layer_norm2.weight", COPY),
        ("layer_norm2/bias", "layer_norm2.bias", COPY),
        ("fc1/kernel", "mlp.fc1.weight", INTO),
        ("fc1/bias", "mlp.fc1.bias", FLAT),
        ("fc2/kernel", "mlp.fc2.weight", INTO),
        ("fc2/bias", "mlp.fc2.bias", FLAT),
    ),
)

_CLIP = _rules(
    "vision_tower/",
    "vision_tower.",
    (
        ("class_embedding", "embeddings.class_embedding", COPY),
        ("patch_embedding/kernel", "embeddings.patch_embedding.weight", CONV),
        ("position_embedding", "embeddings.position_embedding.weight", COPY),
        ("pre_norm/scale", "pre_layrnorm.weight", COPY),  # the misspelling is CLIP's
        ("pre_norm/bias", "pre_layrnorm.bias", COPY),
    ),
)

_SIGLIP = _rules(
    "vision_tower/",
    "vision_tower.",
    (
        ("patch_embedding/kernel", "embeddings.patch_embedding.weight", CONV),
        ("patch_embedding/bias", "embeddings.patch_embedding.bias", FLAT),
        ("position_embedding", "embeddings.position_embedding.weight", COPY),
    ),
)

_PROJECTOR = _rules(
    "projector/",
    "multi_modal_projector.",
    (
        ("linear_1/kernel", "linear_1.weight", INTO),
        ("linear_1/bias", "linear_1.bias", FLAT),
        ("linear_2/kernel", "linear_2.weight", INTO),
        ("linear_2/bias", "linear_2.bias", FLAT),
    ),
)

_DECODER = (
    Rule("language_model/embed_tokens", EMBEDDING, COPY),
    Rule("language_model/norm/scale", "language_model.model.norm.weight", COPY),
    Rule("language_model/lm_head/kernel", HEAD, INTO),
    *_rules(
        "language_model/layers/",
        "language_model.model.layers.{layer}.",
        (
            ("input_norm/scale", "input_layernorm.weight", COPY),
            ("attention/o_proj/kernel", "self_attn.o_proj.weight", OUT_OF_HEADS),
            ("attention/o_proj/bias", "self_attn.o_proj.bias", FLAT),
            ("post_attention_norm/scale", "post_attention_layernorm.weight", COPY),
            ("mlp/down_proj/kernel", "mlp.down_proj.weight", INTO),
            ("mlp/down_proj/bias", "mlp.down_proj.bias", FLAT),
        ),
    ),
)

_SEPARATE = _rules(
    "language_model/layers/",
    "language_model.model.layers.{layer}.",
    (
        ("attention/q_proj/kernel", "self_attn.q_proj.weight", INTO),
        ("attention/q_proj/bias", "self_attn.q_proj.bias", FLAT),
        ("attention/k_proj/kernel", "self_attn.k_proj.weight", INTO),
        ("attention/k_proj/bias", "self_attn.k_proj.bias", FLAT),
        ("attention/v_proj/kernel", "self_attn.v_proj.weight", INTO),
        ("attention/v_proj/bias", "self_attn.v_proj.bias", FLAT),
        ("mlp/gate_proj/kernel", "mlp.gate_proj.weight", INTO),
        ("mlp/gate_proj/bias", "mlp.gate_proj.bias", FLAT),
        ("mlp/up_proj/kernel", "mlp.up_proj.weight", INTO),
        ("mlp/up_proj/bias", "mlp.up_proj.bias", FLAT),
    ),
)

_FUSED = _rules(
    "language_model/layers/",
    "language_model.model.layers.{layer}.",
    (
        ("attention/q_proj/kernel", "self_attn.qkv_proj.weight", INTO),
        ("attention/k_proj/kernel", "self_attn.qkv_proj.weight", INTO),
        ("attention/v_proj/kernel", "self_attn.qkv_proj.weight", INTO),
        ("mlp/gate_proj/kernel", "mlp.gate_up_proj.weight", INTO),
        ("mlp/up_proj/kernel", "mlp.gate_up_proj.weight", INTO),
    ),
)

VISION = {"clip": _CLIP + _VISION_LAYERS, "siglip": _SIGLIP + _VISION_LAYERS}

TEXT = {
    "llama": _DECODER + _SEPARATE,
    "mistral": _DECODER + _SEPARATE,
    "qwen2": _DECODER + _SEPARATE,
    "phi3": _DECODER + _FUSED,
}

CARRIED = (
    r"vision_tower\.post_layernorm\.(weight|bias)",  # feeds the pooled output only
    r"vision_tower\.head\..+",  # SigLIP's attention pooling
)
"""Tensors that the model does not use but an export gives back, as patterns."""

IGNORED = (
    (r"vision_tower\.embeddings\.position_ids", "a buffer that counts from 0; older transformers saved it"),
    (r"language_model\.model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq", "a buffer computed from the configuration"),
)
"""Tensors that are dropped, as (pattern, reason)."""


def rules_of(config: ModelConfig) -> tuple[Rule, ...]:
    """The rules for a model of this configuration."""
    return VISION[config.vision.family] + _PROJECTOR + TEXT[config.text.family]
