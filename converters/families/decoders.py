"""Language models that several families share: Llama, Mistral, Qwen2 and Phi-3."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from converters.families.family import HFConfig, Part, prefixed
from converters.families.values import activation
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
            Rule("post_attention_norm/scale", "post_attention_layernorm.weight", Copy()),
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


@dataclass(frozen=True)
class Decoder:
    """A kind of language model.

    Attributes:
        name: in TextConfig.
        fields: what is handled of `text_config` beside the fields that all decoders have.
        rules: its rule table.
        qkv_bias: queries, keys and values have biases.
        stated_bias: the configuration says whether there are biases (`attention_bias`, `mlp_bias`).
        partial_rotary: only a part of each head may be rotated.
    """

    name: Literal["llama", "mistral", "qwen2", "phi3"]
    fields: frozenset[str]
    rules: tuple[Rule, ...] = _COMMON + _SEPARATE
    qkv_bias: bool = False
    stated_bias: bool = False
    partial_rotary: bool = False


DECODERS: dict[str, Decoder] = {
    decoder.name: decoder
    for decoder in (
        # LLaVA-Phi-3-mini (xtuner) is Phi-3 in Llama's form: it keeps its window, and the original length for longrope only
        Decoder(
            "llama",
            frozenset({"attention_bias", "mlp_bias", "sliding_window", "original_max_position_embeddings"}),
            stated_bias=True,
        ),
        Decoder("mistral", frozenset({"sliding_window"})),
        Decoder(
            "qwen2", frozenset({"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"}), qkv_bias=True
        ),
        Decoder(
            "phi3",
            frozenset({"sliding_window", "original_max_position_embeddings"}),
            rules=_COMMON + _FUSED,
            partial_rotary=True,
        ),
    )
}
"""By model_type of `text_config`, which is also `TextConfig.family`."""

TEXT_PART = Part(default="llama", fields={name: _FIELDS | decoder.fields for name, decoder in DECODERS.items()})

IGNORED = (
    (r"language_model\.model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq", "a buffer computed from the configuration"),
)

_ROPE_FIELDS = {
    "default": set[str](),
    "linear": {"factor"},
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
    attention_bias = decoder.stated_bias and hf.attention_bias
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
        rope=_rope(hf.rope_parameters, decoder, head_dim, where),
        max_positions=hf.max_position_embeddings,
        hidden_act=activation(hf.hidden_act, f"{where}: hidden_act"),
        qkv_bias=decoder.qkv_bias or attention_bias,
        out_bias=attention_bias,
        mlp_bias=decoder.stated_bias and hf.mlp_bias,
        tied_embeddings=tied,
        sliding_window=_sliding_window(hf, where),
    )


def _rope(parameters: Mapping[str, Any] | None, decoder: Decoder, head_dim: int, where: str) -> RopeConfig:
    """Reads `rope_parameters` as transformers 5 has them; its configuration class translates older spellings."""
    given = dict(parameters or {})
    kind = given.pop("rope_type", "default")
    given.pop("type", None)  # the older name of the same
    if kind not in _ROPE_FIELDS:
        raise ConfigError(f"{where}: rope type {kind!r} is not supported; supported: {', '.join(_ROPE_FIELDS)}")
    theta, share = given.pop("rope_theta", None), given.pop("partial_rotary_factor", 1.0)
    if theta is None:
        raise ConfigError(f"{where}: rope_parameters has no rope_theta")
    if unknown := sorted(given.keys() - _ROPE_FIELDS[kind]):
        raise ConfigError(f"{where}: rope_parameters of type {kind}: not understood: {', '.join(unknown)}")
    if missing := sorted(_ROPE_FIELDS[kind] - given.keys()):
        raise ConfigError(f"{where}: rope_parameters of type {kind}: missing: {', '.join(missing)}")
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
    )


def _sliding_window(hf: HFConfig, where: str) -> int | None:
    """The window, if any layer has one. The model refuses sequences longer than that."""
    kinds = set(getattr(hf, "layer_types", None) or ())
    if unknown := sorted(kinds - {"full_attention", "sliding_attention"}):
        raise ConfigError(f"{where}: layer_types {', '.join(unknown)} are not supported")
    if kinds == {"full_attention"}:
        return None
    return getattr(hf, "sliding_window", None)
