"""Peak memory of `lsg prepare` on hostile images of each format: as large as is taken, of little content, a file of kilobytes.

    python benchmarks/decode_memory.py --threads 1 2 8

Each number of threads prepares 10 records in a process of its own. Prints its peak in MiB, that of a process that prepares tiny
images, and the bound: 1 GiB and 64 MiB a thread.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

RECORDS = 10

# name -> mode, pixels in units of the largest image (89 million), options of `save`
IMAGES: dict[str, tuple[str, float, dict[str, Any]]] = {
    "1.png": ("1", 1, {}),
    "i16.png": ("I;16", 1, {}),
    "la.png": ("LA", 1, {}),
    "rgba.png": ("RGBA", 1, {}),
    "p.png": ("P", 1, {"transparency": bytes(256)}),
    "baseline.jpg": ("RGB", 1, {}),
    "progressive.jpg": ("RGB", 1, {"progressive": True, "subsampling": 0}),
    "cmyk.jpg": ("CMYK", 0.74, {"progressive": True, "subsampling": 0}),
    "float.tif": ("F", 0.74, {"compression": "tiff_lzw"}),
    "strip.tif": ("RGB", 0.85, {"compression": "tiff_lzw", "strip_size": 1 << 30}),
    "lossy.webp": ("RGB", 0.37, {"method": 0}),
    "lossless.webp": ("RGBA", 0.37, {"method": 0, "lossless": True}),
    "a.avif": ("RGBA", 0.37, {"speed": 10, "quality": 30, "subsampling": "4:4:4"}),
    "rgb.jp2": ("RGB", 0.29, {}),
    "rgba.jp2": ("RGBA", 0.23, {}),
    "a.gif": ("P", 1, {}),
    "8.bmp": ("L", 0.7, {}),
    "1.pbm": ("1", 0.45, {}),
}

CHILD = """
import sys
from pathlib import Path
from lsg_jax.data.records import prepare_llava
folder, threads, out = sys.argv[1:]
report = prepare_llava(Path(folder) / "records.jsonl", folder, out, threads=int(threads), max_bad_fraction=1)
print(report.rejected, *report.rejects)
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    arguments.add_argument("--threads", type=int, nargs="+", default=[1, 2, 8])
    arguments.add_argument("--images", nargs="+", default=list(IMAGES), choices=list(IMAGES), metavar="NAME")
    args = arguments.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        print("image".ljust(16), *(f"{threads:>4} threads" for threads in args.threads))
        report("tiny", args.threads, folder, lambda: Image.new("RGB", (8, 8)).save(folder / "tiny", "PNG"))
        for name in args.images:
            report(name, args.threads, folder, lambda name=name: write(folder / name))
        print("bound".ljust(16), *(f"{1024 + 64 * threads:>12}" for threads in args.threads))


def write(path: Path) -> None:
    """A square image of one colour."""
    mode, share, options = IMAGES[path.name]
    side = math.isqrt(int(Image.MAX_IMAGE_PIXELS * share))  # type: ignore[operator]
    Image.new(mode, (side, side)).save(path, **options)


def report(name: str, threads: list[int], folder: Path, make: Callable[[], None]) -> None:
    make()
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "yes"}]
    lines = [json.dumps({"id": number, "image": name, "conversations": turns}) + "\n" for number in range(RECORDS)]
    (folder / "records.jsonl").write_text("".join(lines))
    peaks, rejected = [], "0"
    for count in threads:
        command = [sys.executable, "-c", CHILD, str(folder), str(count), str(folder / f"out-{name}-{count}")]
        try:
            rejected, peak = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        except subprocess.CalledProcessError as error:
            rejected, peak = error.stderr.splitlines()[-1], "0"
        peaks.append(f"{int(peak) // 1024:>12}")
    print(name.ljust(16), *peaks, "" if rejected.strip() == "0" else f"rejected: {rejected}", flush=True)
    (folder / name).unlink()


if __name__ == "__main__":
    main()
