"""Speed of `lsg prepare` on generated data: images per second by number of threads, MB/s of the pass over Cambrian.

    python benchmarks/prepare_speed.py --images 1000 --megabytes 200

Each number of threads takes its turn in each repeat (1 2 1 2 ...), so that whatever else the machine does falls on all.
Reported are medians, and the process's peak memory at the end. Images are JPEGs of about 95 kB.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from lsg_jax.data.cambrian import prepare_cambrian
from lsg_jax.data.records import prepare_llava

SOURCES = ("chartqa_28k", "lnqa_302k", "clevr_700k", "websight_800k", "geo170k", "pathvqa_32k", "orca_994k")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    arguments.add_argument("--images", type=int, default=1000, help="records in the LLaVA file, each with its own image")
    arguments.add_argument("--megabytes", type=int, default=200, help="size of the Cambrian file")
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument("--folder", type=Path, help="where the data is made; default: a temporary folder")
    args = arguments.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        time_images(Path(folder), args.images, args.repeats)
        time_pass(Path(folder), args.megabytes, args.repeats)
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")


def time_images(folder: Path, count: int, repeats: int) -> None:
    data = photo()
    (folder / "photos").mkdir()
    records = []
    for index in range(count):
        (folder / f"photos/{index}.jpg").write_bytes(data)
        records.append({"id": index, "image": f"{index}.jpg", "conversations": exchange("A short answer.")})
    (folder / "llava.json").write_text(json.dumps(records))
    cores = os.cpu_count() or 1
    seconds: dict[int, list[float]] = {threads: [] for threads in sorted({1, cores, 2 * cores})}
    for repeat in range(repeats):
        for threads, taken in seconds.items():
            start = time.perf_counter()
            prepare_llava(folder / "llava.json", folder / "photos", folder / f"out{repeat}_{threads}", threads=threads)
            taken.append(time.perf_counter() - start)
    for threads, taken in seconds.items():
        print(f"{threads} threads: {count / statistics.median(taken):.0f} images/s of {len(data) / 1000:.0f} kB")


def photo() -> bytes:
    """A JPEG of 640 x 480 with about as many bytes as a photo of that size."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8))
    file = io.BytesIO()
    noise.resize((640, 480), Image.Resampling.BICUBIC).save(file, "JPEG", quality=85)
    return file.getvalue()


def exchange(answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": answer}]


def time_pass(folder: Path, megabytes: int, repeats: int) -> None:
    rng = random.Random(0)
    words = [f"word{index}" for index in range(1000)]
    (folder / "images/f").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "images/f/0.png")
    path, lines = folder / "cambrian.jsonl", 0
    with path.open("w") as file:
        while file.tell() < megabytes * 1e6:
            turns = [turn for _ in range(rng.randint(1, 6)) for turn in exchange(" ".join(rng.choices(words, k=30)))]
            turns = [{**turn, "value": turn["value"].replace("<image>\n", "")} for turn in turns]
            source = SOURCES[lines % len(SOURCES)]
            file.write(json.dumps({"id": lines, "image": "f/0.png", "conversations": turns, "source": f"{source}.json"}) + "\n")
            lines += 1
    taken = []
    for repeat in range(repeats):
        start = time.perf_counter()
        prepare_cambrian(path, folder / "images", folder / f"sample{repeat}", sample=6)
        taken.append(time.perf_counter() - start)
    size = path.stat().st_size / 1e6
    print(f"Cambrian: {size:.0f} MB in {lines} lines, {size / statistics.median(taken):.0f} MB/s")


if __name__ == "__main__":
    main()
