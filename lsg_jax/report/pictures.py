"""Images as parts of a page: small, and with no file of their own."""

from __future__ import annotations

import base64
import io

from PIL import Image

from lsg_jax.data.images import open_image

JPEG_QUALITY = 80


def small(picture: bytes | Image.Image, side: int) -> tuple[str, bytes]:
    """An image at no more than `side` pixels a side, as (`png` or `jpeg`, the file): whichever of the two is smaller.

    Raises:
        InputError: the bytes are no image that can be read.
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
