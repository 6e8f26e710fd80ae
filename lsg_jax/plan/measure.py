"""Compiles one program for one topology and counts its memory and work."""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass

import jax
from jax.stages import Compiled

from lsg_jax.memory import shard_bytes
from lsg_jax.plan.chips import GIB, Topology
from lsg_jax.plan.hlo import Work, analyse
from lsg_jax.plan.programs import Program

logger = logging.getLogger(__name__)

STORM = 1000  # collective-permutes in one run

_UNITS = {"": 1 / GIB, "K": 2**10 / GIB, "M": 2**20 / GIB, "G": 1.0, "T": 2.0**10}


@dataclass(frozen=True)
class Seconds:
    """Times of one run of a program.

    Attributes:
        mxu, hbm, ici: matrix units, main memory and links at their peak rates: no run is faster.
        expected: the longest of the three, divided by the utilisation.
    """

    mxu: float
    hbm: float
    ici: float
    expected: float

    @property
    def bound(self) -> float:
        """The longest of the three."""
        return max(self.mxu, self.hbm, self.ici)

    @property
    def binds(self) -> str:
        """What the longest of the three is: products, memory or transfers."""
        return max((self.mxu, "products"), (self.hbm, "memory"), (self.ici, "transfers"), key=lambda pair: pair[0])[1]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One compiled program; all numbers are those of one chip. What does not apply is None.

    Attributes:
        rows: of the whole batch.
        memory_gib: by part, with `peak`; of a program that does not fit only its arguments and `peak`.
        work, seconds: of one run; None for a program that does not fit.
        over_gib: by how much it does not fit. advice: what to change then.
        remat: policy of a training step.
        take: whether this is the training step to choose.
        times_forward: FLOPs in units of a forward pass over the same rows.
    """

    program: str
    rows: int
    memory_gib: Mapping[str, float]
    compile_s: float
    work: Work | None = None
    seconds: Seconds | None = None
    over_gib: float | None = None
    advice: str | None = None
    remat: str | None = None
    take: bool = False
    times_forward: float | None = None

    @property
    def fits(self) -> bool:
        return self.seconds is not None

    @property
    def bound(self) -> float:
        """Seconds of one run at peak rates; infinite for a program that does not fit."""
        return math.inf if self.seconds is None else self.seconds.bound

    @property
    def storm(self) -> bool:
        """Whether XLA has rewritten products into loops that pass pieces from chip to chip."""
        return self.work is not None and self.work.collectives.get("collective-permute", 0) > STORM


def measure(program: Program, topology: Topology, line: str, *, utilisation: float) -> tuple[Measured, Compiled | None]:
    """Compiles a program; returns what it needs, and the compiled program if it fits.

    Args:
        line: what is logged when it begins.
        utilisation: as in `times`.
    """
    logger.info("%s", line)
    began = time.perf_counter()
    arguments = {name: shard_bytes(tree) / GIB for name, tree in program.parts.items()}
    try:
        compiled = program.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = needed_gib(str(error))
        if needed is None:
            raise
        refused = Measured(
            program=program.name,
            rows=program.rows,
            memory_gib=arguments | {"peak": needed},
            over_gib=needed - topology.chip.hbm_gib,
            compile_s=time.perf_counter() - began,
        )
        return refused, None
    work = analyse(compiled.as_text(), trips=program.trips)
    measured = Measured(
        program=program.name,
        rows=program.rows,
        memory_gib=memory_gib(compiled, arguments),
        compile_s=time.perf_counter() - began,
        work=work,
        seconds=times(work, topology, utilisation),
    )
    return measured, compiled


def needed_gib(message: str) -> float | None:
    """The memory that a program needs, read from the compiler's error message; None for an error of another kind."""
    for pattern in (r"\(([\d.]+)([KMGT]?)\) exceeds available HBM", r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm"):
        if found := re.search(pattern, message):
            return float(found[1]) * _UNITS[found[2]]
    return None


def memory_gib(compiled: Compiled, arguments: dict[str, float]) -> dict[str, float]:
    """Main memory of one chip by part: arguments, temporaries (activations, gathered weights), results, code; and `peak`."""
    stats = compiled.memory_analysis()
    assert stats is not None  # the TPU compiler gives it
    results = max(0, stats.output_size_in_bytes - stats.alias_size_in_bytes)
    code = stats.generated_code_size_in_bytes
    layout = stats.argument_size_in_bytes / GIB - sum(arguments.values())  # padding of the arguments' tiles
    parts = arguments | {"padding": max(0.0, layout), "temporaries": stats.temp_size_in_bytes / GIB}
    parts |= {"results": results / GIB, "code": code / GIB}
    return parts | {"peak": sum(parts.values()), "host": stats.host_temp_size_in_bytes / GIB}


def times(work: Work, topology: Topology, utilisation: float) -> Seconds:
    """The times that the work takes.

    Args:
        utilisation: the share of the peak rate that a run reaches.
    """
    chip = topology.chip
    mxu, hbm = work.flops / (chip.tflops * 1e12), work.hbm_bytes / (chip.hbm_gbps * 1e9)
    ici = work.received_bytes / (topology.ici_gbps * 1e9)
    return Seconds(mxu, hbm, ici, expected=max(mxu, hbm, ici) / utilisation)
