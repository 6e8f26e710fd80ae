"""Images inside a page: scaled down, as data URLs."""

from __future__ import annotations

import base64
import io

from PIL import Image

from lsg_jax.data.images import open_image

JPEG_QUALITY = 80


def small(picture: bytes | Image.Image, side: int) -> tuple[str, bytes]:
    """Scales an image down to at most `side` pixels a side and encodes it.

    Returns:
        (`png` or `jpeg`, the file's bytes), whichever is smaller.

    Raises:
        InputError: the bytes are not an image that can be read.
    """
    image = (open_image(picture) if isinstance(picture, bytes) else picture).convert("RGB")
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    files = {}
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": JPEG_QUALITY, "optimize": True})):
        out = io.BytesIO()
        image.save(out, kind, **options)
        files[kind] = out.getvalue()
    return min(files.items(), key=lambda file: len(file[1]))


def data_url(kind: str, file: bytes) -> str:
    """An image file as the `src` of an element."""
    return f"data:image/{kind};base64,{base64.b64encode(file).decode()}"
