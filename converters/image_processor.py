"""Hugging Face image processor settings -> ImageConfig. A setting that changes pixels and is not implemented is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lsg_jax.config import Aspect, Canvas, ImageConfig
from lsg_jax.errors import ConfigError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
SIGLIP_MEAN = SIGLIP_STD = (0.5, 0.5, 0.5)

_KINDS = {
    "CLIPImageProcessor": "clip",
    "CLIPFeatureExtractor": "clip",
    "LlavaImageProcessor": "clip",
    "LlavaNextImageProcessor": "clip",
    "LlavaOnevisionImageProcessor": "onevision",
    "SiglipImageProcessor": "siglip",
}

_OF_ALL = {
    "image_processor_type", "feature_extractor_type", "image_mean", "image_std", "rescale_factor", "resample", "do_resize",
    "do_rescale", "do_normalize", "do_convert_rgb",
}  # fmt: skip

_HANDLED = {
    "do_pad", "do_center_crop", "crop_size", "size", "default_to_square", "image_grid_pinpoints", "aspect_ratio_setting",
}  # fmt: skip

_NO_EFFECT = {
    "processor_class", "_processor_class", "data_format", "input_data_format", "return_tensors", "device", "disable_grouping",
    "_valid_processor_keys", "image_seq_length", "patch_size", "num_additional_image_tokens", "vision_feature_select_strategy",
    "image_token", "chat_template", "tokenizer_class", "transformers_version",
}  # fmt: skip


def image_config(
    preprocessor: Mapping[str, Any] | None,
    *,
    size: int,
    tower: str,
    pinpoints: Sequence[Sequence[int]] | None = None,
) -> ImageConfig:
    """Reads `preprocessor_config.json`, or `processor_config.json` with an `image_processor` table.

    Args:
        preprocessor: the file's contents; None gives the tower's default (clip: centre crop; siglip: squash).
        size: side of the square that the vision tower takes, in pixels.
        tower: clip or siglip, gives the defaults if the file names no processor.
        pinpoints: `image_grid_pinpoints` of config.json, for a family with tiles.

    Raises:
        ConfigError: a field is unknown, or describes a preparation that `lsg_jax.data.images` does not implement.
    """
    settings = settings_of(preprocessor, _HANDLED)
    kind = _processor_kind(settings, tower, tiled=bool(pinpoints))
    check_steps(settings)
    if settings.get("resample", 3) != 3:
        raise ConfigError(f"image processor: resample = {settings['resample']!r} is not bicubic (3)")
    stated = settings.get("image_grid_pinpoints", pinpoints)
    if stated != pinpoints:
        raise ConfigError(f"image processor: image_grid_pinpoints = {stated!r} are not those of config.json: {pinpoints!r}")
    if settings.get("aspect_ratio_setting", "anyres") != "anyres":
        raise ConfigError(f"image processor: aspect_ratio_setting = {settings['aspect_ratio_setting']!r} is not anyres")
    # with tiles, `do_pad` fills up their number, and the whole image is resized as it is
    aspect = _aspect({**settings, "do_pad": settings.get("do_pad", False) and not pinpoints}, size, kind)
    mean, std = (SIGLIP_MEAN, SIGLIP_STD) if kind == "siglip" else (CLIP_MEAN, CLIP_STD)
    return ImageConfig(
        size=size,
        aspect="squash" if pinpoints else aspect,
        mean=three_floats(settings.get("image_mean", mean), "image_mean"),
        std=three_floats(settings.get("image_std", std), "image_std"),
        canvases=tuple(Canvas(height, width) for height, width in pinpoints or ()),
    )


def settings_of(preprocessor: Mapping[str, Any] | None, handled: set[str]) -> dict[str, Any]:
    """The stated settings of an image processor.

    Args:
        preprocessor: as of `image_config`.
        handled: fields that this processor has, beside those of all.

    Raises:
        ConfigError: a field is unknown.
    """
    settings = dict(preprocessor or {})
    if isinstance(settings.get("image_processor"), dict):
        settings = dict(settings["image_processor"])
    settings = {name: value for name, value in settings.items() if value is not None}
    if unknown := sorted(set(settings) - _OF_ALL - handled - _NO_EFFECT):
        raise ConfigError(f"image processor: not understood: {', '.join(f'{k}={settings[k]!r}'[:60] for k in unknown)}")
    return settings


def check_steps(settings: Mapping[str, Any]) -> None:
    """Raises ConfigError for a processor that leaves out a step, or scales pixels in another way."""
    for name in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
        if not settings.get(name, True):
            raise ConfigError(f"image processor: {name} = false is not supported")
    factor = settings.get("rescale_factor", 1 / 255)
    if not isinstance(factor, (int, float)) or not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        raise ConfigError(f"image processor: rescale_factor = {factor!r} is not 1/255")


def _processor_kind(settings: Mapping[str, Any], tower: str, *, tiled: bool) -> str:
    name = settings.get("image_processor_type", settings.get("feature_extractor_type"))
    if name is None:
        return tower
    kind = _KINDS.get(str(name).removesuffix("Fast").removesuffix("Pil"))
    if kind is None:
        raise ConfigError(f"image processor: {name!r} is not supported (known: {', '.join(_KINDS)})")
    if str(name).startswith(("LlavaNext", "LlavaOnevision")) != tiled:
        raise ConfigError(f"image processor: {name} does not go with a config.json {'with' if tiled else 'without'} tiles")
    return kind


def three_floats(values: Any, name: str) -> tuple[float, ...]:
    """A value for each channel. Raises ConfigError for anything else."""
    if isinstance(values, (list, tuple)) and len(values) == 3 and all(isinstance(v, (int, float)) for v in values):
        return tuple(float(v) for v in values)
    raise ConfigError(f"image processor: {name} = {values!r} is not a list of three numbers")


def _edges(value: Any, name: str, *, square: bool) -> tuple[str, int]:
    """A size in any of the spellings -> ("square" | "shortest", pixels)."""
    if isinstance(value, int) and not isinstance(value, bool):
        return ("square" if square else "shortest"), value
    if isinstance(value, dict):
        value = {k: v for k, v in value.items() if v is not None}
        if set(value) == {"shortest_edge"}:
            return "shortest", value["shortest_edge"]
        if set(value) == {"height", "width"} and value["height"] == value["width"]:
            return "square", value["height"]
    raise ConfigError(f"image processor: {name} = {value!r} is not supported")


def _aspect(settings: Mapping[str, Any], size: int, kind: str) -> Aspect:
    default = {"shortest_edge": size} if kind == "clip" else {"height": size, "width": size}
    square = settings.get("default_to_square", kind == "siglip")
    shape, edge = _edges(settings.get("size", default), "size", square=square)
    if edge != size:
        raise ConfigError(f"image processor: size {edge} differs from the vision tower's image size {size}")
    crops = settings.get("do_center_crop", kind == "clip")
    if crops:
        _, crop = _edges(settings.get("crop_size", size), "crop_size", square=True)
        if crop != size:
            raise ConfigError(f"image processor: crop_size {crop} differs from the vision tower's image size {size}")
    if settings.get("do_pad", False):
        return "pad"
    if shape == "square":
        return "squash"
    if not crops:
        raise ConfigError("image processor: shortest_edge without do_center_crop gives images that are no squares")
    return "crop"
