"""Tiny random Hugging Face models, the references of the parity tests.

Sizes and values expose mistakes: heads of width 10, grouped keys, 3 x 3 patches; weights, norms and biases are all random, with
scales that keep the output of every stage at order 1.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from converters.byte_tokenizer import write_byte_tokenizer

IMAGE_TOKEN, PAD, BOS, EOS = 3, 0, 1, 2  # as the byte tokenizer numbers them
VOCABULARY = 260

_TEXT = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
    "phi3": transformers.Phi3Config,
}
_VISION = {"clip": transformers.CLIPVisionConfig, "siglip": transformers.SiglipVisionConfig}


def tiny_hf(vision: str, text: str, *, tied: bool = False, seed: int = 0, **overrides: Any) -> transformers.PreTrainedModel:
    """A tiny LLaVA in evaluation mode, float32.

    With `image_grid_pinpoints` among the overrides it is a LLaVA-NeXT, with `vision_aspect_ratio` a OneVision, with
    `projector_layernorm_eps` a ViP-LLaVA.

    Args:
        vision: clip or siglip. text: llama, mistral, qwen2 or phi3.
        tied: whether the output head is the embedding.
        overrides: fields of LlavaConfig, and with `vision_` / `text_` as dicts of fields of the two parts:
            `vision_config={...}`, `text_config={...}`.
    """
    vision_config = _VISION[vision](
        **{
            "hidden_size": 40,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": 42,
            "patch_size": 14,
            **overrides.pop("vision_config", {}),
        }
    )
    text_config = _TEXT[text](
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 40,
            "intermediate_size": 56,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "pad_token_id": PAD,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "tie_word_embeddings": tied,
            **overrides.pop("text_config", {}),
        }
    )
    kind = "LlavaNext" if "image_grid_pinpoints" in overrides else "Llava"
    kind = "LlavaOnevision" if "vision_aspect_ratio" in overrides else kind
    kind = "VipLlava" if "projector_layernorm_eps" in overrides else kind
    config = getattr(transformers, f"{kind}Config")(
        **{
            "vision_config": vision_config,
            "text_config": text_config,
            "image_token_index": IMAGE_TOKEN,
            "vision_feature_select_strategy": "default" if vision == "clip" else "full",
            "image_seq_length": 9,
            "tie_word_embeddings": tied,
            **overrides,
        }
    )
    torch.manual_seed(seed)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    randomise(model, torch.Generator().manual_seed(seed), tied=config.tie_word_embeddings)
    return model


def randomise(model: torch.nn.Module, generator: torch.Generator, *, tied: bool) -> None:
    """Matrices have variance 1 / fan-in, norm scales are around 1, the rest has deviation 1/4: no value is a default."""
    normal = lambda p: torch.randn(p.shape, generator=generator, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.3 * normal(parameter))
            elif "embed_tokens" in name:
                parameter.copy_(normal(parameter) * (0.3 if tied else 1.0))  # a tied embedding is also the output head
            elif parameter.ndim >= 2 and "position" not in name and "probe" not in name:
                fan_in = parameter[0].numel()
                parameter.copy_(normal(parameter) * fan_in**-0.5 * (1.5 if "q_proj" in name or "k_proj" in name else 1.0))
            else:
                parameter.copy_(0.25 * normal(parameter))


def save_tiny(model: transformers.PreTrainedModel, folder: str | Path, **kwargs: Any) -> Path:
    """Saves a checkpoint as on the Hub: weights, configuration, byte tokenizer and image processor."""
    folder = Path(folder)
    model.save_pretrained(folder, **kwargs)
    write_byte_tokenizer(folder)
    size = model.config.vision_config.image_size
    clip = model.config.vision_config.model_type == "clip_vision_model"
    image_processor = {
        "image_processor_type": "CLIPImageProcessor" if clip else "SiglipImageProcessor",
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "resample": 3,
        "image_mean": [0.48145466, 0.4578275, 0.40821073] if clip else [0.5, 0.5, 0.5],
        "image_std": [0.26862954, 0.26130258, 0.27577711] if clip else [0.5, 0.5, 0.5],
        "size": {"shortest_edge": size} if clip else {"height": size, "width": size},
    }
    if pinpoints := getattr(model.config, "image_grid_pinpoints", None):
        kind = type(model.config).__name__.removesuffix("Config")
        image_processor |= {"image_processor_type": f"{kind}ImageProcessor", "image_grid_pinpoints": pinpoints}
        image_processor |= {"do_pad": True, "aspect_ratio_setting": "anyres"} if kind == "LlavaNext" else {"do_pad": True}
    if clip:
        image_processor |= {"do_center_crop": True, "crop_size": {"height": size, "width": size}, "do_convert_rgb": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(image_processor, indent=1))
    return folder


def state_arrays(model: torch.nn.Module) -> dict[str, Any]:
    """The state dict as numpy arrays, under the in-memory names; bfloat16 becomes that of ml_dtypes."""
    import ml_dtypes

    arrays = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach().contiguous()
        if tensor.dtype == torch.bfloat16:
            arrays[name] = tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        else:
            arrays[name] = tensor.numpy()
    return arrays
