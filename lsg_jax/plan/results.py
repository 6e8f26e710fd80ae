"""What a plan holds, and its plain data as `lsg plan --json` prints it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lsg_jax.eval.sizes import Size
from lsg_jax.plan.chips import Topology
from lsg_jax.plan.measure import Measured
from lsg_jax.plan.recipe import Assumptions, Cost

FORMAT = "lsg-plan-1"


@dataclass(frozen=True)
class LargestBatch:
    """The largest training batch that fits under `remat`; None where none of those tried fits."""

    remat: str | None
    rows: int | None
    peak_gib: float | None


@dataclass(frozen=True)
class SlicePlan:
    """All programs on one topology.

    Attributes:
        training_mesh, answering_mesh: axis -> size.
        sizes: of "eval" and "sweep", the questions at a time on each device along `data`, and parts of the coefficients.
        costs: hours of each part of the study.
        attention: which way attention over whole sequences is computed (`attention_path`).
    """

    topology: Topology
    training_mesh: Mapping[str, int]
    answering_mesh: Mapping[str, int]
    programs: tuple[Measured, ...]
    largest_batch: LargestBatch | None
    costs: tuple[Cost, ...]
    attention: str = "kernel"
    sizes: Mapping[str, Size] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """The plan of a configuration.

    Attributes:
        parameters: of the model. source: where its shapes were found.
        failed: the error that ended it before all programs were measured; None for a whole plan.
    """

    parameters: int
    dtype: str
    assumptions: Assumptions
    versions: Mapping[str, str | None]
    topologies: tuple[SlicePlan, ...]
    source: str = field(default="", kw_only=True)
    failed: BaseException | None = field(default=None, kw_only=True)


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain data."""
    return {
        "format": FORMAT,
        "model": {"parameters": plan.parameters, "dtype": plan.dtype, "from": plan.source},
        "assumptions": asdict(plan.assumptions),
        "versions": dict(plan.versions),
        "whole": plan.failed is None,
        "topologies": [_slice(found) for found in plan.topologies],
    }


def _slice(found: SlicePlan) -> dict[str, Any]:
    topology = found.topology
    return {
        "name": topology.name,
        "devices": len(topology.devices),
        "hosts": topology.hosts,
        "device": {**asdict(topology.chip), "ici_gbps": topology.ici_gbps if topology.has_links else None},
        "mesh": {"training": dict(found.training_mesh), "answering": dict(found.answering_mesh)},
        "attention": found.attention,
        "answering": {name: asdict(size) for name, size in found.sizes.items()},
        "programs": [_program(measured) for measured in found.programs],
        "largest_batch": asdict(found.largest_batch) if found.largest_batch else None,
        "recipe": [asdict(cost) for cost in found.costs],
    }


def _program(measured: Measured) -> dict[str, Any]:
    """Only the fields that apply."""
    plain: dict[str, Any] = {name: getattr(measured, name) for name in ("program", "rows", "fits", "memory_gib", "compile_s")}
    if work := measured.work:
        plain |= {name: getattr(work, name) for name in ("flops", "hbm_bytes", "host_bytes")}
        plain |= {"received_bytes": dict(work.received), "collectives": dict(work.collectives), "storm": measured.storm}
    if seconds := measured.seconds:
        plain["seconds"] = {name: getattr(seconds, name) for name in ("mxu", "hbm", "ici", "bound", "binds", "expected")}
    optional = {name: getattr(measured, name) for name in ("over_gib", "advice", "remat", "take", "times_forward")}
    return plain | {name: value for name, value in optional.items() if value not in (None, False)}
