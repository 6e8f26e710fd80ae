"""`lsg explore` on the embedded model: seconds of an answer and of a moved slider, size of the page, memory over 100 questions.

    JAX_PLATFORMS=cpu python benchmarks/explore.py --out explore.json

The server runs as a process of its own on as many cores as `--cores` says, and is asked over HTTP as the page asks it: a new
picture and another question each time. The first answer, which compiles, is reported apart. Ends with 1 if a bound is passed.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image

from converters.convert import convert
from lsg_jax.data.drawing import draw
from lsg_jax.data.scene_questions import scene_question
from lsg_jax.look.page import view_script
from lsg_jax.quickstart import CHECKPOINT

BOUNDS = {"look_s": 5.0, "slider_s": 2.0, "page_kb": 300.0, "saved_page_kb": 300.0, "growth_mb": 40.0}
"""Largest allowed values: medians in seconds, sizes before images in 1,000 bytes, growth of resident memory in 1,000,000."""

WARM_UP, SLIDES = 20, 10  # questions before memory is first read: allocators settle
KINDS = (0, 2, 4)  # short answers of about the same length


def main() -> int:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--out", type=Path, help="JSON file for the results")
    arguments.add_argument("--questions", type=int, default=100)
    arguments.add_argument("--cores", type=int, default=2)
    args = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        convert(CHECKPOINT, Path(folder) / "model", dtype="float32")
        cores = sorted(os.sched_getaffinity(0))[: args.cores]
        command = [sys.executable, "-m", "lsg_jax", "explore", str(Path(folder) / "model"), "--port", "0"]
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "LSG_COMPILE_CACHE": "off"},
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        ) as process:
            try:
                assert process.stdout is not None
                measured = measure(Page(process.stdout.readline().strip()), process.pid, args.questions)
            finally:
                process.terminate()
    passed = {name: measured[name] for name, bound in BOUNDS.items() if measured[name] > bound}
    results = {"cores": len(cores), "questions": args.questions, "measured": measured, "bounds": BOUNDS, "versions": versions()}
    for name, value in measured.items():
        print(f"{name:>16} {value:10.2f}   {f'bound {BOUNDS[name]:g}' if name in BOUNDS else ''}")
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    if passed:
        print(f"bounds passed: {', '.join(passed)}", file=sys.stderr)
    return 1 if passed else 0


class Page:
    """Asks as the page does."""

    def __init__(self, url: str):
        self.url, _, token = url.partition("/?token=")
        self.headers = {"Origin": self.url, "Cookie": f"lsg_explore_{self.url.rpartition(':')[2]}={token}"}
        self.shown: list[str] = []  # names of the answer that the page shows, and of those it has replaced
        self.gone: list[str] = []

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(urllib.request.Request(self.url + path, headers=self.headers)) as answer:
            return answer.read()

    def post(self, path: str, data: bytes) -> bytes:
        with urllib.request.urlopen(urllib.request.Request(self.url + path, data, self.headers)) as answer:
            return answer.read()

    def ask(self, index: int, side: dict[str, Any]) -> tuple[float, str]:
        """Seconds from the upload to the whole answer, and the answer's name."""
        asked = scene_question("validation", 8 * index + KINDS[index % len(KINDS)])
        file = io.BytesIO()
        Image.fromarray(draw(asked.scene, 224)).save(file, "png")
        start = time.perf_counter()
        picture = json.loads(self.post("/pictures", file.getvalue()))["id"]
        body = {"pictures": [picture], "prompt": asked.prompt, "sides": [side], "gone": self.gone}
        last = json.loads(self.post("/ask", json.dumps(body).encode()).splitlines()[-1])
        self.gone, self.shown = self.shown, [last["id"]]
        return time.perf_counter() - start, last["id"]


def measure(page: Page, pid: int, questions: int) -> dict[str, float]:
    base = {"method": "base"}
    first, _ = page.ask(0, base)
    for index in range(WARM_UP):
        page.ask(index, base)
    before = resident(pid)
    seconds = [page.ask(index, base)[0] for index in range(questions)]
    growth = resident(pid) - before
    layers = json.loads(page.get("/").decode().partition('id="model">')[2].partition("</script>")[0])["layers"]
    slides = []
    for step in range(SLIDES):
        taken, name = page.ask(0, {"method": "coefficients", "coefficients": [[1 - step / SLIDES, 1]] * layers})
        slides.append(taken)
    saved = page.post("/save", json.dumps({"looks": [name]}).encode())
    image = saved.index(b"data:image/")
    return {
        "first_s": first,
        "look_s": statistics.median(seconds),
        "slowest_look_s": max(seconds),
        "slider_s": statistics.median(slides),
        "first_slider_s": slides[0],
        "page_kb": sum(len(page.get(path)) for path in ("/", "/explore.js", "/explore.css")) / 1000,
        "saved_page_kb": (len(saved) - (saved.index(b'"', image) - image)) / 1000,
        "script_kb": len(view_script()) / 1000,
        "resident_mb": before / 1e6,
        "growth_mb": growth / 1e6,
    }


def resident(pid: int) -> int:
    """Bytes of memory that a process holds."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: version(name) for name in ("jax", "starlette", "uvicorn")}


if __name__ == "__main__":
    sys.exit(main())
