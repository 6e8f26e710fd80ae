"""Tags of images: lists of numbers that take minutes to read are refused, odd tags are no lines on stderr."""

import io
import json
import struct
import subprocess
import sys

import pytest
from PIL import Image

from lsg_jax.data.images import check_image, open_image
from lsg_jax.errors import InputError

TURNS = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
RECORD = json.dumps({"image": "a.tif", "conversations": TURNS})


def jpeg(**options):
    file = io.BytesIO()
    Image.new("RGB", (20, 24)).save(file, "JPEG", **options)
    return file.getvalue()


def tiff(*tags):
    """A TIFF of 8 x 8 zeros with these (tag, type, count, offset) besides, and a megabyte."""
    tags = sorted([*tags, *((t, 4, 1, v) for t, v in ((256, 8), (257, 8), (258, 8), (259, 1), (262, 1), (278, 8)))])
    listed = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + listed + bytes(1 << 20)


def test_tags_of_many_numbers_are_refused():
    """Before, 16 MB took 32 seconds and half a gigabyte to open, whatever the size of the image."""
    assert check_image(tiff((273, 4, 1, 900))) == (8, 8)
    for tag, kind in ((273, 4), (282, 5)):
        strips = () if tag == 273 else ((273, 4, 1, 900),)
        with pytest.raises(InputError, match=f"tag {tag} of the TIFF holds 300,000 numbers"):
            check_image(tiff(*strips, (tag, kind, 300_000, 900)))
    data, segment = jpeg(), b"\xff\xe1" + struct.pack(">H", 60_000) + b"Exif\0\0".ljust(59_998, b"\0")
    assert check_image(data[:2] + segment + data[2:]) == (20, 24)
    with pytest.raises(InputError, match="EXIF in 17 segments"):
        check_image(data[:2] + segment * 17 + data[2:])


def test_odd_tags_are_no_lines_on_stderr(tmp_path):
    (tmp_path / "a.tif").write_bytes(tiff((273, 4, 1, 900), *((50_000 + n, 7, 1 << 20, 900) for n in range(20))))
    (tmp_path / "r.jsonl").write_text(RECORD)
    command = [sys.executable, "-m", "lsg_jax", "prepare", tmp_path / "r.jsonl", tmp_path / "out", "--images", tmp_path]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "Warning" not in done.stderr


def test_a_jpeg_of_many_scans_is_refused_at_once():
    """Each scan passes over all pixels. Those in a segment that is skipped, and behind the end, do not count."""
    data = jpeg(progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    start, _, _ = data.partition(b"\xff\xdb")
    hidden = b"\xff\xe5\xff\xfe" + b"\xff\xd9\xff\xda" * 16383  # in a segment that readers skip
    for many in (data[:-2] + scan * 200 + b"\xff\xd9", start + hidden + data[len(start) : -2] + scan * 200):
        with pytest.raises(InputError, match="more than 100 scans"):
            open_image(many)
    for few in (data[:-2] + scan * 80 + b"\xff\xd9", start + hidden + data[len(start) :] + scan * 200):
        assert open_image(few).tobytes() == open_image(data).tobytes()
