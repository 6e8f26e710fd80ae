"""From the time of one step to the hours of a whole study: training, all layers, sweep, evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lsg_jax.config import EvalConfig
from lsg_jax.data.records import open_records
from lsg_jax.eval.registry import BENCHMARKS
from lsg_jax.eval.runner import MAX_NEW_TOKENS
from lsg_jax.eval.sizes import Size
from lsg_jax.plan.chips import Topology
from lsg_jax.plan.measure import Measured
from lsg_jax.plan.record_lengths import RecordLengths
from lsg_jax.run_config import RunConfig
from lsg_jax.train.seeds import together

RECORDS = 10_000  # of the paper's sample of Cambrian-7M
BENCHMARKS_OF_THE_PAPER = ("cv_bench", "mmstar")
METHODS = 2  # the base model and the one with gates


@dataclass(frozen=True)
class Assumptions:
    """What a time rests on, besides peak rates.

    Attributes:
        utilisation: share of the bound's rate that a run reaches.
        records: training examples; one answer each.
        questions: of all benchmarks together.
        max_new_tokens: every answer is taken to be that long.
        lengths: of training batches; None: every row is as long as `data.max_length`.
    """

    utilisation: float
    records: int
    records_from: str
    questions: int
    questions_from: str
    max_new_tokens: int
    lengths: RecordLengths | None = None

    @property
    def share_of_longest(self) -> float:
        """Mean length of a training row, as a share of the longest one, which programs are compiled for."""
        return self.lengths.mean / self.lengths.lengths[-1] if self.lengths else 1.0


@dataclass(frozen=True)
class Cost:
    """What one part of the study costs: `runs` says of what, in words."""

    part: str
    runs: str
    hours: float
    chip_hours: float


def assume(
    config: RunConfig,
    *,
    utilisation: float,
    records: int | None,
    questions: int | None,
    lengths: RecordLengths | None = None,
) -> Assumptions:
    """What was given, else what the files of the configuration say, else what the paper has."""
    counted, source = records, "--records"
    if counted is None:
        folder = config.data.records
        there = bool(folder) and Path(folder).is_dir()
        counted = len(open_records(folder, check=False)) if there else RECORDS
        source = folder if there else "the paper's; no records there yet"
    names = [name for name in config.eval.benchmarks if name in BENCHMARKS] or list(BENCHMARKS_OF_THE_PAPER)
    asked = sum(BENCHMARKS[name].size or 0 for name in names) if questions is None else questions
    return Assumptions(
        utilisation=utilisation,
        records=counted,
        records_from=source,
        questions=_limited(asked, config.eval, len(names)) if questions is None else asked,
        questions_from=" and ".join(names) if questions is None else "--questions",
        max_new_tokens=config.eval.max_new_tokens or MAX_NEW_TOKENS,
        lengths=lengths,
    )


def _limited(questions: int, config: EvalConfig, benchmarks: int) -> int:
    return questions if config.limit is None else min(questions, config.limit * benchmarks)


def recipe(
    measured: Mapping[str, Measured],
    config: RunConfig,
    layers: int,
    topology: Topology,
    assumed: Assumptions,
    *,
    sizes: Mapping[str, Size] | None = None,
) -> tuple[Cost, ...]:
    """Hours and chip-hours of each part whose programs were measured and fit.

    A training step on shorter rows is taken to be faster in proportion to their length.

    Args:
        measured: program name -> the program under the settings to take.
        sizes: of "sweep", the parts in which its coefficients run; None for all at once.
    """
    seconds = {name: found.bound / assumed.utilisation for name, found in measured.items() if found.fits}
    rows: list[tuple[str, str, float]] = []
    for name in ("train", "each"):
        if name in seconds:
            steps, seeds = training_steps(config, assumed.records, measured[name].rows), config.train.seeds
            runs = 1 if together(config) else seeds
            how = "" if seeds == 1 else f", {seeds} seeds {'together' if runs == 1 else 'one after the other'}"
            rows.append((name, f"{steps} steps{how}", runs * steps * seconds[name] * assumed.share_of_longest))
    if "sweep prompts" in seconds and "sweep cells" in seconds:
        batches = math.ceil(assumed.questions / measured["sweep prompts"].rows)
        parts = sizes["sweep"].parts if sizes else 1
        once = seconds["sweep prompts"] + layers * parts * seconds["sweep cells"]
        in_parts = f" x {parts} parts" if parts > 1 else ""
        rows.append(("sweep", f"{batches} batches x {layers} layers{in_parts}", batches * once))
    if "eval prompts" in seconds and "eval answers" in seconds:
        batches = METHODS * math.ceil(assumed.questions / measured["eval prompts"].rows)
        once = seconds["eval prompts"] + seconds["eval answers"]
        rows.append(("eval", f"{batches} batches, {METHODS} methods", batches * once))
    chips = len(topology.devices) / topology.chip.per_chip
    return tuple(Cost(part, runs, time / 3600, time * chips / 3600) for part, runs, time in rows)


def training_steps(config: RunConfig, records: int, batch_size: int) -> int:
    """Optimiser steps of a run, by the number of examples."""
    steps = max(1, records * config.train.epochs // batch_size)
    return min(steps, config.train.max_steps or steps)
