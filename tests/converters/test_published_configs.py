"""config.json and image processor files of the later families as they are on the Hub; what is read of them and what refused."""

import copy
import json

import pytest
import torch
from transformers import CONFIG_MAPPING
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from converters.hf_config import model_config, read_config
from lsg_jax.errors import ConfigError

QWEN2_5_VL_3B = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"], "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "vision_start_token_id": 151652, "vision_end_token_id": 151653, "vision_token_id": 151654,
    "image_token_id": 151655, "video_token_id": 151656, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
    "intermediate_size": 11008, "max_position_embeddings": 128000, "max_window_layers": 70, "model_type": "qwen2_5_vl",
    "num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "transformers_version": "4.41.2", "use_cache": True, "use_sliding_window": False,
    "vision_config": {
        "depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "in_chans": 3,
        "out_hidden_size": 2048, "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14, "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2, "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "vocab_size": 151936,
}  # fmt: skip
QWEN3_VL_4B = {
    "architectures": ["Qwen3VLForConditionalGeneration"], "image_token_id": 151655, "model_type": "qwen3_vl",
    "text_config": {
        "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643, "dtype": "bfloat16",
        "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2560, "initializer_range": 0.02,
        "intermediate_size": 9728, "max_position_embeddings": 262144, "model_type": "qwen3_vl_text",
        "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
        "rope_theta": 5000000, "tie_word_embeddings": True, "use_cache": True, "vocab_size": 151936,
    },
    "tie_word_embeddings": True, "transformers_version": "4.57.0.dev0", "video_token_id": 151656,
    "vision_config": {
        "deepstack_visual_indexes": [5, 11, 17], "depth": 24, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 1024,
        "in_channels": 3, "initializer_range": 0.02, "intermediate_size": 4096, "model_type": "qwen3_vl", "num_heads": 16,
        "num_position_embeddings": 2304, "out_hidden_size": 2560, "patch_size": 16, "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
    "vision_end_token_id": 151653, "vision_start_token_id": 151652,
}  # fmt: skip
INTERNVL3_1B = {
    "architectures": ["InternVLForConditionalGeneration"], "downsample_ratio": 0.5, "image_seq_length": 256,
    "image_token_id": 151667, "model_type": "internvl", "projector_hidden_act": "gelu",
    "text_config": {
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
        "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02, "intermediate_size": 4864,
        "max_position_embeddings": 32768, "max_window_layers": 70, "model_type": "qwen2", "num_attention_heads": 14,
        "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
        "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"}, "rope_theta": 1000000.0,
        "sliding_window": None, "torch_dtype": "bfloat16", "use_bfloat16": True, "use_cache": True, "moe_config": None,
        "use_sliding_window": False, "vocab_size": 151674,
    },
    "torch_dtype": "bfloat16", "transformers_version": "4.52.0.dev0",
    "vision_config": {
        "architectures": ["InternVisionModel"], "attention_bias": True, "attention_dropout": 0.0, "dropout": 0.0,
        "hidden_act": "gelu", "hidden_dropout_prob": 0.0, "hidden_size": 1024, "image_size": [448, 448],
        "initializer_factor": 0.1, "initializer_range": 1e-10, "intermediate_size": 4096, "layer_norm_eps": 1e-06,
        "layer_scale_init_value": 0.1, "model_type": "internvl_vision", "norm_type": "layer_norm",
        "num_attention_heads": 16, "num_channels": 3, "num_hidden_layers": 24, "patch_size": [14, 14],
        "projection_dropout": 0.0, "use_absolute_position_embeddings": True, "use_mask_token": False,
        "use_mean_pooling": True, "use_qk_norm": False,
    },
    "vision_feature_layer": -1, "vision_feature_select_strategy": "default",
}  # fmt: skip
GEMMA3_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999, "eoi_token_index": 256000,
    "eos_token_id": [1, 106], "image_token_index": 262144, "initializer_range": 0.02, "mm_tokens_per_image": 256,
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0",
    "vision_config": {
        "hidden_size": 1152, "image_size": 896, "intermediate_size": 4304, "model_type": "siglip_vision_model",
        "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False,
    },
}  # fmt: skip
SMOLVLM2_500M = {
    "architectures": ["SmolVLMForConditionalGeneration"], "image_token_id": 49190, "model_type": "smolvlm",
    "pad_token_id": 2, "scale_factor": 4, "qk_layer_norms": False,
    "text_config": {
        "_flash_attn_2_enabled": True, "_name_or_path": "None", "architectures": ["VLlama3ForCausalLM"], "head_dim": 64,
        "hidden_size": 960, "intermediate_size": 2560, "is_llama_config": True, "max_position_embeddings": 8192,
        "model_type": "llama", "neftune_noise_alpha": 0.0, "num_attention_heads": 15, "num_hidden_layers": 32,
        "num_key_value_heads": 5, "pad_token_id": 2, "perceiver_config": {"model_type": "vllama3", "resampler_depth": 6},
        "pixel_shuffle_factor": 4, "qk_layer_norms": False, "rms_norm_eps": 1e-05, "rope_interleaved": False,
        "rope_theta": 100000, "torch_dtype": "bfloat16", "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}},
        "use_resampler": False, "vocab_size": 49280,
    },
    "tie_word_embeddings": False, "torch_dtype": "float32", "transformers_version": "4.47.1", "use_cache": False,
    "use_reentrant_checkpointing": False,
    "vision_config": {
        "hidden_size": 768, "image_size": 512, "max_image_size": {"longest_edge": 512}, "model_type": "smolvlm_vision",
        "num_attention_heads": 12, "patch_size": 16, "size": {"longest_edge": 2048}, "tie_word_embeddings": False,
        "use_base_siglip": False,
    },
    "vocab_size": 49280,
}  # fmt: skip
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 0.00392156862745098}
QWEN = {"image_processor_type": "Qwen2VLImageProcessor", "temporal_patch_size": 2, "merge_size": 2}
PROCESSORS = {
    "qwen2_5_vl": QWEN | {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14},
    "qwen3_vl": QWEN | HALF | {"patch_size": 16, "size": {"longest_edge": 16777216, "shortest_edge": 65536}},
    "internvl": {
        "crop_size": None, "crop_to_patches": False, "data_format": "channels_first", "default_to_square": True,
        "do_center_crop": None, "do_resize": True, "image_mean": [0.485, 0.456, 0.406], "max_patches": 12,
        "image_processor_type": "GotOcr2ImageProcessorFast", "image_std": [0.229, 0.224, 0.225], "min_patches": 1,
        "resample": 3, "size": {"height": 448, "width": 448},
    },
    "gemma3": HALF
    | {
        "do_convert_rgb": None, "do_pan_and_scan": None, "image_processor_type": "Gemma3ImageProcessor",
        "image_seq_length": 256, "pan_and_scan_max_num_crops": None, "resample": 2, "size": {"height": 896, "width": 896},
    },
    "smolvlm": HALF
    | {
        "do_image_splitting": True, "do_pad": True, "image_processor_type": "SmolVLMImageProcessor", "resample": 1,
        "max_image_size": {"longest_edge": 512}, "size": {"longest_edge": 2048},
        "video_sampling": {"fps": 1, "max_frames": 64, "video_size": {"longest_edge": 512}},
    },
}  # fmt: skip
PUBLISHED = {each["model_type"]: each for each in (QWEN2_5_VL_3B, QWEN3_VL_4B, INTERNVL3_1B, GEMMA3_4B, SMOLVLM2_500M)}


def read(kind, part=None, processor=None, **changes):
    config = copy.deepcopy(PUBLISHED[kind])
    (config[part] if part else config).update(changes)
    return model_config(config, preprocessor=PROCESSORS[kind] | (processor or {}), where="config.json")


def test_published_files_are_read():
    qwen2_5, qwen3, intern, gemma, smol = map(read, PUBLISHED)
    assert qwen2_5.text.rope.sections == (16, 24, 24) and qwen2_5.text.sliding_window is None and qwen2_5.text.tied_embeddings
    assert qwen2_5.vision.full_layers == (7, 15, 23, 31) and qwen2_5.sinks.llm_dims == (318, 1874, 1819)
    assert (qwen2_5.image.min_pixels, qwen2_5.image.max_pixels) == (3136, 12845056)
    assert qwen3.deepstack == (6, 12, 18) and qwen3.image.max_pixels == 16777216
    assert intern.tokens_per_tile == 256 and intern.image.max_grid == 12 and intern.image.mean == (0.485, 0.456, 0.406)
    assert gemma.tokens_per_tile == 256 and gemma.text.num_heads == 8 and gemma.text.sliding_layers[:6] == (0, 1, 2, 3, 4, 6)
    assert smol.tokens_per_tile == 64 and smol.image.longest_edge == 2048


def test_a_decoder_that_is_stated_twice_is_read_once():
    """As transformers 4.52 to 4.55 wrote Qwen2.5-VL: at the top as on the Hub, and in text_config."""
    top = PUBLISHED["qwen2_5_vl"]
    rope = {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"}
    apart = ("vision_config", "model_type", "transformers_version", "image_token_id", "video_token_id")
    text = {name: value for name, value in top.items() if name not in apart}
    text |= {"model_type": "qwen2_5_vl_text", "rope_scaling": rope, "sliding_window": None, "image_token_id": None}
    text |= {"layer_types": ["full_attention"] * 36, "video_token_id": None}
    twice = top | {"text_config": text, "rope_scaling": rope}
    processor = PROCESSORS["qwen2_5_vl"]
    assert model_config(twice, preprocessor=processor) == read("qwen2_5_vl")
    for name, wrong in {"hidden_size": 1024, "rope_scaling": {**rope, "factor": 2.0}}.items():
        with pytest.raises(ConfigError, match=f"config.json: .*{name} = "):
            model_config(twice | {name: wrong}, preprocessor=processor)


def test_a_window_that_a_decoder_does_not_have_is_ignored():
    """As Qwen3-VL in transformers, which keeps the field and reads it nowhere."""
    assert read("qwen3_vl", "text_config", sliding_window=7, query_pre_attn_scalar=9) == read("qwen3_vl")


def test_dynamic_rotary_embedding_is_the_default_one_up_to_the_positions_of_the_model():
    text = {"max_position_embeddings": 64, "num_attention_heads": 2, "hidden_size": 32}
    plain, dynamic = (
        Qwen2RotaryEmbedding(CONFIG_MAPPING["qwen2"](**text, rope_parameters={"rope_theta": 1e6, **more}))
        for more in ({"rope_type": "default"}, {"rope_type": "dynamic", "factor": 2.0})
    )
    positions = torch.arange(64)[None]
    for mine, theirs in zip(plain(torch.zeros(1), positions), dynamic(torch.zeros(1), positions), strict=True):
        assert torch.equal(mine, theirs)
    assert read("internvl").text.rope == read("internvl", "text_config", rope_scaling=None).text.rope


@pytest.mark.parametrize(
    ("kind", "part", "changes", "message"),
    [
        ("gemma3", "text_config", {"final_logit_softcapping": 30.0}, "results: final_logit_softcapping = 30.0"),
        ("gemma3", "text_config", {"use_bidirectional_attention": True}, "results: use_bidirectional_attention = True"),
        ("gemma3", None, {"mm_tokens_per_image": 255}, "mm_tokens_per_image = 255 are no square that divides 64 x 64 patches"),
        ("internvl", "vision_config", {"use_mask_token": True}, "results: use_mask_token = True"),
        ("internvl", "vision_config", {"use_mean_pooling": False}, "results: use_mean_pooling = False"),
        ("internvl", "vision_config", {"norm_type": "batch"}, "norm_type = 'batch' is not supported; supported: layer_norm"),
        ("internvl", None, {"vision_feature_layer": [-1, -2]}, "vision_feature_layer must be one layer"),
        ("internvl", None, {"downsample_ratio": 0.3}, "downsample_ratio = 0.3 does not divide the grid of patches"),
        ("internvl", None, {"quantization_config": {"bits": 4}}, "results: quantization_config = {'bits': 4}"),
        ("internvl", "text_config", {"model_type": "internlm2"}, "supported: qwen2, qwen3, llama"),
        ("qwen2_5_vl", "vision_config", {"hidden_act": "selu"}, "vision_config: hidden_act = 'selu' is not supported"),
        ("qwen2_5_vl", "vision_config", {"window_size": 100}, "window_size = 100 is no multiple of 2 patches of 14 pixels"),
        ("qwen2_5_vl", "vision_config", {"temporal_patch_size": 1}, "temporal_patch_size = 2 is not that of config.json, 1"),
        ("qwen2_5_vl", None, {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope type 'yarn' is not supported"),
        ("qwen3_vl", "vision_config", {"deepstack_visual_indexes": [5, 30]}, r"deepstack_visual_indexes = \[5, 30\] are not"),
        ("qwen2_5_vl", None, {"rope_scaling": {"type": "mrope", "mrope_section": None}}, "mrope_section = None are not"),
        ("qwen3_vl", "text_config", {"rope_scaling": {"type": "default", "mrope_section": 3}}, "mrope_section = 3 are not"),
        ("qwen2_5_vl", "vision_config", {"num_heads": 0}, "vision_config: num_heads = 0 is no whole number above 0"),
        ("qwen3_vl", "vision_config", {"num_position_embeddings": -1}, "num_position_embeddings = -1 is no whole number"),
        ("gemma3", None, {"mm_tokens_per_image": 0}, "mm_tokens_per_image = 0 is no whole number above 0"),
        ("gemma3", None, {"mm_tokens_per_image": None}, "mm_tokens_per_image = None is no whole number above 0"),
        ("internvl", None, {"image_seq_length": 64}, "image_seq_length = 64, but a tile becomes 256 tokens"),
        ("internvl", None, {"downsample_ratio": 0.0}, "a value cannot be used: float division by zero; compare"),
        ("smolvlm", None, {"scale_factor": 0}, "scale_factor = 0 is no whole number above 0"),
        ("smolvlm", None, {"scale_factor": 3}, "scale_factor = 3 does not divide the grid of patches"),
    ],
)  # fmt: skip
def test_settings_that_would_change_the_results_are_refused_by_name(kind, part, changes, message):
    with pytest.raises(ConfigError, match=message) as error:
        read(kind, part, **changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("qwen2_5_vl", {"min_pixels": 9, "max_pixels": 4}, "min_pixels 9 is above max_pixels 4"),
        ("qwen2_5_vl", {"resample": [1]}, r"resample = \[1\] is not supported"),
        ("internvl", {"size": {"height": 336, "width": 336}}, "differs from the vision tower's image size 448"),
        ("gemma3", {"do_pan_and_scan": True}, "do_pan_and_scan = true is not supported"),
        ("smolvlm", {"do_image_splitting": False}, "do_image_splitting = false is not supported"),
        ("smolvlm", {"max_image_size": {"longest_edge": 384}}, "differs from the vision tower's image size 512"),
    ],
)
def test_image_processors_that_prepare_otherwise_are_refused_by_name(kind, changes, message):
    with pytest.raises(ConfigError, match=message):
        read(kind, processor=changes)


@pytest.mark.parametrize("kind", PUBLISHED)
def test_a_folder_without_the_file_of_its_image_processor(kind, tmp_path, caplog):
    """The published files of Qwen-VL and InternVL differ from what their classes do without one."""
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[kind]))
    assert read_config(tmp_path).image.size == read(kind).image.size
    assert ("config.json: no preprocessor_config.json beside it" in caplog.text) == (kind not in ("gemma3", "smolvlm"))
