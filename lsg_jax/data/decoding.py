"""What decoding an image takes in memory, and a bound on that of all threads of the process."""

from __future__ import annotations

import contextlib
import re
import struct
import threading
from collections.abc import Iterator

from PIL import Image

from lsg_jax.errors import InputError

MAX_FILE = 64 << 20
"""Bytes of an encoded image, or of all images of one record."""

MAX_DECODING = 512 << 20
"""Bytes that are decoded into at a time, by all threads together. An image that needs more to be checked is refused."""

# Peak bytes a pixel until the image is decoded, as `benchmarks/decode_memory.py` measures them, with what that comes to in the
# worst case: JPEG of several scans holds two bytes a coefficient, JPEG 2000 an int32 a value.
_PER_PIXEL = {"PNG": 4.0, "GIF": 5.0, "BMP": 6.0, "PPM": 12.0, "WEBP": 16.1, "AVIF": 16.1}
MAX_NUMBERS, MAX_RATIONALS, MAX_EXIF = 1 << 18, 1 << 14, 16
"""Numbers in a tag of a TIFF (as strips of one row, of 65,535 rows and 4 planes), and segments of EXIF in a JPEG."""

MAX_SCANS = 100
"""Scans of a JPEG: each passes over all pixels, and few bytes may hold thousands. Progressive ones have about ten."""

BLOCK = 64 << 20
"""Bytes of the pieces in which Pillow stores large images; see `give_back`."""

_EXIF = re.compile(rb"\xff\xe1..Exif\0\0", re.DOTALL)
_MARKER = re.compile(rb"\xff+([^\x00\x01\xd0-\xd7\xff])")  # of JPEG: those that a segment follows, and the end
_AS_RGB = 4  # bytes a pixel of an RGB image


def check_cost(image: Image.Image) -> int:
    """Peak bytes while an image that was opened, and not loaded, is decoded to see whether it can be; JPEG at an eighth."""
    pixels, bands = image.width * image.height, len(image.getbands())
    if image.format in ("JPEG", "MPO"):
        return int(2 * bands * pixels)
    if image.format == "JPEG2000":
        return int((5 * bands + 5) * pixels)
    if image.format == "TIFF":
        return 4 * pixels + _piece_of_tiff(image)
    return int(_PER_PIXEL.get(image.format or "", 16.1) * pixels)


def rgb_cost(image: Image.Image) -> int:
    """Peak bytes while an image is decoded to RGB and resized; see `check_cost`."""
    pixels = image.width * image.height
    of_jpeg = _AS_RGB * pixels if image.format in ("JPEG", "MPO") else 0
    padded = min(max(image.size) ** 2, Image.MAX_IMAGE_PIXELS or 0)  # to a square
    return max(check_cost(image) + of_jpeg, (_AS_RGB + 5) * pixels, _AS_RGB * (pixels + padded))


def _piece_of_tiff(image: Image.Image) -> int:
    """Bytes of the largest strip or tile as the header states it; a tile may be larger than the image."""
    tags = image.tag_v2  # type: ignore[attr-defined]
    numbers = lambda tag, default: [n for n in _listed(tags.get(tag, default)) if isinstance(n, int) and n > 0] or [1]
    bits = sum(numbers(258, 8)) if 258 in tags else 8
    area = max(numbers(322, 1)) * max(numbers(323, 1))
    return max(image.width * image.height, area) * max(-(-bits // 8), 1)


def _listed(value: object) -> list[object]:
    return list(value) if isinstance(value, (tuple, list)) else [value]


def give_back() -> None:
    """Lets the memory of a large image return to the system when it is freed.

    Pillow's own pieces of 16 MiB stay with the thread that allocated them, where glibc keeps blocks of up to 32 MiB for reuse:
    eight threads that decode in turn held eight images.
    """
    if Image.core.get_block_size() < BLOCK:
        Image.core.set_block_size(BLOCK)


def check_decodable(image: Image.Image) -> None:
    """Raises InputError if an image takes more memory than one may; the message says how many pixels its format may have."""
    cost, pixels = check_cost(image), image.width * image.height
    if cost > MAX_DECODING:
        most = f"a {image.format} image of mode {image.mode} may have {int(MAX_DECODING / cost * pixels):,}"
        raise InputError(f"{pixels:,} pixels take {cost >> 20} MiB to decode; {most}: shrink it, or save it as PNG")


def check_scans(data: bytes) -> None:
    """Raises InputError if a JPEG has more than MAX_SCANS scans: a thousand, in 76 KB, take ten seconds to decode."""
    if data.count(b"\xff\xda") <= MAX_SCANS:
        return  # almost always; the bytes may also be part of a segment, or lie behind the end
    place, scans = 2, 0
    while (found := _MARKER.search(data, place)) and found[1] != b"\xd9":
        scans += found[1] == b"\xda"
        if scans > MAX_SCANS:
            raise InputError(f"a JPEG of more than {MAX_SCANS} scans; save it again")
        place = found.end() + max(int.from_bytes(data[found.end() : found.end() + 2]), 2)


def check_tags(data: bytes) -> None:
    """Raises InputError if the tags of a TIFF, or EXIF in a JPEG, list so many numbers that Pillow takes minutes to open it."""
    if data.startswith(b"\xff\xd8"):
        if (parts := len(_EXIF.findall(data))) > MAX_EXIF:
            raise InputError(f"EXIF in {parts} segments; save it again without EXIF")
        return
    if data[:2] not in (b"II", b"MM") or data[2:4] not in (b"*\0", b"\0*", b"+\0", b"\0+"):
        return
    order, large = "<" if data[:2] == b"II" else ">", data[2] == 43  # as Pillow tells BigTIFF
    place, length = struct.Struct(order + ("Q" if large else "L")), struct.Struct(order + ("Q" if large else "H"))
    entry = struct.Struct(order + ("HHQ8x" if large else "HHL4x"))
    try:
        (start,) = place.unpack_from(data, 8 if large else 4)
        (entries,) = length.unpack_from(data, start)
    except struct.error:
        return  # Pillow says what is wrong with it
    start += length.size
    fits = min(entries, (len(data) - start) // entry.size)
    for tag, kind, count in entry.iter_unpack(data[start : start + fits * entry.size]):
        if kind not in (1, 2, 6, 7) and count > (MAX_RATIONALS if kind in (5, 10) else MAX_NUMBERS):
            raise InputError(f"tag {tag} of the TIFF holds {count:,} numbers; save it as PNG")


class Budget:
    """Bytes that threads may use at a time. One that asks for more than there is waits until it is alone."""

    def __init__(self, total: int):
        self._total, self._used = total, 0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def take(self, count: int) -> Iterator[None]:
        """Waits until `count` bytes are free, and holds them during the block. Not to be nested."""
        with self._changed:
            self._changed.wait_for(lambda: not self._used or self._used + count <= self._total)
            self._used += count
        try:
            yield
        finally:
            with self._changed:
                self._used -= count
                self._changed.notify_all()


DECODING = Budget(MAX_DECODING)
"""That of all threads: memory belongs to the process."""
