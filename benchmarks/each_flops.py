"""FLOPs of LLaVA-1.5-7B gate training: gates of all 32 layers in one run against 32 runs of one gate.

    python benchmarks/each_flops.py [--remat full|none] [--json FILE]

Compiles the training steps at true size for the CPU, without any weights, and counts the matrix products of the optimised
programs, loops times their trip counts. The cost of one gate is linear in its layer up to layer 29, which is checked at three
layers, and the others follow. The last layer computes answer rows only, and for the gate before it XLA leaves out more.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import re
import sys
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # of the machine code alone, which never runs
sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "train"))

import jax
from llava_7b import LAYERS, ROWS, TOKENS, abstract_step, alone, each

LINEAR = (0, 15, 29)
COUNTED = (*LINEAR, 30, 31)  # layers whose single gate is compiled


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    arguments.add_argument("--remat", choices=["full", "none"], default="full")
    arguments.add_argument("--json", type=Path, help="file for the results")
    args = arguments.parse_args()
    counted = {layer: compiled_flops(alone(layer), args.remat) for layer in COUNTED}
    low, middle, high = LINEAR
    layer_cost = (counted[low] - counted[high]) // (high - low)
    if counted[middle] != counted[low] - (middle - low) * layer_cost:
        raise SystemExit(f"the cost of a gate is not linear in its layer: {counted}")
    separate = sum(counted.get(layer, counted[low] - (layer - low) * layer_cost) for layer in range(LAYERS))
    together = compiled_flops(each(range(LAYERS)), args.remat)
    result = {
        "rows": ROWS,
        "tokens": TOKENS,
        "remat": args.remat,
        "one_gate": counted,
        "separate": separate,
        "each": together,
        "ratio": together / separate,
        "jax": jax.__version__,
    }
    print(f"32 runs of one gate {separate / 1e15:.1f} PFLOP a step, one run {together / 1e15:.1f}: {result['ratio']:.4f}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


def compiled_flops(gate, remat: str) -> int:
    """FLOPs of one compiled training step."""
    start = time.perf_counter()
    step, arguments = abstract_step(gate, remat)
    flops = count(jax.jit(step, donate_argnums=0).lower(*arguments).compile().as_text())
    print(f"layers {gate.layers}: {flops / 1e15:.3f} PFLOP, {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return flops


def count(hlo: str) -> int:
    """FLOPs of the matrix products of an optimised HLO module."""
    if " convolution(" in hlo:
        raise SystemExit("the program has convolutions, which this script does not count")
    headers = re.compile(r"^(ENTRY )?%(\S+) \(.*\{$", re.MULTILINE)
    computations = {found[2]: block for block in hlo.split("\n\n") if (found := headers.search(block))}
    (entry,) = (found[2] for found in headers.finditer(hlo) if found[1])

    @functools.cache
    def flops(name: str) -> int:
        block = computations[name]
        shapes = {found[1]: shape(found[2]) for found in re.finditer(r"%(\S+) = \w+\[([\d,]*)\]", block)}
        total = 0
        for line in block.splitlines():
            if product := re.search(r"= \w+\[([\d,]*)\]\S* dot\(%([^\s,)]+), .*lhs_contracting_dims=\{([\d,]*)\}", line):
                contracted = math.prod(shapes[product[2]][axis] for axis in shape(product[3]))
                total += 2 * math.prod(shape(product[1])) * contracted
            calls = re.findall(r"(?:calls|to_apply|body)=%([^\s,}]+)", line)
            trips = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line)
            if " while(" in line and not trips:
                raise SystemExit(f"a loop of unknown length: {line.strip()[:200]}")
            total += sum(flops(called) for called in calls) * (int(trips[1]) if trips else 1)
        return total

    return flops(entry)


def shape(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split(",") if size)


if __name__ == "__main__":
    main()
