"""Configurations of decoders as they are on the Hub: what is read of them, and what is refused."""

import pytest
from transformers import CONFIG_MAPPING

from converters.families.decoders import DECODERS, RULES, TEXT_PART, text_config, text_part
from converters.families.fields import undefined_fields
from lsg_jax.config import RopeConfig, TextConfig, from_dict, to_dict
from lsg_jax.errors import ConfigError

GEMMA_3_4B = {
    "model_type": "gemma3_text",
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_hidden_layers": 34,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window": 1024,
}
QWEN_2_5_VL_7B = {
    "model_type": "qwen2_5_vl_text",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_window_layers": 28,
    "sliding_window": 32768,
    "use_sliding_window": False,
    "rope_theta": 1e6,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
}
QWEN_3_VL_4B = {
    "model_type": "qwen3_vl_text",
    "hidden_size": 2560,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 36,
    "head_dim": 128,
    "attention_bias": False,
    "rope_theta": 5e6,
    "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
}


def read(part, **changes):
    """As a family reads it: fields that are not handled first."""
    part = part | changes
    kind = part["model_type"]
    undefined_fields(part, text_part(kind).fields[kind], kind, "text_config")
    given = {name: dict(value) if isinstance(value, dict) else value for name, value in part.items()}
    config = text_config(CONFIG_MAPPING[kind](**given), tied=False, where="text_config")
    assert from_dict(TextConfig, to_dict(config), where="manifest") == config
    return config


def test_gemma_3():
    found = read(GEMMA_3_4B)
    assert (found.family, found.num_heads, found.num_kv_heads, found.head_dim) == ("gemma3", 8, 4, 256)
    assert found.rope == RopeConfig(theta=1e6, kind="linear", factor=8.0) and found.sliding_rope == RopeConfig(theta=1e4)
    assert found.sliding_window == 1024
    assert set(range(34)) - set(found.sliding_layers) == {5, 11, 17, 23, 29}
    assert found.qk_norm and found.sandwich_norms and found.norm_offset and found.scaled_embeddings
    assert (found.hidden_act, found.query_scale) == ("gelu", None)
    assert read(GEMMA_3_4B, head_dim=128, query_pre_attn_scalar=168).query_scale == 168**-0.5
    with pytest.raises(ConfigError, match=r"final_logit_softcapping = 30.0"):
        read(GEMMA_3_4B, final_logit_softcapping=30.0)
    with pytest.raises(ConfigError, match=r"use_bidirectional_attention = True"):
        read(GEMMA_3_4B, use_bidirectional_attention=True)


def test_qwen_vl():
    found = read(QWEN_2_5_VL_7B)
    assert (found.family, found.qkv_bias, found.out_bias, found.qk_norm) == ("qwen2", True, False, False)
    assert found.rope == RopeConfig(theta=1e6, sections=(16, 24, 24))
    assert (found.sliding_window, found.sliding_layers, found.sliding_rope) == (None, None, None)
    found = read(QWEN_2_5_VL_7B, use_sliding_window=True, max_window_layers=26)
    assert (found.sliding_window, found.sliding_layers) == (32768, (26, 27))
    found = read(QWEN_3_VL_4B)
    assert (found.family, found.qkv_bias, found.qk_norm) == ("qwen3", False, True)
    assert found.rope == RopeConfig(theta=5e6, sections=(24, 20, 20), interleaved=True)
    with pytest.raises(ConfigError, match=r"mrope_section = \[24, 20\] are not the three sections"):
        read(QWEN_3_VL_4B, rope_scaling={"mrope_section": [24, 20], "rope_type": "default"})


def test_decoders_of_one_name_have_the_same_rules():
    assert all(decoder.rules == RULES[decoder.name] for decoder in DECODERS.values())
    assert set(TEXT_PART.fields) == {"llama", "mistral", "qwen2", "qwen3", "phi3"}
