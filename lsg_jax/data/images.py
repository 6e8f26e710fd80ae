"""Image files -> the uint8 squares that go to the device. The device normalises them; `normalise` is the tests' reference.

Pixels equal those of the Hugging Face image processors (LLaVA, LLaVA-NeXT, CLIP, SigLIP, InternVL's GOT-OCR 2, Gemma 3,
SmolVLM, Qwen2-VL). EXIF orientation is ignored, as there.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from lsg_jax.config import ImageConfig, ModelConfig
from lsg_jax.data.decoding import DECODING, MAX_FILE, check_cost, check_decodable, check_scans, check_tags, give_back, rgb_cost
from lsg_jax.data.grids import ImageSize, best_grid, split_sizes
from lsg_jax.data.layout import best_canvas, image_of, resized_to_cover, resized_to_fit
from lsg_jax.data.native import native_size
from lsg_jax.errors import InputError
from lsg_jax.files import read_regular

MAX_PIXELS = 1024 * 1024 * 1024 // 4 // 3
"""Largest image that is decoded or made in between (the limit of PIL's decompression bomb warning)."""

MAX_SIDE, MAX_ASPECT = 65_535, 500
"""Longest side in pixels (JPEG's limit), and largest ratio of the sides. Within both, memory stays bounded."""

# A closed list: some of PIL's other readers run programs (EPS) or are rarely exercised.
FORMATS = ("JPEG", "MPO", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")

Read = TypeVar("Read")
Result = TypeVar("Result")
_TRANSPOSE = Image.Transpose.TRANSPOSE


def open_image(source: bytes | str | Path) -> Image.Image:
    """Decodes the first frame of an image file, or of its bytes, to RGB.

    Transparency is dropped, as by `convert("RGB")`. 16-bit grey is scaled to 8 bits (`convert` alone would clip it to white).

    Raises:
        InputError: in one line, what the file is: missing, empty, HTML, a Git LFS pointer, truncated, too large, ...
    """
    return use_image(source, lambda image: image)


def use_image(source: bytes | str | Path, use: Callable[[Image.Image], Result]) -> Result:
    """`use` of the image that `open_image` gives. Until it returns, its memory counts among that of all threads.

    `use` must not open another image. Raises InputError as `open_image` does.
    """

    def load(image: Image.Image) -> Image.Image:
        image.load()
        return to_rgb(image)

    return _read(source, load, use, rgb_cost)


def check_image(source: bytes | str | Path) -> ImageSize:
    """(width, height) in pixels of an image that can be decoded. Takes less memory than `open_image`; the same errors."""

    def load(image: Image.Image) -> ImageSize:
        size = image.size
        image.draft(image.mode, (1, 1))  # of JPEG, all is read and an eighth of the sides computed
        image.load()
        return size

    return _read(source, load, lambda size: size, check_cost)


def image_size(source: bytes | str | Path) -> ImageSize:
    """(width, height) in pixels from an image's header. Nothing is decoded, so a truncated image passes; see `check_image`."""
    return _read(source, lambda image: image.size, lambda size: size, None)


def _read(
    source: bytes | str | Path,
    read: Callable[[Image.Image], Read],
    use: Callable[[Read], Result],
    cost: Callable[[Image.Image], int] | None,
) -> Result:
    """`use` of what `read` makes of an opened image whose size is within the limits.

    Args:
        cost: bytes that this takes; None for nothing to speak of.
    """
    name = "image" if isinstance(source, bytes) else str(source)
    data = source if isinstance(source, bytes) else read_regular(Path(source), limit=MAX_FILE)
    with contextlib.ExitStack() as held:
        try:
            return _decode(data, read, use, cost, held)
        except InputError as error:
            problem = str(error)
    # Raised here, the error holds none of the frames in which the image is, which would keep it in memory.
    raise InputError(f"{name}: {problem}")


def _decode(
    data: bytes,
    read: Callable[[Image.Image], Read],
    use: Callable[[Read], Result],
    cost: Callable[[Image.Image], int] | None,
    held: contextlib.ExitStack,
) -> Result:
    """As `_read`; what is held of the budget is put into `held`, to be freed after the image."""
    if len(data) > MAX_FILE:
        raise InputError(f"larger than {MAX_FILE >> 20} MiB; save it as JPEG or PNG")
    if problem := _not_an_image(data):
        raise InputError(problem)
    check_tags(data)
    try:
        with Image.open(io.BytesIO(data), formats=_known_formats()) as image:
            _check_size(image)
            if cost is not None:
                check_decodable(image)
                if image.format in ("JPEG", "MPO"):
                    check_scans(data)
                give_back()
                held.enter_context(DECODING.take(cost(image) + len(data)))
            found = read(image)
    except InputError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise InputError(f"image bomb: more than {MAX_PIXELS:,} pixels") from None
    except Image.UnidentifiedImageError:
        raise InputError(f"not an image of a known format (starts with {data[:12]!r})") from None
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error, ...
        raise InputError(f"broken image file: {str(error) or type(error).__name__}") from None
    return use(found)


def _check_size(image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise Image.DecompressionBombError
    size = image.size
    if max(size) > MAX_SIDE or max(size) > MAX_ASPECT * min(size):
        limits = f"sides of up to {MAX_SIDE} and an aspect of up to {MAX_ASPECT}:1 are read"
        raise InputError(f"{size[0]} x {size[1]} pixels is too extreme: {limits}")


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
        image = _grey(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _grey(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits -> 8 bits, some rows at a time. 32 bits that hold no more than 255 are kept as they are."""
    shift = 8 if image.mode != "I" or image.getextrema()[1] > 255 else 0  # type: ignore[operator]
    grey = Image.new("L", image.size)
    rows = max((1 << 20) // max(image.width, 1), 1)
    for top in range(0, image.height, rows):
        band = np.asarray(image.crop((0, top, image.width, min(top + rows, image.height))))
        grey.paste(Image.fromarray((band >> shift).clip(0, 255).astype(np.uint8)), (0, top))
    return grey


def prepare_tiles(image: Image.Image, config: ImageConfig, *, alone: bool = True) -> np.ndarray:
    """An RGB image -> uint8 [S, size, size, 3], the tiles of its layout: the whole image, then those of its canvas.

    Of a grid (`tiles`, `split`), the whole image comes last.

    Args:
        alone: it is the only image of its prompt; see `layout.image_of`.
    """
    config = image_of(config, alone=alone)
    if config.kind == "tiles":
        across, down = best_grid(image.size, config)
        resized = _resize(image, (across * config.size, down * config.size), config)
        return _cut(resized, image, config, whole=config.thumbnail)
    if config.kind == "split":
        first, second = split_sizes(image.size, config)
        resized = _resize(_resize(image, first, config), second, config)
        return _cut(resized, resized, config, whole=True)
    whole = prepare_pixels(image, config)
    if not config.canvases:
        return whole[None]
    canvas = best_canvas(image.size, config.canvases)
    width, height = resized_to_fit(image.size, canvas)
    padded = Image.new("RGB", canvas)
    place = (canvas[0] - width) // 2, (canvas[1] - height) // 2
    padded.paste(image.resize((width, height), Image.Resampling.BICUBIC), place)
    return np.concatenate([whole[None], _tiles(padded, config.size)])


def prepare_native(image: Image.Image, config: ModelConfig) -> np.ndarray:
    """An RGB image -> uint8 [height, width, 3] of about its own size (Qwen-VL). Errors as of `native_size`."""
    return np.array(_resize(image, native_size(image.size, config), config.image))


def _resize(image: Image.Image, size: ImageSize, config: ImageConfig) -> Image.Image:
    return image.resize(size, Image.Resampling[config.resample.upper()])


def _tiles(image: Image.Image, size: int) -> np.ndarray:
    """uint8 [S, size, size, 3] of an image whose sides are multiples of `size`, row by row."""
    across, down = image.width // size, image.height // size
    grid = np.asarray(image).reshape(down, size, across, size, 3).swapaxes(1, 2)
    return grid.reshape(-1, size, size, 3)


def _cut(resized: Image.Image, image: Image.Image, config: ImageConfig, *, whole: bool) -> np.ndarray:
    """The tiles of a resized image and, if there are several, the whole of `image` behind them."""
    tiles = _tiles(resized, config.size)
    if len(tiles) == 1 or not whole:
        return tiles
    return np.concatenate([tiles, _tiles(_resize(image, (config.size, config.size), config), config.size)])


def prepare_pixels(image: Image.Image, config: ImageConfig) -> np.ndarray:
    """An RGB image -> uint8 [size, size, 3]. `pad` and `crop` resize by PIL's bicubic filter."""
    if config.aspect == "squash":
        square = _resize(image, (config.size, config.size), config)
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
    """[..., H, W, C] -> [..., P, h * w * C], the patches row by row.

    Within a patch the order is row, column, channel. A remainder at the right and lower edge is dropped.
    """
    *lead, height, width, channels = pixels.shape
    rows, columns = height // patch_size, width // patch_size
    cut = pixels[..., : rows * patch_size, : columns * patch_size, :]
    grid = cut.reshape(*lead, rows, patch_size, columns, patch_size, channels).swapaxes(-4, -3)
    return grid.reshape(*lead, rows * columns, patch_size * patch_size * channels)


def normalise(pixels: np.ndarray, config: ImageConfig) -> np.ndarray:
    """uint8 [..., H, W, C] -> float32 of the same shape, (pixels / 255 - mean) / std, as the model does on the device."""
    scaled = pixels.astype(np.float32) / np.float32(255)
    return (scaled - np.asarray(config.mean, np.float32)) / np.asarray(config.std, np.float32)


def opened_images(entry: Any) -> list[Image.Image]:
    """The images of one prompt: an image, its file or its bytes, a list of these, or None."""
    shown = entry if isinstance(entry, (list, tuple)) else [] if entry is None else [entry]
    if wrong := [image for image in shown if not isinstance(image, Image.Image | bytes | str | Path)]:
        raise InputError(f"an image is of type {type(wrong[0]).__name__}; give a path, bytes or a PIL image")
    return [image if isinstance(image, Image.Image) else open_image(image) for image in shown]
