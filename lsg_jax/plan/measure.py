"""One program on one topology: compiled, weighed and counted."""

from __future__ import annotations

import logging
import re
import time
from typing import Any

import jax

from lsg_jax.plan.chips import GIB, Topology
from lsg_jax.plan.hlo import Work, analyse
from lsg_jax.plan.programs import Program, shard_bytes

logger = logging.getLogger(__name__)

STORM = 1000
"""More collective-permutes than this in one run: products were rewritten to loops that pass pieces from chip to chip."""

_UNITS = {"": 1 / GIB, "K": 2**10 / GIB, "M": 2**20 / GIB, "G": 1.0, "T": 2.0**10}


def measure(program: Program, topology: Topology, what: str) -> dict[str, Any]:
    """Compiles a program and says what it needs of each chip.

    Args:
        what: names the program in progress messages.

    Returns:
        `fits`, `rows`, `memory_gib` by part with `peak`, `compile_s`; of a program that fits also the fields of Work and
        `seconds`. One that does not fit has no parts but its arguments: the compiler says only how much it would need.
    """
    logger.info("%s, %s: compiling", topology.name, what)
    began = time.perf_counter()
    arguments = {name: shard_bytes(tree) / GIB for name, tree in program.parts.items()}
    found: dict[str, Any] = {"program": program.name, "rows": program.rows}
    try:
        compiled = program.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = needed_gib(str(error))
        if needed is None:
            raise
        over = needed - topology.chip.hbm_gib
        return found | {
            "fits": False,
            "memory_gib": arguments | {"peak": needed},
            "over_gib": over,
            "compile_s": time.perf_counter() - began,
        }
    memory = memory_gib(compiled, arguments)
    work = analyse(compiled.as_text(), trips=program.trips)
    found |= {
        "fits": True,
        "memory_gib": memory,
        "compile_s": time.perf_counter() - began,
        "flops": work.flops,
        "hbm_bytes": work.hbm_bytes,
        "host_bytes": work.host_bytes,
        "received_bytes": dict(work.received),
        "collectives": dict(work.collectives),
        "seconds": bounds(work, topology),
        "storm": work.collectives.get("collective-permute", 0) > STORM,
        "compiled": compiled,
    }
    return found


def needed_gib(message: str) -> float | None:
    """What a program would need, by the compiler's refusal; None for an error of another kind."""
    for pattern in (r"\(([\d.]+)([KMGT]?)\) exceeds available HBM", r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm"):
        if found := re.search(pattern, message):
            return float(found[1]) * _UNITS[found[2]]
    return None


def memory_gib(compiled: Any, arguments: dict[str, float]) -> dict[str, float]:
    """Main memory of one chip by part: arguments, temporaries (activations, gathered weights), results, code; and `peak`."""
    stats = compiled.memory_analysis()
    results = max(0, stats.output_size_in_bytes - stats.alias_size_in_bytes)
    code = stats.generated_code_size_in_bytes
    layout = stats.argument_size_in_bytes / GIB - sum(arguments.values())  # what tiles of arguments waste
    parts = arguments | {"padding": max(0.0, layout), "temporaries": stats.temp_size_in_bytes / GIB}
    parts |= {"results": results / GIB, "code": code / GIB}
    return parts | {"peak": sum(parts.values()), "host": stats.host_temp_size_in_bytes / GIB}


def bounds(work: Work, topology: Topology) -> dict[str, float]:
    """Seconds that no run can beat at peak rates: matrix units, main memory and links; `bound` is the longest of them."""
    chip = topology.chip
    seconds = {
        "mxu": work.flops / (chip.tflops * 1e12),
        "hbm": work.hbm_bytes / (chip.hbm_gbps * 1e9),
        "ici": work.received_bytes / (topology.ici_gbps * 1e9),
    }
    return seconds | {"bound": max(seconds.values())}
