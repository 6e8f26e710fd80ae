"""Small configurations of the families that have a layout of their own, as their converters make them."""

from __future__ import annotations

import dataclasses

from lsg_jax.config import ImageConfig, ModelConfig, RopeConfig, TextConfig, VisionConfig

HALF = (0.5, 0.5, 0.5)
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def _config(family: str, vision: VisionConfig, image: ImageConfig, *, merge: int, text: dict | None = None) -> ModelConfig:
    base = TextConfig("qwen2", 700, 16, 32, 2, 2, 2, 8, 1e-5, RopeConfig(1e4), 4096)
    return ModelConfig(
        vision=vision,
        text=dataclasses.replace(base, **text or {}),
        feature_layers=(-1,),
        feature_select="full" if not vision.has_class_token else "default",
        image_token_id=3,
        eos_token_ids=(2,),
        pad_token_id=0,
        image=image,
        merge=merge,
        family=family,  # type: ignore[arg-type]
    )


def qwen(version: str = "qwen2_5_vl", *, min_pixels: int = 56 * 56, max_pixels: int = 200 * 28 * 28) -> ModelConfig:
    """Qwen2-VL, Qwen2.5-VL with windows of 112 pixels, or Qwen3-VL with patches of 16 pixels and a table of positions."""
    patch = 16 if version == "qwen3_vl" else 14
    vision = VisionConfig(version, 20 * patch, patch, 16, 32, 2, 2, 1e-6, "silu", frames=2, rotary_theta=1e4)  # type: ignore[arg-type]
    if version == "qwen2_5_vl":
        vision = dataclasses.replace(vision, window_size=112, full_layers=(1,))
    if version == "qwen3_vl":
        vision = dataclasses.replace(vision, table_side=6)
    mean, std = (HALF, HALF) if version == "qwen3_vl" else CLIP
    tag = "<|image_pad|>"
    image = ImageConfig(
        vision.image_size, "squash", mean, std, layout="native", min_pixels=min_pixels, max_pixels=max_pixels, tag=tag
    )
    rope = RopeConfig(1e4, sections=(1, 1, 2))
    return _config(version, vision, image, merge=2, text={"rope": rope})


def internvl(*, size: int = 28, patch: int = 7, most: int = 12, fewest: int = 1) -> ModelConfig:
    vision = VisionConfig("internvit", size, patch, 16, 32, 2, 2, 1e-6, "gelu")
    image = ImageConfig(
        size, "squash", *CLIP, layout="tiles", min_grid=fewest, max_grid=most,
        tag="<IMG_CONTEXT>", before="<img>", after="</img>",
    )  # fmt: skip
    return _config("internvl", vision, image, merge=2)


def gemma3(*, size: int = 32, patch: int = 4, merge: int = 2) -> ModelConfig:
    vision = VisionConfig("siglip", size, patch, 16, 32, 2, 2, 1e-6, "gelu", final_norm=True)
    image = ImageConfig(
        size, "squash", HALF, HALF, resample="bilinear",
        tag="<start_of_image>", before="\n\n<start_of_image>", after="<end_of_image>\n\n",
    )  # fmt: skip
    return _config("gemma3", vision, image, merge=merge, text={"images_see_themselves": True, "family": "gemma3"})


def smolvlm(*, size: int = 32, patch: int = 5, longest: int = 128) -> ModelConfig:
    """The tower drops a remainder of 2 pixels."""
    vision = VisionConfig("smolvlm", size, patch, 16, 32, 2, 2, 1e-6, "gelu", final_norm=True)
    image = ImageConfig(size, "squash", HALF, HALF, layout="split", longest_edge=longest, resample="lanczos")
    return _config("smolvlm", vision, image, merge=3, text={"family": "llama"})


ALL = {
    "qwen2_vl": qwen("qwen2_vl"),
    "qwen2_5_vl": qwen(),
    "qwen3_vl": qwen("qwen3_vl"),
    "internvl": internvl(),
    "gemma3": gemma3(),
    "smolvlm": smolvlm(),
}

NATIVE = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
