"""Image processor settings of Qwen-VL, InternVL, Gemma 3 and SmolVLM -> ImageConfig.

Defaults are those of transformers' classes. A setting that changes pixels and is not implemented is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from converters.image_processor import CLIP_MEAN, CLIP_STD, SIGLIP_MEAN, SIGLIP_STD, check_steps, settings_of, three_floats
from lsg_jax.config import ImageConfig
from lsg_jax.errors import ConfigError

Preprocessor = Mapping[str, Any] | None
"""Contents of `preprocessor_config.json`, or of `processor_config.json` with a table `image_processor`; None for defaults."""

_FILTERS: dict[Any, Literal["lanczos", "bilinear", "bicubic"]] = {1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""PIL's numbers of resampling filters."""


def native_image_config(preprocessor: Preprocessor, *, size: int, patch: int, merge: int, frames: int) -> ImageConfig:
    """Of `Qwen2VLImageProcessor`, which Qwen2-VL, Qwen2.5-VL and Qwen3-VL have.

    Args:
        size: pixels, side of the square that stands for an image of unknown size.
        patch, merge, frames: of the vision tower: pixels, side of a square of patches, frames of a patch.

    Raises:
        ConfigError: a field is unknown, is not supported, or is not as in config.json.
    """
    names = ("Qwen2VLImageProcessor", "Qwen2_5_VLImageProcessor")
    pixels = {"min_pixels", "max_pixels", "patch_size", "temporal_patch_size", "merge_size"}
    settings = _settings(preprocessor, names, pixels)
    for name, default, stated in (
        ("patch_size", 14, patch),
        ("temporal_patch_size", 2, frames),
        ("merge_size", 2, merge),
    ):
        if (found := settings.get(name, stated if preprocessor is None else default)) != stated:
            raise ConfigError(f"image processor: {name} = {found!r} is not that of config.json, {stated}")
    edges = settings.get("size", {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280})
    if not isinstance(edges, Mapping) or set(edges) - {"shortest_edge", "longest_edge", "min_pixels", "max_pixels"}:
        raise ConfigError(
            f"image processor: size = {edges!r} is not supported: state shortest_edge and longest_edge, in pixels"
        )
    fewest = _whole_number(settings.get("min_pixels", edges.get("shortest_edge")), "min_pixels")
    most = _whole_number(settings.get("max_pixels", edges.get("longest_edge")), "max_pixels")
    if fewest > most:
        raise ConfigError(f"image processor: min_pixels {fewest} is above max_pixels {most}")
    return ImageConfig(
        size=size,
        aspect="squash",
        **_values(settings, CLIP_MEAN, CLIP_STD, 3),
        layout="native",
        min_pixels=fewest,
        max_pixels=most,
        tag="<|image_pad|>",
    )


def tiles_image_config(preprocessor: Preprocessor, *, size: int) -> ImageConfig:
    """Of `GotOcr2ImageProcessor`, as InternVL's processor calls it: with `crop_to_patches`, whatever the file says.

    Args:
        size: pixels, side of the square that the vision tower takes.

    Raises:
        ConfigError: as of `native_image_config`.
    """
    settings = _settings(preprocessor, ("GotOcr2ImageProcessor",), {"crop_to_patches", "min_patches", "max_patches"})
    _check_square(settings.get("size"), "size", ("height", "width"), size)
    fewest = _whole_number(settings.get("min_patches", 1), "min_patches")
    most = _whole_number(settings.get("max_patches", 12), "max_patches")
    if fewest > most:
        raise ConfigError(f"image processor: min_patches {fewest} is above max_patches {most}")
    return ImageConfig(
        size=size,
        aspect="squash",
        **_values(settings, CLIP_MEAN, CLIP_STD, 3),
        layout="tiles",
        min_grid=fewest,
        max_grid=most,
        tag="<IMG_CONTEXT>",
        before="<img>",
        after="</img>",
    )


def split_image_config(preprocessor: Preprocessor, *, size: int) -> ImageConfig:
    """Of `SmolVLMImageProcessor`. Arguments and errors as of `tiles_image_config`."""
    handled = {"do_image_splitting", "max_image_size", "return_row_col_info", "video_sampling"}
    settings = _settings(preprocessor, ("SmolVLMImageProcessor",), handled)
    if not settings.get("do_image_splitting", True):
        raise ConfigError("image processor: do_image_splitting = false is not supported")
    _check_square(settings.get("max_image_size"), "max_image_size", ("longest_edge",), size)
    edges = settings.get("size", {"longest_edge": 4 * size})
    if not isinstance(edges, Mapping) or set(edges) != {"longest_edge"}:
        raise ConfigError(f"image processor: size = {edges!r} is not supported: state longest_edge, in pixels")
    return ImageConfig(
        size=size,
        aspect="squash",
        **_values(settings, SIGLIP_MEAN, SIGLIP_STD, 1),
        layout="split",
        longest_edge=_whole_number(edges["longest_edge"], "size.longest_edge"),
    )


def gemma_image_config(preprocessor: Preprocessor, *, size: int) -> ImageConfig:
    """Of `Gemma3ImageProcessor`, without pan-and-scan. Arguments and errors as of `tiles_image_config`."""
    pan_and_scan = {"do_pan_and_scan", *(f"pan_and_scan_{name}" for name in ("min_crop_size", "max_num_crops"))}
    settings = _settings(preprocessor, ("Gemma3ImageProcessor",), {*pan_and_scan, "pan_and_scan_min_ratio_to_activate"})
    if settings.get("do_pan_and_scan"):
        raise ConfigError("image processor: do_pan_and_scan = true is not supported")
    _check_square(settings.get("size"), "size", ("height", "width"), size)
    return ImageConfig(
        size=size,
        aspect="squash",
        **_values(settings, SIGLIP_MEAN, SIGLIP_STD, 2),
        tag="<start_of_image>",
        before="\n\n<start_of_image>",
        after="<end_of_image>\n\n",
    )


def _settings(preprocessor: Preprocessor, names: tuple[str, ...], handled: set[str]) -> dict[str, Any]:
    """The stated settings, checked as far as all processors have them; `names` are those of the image processor."""
    settings = settings_of(preprocessor, handled | {"do_pad", "do_center_crop", "size", "default_to_square"})
    name = settings.get("image_processor_type", settings.get("feature_extractor_type", names[0]))
    if str(name).removesuffix("Fast").removesuffix("Pil") not in names:
        raise ConfigError(f"image processor: {name!r} is not supported for this family (known: {', '.join(names)})")
    check_steps(settings)
    if settings.get("do_center_crop"):
        raise ConfigError("image processor: do_center_crop = true is not supported for this family")
    return settings


def _values(settings: Mapping[str, Any], mean: tuple[float, ...], std: tuple[float, ...], resample: int) -> dict[str, Any]:
    """Mean, standard deviation and filter, with these defaults."""
    number = settings.get("resample", resample)
    if isinstance(number, list | dict) or number not in _FILTERS:
        known = ", ".join(f"{name} ({key})" for key, name in _FILTERS.items())
        raise ConfigError(f"image processor: resample = {number!r} is not supported (known: {known})")
    return {
        "mean": three_floats(settings.get("image_mean", mean), "image_mean"),
        "std": three_floats(settings.get("image_std", std), "image_std"),
        "resample": _FILTERS[number],
    }


def _check_square(stated: Any, name: str, keys: tuple[str, ...], size: int) -> None:
    """Raises ConfigError if a size is stated, and is not the vision tower's."""
    if stated is not None and (
        not isinstance(stated, Mapping) or {k: v for k, v in stated.items() if v} != dict.fromkeys(keys, size)
    ):
        raise ConfigError(f"image processor: {name} = {stated!r} differs from the vision tower's image size {size}")


def _whole_number(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"image processor: {name} = {value!r} is no positive whole number")
    return value
