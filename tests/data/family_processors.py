"""Hugging Face's processors of the later families, and ours with the same tokenizers and settings."""

from __future__ import annotations

import dataclasses

import numpy as np
from PIL import Image
from tokenizers import AddedToken, processors
from transformers import (
    Gemma3ImageProcessorPil,
    GotOcr2ImageProcessorPil,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessorPil,
    SmolVLMImageProcessorPil,
)
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.processing_smolvlm import SmolVLMProcessor

from lsg_jax.config import ModelConfig
from lsg_jax.data.processor import Processor
from tests.data import published_templates
from tests.data.family_configs import ALL
from tests.data.tokenizers_for_tests import byte_level_tokenizer

SIZES = [(61, 45), (45, 90), (300, 40), (129, 128)]

QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|im_start|>", "<|im_end|>")
SMOL_TOKENS = (
    "<fake_token_around_image>", "<global-img>", *(f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7)),
    "<|im_start|>", "<end_of_utterance>",
)  # fmt: skip
FAMILIES = {
    "qwen2_vl": (published_templates.QWEN2_VL, QWEN_TOKENS, "<|image_pad|>", Qwen2VLProcessor),
    "qwen2_5_vl": (published_templates.QWEN2_VL, QWEN_TOKENS, "<|image_pad|>", Qwen2_5_VLProcessor),
    "qwen3_vl": (published_templates.QWEN3_VL, QWEN_TOKENS, "<|image_pad|>", Qwen3VLProcessor),
    "internvl": (
        published_templates.INTERNVL,
        ("<img>", "</img>", "<video>", "<|im_start|>", "<|im_end|>"),
        "<IMG_CONTEXT>",
        InternVLProcessor,
    ),
    "gemma3": (
        published_templates.GEMMA3,
        ("<bos>", "<start_of_image>", "<end_of_image>", "<start_of_turn>", "<end_of_turn>"),
        "<image_soft_token>",
        Gemma3Processor,
    ),
    "smolvlm": (published_templates.SMOLVLM, SMOL_TOKENS, "<image>", SmolVLMProcessor),
}
NAMES = {
    "internvl": {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
    "gemma3": {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    },
}


def tokenizer_of(name):
    """A byte-level tokenizer with the special tokens of the family."""
    _, tokens, image, _ = FAMILIES[name]
    base = byte_level_tokenizer(tokens, image=image)
    bos = {"bos_token": "<bos>"} if name == "gemma3" else {}
    tokenizer = base.backend_tokenizer
    if name == "gemma3":
        first = tokenizer.token_to_id("<bos>")
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", first)])
    tokenizer.add_special_tokens([AddedToken("<|video_pad|>", special=True)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token=tokens[-1],
        extra_special_tokens=NAMES.get(name, {"image_token": image}),
        **bos,
    )


def pair(name, monkeypatch, *, template=None):
    source, _, image, kind = FAMILIES[name]
    tokenizer = tokenizer_of(name)
    config = dataclasses.replace(ALL[name], image_token_id=tokenizer.convert_tokens_to_ids(image))
    monkeypatch.setattr(processing_smolvlm, "num2words", str)  # it writes the numbers of video frames
    # the video processors need torchvision
    monkeypatch.setattr(kind, "check_argument_for_proper_class", lambda *_: None)
    video = {} if name == "gemma3" else {"video_processor": object()}
    length = {"internvl": "image_seq_length", "gemma3": "image_seq_length", "smolvlm": "image_seq_len"}.get(name)
    tokens = {length: config.tokens_per_tile} if length else {}
    theirs = kind(image_processor=hf_processor(config), tokenizer=tokenizer, chat_template=source, **video, **tokens)
    ours = Processor(tokenizer, config, template=template, chat_template=None if template else source, image_token=image)
    return ours, theirs


def rendered(theirs, turns, generate=True):
    """A conversation of (text, number of images in front), as Hugging Face renders it."""
    messages = []
    for number, (text, count) in enumerate(turns):
        parts = [{"type": "image"}] * count + [{"type": "text", "text": text}]
        messages.append({"role": ("user", "assistant")[number % 2], "content": parts})
    source = theirs.chat_template
    return theirs.tokenizer.apply_chat_template(messages, chat_template=source, tokenize=False, add_generation_prompt=generate)


def called(theirs, text, shown, **more):
    """What Hugging Face's processor returns for rendered texts; its chat template has written the first token."""
    if not isinstance(text, list):
        text, shown = [text], [shown]
    extra = {"add_special_tokens": False} if text[0].startswith("<bos>") else {}
    if type(theirs).__name__ == "SmolVLMProcessor" or type(theirs).__name__ == "Gemma3Processor":
        given = shown
    else:
        given = [image for images in shown for image in images]
    return theirs(images=given, text=text, return_tensors="np", **extra, **more)


def hf_processor(config: ModelConfig):
    """The image processor with the settings of a configuration."""
    image, vision = config.image, config.vision
    stated = {"image_mean": list(image.mean), "image_std": list(image.std)}
    square = {"height": image.size, "width": image.size}
    if image.kind == "native":
        size = {"shortest_edge": image.min_pixels, "longest_edge": image.max_pixels}
        return Qwen2VLImageProcessorPil(size=size, patch_size=vision.patch_size, merge_size=config.merge, **stated)
    if image.kind == "tiles":
        most = {"min_patches": image.min_grid, "max_patches": image.max_grid}
        return GotOcr2ImageProcessorPil(size=square, crop_to_patches=True, **most, **stated)
    if image.kind == "split":
        sizes = {"size": {"longest_edge": image.longest_edge}, "max_image_size": {"longest_edge": image.size}}
        return SmolVLMImageProcessorPil(**sizes, **stated)
    return Gemma3ImageProcessorPil(size=square, **stated)


def picture(size, seed=0):
    width, height = size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def batch_of(ours, encoded, shown, side):
    length = max(len(each.ids) for each in encoded) + 3
    return ours.collate(encoded, list(map(ours.all_pixels, shown)), max_length=length, max_answer_tokens=1, padding_side=side)
