"""The input pipeline: images per second and core, start-up time, and how long a training step waits for its batch.

    JAX_PLATFORMS=cpu python benchmarks/input_pipeline.py --out input_pipeline.json

JPEGs of about 95 kB (640 x 480, smooth noise of several scales) are generated, padded to squares and resized to 336 x 336: by
the function alone in threads, and through `TrainingData` with tokens and batches. Each run is pinned to as many cores as it
has threads. CPU seconds are counted as well, for machines that are busy with other work. Then the tiny model is trained on
these JPEGs at its own image size, and the waiting time of each step is read from its log. Last, the share of padding of batches
under several `data.buckets`, for examples whose lengths are drawn (`drawn_lengths`).
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

WIDTH, HEIGHT, BYTES, SIDE = 640, 480, 95_000, 336
BATCH, LENGTH, ANSWER = 8, 1024, 64


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    arguments.add_argument("--out", type=Path, help="JSON file for the results")
    arguments.add_argument("--images", type=int, default=400, help="images a run")
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument("--records", type=int, default=10_000, help="records of the start-up measurement")
    arguments.add_argument("--steps", type=int, default=60, help="training steps")
    arguments.add_argument("--examples", type=int, default=100_000, help="examples whose padding is counted")
    args = arguments.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    photos = [jpeg(seed) for seed in range(16)]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = tiny_model(work)
        photo_records = write_records(work / "photos", photos, max(args.images, BATCH * 8))
        results: dict[str, Any] = {
            "settings": {"jpeg_bytes": round(statistics.mean(map(len, photos))), "jpeg_size": [WIDTH, HEIGHT], "side": SIDE}
            | {name: getattr(args, name) for name in ("images", "repeats", "records", "steps", "examples")},
            "images": images_per_second(model, photos, photo_records, args),
            "start_up": start_up(model, work, args.records),
            "padding": padding(args.examples),
            "waiting": waiting(model, photo_records, work, args.steps),
            "versions": versions(),
        }
    print(table(results))
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


# ----------------------------------------------------------------------------------------------------------------- materials


def jpeg(seed: int) -> bytes:
    """A smooth picture with some grain, at the quality that brings it closest to 95 kB."""
    rng = np.random.default_rng(seed)
    values = 0.06 * rng.normal(size=(HEIGHT, WIDTH, 3))
    for octave in range(1, 9):
        for channel in range(3):
            coarse = Image.fromarray(rng.normal(size=(2**octave, 2**octave)).astype(np.float32))
            values[..., channel] += 0.75**octave * np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))
    low, high = np.percentile(values, [0.5, 99.5])
    picture = Image.fromarray((255 * (values - low) / (high - low)).clip(0, 255).astype(np.uint8))
    return min((encode(picture, quality) for quality in range(75, 100)), key=lambda data: abs(len(data) - BYTES))


def encode(picture: Image.Image, quality: int) -> bytes:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return file.getvalue()


def write_records(out: Path, photos: list[bytes], count: int) -> Path:
    """Prepared records of `count` questions on the photos, one answer each."""
    from lsg_jax.data.records import prepare_llava

    source = out.with_suffix(".images")
    source.mkdir()
    for number, data in enumerate(photos):
        (source / f"{number}.jpg").write_bytes(data)
    question, answer = "What is to be seen here, and in which colours? Answer in a sentence.", "Soft spots of many colours."
    lines = []
    for i in range(count):
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": f"{answer} {i}"}]
        lines.append(json.dumps({"id": str(i), "image": f"{i % len(photos)}.jpg", "conversations": turns}))
    path = out.with_suffix(".jsonl")
    path.write_text("\n".join(lines) + "\n")
    prepare_llava(path, source, out)
    return out


def tiny_model(work: Path) -> Path:
    from converters.convert import convert
    from converters.tiny_checkpoint import write_tiny_checkpoint

    write_tiny_checkpoint(work / "tiny-hf")
    convert(work / "tiny-hf", work / "tiny")
    return work / "tiny"


def llava_processor(model: Path) -> Any:
    """The tiny model's tokenizer with the image settings of LLaVA-1.5: 336 pixels, 576 image tokens."""
    import lsg_jax
    from lsg_jax.data.processor import Processor

    tiny = lsg_jax.load(model)
    vision = dataclasses.replace(tiny.config.vision, image_size=SIDE, patch_size=14)
    image = dataclasses.replace(tiny.config.image, size=SIDE, aspect="pad")
    return Processor(tiny.make_processor().tokenizer, dataclasses.replace(tiny.config, vision=vision, image=image))


# -------------------------------------------------------------------------------------------------------------- measurements


def images_per_second(model: Path, photos: list[bytes], records: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Median and best of several alternating runs."""
    made = llava_processor(model)
    tasks: dict[str, tuple[int, Callable[[], int]]] = {
        "Hugging Face processor, 1 thread": (1, by_hugging_face(photos, args.images))
    }
    for threads in (1, 2):
        tasks[f"function, {threads} threads"] = threads, by_function(made, photos, args.images, threads)
        tasks[f"TrainingData, {threads} threads"] = threads, by_pipeline(made, records, args.images, threads)
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in tasks}
    for _ in range(args.repeats):
        for name, (threads, task) in tasks.items():
            with cores(threads):
                seen[name].append(timed(task))
    return {
        name: {
            "per_second": statistics.median(wall for wall, _ in rates),
            "per_second_and_core": statistics.median(wall for wall, _ in rates) / tasks[name][0],
            "best_per_second_and_core": max(wall for wall, _ in rates) / tasks[name][0],
            "per_cpu_second": statistics.median(cpu for _, cpu in rates),
        }
        for name, rates in seen.items()
    }


def timed(task: Callable[[], int]) -> tuple[float, float]:
    """Images per second, images per CPU second."""
    wall, cpu = time.perf_counter(), time.process_time()
    count = task()
    return count / (time.perf_counter() - wall), count / (time.process_time() - cpu)


def by_function(made: Any, photos: list[bytes], count: int, threads: int) -> Callable[[], int]:
    def run() -> int:
        with ThreadPoolExecutor(threads) as pool:
            return sum(pixels.shape[1] == SIDE for pixels in pool.map(made.pixels, (photos * count)[:count]))

    return run


def by_hugging_face(photos: list[bytes], count: int) -> Callable[[], int]:
    """The Hugging Face processor that gives the same pixels: a reference for the current speed of the machine."""
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    square = {"height": SIDE, "width": SIDE}
    processor = LlavaImageProcessorPil(do_pad=True, size={"shortest_edge": SIDE}, crop_size=square)

    def run() -> int:
        return sum(len(processor(Image.open(io.BytesIO(data)))["pixel_values"]) for data in (photos * count)[:count])

    return run


def by_pipeline(made: Any, records: Path, count: int, threads: int) -> Callable[[], int]:
    from lsg_jax.config import DataConfig
    from lsg_jax.data.pipeline import TrainingData

    settings = DataConfig(max_length=LENGTH, max_answer_tokens=ANSWER, num_threads=threads, prefetch=4)
    data = TrainingData(records, made, settings, batch_size=BATCH, seed=0, epochs=1)
    start = data.get_state()

    def run() -> int:
        data.set_state(start)
        return sum(len(next(data).images.patches) for _ in range(count // BATCH))

    return run


@contextmanager
def cores(count: int) -> Iterator[None]:
    """Pins new threads to `count` cores, if the system supports it; running threads are not moved."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    everything = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(everything)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, everything)


def start_up(model: Path, work: Path, count: int) -> list[dict[str, float]]:
    """Seconds to open records and check them before the first step, which tokenises all of them for several lengths."""
    from lsg_jax.config import DataConfig
    from lsg_jax.data.pipeline import TrainingData

    small = io.BytesIO()
    Image.new("RGB", (64, 48), "teal").save(small, "JPEG")
    records = write_records(work / "many", [small.getvalue()], count)
    found = []
    for buckets in (1, 4):
        settings = DataConfig(max_length=LENGTH, max_answer_tokens=ANSWER, buckets=buckets)
        made, wall, cpu = llava_processor(model), time.perf_counter(), time.process_time()
        with closing(TrainingData(records, made, settings, batch_size=BATCH, seed=0, epochs=1)) as data:
            assert data.num_examples == count
        spent = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        found.append({"records": count, "buckets": buckets} | spent)
    return found


def waiting(model: Path, records: Path, work: Path, steps: int) -> dict[str, float]:
    """Trains the tiny model and sums the time that steps waited for data, without the first step, which compiles."""
    from lsg_jax.config import DataConfig, GateConfig, SinkConfig, TrainConfig
    from lsg_jax.json_files import json_lines
    from lsg_jax.run_config import RunConfig
    from lsg_jax.train.loop import METRICS, train

    config = RunConfig(
        model=str(model),
        output=str(work / "run"),
        tables={"gate": GateConfig(layers=(1,))},
        sinks=SinkConfig(criterion="norm", vit_tau=10.0),
        data=DataConfig(records=str(records), max_length=384, max_answer_tokens=ANSWER),
        train=TrainConfig(batch_size=BATCH, epochs=steps, max_steps=steps, save_every=steps),
    )
    lines = [json.loads(line) for _, line in json_lines(train(config) / METRICS)]
    waits, seconds = ([line[name] for line in lines[1:]] for name in ("data_wait_s", "step_s"))
    return {
        "steps": len(waits),
        "step_ms": 1000 * statistics.median(seconds),
        "wait_ms_median": 1000 * statistics.median(waits),
        "wait_ms_max": 1000 * max(waits),
        "share": sum(waits) / sum(seconds),
    }


def drawn_lengths(count: int) -> np.ndarray:
    """Tokens of examples as a mix like LLaVA's may have them for LLaVA-1.5; drawn, not counted.

    Of 100 examples 94 have an image: its 576 tokens, 43 of system prompt and roles, and a text whose tokens are log-normal with
    median 70 and sigma 0.8. The others are texts alone, with median 400 and sigma 0.9. All are cut at LENGTH.
    """
    rng = np.random.default_rng(0)
    beside, alone = rng.lognormal(np.log(70), 0.8, count), rng.lognormal(np.log(400), 0.9, count)
    return np.where(rng.random(count) < 0.94, 576 + 43 + beside, 43 + alone).clip(1, LENGTH).astype(np.int32)


def padding(count: int) -> list[dict[str, Any]]:
    """Share of padding in two epochs of batches of 64, for numbers of buckets."""
    from lsg_jax.data.lengths import arrange, choose_lengths, unit_of

    tokens, rng = drawn_lengths(count), np.random.default_rng(1)
    order = np.concatenate([rng.permutation(count) for _ in range(2)])
    found = []
    for buckets in (1, 2, 3, 4, 8):
        chosen = choose_lengths(tokens, max_length=LENGTH, most=buckets, unit=unit_of(LENGTH)) if buckets > 1 else (LENGTH,)
        batches, of = arrange(order, np.searchsorted(chosen, tokens), 64)
        positions = 64 * np.asarray(chosen)[of].sum()
        found.append({"buckets": buckets, "lengths": chosen, "padding": 1 - tokens[batches].sum() / positions})
    return found


def table(results: dict[str, Any]) -> str:
    lines = [f"JPEGs of {results['settings']['jpeg_bytes'] / 1000:.1f} kB, {WIDTH} x {HEIGHT} -> uint8 {SIDE} x {SIDE}", ""]
    lines += ["| run | images / s | / s / core | best / s / core | / CPU second |", "|---|---|---|---|---|"]
    for name, rate in results["images"].items():
        lines.append("| " + " | ".join([name, *(f"{rate[column]:.0f}" for column in rate)]) + " |")
    wait = results["waiting"]
    lines.append("")
    for start in results["start_up"]:
        took = f"{start['seconds']:.1f} s ({start['cpu_seconds']:.1f} CPU s)"
        lines.append(f"Start-up with data.buckets = {start['buckets']}: {start['records']} records in {took}")
    lines.append(
        f"Tiny model, {wait['steps']} steps of {wait['step_ms']:.0f} ms: waits for data {wait['wait_ms_median']:.2f} ms "
        f"(at most {wait['wait_ms_max']:.1f}), {100 * wait['share']:.2f} % of the time"
    )
    lines += ["", "| data.buckets | lengths | padding |", "|---|---|---|"]
    for row in results["padding"]:
        lines.append(f"| {row['buckets']} | {', '.join(map(str, row['lengths']))} | {100 * row['padding']:.1f} % |")
    return "\n".join(lines)


def versions() -> dict[str, str]:
    packages = ("pillow", "numpy", "grain", "tokenizers", "transformers", "jax")
    cpu = {"python": platform.python_version(), "machine": platform.machine(), "cores": str(os.cpu_count())}
    return cpu | {name: version(name) for name in packages}


if __name__ == "__main__":
    main()
