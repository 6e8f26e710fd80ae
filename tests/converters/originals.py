"""Tiny checkpoints in the original layouts, with the tensor names of the real repositories, written out by hand.

Sources of names and fields: `liuhaotian/llava-v1.5-7b` and `-v1.6-vicuna-7b`, `openai/clip-vit-large-patch14-336`,
`lmms-lab/llava-onevision-qwen2-0.5b-ov`, `Zhang199/TinyLLaVA-Qwen2.5-3B-SigLIP`, and the code that wrote them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import Arrays
from safetensors.numpy import save_file

from converters.byte_tokenizer import write_byte_tokenizer

ROWS = 260
"""Embedding rows of an original: the byte tokenizer's, without an image token."""

LLAMA_LAYER = (
    "input_layernorm.weight", "self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight",
    "self_attn.o_proj.weight", "post_attention_layernorm.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight",
    "mlp.down_proj.weight",
)  # fmt: skip
QWEN2_LAYER = (*LLAMA_LAYER, "self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias")
VIT_LAYER = tuple(
    f"{module}.{kind}"
    for module in (
        "layer_norm1", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "layer_norm2",
        "mlp.fc1", "mlp.fc2",
    )
    for kind in ("weight", "bias")
)  # fmt: skip
CLIP_REST = (
    "embeddings.class_embedding", "embeddings.patch_embedding.weight", "embeddings.position_embedding.weight",
    "pre_layrnorm.weight", "pre_layrnorm.bias", "post_layernorm.weight", "post_layernorm.bias",
)  # fmt: skip
SIGLIP_REST = (
    "embeddings.patch_embedding.weight", "embeddings.patch_embedding.bias", "embeddings.position_embedding.weight",
    "post_layernorm.weight", "post_layernorm.bias",
)  # fmt: skip
SIGLIP_HEAD = (
    "head.probe", "head.attention.in_proj_weight", "head.attention.in_proj_bias", "head.attention.out_proj.weight",
    "head.attention.out_proj.bias", "head.layernorm.weight", "head.layernorm.bias", "head.mlp.fc1.weight", "head.mlp.fc1.bias",
    "head.mlp.fc2.weight", "head.mlp.fc2.bias",
)  # fmt: skip


def vit(prefix: str, layers: int, rest: tuple[str, ...]) -> dict[str, str]:
    """Original name -> name in the twin, for a vision tower below `prefix`."""
    names = [*rest, *(f"encoder.layers.{i}.{name}" for i in range(layers) for name in VIT_LAYER)]
    return {f"{prefix}{name}": f"vision_tower.{name}" for name in names}


def decoder(prefix: str, layers: int, layer: tuple[str, ...]) -> dict[str, str]:
    """The same for a decoder whose `model.` and `lm_head.` are below `prefix`."""
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    names += [f"model.layers.{i}.{name}" for i in range(layers) for name in layer]
    return {f"{prefix}{name}": f"language_model.{name}" for name in names}


PROJECTOR = {
    "model.mm_projector.0.weight": "multi_modal_projector.linear_1.weight",
    "model.mm_projector.0.bias": "multi_modal_projector.linear_1.bias",
    "model.mm_projector.2.weight": "multi_modal_projector.linear_2.weight",
    "model.mm_projector.2.bias": "multi_modal_projector.linear_2.bias",
}
CONNECTOR = {
    "connector._connector.0.weight": "multi_modal_projector.linear_1.weight",
    "connector._connector.0.bias": "multi_modal_projector.linear_1.bias",
    "connector._connector.2.weight": "multi_modal_projector.linear_2.weight",
    "connector._connector.2.bias": "multi_modal_projector.linear_2.bias",
}

LLAVA15: dict[str, Any] = {
    "_name_or_path": "llava-v1.5-7b",
    "architectures": ["LlavaLlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "freeze_mm_mlp_adapter": False,
    "freeze_mm_vision_resampler": False,
    "hidden_act": "silu",
    "image_aspect_ratio": "pad",
    "image_grid_pinpoints": None,
    "initializer_range": 0.02,
    "max_length": 4096,
    "mm_projector_type": "mlp2x_gelu",
    "mm_resampler_type": None,
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "model_type": "llava",
    "pad_token_id": 0,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0",
    "tune_mm_mlp_adapter": False,
    "tune_mm_vision_resampler": False,
    "unfreeze_mm_vision_tower": False,
    "use_cache": True,
    "use_mm_proj": True,
}
LLAVA16 = LLAVA15 | {
    "image_aspect_ratio": "anyres",
    "image_crop_resolution": 224,
    "image_split_resolution": 224,
    "mm_patch_merge_type": "spatial_unpad",
    "mm_projector_lr": None,
    "mm_vision_tower_lr": 2e-6,
    "model_type": "llava_llama",
    "tokenizer_model_max_length": 4096,
    "tokenizer_padding_side": "right",
    "unfreeze_mm_vision_tower": True,
}
ONEVISION = LLAVA16 | {
    "architectures": ["LlavaQwenForCausalLM"],
    "image_aspect_ratio": "anyres_max_9",
    "image_crop_resolution": None,
    "image_split_resolution": None,
    "image_token_index": 151646,
    "max_window_layers": 24,
    "mm_spatial_pool_mode": "bilinear",
    "mm_spatial_pool_stride": None,
    "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model",
    "mm_vision_tower": "google/siglip-so400m-patch14-384",
    "model_type": "llava",
    "pos_skipping_range": 4096,
    "sliding_window": 32768,
    "use_pos_skipping": False,
    "use_sliding_window": False,
    "vision_tower_pretrained": None,
}
TINYLLAVA: dict[str, Any] = {
    "architectures": ["TinyLlavaForConditionalGeneration"],
    "auto_map": {"AutoConfig": "configuration.TinyLlavaConfig"},
    "cache_dir": None,
    "connector_type": "mlp2x_gelu",
    "hidden_size": 40,
    "ignore_index": -100,
    "image_aspect_ratio": "square",
    "image_token_index": -200,
    "llm_model_name_or_path": "Qwen/Qwen2.5-3B",
    "model_type": "tinyllava",
    "num_queries": 128,
    "num_resampler_layers": 3,
    "pad_token": "<|endoftext|>",
    "pad_token_id": 151643,
    "resampler_hidden_size": 768,
    "tokenizer_model_max_length": 2048,
    "tokenizer_name_or_path": "Qwen/Qwen2.5-3B",
    "tokenizer_padding_side": "right",
    "tokenizer_use_fast": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "tune_type_connector": "full",
    "tune_type_llm": "full",
    "tune_type_vision_tower": "frozen",
    "tune_vision_tower_from_layer": 0,
    "use_cache": True,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "patch",
    "vision_hidden_size": 40,
    "vision_model_name_or_path": "google/siglip-so400m-patch14-384",
    "vision_model_name_or_path2": "",
    "vocab_size": ROWS,
}

TEXT = {
    "hidden_size": 40,
    "intermediate_size": 56,
    "max_position_embeddings": 256,
    "num_attention_heads": 4,
    "num_hidden_layers": 5,
    "num_key_value_heads": 2,
    "vocab_size": ROWS,
}
"""The sizes of `tiny_hf`, in a flat config.json."""


def write_original(folder: Path, config: dict[str, Any], tensors: Arrays) -> Path:
    """A checkpoint folder with the byte tokenizer, which has a padding token and no image token."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """The byte tokenizer as before an image token was added."""
    write_byte_tokenizer(folder, image_token="<unused>")
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in settings.items() if value != "<unused>"}))


def renamed(twin: Arrays, names: dict[str, str]) -> Arrays:
    """The tensors of a twin under their original names; embedding and head without the rows that only the twin has."""
    found = {name: twin[other] for name, other in names.items() if other in twin}
    cut = ("embed_tokens.weight", "lm_head.weight")
    return {name: np.ascontiguousarray(a[:ROWS]) if name.endswith(cut) else a for name, a in found.items()}
