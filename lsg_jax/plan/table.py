"""A plan as plain text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from lsg_jax.plan.hlo import Work
from lsg_jax.plan.measure import Measured, Seconds
from lsg_jax.plan.record_lengths import RecordLengths
from lsg_jax.plan.results import Plan, SlicePlan
from lsg_jax.sharding import ROWS


def table(plan: Plan) -> str:
    """Every topology with its programs, what fits and what the study costs; then the assumptions."""
    parts = [_model(plan), *map(_slice, plan.topologies)]
    if len(plan.topologies) > 1:
        parts.append(_side_by_side(plan.topologies))
    return "\n\n".join([*parts, _assumptions(plan)])


def _model(plan: Plan) -> str:
    source = f", {plan.source}" if plan.source else ""
    return f"model: {plan.parameters / 1e9:.2f} billion parameters, {plan.dtype}{source}"


def _slice(found: SlicePlan) -> str:
    topology, chip = found.topology, found.topology.chip
    what = "chips" if chip.per_chip == 1 else f"devices ({chip.per_chip} a chip)"
    links = f", {topology.ici_gbps:g} GB/s from its neighbours" if topology.has_links else ""
    lines = [
        f"{topology.name}: {len(topology.devices)} {what} on {topology.hosts} hosts; each {chip.hbm_gib:g} GiB, "
        f"{chip.tflops:g} TFLOP/s, {chip.hbm_gbps:g} GB/s of memory{links}",
        f"mesh: training {_mesh(found.training_mesh)}; answering {_mesh(found.answering_mesh)}",
        *([] if found.attention == "kernel" else [f"attention: {found.attention}"]),
        "",
        *_aligned([_MEMORY, *map(_memory, found.programs)]),
        "",
        *_aligned([_WORK, *(_work(m, m.work, m.seconds) for m in found.programs if m.work and m.seconds)]),
    ]
    notes = [
        f"{_name(measured)}: does not fit, {measured.memory_gib['peak']:.2f} GiB a chip are {measured.over_gib:.2f} too many: "
        f"{measured.advice}"
        for measured in found.programs
        if not measured.fits
    ]
    notes += [
        f"{_name(measured)}: {measured.work.collectives['collective-permute']:.0f} collective-permutes: products were cut to "
        "pieces that go from chip to chip"
        for measured in found.programs
        if measured.work and measured.storm
    ]
    groups = math.prod(found.answering_mesh.get(axis, 1) for axis in ROWS)
    for name, size in found.sizes.items():
        parts = f", their coefficients in {size.parts} parts" if size.parts > 1 else ""
        notes.append(f"{name}: {size.questions} questions at a time on each of {groups} groups of chips{parts}")
    if largest := found.largest_batch:
        fits = f"{largest.rows} rows, {largest.peak_gib:.2f} GiB a chip" if largest.rows else "none was found that fits"
        notes.append(f"largest training batch with remat {largest.remat}: {fits}")
    lines += ["", *notes] if notes else []
    if found.costs:
        rows = [["the study", "", "hours", "chip-hours"]]
        rows += [[cost.part, cost.runs, _number(cost.hours), _number(cost.chip_hours)] for cost in found.costs]
        lines += ["", *_aligned(rows)]
    return "\n".join(lines)


_MEMORY = ["GiB a chip", "rows", "weights", "trained", "other", "temporaries", "peak", "fits"]


def _memory(measured: Measured) -> list[str]:
    memory = measured.memory_gib
    weights, trained = memory.get("weights", 0.0), memory.get("trained and optimiser", 0.0)
    temporaries = memory.get("temporaries")
    other = None if temporaries is None else memory["peak"] - weights - trained - temporaries
    shown = [f"{value:.2f}" if value is not None else "-" for value in (weights, trained, other, temporaries, memory["peak"])]
    return [_name(measured), str(measured.rows), *shown, "yes" if measured.fits else "NO"]


_WORK = ["work of a chip", "TFLOP", "x forward", "GB memory", "GB received", "collectives"]
_WORK += ["MXU s", "HBM s", "ICI s", "expected s", "bound by"]


def _work(measured: Measured, work: Work, seconds: Seconds) -> list[str]:
    return [
        _name(measured),
        _number(work.flops / 1e12),
        "-" if measured.times_forward is None else f"{measured.times_forward:.2f}",
        _number(work.hbm_bytes / 1e9),
        _number(work.received_bytes / 1e9),
        f"{sum(work.collectives.values()):.0f}",
        *map(_number, (seconds.mxu, seconds.hbm, seconds.ici, seconds.expected)),
        seconds.binds,
    ]


def _side_by_side(slices: Sequence[SlicePlan]) -> str:
    """The training step to take on each topology: how it scales."""
    rows = [["topology", "chips", "rows", "remat", "peak GiB", "TFLOP", "GB received", "expected s", "rows a second"]]
    for found in slices:
        for measured in found.programs:
            if measured.take and measured.work and measured.seconds:
                work, expected = measured.work, measured.seconds.expected
                numbers = work.flops / 1e12, work.received_bytes / 1e9, expected, measured.rows / expected
                named = found.topology.name, str(len(found.topology.devices)), str(measured.rows), str(measured.remat)
                rows.append([*named, f"{measured.memory_gib['peak']:.2f}", *map(_number, numbers)])
    return "\n".join(_aligned(rows))


def _assumptions(plan: Plan) -> str:
    assumed, versions = plan.assumptions, plan.versions
    chips = {found.topology.chip.name: found.topology.chip.source for found in plan.topologies}
    sources = sorted(f"{name}: {source}" for name, source in chips.items())
    return "\n".join(
        [
            f"Of one chip and one run of a program (a step, or a batch), as compiled by libtpu {versions['libtpu']} for jax "
            f"{versions['jax']}; no TPU was run. trained: with optimiser; temporaries: activations and gathered weights; "
            "peak: the sum of the parts, and the compiler, which knows what is never there at once, says what fits; "
            "MXU, HBM, ICI: seconds at peak rates; * marks the policy to take.",
            f"expected: the longest of the three at {assumed.utilisation:.0%} utilisation. {assumed.records} records "
            f"({assumed.records_from}), {assumed.questions} questions ({assumed.questions_from}), answers of "
            f"{assumed.max_new_tokens} tokens. Starting, compiling, reading data and saving are not counted.",
            _lengths(assumed.lengths),
            f"peak rates: {'; '.join(sources)}",
        ]
    )


def _lengths(found: RecordLengths | None) -> str:
    if found is None:
        return "Every training row is taken to be data.max_length long."
    *others, longest = map(str, found.lengths)
    every = f"{', '.join(others)} or {longest}" if others else longest
    return (
        f"Training rows are {every} tokens long, {found.mean:.0f} on average, {found.padding:.1%} of them padding: steps are "
        "compiled for the longest, hours are in proportion to the average."
    )


def _name(measured: Measured) -> str:
    remat = f", remat {measured.remat}" if measured.remat else ""
    return measured.program + remat + (" *" if measured.take else "")


def _mesh(sizes: Mapping[str, int]) -> str:
    return " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "one device"


def _number(value: float) -> str:
    """Three figures."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
