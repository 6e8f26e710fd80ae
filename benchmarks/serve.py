"""`lsg serve` on the embedded model: 200 requests one by one and at once, memory, and programs that are compiled.

    JAX_PLATFORMS=cpu python benchmarks/serve.py --out serve.json

The server runs as a process of its own on as many cores as `--cores` says, and is asked over HTTP. Images, questions, their
lengths and the numbers of images are mixed; answers are short, as of benchmarks, so most of the work is in the prompts. Before
it is timed, each way runs until nothing is compiled any more. Ends with 1 if an answer at once is not that of one alone.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

from converters.convert import convert
from lsg_jax.data.drawing import draw
from lsg_jax.data.scene_questions import scene_question
from lsg_jax.quickstart import CHECKPOINT

GATES = CHECKPOINT.parent / "gates.safetensors"
QUIET = 2  # times in a row that nothing is compiled, before it is timed: batches differ from time to time
MAX_TOKENS = 16  # of an answer; the longest here has some four


def main() -> int:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--out", type=Path, help="JSON file for the results")
    arguments.add_argument("--requests", type=int, default=200)
    arguments.add_argument("--cores", type=int, default=2)
    arguments.add_argument("--batch-size", type=int, default=8)
    args = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        convert(CHECKPOINT, Path(folder) / "model", dtype="float32")
        cores = sorted(os.sched_getaffinity(0))[: args.cores]
        options = ["--port", "0", "--batch-size", str(args.batch_size), "--gates", str(GATES)]
        with subprocess.Popen(
            [sys.executable, "-m", "lsg_jax", "serve", str(Path(folder) / "model"), *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "LSG_COMPILE_CACHE": "off"},
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        ) as process:
            try:
                assert process.stdout is not None
                url = process.stdout.readline().strip().removesuffix("/v1")
                rows, same = asyncio.run(measure(url, process.pid, bodies(args.requests)))
            finally:
                process.terminate()
    results = {
        "cores": len(cores),
        "requests": args.requests,
        "batch_size": args.batch_size,
        "rows": rows,
        "same": same,
    }
    print(table(rows))
    if args.out:
        args.out.write_text(json.dumps(results | {"versions": versions()}, indent=1) + "\n")
    if not same:
        print("an answer at once is not that of the request alone", file=sys.stderr)
    return 0 if same else 1


def bodies(count: int) -> list[dict[str, Any]]:
    """Requests: each seventh of two images, each ninth of none, questions of several lengths."""
    found = []
    for index in range(count):
        asked = scene_question("validation", index)
        images = 0 if index % 9 == 8 else 2 if index % 7 == 6 else 1
        parts = [_shown(index + extra, 112 + 16 * (index % 8)) for extra in range(images)]
        text = asked.prompt if index % 5 else f"{asked.prompt} Look at all shapes, at their colours and at where they are."
        content = [*parts, {"type": "text", "text": text}]
        found.append({"model": "model", "messages": [{"role": "user", "content": content}], "max_tokens": MAX_TOKENS})
    return found


def _shown(index: int, side: int) -> dict[str, Any]:
    out = io.BytesIO()
    Image.fromarray(draw(scene_question("validation", index).scene, side)).save(out, "png")
    return {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()}}


async def measure(url: str, pid: int, asked: list[dict[str, Any]]) -> tuple[list[dict[str, float | str]], bool]:
    """A row of the table for each way, and whether both gave the same answers."""
    rows: list[dict[str, float | str]] = []
    answers = []
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=None)) as client:
        for name, at_once in (("one by one", False), ("at once", True)):
            before, quiet = await counters(client), 0
            while quiet < QUIET:
                compiled = before["lsg_compilations_total"]
                await ask_all(client, asked, at_once)
                before = await counters(client)
                quiet = quiet + 1 if before["lsg_compilations_total"] == compiled else 0
            start = time.perf_counter()
            found, seconds = await ask_all(client, asked, at_once)
            took = time.perf_counter() - start
            after = await counters(client)
            answers.append(found)
            batches = after["lsg_batch_requests_count"] - before["lsg_batch_requests_count"]
            seconds.sort()
            rows.append(
                {
                    "asked": name,
                    "requests_per_s": len(asked) / took,
                    "new_tokens_per_s": (after["lsg_new_tokens_total"] - before["lsg_new_tokens_total"]) / took,
                    "requests_per_batch": len(asked) / batches,
                    "median_s": seconds[len(seconds) // 2],
                    "slowest_s": seconds[-1],
                    "resident_mb": resident(pid) / 1e6,
                    "programs": after["lsg_compilations_total"],
                    "compiled_while_timed": after["lsg_compilations_total"] - before["lsg_compilations_total"],
                }
            )
    return rows, answers[0] == answers[1]


async def ask_all(client: httpx.AsyncClient, asked: list[dict[str, Any]], at_once: bool) -> tuple[list[str], list[float]]:
    """The answers, and the seconds that each took."""

    async def ask(body: dict[str, Any]) -> tuple[str, float]:
        start = time.perf_counter()
        reply = (await client.post("/v1/chat/completions", json=body)).raise_for_status().json()
        return reply["choices"][0]["message"]["content"], time.perf_counter() - start

    found = await asyncio.gather(*map(ask, asked)) if at_once else [await ask(body) for body in asked]
    return [answer for answer, _ in found], [seconds for _, seconds in found]


async def counters(client: httpx.AsyncClient) -> dict[str, float]:
    """The metrics without labels."""
    lines = (await client.get("/metrics")).text.splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if not line.startswith("#"))}


def resident(pid: int) -> int:
    """Bytes of memory that a process holds."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def table(rows: list[dict[str, float | str]]) -> str:
    """In Markdown."""
    names = list(rows[0])
    shown = lambda value: value if isinstance(value, str) else f"{value:.2f}"
    lines = [names, ["---"] * len(names), *([shown(row[name]) for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: version(name) for name in ("jax", "starlette", "uvicorn")}


if __name__ == "__main__":
    sys.exit(main())
