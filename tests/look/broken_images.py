"""Two hundred uploads that are no images, or none that should be decoded: broken, huge, odd, disguised."""

import gzip
import io
import itertools
import random
import struct
import zipfile
import zlib

from PIL import Image

STARTS = (
    *(b"\0", b" \n", b"hello", b"<!doctype html><p>no", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.7\n"),
    *(
        b"%!PS-Adobe-3.0 EPSF",
        b"version https://git-lfs.github.com/spec/v1\n",
        b'{"a": 1}',
        b"MZ\x90",
        b"\x7fELF",
        b"BM",
        b"II*\0",
    ),
    *(b"RIFF\0\0\0\0WEBP", b"GIF89a", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"P6", b"P6\n9999999 9999999\n255\n"),
    *(b"P5\n-1 4\n255\n", b"P6\n2 2\n0\n", b"\0\0\0\x0cjP  ", b"\0\0\1\0", b"../../etc/passwd", b"file:///etc/passwd"),
    *(b"http://127.0.0.1/", b"\xef\xbb\xbf", "ünï".encode("utf-16"), b"#!/bin/sh\n", b"\x1f\x8b\x08"),
)
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")
MODES = (
    *(
        ("1", "PNG"),
        ("L", "PNG"),
        ("LA", "PNG"),
        ("P", "PNG"),
        ("RGBA", "PNG"),
        ("I;16", "PNG"),
        ("L", "JPEG"),
        ("CMYK", "JPEG"),
    ),
    *(("P", "GIF"), ("F", "TIFF"), ("LAB", "TIFF"), ("CMYK", "TIFF"), ("RGBA", "WEBP")),
)


def file_of(kind, size=(40, 30), mode="RGB"):
    """A small picture as an image file."""
    out = io.BytesIO()
    Image.effect_noise(size, 80).convert(mode).save(out, kind)
    return out.getvalue()


def png_of(width, height, *, depth=8, colour=2, data=b"", checksum=None):
    """A PNG that claims a size."""
    chunk = lambda name, body: (
        struct.pack(">I", len(body))
        + name
        + body
        + struct.pack(">I", zlib.crc32(name + body) if checksum is None else checksum)
    )
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def zipped():
    """A zip archive that calls itself a picture."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("photo.png", b"0" * 99)
    return out.getvalue()


def uploads():
    """(name, bytes), some 200."""
    whole = {kind: file_of(kind) for kind in FORMATS}
    yield "empty", b""
    for text in STARTS:
        yield f"starts with {text[:12]!r}", text
    for kind, data in whole.items():
        for share in (0.02, 0.1, 0.3, 0.5):
            yield f"{kind} cut at {share}", data[: int(len(data) * share)]
        yield f"{kind} reversed", data[::-1]
        yield f"{kind} behind a text", b"GET / HTTP/1.1\r\n\r\n" + data
        yield f"{kind} zipped", gzip.compress(data)
        yield f"{kind} named otherwise", b"\x89PNG\r\n\x1a\n" + data
        for seed in range(8):
            rng, bytes_ = random.Random(f"{kind} {seed}"), bytearray(data)
            for _ in range(30):  # mostly in the header, where sizes and tables are
                bytes_[rng.randrange(min(len(bytes_), 80 if seed % 2 else 4000))] = rng.randrange(256)
            yield f"{kind} damaged {seed}", bytes(bytes_)
    sides = (0, 1, 65_535, 65_536, 2**31 - 1, 2**32 - 1)
    for width, height in itertools.product(sides, sides):
        if (width, height) != (1, 1):
            yield f"PNG of {width} x {height}", png_of(width, height)
    for depth, colour in itertools.product((0, 3, 8, 16), (1, 2, 5, 7)):
        yield f"PNG of depth {depth}, colour {colour}", png_of(4, 4, depth=depth, colour=colour, data=b"\0" * 9)
    yield "PNG with a wrong checksum", png_of(4, 4, data=b"\0" * 52, checksum=7)
    yield "bomb in a PNG", png_of(60_000, 60_000, data=b"\0" * 5_000_000)
    yield "bomb in a gzip", gzip.compress(b"\0" * 5_000_000)
    yield "zip", zipped()
    for length in (100, 10_000, 1_000_000):
        yield f"noise of {length}", random.Random(length).randbytes(length)


def odd_pictures():
    """(name, file) of pictures in modes that few programs write; they can be read."""
    for mode, kind in MODES:
        out = io.BytesIO()
        Image.effect_noise((9, 7), 80).convert("RGB" if mode not in ("I;16", "F") else "L").convert(mode).save(out, kind)
        yield f"{mode} {kind}", out.getvalue()
