"""Tiny random models of Qwen-VL, InternVL, Gemma 3 and SmolVLM, the references of their tests."""

from __future__ import annotations

import json
import tempfile
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from hf_models import BOS, EOS, PAD, randomise
from tokenizers import AddedToken

from converters.byte_tokenizer import byte_level

VOCABULARY = 320
IMAGE, VIDEO, START, END = 260, 261, 262, 263  # tokens of patches, of videos, and around an image: first of the lists below
_CHATML = ["<|im_start|>", "<|im_end|>"]
SPECIALS = {
    "qwen": ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", *_CHATML],
    "internvl": ["<IMG_CONTEXT>", "<video>", "<img>", "</img>", *_CHATML],
    "gemma3": ["<image_soft_token>", "<unused0>", "<start_of_image>", "<end_of_image>", "<start_of_turn>", "<end_of_turn>"],
    "smolvlm": [
        "<image>", "<video>", "<fake_token_around_image>", "<global-img>", "<|im_start|>", "<end_of_utterance>",
        *(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)),
    ],
}  # fmt: skip
"""Special tokens by the start of a name; they follow the 260 tokens of the byte tokenizer."""
_NAMED = {
    "qwen": {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    "internvl": {
        "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
    "gemma3": {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
    "smolvlm": {
        "image_token": "<image>", "fake_image_token": "<fake_token_around_image>", "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
    },
}  # fmt: skip
_TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
_TEXT = {
    **_TOKENS, "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 5, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024,
}  # fmt: skip
_QWEN_VISION = {"depth": 4, "num_heads": 4, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
_QWEN_IDS = {
    "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END
}  # fmt: skip


def _mrope(head: int, sections: list[int], **more: Any) -> dict[str, Any]:
    assert 2 * sum(sections) == head
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections, **more}}


_QWEN2_TEXT = {**_TEXT, "hidden_size": 64, **_mrope(16, [2, 3, 3])}
_INTERN_VISION = {
    "hidden_size": 40, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": [28, 28],
    "patch_size": [7, 7],
}  # fmt: skip


def _internvl(text: Any, vision: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "vision_config": _INTERN_VISION | vision, "text_config": text, "image_token_id": IMAGE, "image_seq_length": 4,
        "downsample_ratio": 0.5, "tie_word_embeddings": False, **more,
    }  # fmt: skip


CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_vl": (
        "Qwen2VL",
        {
            "vision_config": _QWEN_VISION | {"embed_dim": 48, "hidden_size": 64, "mlp_ratio": 2},
            "text_config": _QWEN2_TEXT, "tie_word_embeddings": True, **_QWEN_IDS,
        },
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VL",
        {
            "vision_config": _QWEN_VISION
            | {
                "hidden_size": 48, "intermediate_size": 56, "out_hidden_size": 64, "window_size": 56,
                "fullatt_block_indexes": [1, 3],
            },
            "text_config": _QWEN2_TEXT, "tie_word_embeddings": False, **_QWEN_IDS,
        },
    ),
    "qwen3_vl": (
        "Qwen3VL",
        {
            "vision_config": _QWEN_VISION
            | {
                "hidden_size": 48, "intermediate_size": 56, "out_hidden_size": 64, "num_position_embeddings": 36,
                "deepstack_visual_indexes": [0, 2], "patch_size": 16,
            },
            "text_config": {**_TEXT, "hidden_size": 64, "head_dim": 16, **_mrope(16, [4, 2, 2], mrope_interleaved=True)},
            "tie_word_embeddings": True, **_QWEN_IDS,
        },
    ),
    "internvl-qwen2": ("InternVL", _internvl({"model_type": "qwen2", **_TEXT}, {})),
    "internvl-qwen3": (
        "InternVL",
        _internvl(
            {"model_type": "qwen3", **_TEXT, "head_dim": 12}, {"norm_type": "rms_norm", "use_qk_norm": True}
        ),
    ),
    "internvl-llama": ("InternVL", _internvl({"model_type": "llama", **_TEXT}, {"attention_bias": True})),
    "gemma3": (
        "Gemma3",
        {
            "vision_config": {
                "model_type": "siglip_vision_model", "hidden_size": 40, "intermediate_size": 48, "num_hidden_layers": 4,
                "num_attention_heads": 4, "image_size": 56, "patch_size": 7, "vision_use_head": False,
            },
            "text_config": {
                **_TEXT, "head_dim": 12, "sliding_window": 7, "query_pre_attn_scalar": 20,
                "layer_types": ["sliding_attention"] * 2 + ["full_attention"] + ["sliding_attention"] * 2,
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                },
            },
            "mm_tokens_per_image": 4, "image_token_index": IMAGE, "boi_token_index": START, "eoi_token_index": END,
        },
    ),
    "smolvlm": (
        "SmolVLM",
        {
            "vision_config": {
                "hidden_size": 40, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
                "image_size": 42, "patch_size": 7,
            },
            "text_config": {"model_type": "llama", **_TEXT, "head_dim": 10}, "image_token_id": IMAGE, "scale_factor": 3,
            "pad_token_id": PAD, "tie_word_embeddings": False,
        },
    ),
}  # fmt: skip
"""Name -> the prefix of the classes in transformers, and what its configuration is made of."""


def tiny_family(name: str, *, seed: int = 0, **overrides: Any) -> transformers.PreTrainedModel:
    """A tiny model in evaluation mode, float32; `overrides` are fields of its configuration, nested ones as dicts."""
    prefix, fields = CONFIGS[name]
    fields = {key: value | overrides.pop(key, {}) if isinstance(value, dict) else value for key, value in fields.items()}
    config = getattr(transformers, f"{prefix}Config")(**{**fields, **overrides})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{prefix}ForConditionalGeneration")(config).eval()
    randomise(model, torch.Generator().manual_seed(seed), tied=bool(config.tie_word_embeddings))
    return model


def save_family(name: str, model: transformers.PreTrainedModel, folder: Path) -> None:
    """Saves a checkpoint as on the Hub, without a chat template: weights, configuration, tokenizer, image processor."""
    model.save_pretrained(folder)
    family = next(start for start in SPECIALS if name.startswith(start))
    tokenizer = byte_level("<unused>")
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS[family]])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=_NAMED[family],
    ).save_pretrained(folder)
    image_processor(name).save_pretrained(folder)


def preprocessor(name: str) -> dict[str, Any]:
    """The contents of the file of `image_processor`."""
    with tempfile.TemporaryDirectory() as folder:
        image_processor(name).save_pretrained(folder)
        return json.loads((Path(folder) / "preprocessor_config.json").read_text())


def image_processor(name: str) -> Any:
    """The image processor of transformers that goes with `tiny_family(name)`; its limits are as tiny as the model."""
    half = {"image_mean": [0.5] * 3, "image_std": [0.4] * 3}
    if name.startswith("qwen"):
        patch = 16 if name == "qwen3_vl" else 14
        factor = (2 * patch) ** 2
        return transformers.Qwen2VLImageProcessorPil(
            patch_size=patch, merge_size=2, temporal_patch_size=2, min_pixels=2 * factor, max_pixels=24 * factor, **half
        )
    if name.startswith("internvl"):
        return transformers.GotOcr2ImageProcessorPil(
            size={"height": 28, "width": 28}, crop_to_patches=True, min_patches=1, max_patches=6, **half
        )
    if name == "gemma3":
        return transformers.Gemma3ImageProcessorPil(size={"height": 56, "width": 56}, image_seq_length=4, **half)
    return transformers.SmolVLMImageProcessorPil(
        size={"longest_edge": 126}, max_image_size={"longest_edge": 42}, do_image_splitting=True, **half
    )


def processed(name: str, rows: list[list[Any]]) -> tuple[dict[str, np.ndarray], list[list[list[int]]]]:
    """What HF's image processor makes of the images of each row, and the tokens that stand for each image."""
    processor = image_processor(name)
    if name == "smolvlm":
        found = dict(processor(rows, return_tensors="np", return_row_col_info=True))
        grids = [list(zip(*each, strict=True)) for each in zip(found.pop("rows"), found.pop("cols"), strict=True)]
        tiles = lambda high, wide: chain.from_iterable([10 + tile, *[IMAGE] * 4] for tile in range(high * wide))
        text = lambda high, wide: [*tiles(high, wide), 9, *[IMAGE] * 4, 8]
        return found, [[text(*grid) for grid in row] for row in grids]
    found = dict(processor([image for row in rows for image in row], return_tensors="np"))
    if name.startswith("qwen"):
        counts = (found["image_grid_thw"].prod(-1) // 4).tolist()
    elif name == "gemma3":
        found.pop("num_crops")
        counts = [4] * len(found["pixel_values"])
    else:
        counts = (4 * np.asarray(found.pop("num_patches"))).tolist()
    each = iter([[START, *[IMAGE] * count, END] for count in counts])
    return found, [[next(each) for _ in row] for row in rows]


def family_inputs(name: str, rows: list[list[Any]], side: str, *, seed: int = 1) -> dict[str, np.ndarray]:
    """Arrays as the family's HF processor returns them: rows of text of unequal length around their images."""
    rng = np.random.default_rng(seed)
    found, images = processed(name, rows)
    words = lambda count: rng.integers(4, 260, count).tolist()
    texts = [[BOS, *words(2 + i), *chain.from_iterable([*image, *words(3)] for image in row)] for i, row in enumerate(images)]
    length = max(map(len, texts))
    ids, mask = np.full((len(texts), length), PAD), np.zeros((len(texts), length), np.int64)
    for i, text in enumerate(texts):
        where = slice(length - len(text), None) if side == "left" else slice(len(text))
        ids[i, where], mask[i, where] = text, 1
    arrays = {"input_ids": ids, "attention_mask": mask, **found}
    types = {"gemma3": "token_type_ids"} | dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), "mm_token_type_ids")
    return arrays | ({types[name]: (ids == IMAGE).astype(np.int64)} if name in types else {})
