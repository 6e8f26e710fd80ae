"""Are the answers to the rendered scenes the same for any batch size, device count, number of processes and interruption?

    python benchmarks/evaluation_invariance.py [--questions 2000] [--json FILE]

A tiny random model answers the questions on simulated CPU devices. Takes a few minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from processes import run_processes

from lsg_jax.json_files import json_lines

# name: (processes, devices of each, batch size per device, whether it is stopped half way and resumed on one device)
WAYS = {
    "1 device, 16 at a time": (1, 1, 16, False),
    "1 device, 2 at a time": (1, 1, 2, False),
    "4 devices, 8 at a time": (1, 4, 8, False),
    "8 devices, 4 at a time": (1, 8, 4, False),
    "2 processes of 2 devices, 8 at a time": (2, 2, 8, False),
    "stopped half way on 4 devices, continued on 1": (1, 4, 8, True),
}

SCRIPT = """
import json, sys
from pathlib import Path
import jax
import lsg_jax
from lsg_jax.config import EvalConfig, MeshConfig
from lsg_jax.eval.runner import ask_all, evaluate
from lsg_jax.sharding import make_mesh

model, out, batch, questions, stop = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5] == "True"
config = EvalConfig(benchmarks={"scenes": ""}, batch_size=batch, max_new_tokens=8, limit=questions)

class Stop(Exception):
    pass

def half(done, total, what):
    if 2 * done >= total:
        raise Stop

asked = ask_all(config)
if stop:
    try:
        evaluate({"base": lsg_jax.load(model, mesh=make_mesh(MeshConfig()))}, config, out, asked=asked, progress=half)
    except Stop:
        pass
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
else:
    mesh = make_mesh(MeshConfig())
evaluate({"base": lsg_jax.load(model, mesh=mesh)}, config, out, asked=asked)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = compare(Path(folder), options.questions)
    print(f"{options.questions} questions\n")
    for name, row in rows.items():
        print(f"{name:48}{row['differ']:6} answers differ{row['seconds']:8.0f} s{row['distinct']:6} distinct answers")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    sys.exit(any(row["differ"] for row in rows.values()))


def compare(folder: Path, questions: int) -> dict[str, dict[str, float]]:
    """{way: number of answers that differ from the first way, number of distinct answers, seconds}."""
    from converters.convert import convert
    from converters.tiny_checkpoint import write_tiny_checkpoint

    write_tiny_checkpoint(folder / "hf")
    convert(folder / "hf", folder / "model")
    rows, first = {}, None
    for number, (name, (processes, devices, batch, stop)) in enumerate(WAYS.items()):
        out, began = folder / str(number), time.perf_counter()
        run_processes(
            SCRIPT, processes, devices_each=devices, args=[folder / "model", out, batch, questions, stop], timeout=3600
        )
        outputs = [json.loads(line)["output"] for _, line in json_lines(out / "scenes.base.jsonl")]
        first = first or outputs
        rows[name] = {
            "differ": sum(a != b for a, b in zip(first, outputs, strict=True)),
            "distinct": len(set(outputs)),
            "seconds": time.perf_counter() - began,
        }
        print(f"{name}: done", file=sys.stderr, flush=True)
    return rows


if __name__ == "__main__":
    main()
