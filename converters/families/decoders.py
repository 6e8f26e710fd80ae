"""Language models that several families share: Llama, Mistral, Qwen2, Qwen3, Phi-3 and Gemma 3."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from converters.families.family import HFConfig, Part, prefixed
from converters.families.values import activation, positive, shortened
from converters.ops import Copy, Flat, Linear, Rule
from lsg_jax.config import RopeConfig, TextConfig
from lsg_jax.errors import ConfigError

EMBEDDING = "language_model.model.embed_tokens.weight"
HEAD = "language_model.lm_head.weight"

_LAYER = ("language_model/layers/", "language_model.model.layers.{layer}.")

_COMMON = (
    Rule("language_model/embed_tokens", EMBEDDING, Copy()),
    Rule("language_model/norm/scale", "language_model.model.norm.weight", Copy()),
    Rule("language_model/lm_head/kernel", HEAD, Linear()),
    *prefixed(
        *_LAYER,
        (
            Rule("input_norm/scale", "input_layernorm.weight", Copy()),
            Rule("attention/o_proj/kernel", "self_attn.o_proj.weight", Linear(in_axes=2)),
            Rule("attention/o_proj/bias", "self_attn.o_proj.bias", Flat()),
            Rule("mlp/down_proj/kernel", "mlp.down_proj.weight", Linear()),
            Rule("mlp/down_proj/bias", "mlp.down_proj.bias", Flat()),
        ),
    ),
)

_SEPARATE = prefixed(
    *_LAYER,
    (
        Rule("attention/q_proj/kernel", "self_attn.q_proj.weight", Linear()),
        Rule("attention/q_proj/bias", "self_attn.q_proj.bias", Flat()),
        Rule("attention/k_proj/kernel", "self_attn.k_proj.weight", Linear()),
        Rule("attention/k_proj/bias", "self_attn.k_proj.bias", Flat()),
        Rule("attention/v_proj/kernel", "self_attn.v_proj.weight", Linear()),
        Rule("attention/v_proj/bias", "self_attn.v_proj.bias", Flat()),
        Rule("mlp/gate_proj/kernel", "mlp.gate_proj.weight", Linear()),
        Rule("mlp/gate_proj/bias", "mlp.gate_proj.bias", Flat()),
        Rule("mlp/up_proj/kernel", "mlp.up_proj.weight", Linear()),
        Rule("mlp/up_proj/bias", "mlp.up_proj.bias", Flat()),
    ),
)

# before the MLP; Gemma 3 has one of that name behind the attention
_MLP_NORM = prefixed(*_LAYER, (Rule("post_attention_norm/scale", "post_attention_layernorm.weight", Copy()),))

_HEAD_NORMS = prefixed(
    *_LAYER,
    (
        Rule("attention/q_norm/scale", "self_attn.q_norm.weight", Copy()),
        Rule("attention/k_norm/scale", "self_attn.k_norm.weight", Copy()),
    ),
)

_SANDWICH_NORMS = prefixed(
    *_LAYER,
    (
        Rule("attention_out_norm/scale", "post_attention_layernorm.weight", Copy()),
        Rule("post_attention_norm/scale", "pre_feedforward_layernorm.weight", Copy()),
        Rule("mlp_out_norm/scale", "post_feedforward_layernorm.weight", Copy()),
    ),
)

_FUSED = prefixed(
    *_LAYER,
    (
        Rule("attention/q_proj/kernel", "self_attn.qkv_proj.weight", Linear()),
        Rule("attention/k_proj/kernel", "self_attn.qkv_proj.weight", Linear()),
        Rule("attention/v_proj/kernel", "self_attn.qkv_proj.weight", Linear()),
        Rule("mlp/gate_proj/kernel", "mlp.gate_up_proj.weight", Linear()),
        Rule("mlp/up_proj/kernel", "mlp.gate_up_proj.weight", Linear()),
    ),
)

_FIELDS = frozenset(
    {
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "rope_parameters",
        "rope_theta", "rope_scaling", "partial_rotary_factor",
    }
)  # fmt: skip


_WINDOW = frozenset({"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"})

Name = Literal["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma3"]


@dataclass(frozen=True)
class Decoder:
    """A kind of language model.

    Attributes:
        model_type: of its configuration in transformers.
        fields: what is handled of that beside the fields that all decoders have.
        name: in TextConfig.
        rules: its rule table.
        qkv_bias: queries, keys and values have biases.
        partial_rotary: only a part of each head may be rotated.
        sections: frequencies that turn with frame, row and column where the configuration does not say it; none: no M-RoPE.
        interleaved: the three take turns.
        settings: fixed settings of TextConfig.
    """

    model_type: str
    fields: frozenset[str]
    name: Name
    rules: tuple[Rule, ...] = _COMMON + _MLP_NORM + _SEPARATE
    qkv_bias: bool = False
    partial_rotary: bool = False
    sections: tuple[int, ...] = ()
    interleaved: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)


_QWEN3_RULES = _COMMON + _MLP_NORM + _SEPARATE + _HEAD_NORMS

DECODERS: dict[str, Decoder] = {
    decoder.model_type: decoder
    for decoder in (
        # LLaVA-Phi-3-mini (xtuner) is Phi-3 in Llama's form, with an original length for longrope only. It also states Phi-3's
        # window, which Llama of transformers does not know
        Decoder("llama", frozenset({"attention_bias", "mlp_bias", "original_max_position_embeddings"}), "llama"),
        Decoder("mistral", frozenset({"sliding_window"}), "mistral"),
        Decoder("qwen2", _WINDOW, "qwen2", qkv_bias=True),
        Decoder("qwen2_vl_text", _WINDOW, "qwen2", qkv_bias=True, sections=(16, 24, 24)),
        Decoder("qwen2_5_vl_text", _WINDOW, "qwen2", qkv_bias=True, sections=(16, 24, 24)),
        Decoder("qwen3", _WINDOW | {"attention_bias"}, "qwen3", rules=_QWEN3_RULES, settings={"qk_norm": True}),
        Decoder(
            "qwen3_vl_text",
            frozenset({"attention_bias"}),
            "qwen3",
            rules=_QWEN3_RULES,
            sections=(24, 20, 20),
            interleaved=True,
            settings={"qk_norm": True},
        ),
        Decoder(
            "phi3",
            frozenset({"sliding_window", "original_max_position_embeddings"}),
            "phi3",
            rules=_COMMON + _MLP_NORM + _FUSED,
            partial_rotary=True,
        ),
        Decoder(
            "gemma3_text",
            frozenset(
                {
                    "attention_bias", "hidden_activation", "query_pre_attn_scalar", "sliding_window", "layer_types",
                    "sliding_window_pattern", "_sliding_window_pattern", "rope_local_base_freq",
                }
            ),
            "gemma3",
            rules=_COMMON + _SEPARATE + _HEAD_NORMS + _SANDWICH_NORMS,
            settings={"qk_norm": True, "sandwich_norms": True, "norm_offset": True, "scaled_embeddings": True},
        ),
    )
}  # fmt: skip
"""By model_type of `text_config`."""

RULES: dict[str, tuple[Rule, ...]] = {decoder.name: decoder.rules for decoder in DECODERS.values()}
"""By `TextConfig.family`. Decoders of one name have the same rules."""


def text_part(*model_types: str) -> Part:
    """What `text_config` may be: some of DECODERS, the first of them where config.json does not say which."""
    return Part(default=model_types[0], fields={name: _FIELDS | DECODERS[name].fields for name in model_types})


TEXT_PART = text_part("llama", "mistral", "qwen2", "phi3", "qwen3")

IGNORED = (
    (r"language_model\.model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq", "a buffer computed from the configuration"),
)

_ROPE_FIELDS = {
    "default": set[str](),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}


def text_config(hf: HFConfig, *, tied: bool, where: str) -> TextConfig:
    """The configuration of a decoder.

    Args:
        tied: the output head is the embedding.

    Raises:
        ConfigError: a value is not supported.
    """
    decoder = DECODERS[hf.model_type]
    heads, kv_heads = hf.num_attention_heads, hf.num_key_value_heads
    if kv_heads < 1 or heads % kv_heads:
        raise ConfigError(f"{where}: {heads} attention heads are no multiple of {kv_heads} key-value heads")
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // heads
    attention_bias = "attention_bias" in decoder.fields and hf.attention_bias
    act = "hidden_activation" if "hidden_activation" in decoder.fields else "hidden_act"
    rope, sliding_rope = _ropes(hf.rope_parameters, decoder, head_dim, where)
    # what a decoder's class does not define has no effect there, though its configuration keeps it
    window, sliding_layers = _sliding_window(hf, where) if "sliding_window" in decoder.fields else (None, None)
    return TextConfig(
        family=decoder.name,
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        num_layers=hf.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=float(hf.rms_norm_eps),
        rope=rope,
        max_positions=hf.max_position_embeddings,
        hidden_act=activation(getattr(hf, act), f"{where}: {act}"),
        qkv_bias=decoder.qkv_bias or attention_bias,
        out_bias=attention_bias,
        mlp_bias="mlp_bias" in decoder.fields and hf.mlp_bias,
        tied_embeddings=tied,
        sliding_window=window,
        sliding_layers=sliding_layers,
        sliding_rope=sliding_rope,
        query_scale=_query_scale(hf, head_dim, where) if "query_pre_attn_scalar" in decoder.fields else None,
        **decoder.settings,
    )


def _ropes(
    parameters: Mapping[str, Any] | None, decoder: Decoder, head_dim: int, where: str
) -> tuple[RopeConfig, RopeConfig | None]:
    """The rotary embeddings of all layers, and that of the sliding ones if they have their own."""
    given = dict(parameters or {})
    if "full_attention" not in given:
        return _rope(given, decoder, head_dim, where), None
    if unknown := sorted(given.keys() - {"full_attention", "sliding_attention"}):
        raise ConfigError(f"{where}: rope_parameters: not understood: {', '.join(unknown)}")
    full, sliding = (_rope(given[kind], decoder, head_dim, where) for kind in ("full_attention", "sliding_attention"))
    return full, None if sliding == full else sliding


def _rope(parameters: Mapping[str, Any] | None, decoder: Decoder, head_dim: int, where: str) -> RopeConfig:
    """Reads `rope_parameters` as transformers 5 has them; its configuration class translates older spellings.

    `dynamic` (InternVL3) is the default up to `max_position_embeddings` tokens. Beyond them it would depend on the whole batch.
    """
    given = dict(parameters or {})
    kind = given.pop("rope_type", "default")
    given.pop("type", None)  # the older name of the same
    sections: tuple[int, ...] = ()
    if decoder.sections:
        stated = given.pop("mrope_section", decoder.sections)
        if not isinstance(stated, (list, tuple)) or len(stated) != 3:
            raise ConfigError(
                f"{where}: mrope_section = {shortened(stated)} are not the three sections of frame, row and column"
            )
        sections = tuple(positive(each, f"{where}: mrope_section") for each in stated)
        given.pop("mrope_interleaved", None)  # the class of the model decides
    if kind not in _ROPE_FIELDS:
        raise ConfigError(f"{where}: rope type {kind!r} is not supported; supported: {', '.join(_ROPE_FIELDS)}")
    theta, share = given.pop("rope_theta", None), given.pop("partial_rotary_factor", 1.0)
    if theta is None:
        raise ConfigError(f"{where}: rope_parameters has no rope_theta")
    if unknown := sorted(given.keys() - _ROPE_FIELDS[kind]):
        raise ConfigError(f"{where}: rope_parameters of type {kind}: not understood: {', '.join(unknown)}")
    if missing := sorted(_ROPE_FIELDS[kind] - given.keys()):
        raise ConfigError(f"{where}: rope_parameters of type {kind}: missing: {', '.join(missing)}")
    if kind == "dynamic":
        kind = "default"
        given.pop("factor")
    rotary_dim = int(head_dim * share)
    if share != 1.0 and (not decoder.partial_rotary or not 0 < rotary_dim <= head_dim):
        raise ConfigError(f"{where}: partial_rotary_factor = {share} is not supported for {decoder.name}")
    if rotary_dim % 2:
        raise ConfigError(f"{where}: {rotary_dim} rotary dimensions; an even number is needed")
    return RopeConfig(
        theta=float(theta),
        kind=kind,
        factor=float(given.get("factor", 1.0)),
        low_freq_factor=float(given.get("low_freq_factor", 1.0)),
        high_freq_factor=float(given.get("high_freq_factor", 4.0)),
        original_max_positions=int(given.get("original_max_position_embeddings", 8192)),
        rotary_dim=None if rotary_dim == head_dim else rotary_dim,
        sections=sections,
        interleaved=decoder.interleaved,
    )


def _sliding_window(hf: HFConfig, where: str) -> tuple[int | None, tuple[int, ...] | None]:
    """The window, if any layer has one, and the layers that have it; None for all of them."""
    kinds = list(getattr(hf, "layer_types", None) or ())
    if unknown := sorted(set(kinds) - {"full_attention", "sliding_attention"}):
        raise ConfigError(f"{where}: layer_types {', '.join(unknown)} are not supported")
    window = getattr(hf, "sliding_window", None)
    if set(kinds) == {"full_attention"} or window is None:
        return None, None
    sliding = tuple(layer for layer, kind in enumerate(kinds) if kind == "sliding_attention")
    return window, None if len(sliding) == len(kinds) else sliding


def _query_scale(hf: HFConfig, head_dim: int, where: str) -> float | None:
    """The factor of the attention logits, where it is not 1 / sqrt(head_dim)."""
    scalar = getattr(hf, "query_pre_attn_scalar", head_dim)
    if not scalar > 0:
        raise ConfigError(f"{where}: query_pre_attn_scalar = {scalar}: it must be above 0")
    return None if scalar == head_dim else float(scalar) ** -0.5
