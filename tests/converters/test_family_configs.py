"""config.json of the later families, as published and as transformers 5 saves it."""

import json
from importlib.resources import files

import pytest

from converters.hf_config import model_config
from lsg_jax.errors import ConfigError

TOP = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"], "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "vision_start_token_id": 151652, "vision_end_token_id": 151653, "vision_token_id": 151654,
    "image_token_id": 151655, "video_token_id": 151656, "hidden_act": "silu", "hidden_size": 3584,
    "initializer_range": 0.02, "intermediate_size": 18944, "max_position_embeddings": 128000, "max_window_layers": 28,
    "model_type": "qwen2_5_vl", "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.41.2", "use_cache": True, "use_sliding_window": False,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "vocab_size": 152064,
    "vision_config": {
        "depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "in_chans": 3,
        "out_hidden_size": 3584, "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14, "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2, "temporal_patch_size": 2,
    },
}  # fmt: skip
"""Qwen2.5-VL-7B as published: the fields of its language model are at the top."""


def known(name):
    """The shapes that `lsg plan` knows, as transformers 5 saves them, and the image processor's settings."""
    stated = json.loads((files("lsg_jax.plan") / "models" / f"{name}.json").read_text())
    return stated, stated.pop("preprocessor")


def test_fields_at_the_top_are_those_of_the_language_model():
    stated, preprocessor = known("qwen25_vl_7b")
    assert model_config(TOP, preprocessor=preprocessor) == model_config(stated, preprocessor=preprocessor)
    with pytest.raises(ConfigError, match="rope_parameters of type default: not understood: beta_fast"):
        model_config({**TOP, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24], "beta_fast": 1}})


def test_towers_and_decoders_may_be_named_as_the_whole_model():
    stated, preprocessor = known("qwen3_vl_8b")
    older = {**stated, "vision_config": {**stated["vision_config"], "model_type": "qwen3_vl"}}
    assert model_config(older, preprocessor=preprocessor) == model_config(stated, preprocessor=preprocessor)
