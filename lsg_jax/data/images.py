"""Image files -> the uint8 square that goes to the device. The device normalises it; `normalise` is the tests' reference.

Pixels equal those of the Hugging Face image processors (LLaVA, CLIP, SigLIP). EXIF orientation is ignored, as there.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from PIL import Image

from lsg_jax.config import ImageConfig
from lsg_jax.data.layout import ImageSize, resized_to_cover
from lsg_jax.errors import ConfigError, InputError

MAX_PIXELS = 1024 * 1024 * 1024 // 4 // 3
"""Largest image that is decoded or made in between (the limit of PIL's decompression bomb warning)."""

MAX_SIDE, MAX_ASPECT = 65_535, 500
"""Longest side in pixels (JPEG's limit), and largest ratio of the sides. Within both, memory stays bounded."""

# A closed list: some of PIL's other readers run programs (EPS) or are rarely exercised.
FORMATS = ("JPEG", "MPO", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
SIGLIP_MEAN = SIGLIP_STD = (0.5, 0.5, 0.5)

Result = TypeVar("Result")
_TRANSPOSE = Image.Transpose.TRANSPOSE


def open_image(source: bytes | str | Path) -> Image.Image:
    """Decodes the first frame of an image file, or of its bytes, to RGB.

    Transparency is dropped, as by `convert("RGB")`. 16-bit grey is scaled to 8 bits (`convert` alone would clip it to white).

    Raises:
        InputError: in one line, what the file is: missing, empty, HTML, a Git LFS pointer, truncated, too large, ...
    """
    return _read(source, _load)


def image_size(source: bytes | str | Path) -> ImageSize:
    """(width, height) in pixels from an image's header. Nothing is decoded, so a truncated image passes; see `open_image`."""
    return _read(source, lambda image: image.size)


def _load(image: Image.Image) -> Image.Image:
    image.load()
    return to_rgb(image)


def _read(source: bytes | str | Path, read: Callable[[Image.Image], Result]) -> Result:
    """`read` of an opened image whose size is within the limits."""
    name = "image" if isinstance(source, bytes) else str(source)
    if not isinstance(source, bytes):
        try:
            source = Path(source).read_bytes()
        except FileNotFoundError:
            raise InputError(f"{name}: no such file") from None
        except OSError as error:
            raise InputError(f"{name}: cannot be read: {error.strerror or error}") from None
    if problem := _not_an_image(source):
        raise InputError(f"{name}: {problem}")
    try:
        with Image.open(io.BytesIO(source), formats=_known_formats()) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            size = image.size
            if max(size) <= MAX_SIDE and max(size) <= MAX_ASPECT * min(size):
                return read(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise InputError(f"{name}: image bomb: more than {MAX_PIXELS:,} pixels") from None
    except Image.UnidentifiedImageError:
        raise InputError(f"{name}: not an image of a known format (starts with {source[:12]!r})") from None
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error, ...
        raise InputError(f"{name}: broken image file: {str(error) or type(error).__name__}") from None
    raise InputError(f"{name}: {size[0]} x {size[1]} pixels is too extreme (a side of {MAX_SIDE}, an aspect of {MAX_ASPECT}:1)")


def _not_an_image(data: bytes) -> str | None:
    if not data:
        return "the image file is empty (0 bytes)"
    start = data[:256].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the image; run `git lfs pull`"
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "an HTML page, not an image; the download failed"
    return None


def _known_formats() -> list[str]:
    Image.preinit()
    Image.init()
    return [f for f in FORMATS if f in Image.OPEN]


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode -> RGB; see `open_image`."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if image.mode != "I" or values.max(initial=0) > 255:
            values = values >> 8
        image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def prepare_pixels(image: Image.Image, config: ImageConfig) -> np.ndarray:
    """An RGB image -> uint8 [size, size, 3], resized by PIL's bicubic filter."""
    if config.aspect == "squash":
        square = image.resize((config.size, config.size), Image.Resampling.BICUBIC)
    elif config.aspect == "pad":
        square = _pad_and_resize(image, config.size, tuple(int(255 * m) for m in config.mean))
    else:
        square = _centre_crop(image, config.size)
    return np.array(square)


def _pad_and_resize(image: Image.Image, size: int, colour: tuple[int, ...]) -> Image.Image:
    """Pads to a square with `colour`, then resizes. Uses a cheaper order where that gives the same bytes.

    PIL resizes horizontally first, each row on its own, and leaves rows of one colour unchanged. So a wide image is resized
    horizontally before it is padded. A tall image is padded first. If that square is above `MAX_PIXELS` (2.7 GB for a
    screenshot of 1000 x 30000 pixels), the image is transposed; rounding then differs by one level in places.
    """
    width, height = image.size
    side = max(width, height)
    if width < height and side * side > MAX_PIXELS:
        return _pad_and_resize(image.transpose(_TRANSPOSE), size, colour).transpose(_TRANSPOSE)
    if width > height:
        padded = Image.new("RGB", (size, side), colour)
        padded.paste(image.resize((size, height), Image.Resampling.BICUBIC), (0, (side - height) // 2))
    elif width == height:
        padded = image
    else:
        padded = Image.new("RGB", (side, side), colour)
        padded.paste(image, ((side - width) // 2, 0))
    return padded.resize((size, size), Image.Resampling.BICUBIC)


def _centre_crop(image: Image.Image, size: int) -> Image.Image:
    """Resizes the shortest edge to `size`, then crops the centre, rounding as CLIP's processor does."""
    new_width, new_height = resized_to_cover(image.size, size)
    resized = image.resize((new_width, new_height), Image.Resampling.BICUBIC)
    left, top = (new_width - size) // 2, (new_height - size) // 2
    return resized.crop((left, top, left + size, top + size))


def to_patches(pixels: np.ndarray, patch_size: int) -> np.ndarray:
    """uint8 [H, W, C] -> [P, h * w * C], the patches row by row.

    Within a patch the order is row, column, channel. A remainder at the right and lower edge is dropped.
    """
    rows, columns, channels = pixels.shape[0] // patch_size, pixels.shape[1] // patch_size, pixels.shape[2]
    grid = pixels[: rows * patch_size, : columns * patch_size].reshape(rows, patch_size, columns, patch_size, channels)
    return grid.swapaxes(1, 2).reshape(rows * columns, patch_size * patch_size * channels)


def normalise(pixels: np.ndarray, config: ImageConfig) -> np.ndarray:
    """uint8 [..., H, W, C] -> float32 of the same shape, (pixels / 255 - mean) / std, as the model does on the device."""
    scaled = pixels.astype(np.float32) / np.float32(255)
    return (scaled - np.asarray(config.mean, np.float32)) / np.asarray(config.std, np.float32)


# ------------------------------------------------------------------------------------- reading a checkpoint's image processor

_KINDS = {
    "CLIPImageProcessor": "clip",
    "CLIPFeatureExtractor": "clip",
    "LlavaImageProcessor": "clip",
    "SiglipImageProcessor": "siglip",
}

_HANDLED = {
    "image_processor_type", "feature_extractor_type", "do_pad", "do_center_crop", "crop_size", "size", "image_mean",
    "image_std", "rescale_factor", "resample", "do_resize", "do_rescale", "do_normalize", "do_convert_rgb", "default_to_square",
}  # fmt: skip

_NO_EFFECT = {
    "processor_class", "_processor_class", "data_format", "input_data_format", "return_tensors", "device", "disable_grouping",
    "_valid_processor_keys", "image_seq_length", "patch_size", "num_additional_image_tokens", "vision_feature_select_strategy",
    "image_token", "chat_template", "tokenizer_class", "transformers_version",
}  # fmt: skip


def image_config_from_hf(preprocessor: dict[str, Any] | None, *, size: int, family: Literal["clip", "siglip"]) -> ImageConfig:
    """Reads `preprocessor_config.json`, or `processor_config.json` with an `image_processor` table.

    Args:
        preprocessor: the file's contents; None gives the family's default (clip: centre crop; siglip: squash).
        size: side of the square that the vision tower takes, in pixels.
        family: the vision tower's, which decides what the file leaves out if it names no processor.

    Raises:
        ConfigError: a field is unknown, or describes pixels that `prepare_pixels` does not make.
    """
    settings = dict(preprocessor or {})
    if isinstance(settings.get("image_processor"), dict):
        settings = dict(settings["image_processor"])
    settings = {name: value for name, value in settings.items() if value is not None}
    if unknown := sorted(set(settings) - _HANDLED - _NO_EFFECT):
        raise ConfigError(f"image processor: not understood: {', '.join(f'{k}={settings[k]!r}'[:60] for k in unknown)}")
    kind = _processor_kind(settings, family)
    for name in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
        if not settings.get(name, True):
            raise ConfigError(f"image processor: {name} = false is not supported")
    factor = settings.get("rescale_factor", 1 / 255)
    if not isinstance(factor, (int, float)) or not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        raise ConfigError(f"image processor: rescale_factor = {factor!r} is not 1/255")
    if settings.get("resample", 3) != 3:
        raise ConfigError(f"image processor: resample = {settings['resample']!r} is not bicubic (3)")
    mean, std = (CLIP_MEAN, CLIP_STD) if kind == "clip" else (SIGLIP_MEAN, SIGLIP_STD)
    return ImageConfig(
        size=size,
        aspect=_aspect(settings, size, kind),
        mean=_three_floats(settings.get("image_mean", mean), "image_mean"),
        std=_three_floats(settings.get("image_std", std), "image_std"),
    )


def _processor_kind(settings: dict[str, Any], family: str) -> str:
    name = settings.get("image_processor_type", settings.get("feature_extractor_type"))
    if name is None:
        return family
    kind = _KINDS.get(str(name).removesuffix("Fast").removesuffix("Pil"))
    if kind is None:
        raise ConfigError(f"image processor: {name!r} is not supported (known: {', '.join(_KINDS)})")
    return kind


def _three_floats(values: Any, name: str) -> tuple[float, ...]:
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


def _aspect(settings: dict[str, Any], size: int, kind: str) -> Literal["pad", "crop", "squash"]:
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
