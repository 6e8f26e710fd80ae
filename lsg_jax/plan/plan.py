"""`lsg plan`: memory, work and cost of the programs of a configuration on TPU slices, without a TPU and without weights."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax.numpy as jnp
from jax.stages import Compiled

from lsg_jax.analysis.sweep import coefficient_grid, sweep_batch
from lsg_jax.checkpoint.tree import flatten
from lsg_jax.config import ModelConfig, Remat, is_scale
from lsg_jax.errors import ConfigError, InputError
from lsg_jax.eval.batches import Bucket
from lsg_jax.eval.sizes import USED, Room, Size, smaller
from lsg_jax.memory import GIB, peak_bytes, tree_bytes
from lsg_jax.methods.method_model import abstract_model
from lsg_jax.model.attention import attention_path
from lsg_jax.model.language_model import REMAT
from lsg_jax.plan.chips import Topology, open_topology
from lsg_jax.plan.measure import Measured, measure
from lsg_jax.plan.programs import (
    Program,
    each_config,
    eval_answers,
    eval_prompts,
    forward_program,
    look_program,
    question_bucket,
    sweep_cells,
    sweep_prompts,
    train_program,
    trained_method,
)
from lsg_jax.plan.recipe import Assumptions, recipe
from lsg_jax.plan.results import LargestBatch, Plan, SlicePlan
from lsg_jax.plan.search import VERIFICATIONS, fastest, largest_batch, try_policies
from lsg_jax.plan.traced import traced_flops
from lsg_jax.run_config import RunConfig
from lsg_jax.sharding import answering_mesh, batch_rows, make_mesh, shard_params

PROGRAMS = ("forward", "train", "each", "sweep", "eval", "look")
DEFAULT_PROGRAMS = ("train", "each", "sweep", "eval")
TRAINING = ("forward", "train", "each")  # programs of a training batch: their FLOPs are given in units of its forward pass
POLICIES: tuple[Remat, ...] = tuple(REMAT)  # type: ignore[arg-type]


@dataclass(frozen=True)
class PlanSettings:
    """What is planned.

    Attributes:
        topologies: names such as `v5e:4x4`.
        programs: some of PROGRAMS.
        policies: remat policies to compile; None: up to the fastest that fits, and the configuration's.
        rows_per_chip: training batch of each chip, in place of the configuration's batch.
        find_largest: whether to search for the largest training batch.
    """

    topologies: tuple[str, ...]
    programs: tuple[str, ...] = DEFAULT_PROGRAMS
    policies: tuple[Remat, ...] | None = None
    rows_per_chip: int | None = None
    find_largest: bool = True


def plan(config: RunConfig, model: ModelConfig, settings: PlanSettings, assumed: Assumptions, *, source: str = "") -> Plan:
    """Compiles the programs of a configuration for every topology and measures them, training steps on the longest rows.

    An error, or a stop, after the first program was measured ends the plan: it is in `failed`, beside what was finished.

    Args:
        source: where the shapes of `model` were found, for the result.

    Raises:
        InputError: an unknown topology, or no TPU compiler. ConfigError: the configuration does not fit the model or the slice.
    """
    if unknown := [name for name in settings.programs if name not in PROGRAMS]:
        raise InputError(f"--programs {unknown[0]}: no such program; known: {', '.join(PROGRAMS)}")
    if config.dtype == "int8":
        model = dataclasses.replace(model, text=dataclasses.replace(model.text, weights="int8"))
    if assumed.lengths is not None:
        data = dataclasses.replace(config.data, max_length=assumed.lengths.lengths[-1])
        config = dataclasses.replace(config, data=data)
    # errors are raised before the first minute of compiling
    slices = [_Slice(config, model, settings, assumed, open_topology(name)) for name in settings.topologies]
    dtype = _float_dtype(config)
    _, params = abstract_model(model, dtype=dtype)
    failed: BaseException | None = None
    try:
        number, most = itertools.count(1), sum(one.most_programs() for one in slices)
        for one in slices:
            one.measure(lambda what: f"{what}: compiling {next(number)} of at most {most}")
    except (Exception, KeyboardInterrupt) as error:
        if not slices[0].measured:
            raise
        failed = error
    return Plan(
        parameters=sum(leaf.size for name, leaf in flatten(params).items() if not is_scale(name)),
        dtype=f"int8 in the decoder layers, {dtype} elsewhere" if model.text.weights == "int8" else str(dtype),
        assumptions=assumed,
        versions={name: _version(name) for name in ("lsg_jax", "jax", "libtpu")},
        topologies=tuple(one.plan() for one in slices if one.measured),
        source=source,
        failed=failed,
    )


def _float_dtype(config: RunConfig) -> Any:
    """Of all weights that are no 8-bit ones."""
    return jnp.dtype(config.dtype if config.dtype in ("bfloat16", "float32") else "bfloat16")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


class _Slice:
    """The plan of one topology."""

    def __init__(self, config: RunConfig, model: ModelConfig, settings: PlanSettings, assumed: Assumptions, topology: Topology):
        self.model, self.settings, self.assumed, self.topology = model, settings, assumed, topology
        devices = list(topology.devices)
        if settings.rows_per_chip is not None:
            train = dataclasses.replace(config.train, batch_size=settings.rows_per_chip * len(devices))
            config = dataclasses.replace(config, train=train)
        self.config = config
        self.dtype = _float_dtype(config)
        self.training_mesh = make_mesh(config.mesh, devices)
        _, params = abstract_model(model, dtype=self.dtype)
        memory = topology.chip.hbm_gib * GIB
        self.answering_mesh = answering_mesh(config.eval.mesh, model.text, devices, weights=tree_bytes(params), memory=memory)
        room = Room.of(model, shard_params(params, self.answering_mesh), self.answering_mesh, memory)
        most = max(1, -(-assumed.questions // batch_rows(self.answering_mesh)))
        self.room = dataclasses.replace(room, most=min(room.most, most))
        self.sizes: dict[str, Size] = {}
        self.measured: list[Measured] = []
        self.taken: dict[str, Measured] = {}
        self.largest: LargestBatch | None = None
        self.counted: Callable[[str], str] = str
        if set(settings.programs) & set(TRAINING):
            self.check()

    def most_programs(self) -> int:
        """How many programs are compiled if every search goes on to its end."""
        settings, independent = self.settings, self.config.get_method().independent
        train = len(settings.policies or POLICIES) + (1 + VERIFICATIONS) * settings.find_largest
        most = {"train": 1 if independent else train, "sweep": 2, "eval": 2}
        asked = [name for name in settings.programs if not (independent and name == "each" and "train" in settings.programs)]
        return sum(most.get(name, 1) for name in asked)

    def measure(self, counted: Callable[[str], str]) -> None:
        """Compiles the programs one after the other; `plan` tells of those that are done.

        Args:
            counted: what a program is -> its line in the log.
        """
        self.counted = counted
        for name in self.settings.programs:
            getattr(self, name)()

    def plan(self) -> SlicePlan:
        return SlicePlan(
            topology=self.topology,
            training_mesh=dict(self.training_mesh.shape),
            answering_mesh=dict(self.answering_mesh.shape),
            sizes=dict(self.sizes),
            programs=tuple(self.compared(found) for found in self.measured),
            largest_batch=self.largest,
            costs=recipe(self.taken, self.config, self.model.text.num_layers, self.topology, self.assumed, sizes=self.sizes),
            attention=attention_path(self.model.text, self.training_mesh),
        )

    def compared(self, found: Measured) -> Measured:
        """Adds the FLOPs in units of a forward pass, or what to change where the program does not fit."""
        if found.work is None:
            return dataclasses.replace(found, advice=self.advice(found))
        if found.program not in TRAINING:
            return found
        forward = self.forward_flops_a_row * found.rows
        return dataclasses.replace(found, times_forward=found.work.flops * len(self.topology.devices) / forward)

    def run(self, program: Program, what: str = "") -> Measured:
        return self.compile(program, f"{program.name}{what}, {program.rows} rows")[0]

    def compile(self, program: Program, what: str) -> tuple[Measured, Compiled | None]:
        line = self.counted(f"{self.topology.name}, {what}")
        return measure(program, self.topology, line, utilisation=self.assumed.utilisation)

    def forward(self) -> None:
        self.measured.append(self.run(forward_program(self.config, self.model, self.training_mesh, dtype=self.dtype)))

    def train(self) -> None:
        """The step under the policies, then the largest batch under the fastest of them."""
        config = self.config
        if config.get_method().independent:
            self.each()
            return
        rows, before = config.train.batch_size, len(self.measured)

        def step(policy: Remat, rows: int) -> Measured:
            return dataclasses.replace(self.run(self.training(config, policy, rows), f", remat {policy}"), remat=policy)

        def tried(policy: Remat) -> Measured:
            self.measured.append(step(policy, rows))
            return self.measured[-1]

        chosen, own = self.settings.policies, config.train.remat
        if chosen is None:
            found = try_policies(POLICIES, tried, also=[own] if own in POLICIES else [])
        else:
            found = [tried(policy) for policy in chosen]
        best = fastest(found)
        self.measured[before:] = [dataclasses.replace(one, take=one is best) for one in found]
        if best is not None:
            self.taken["train"] = best
        if self.settings.find_largest:
            start = best or found[-1]
            largest = largest_batch(
                start,
                lambda rows: step(start.remat, rows),  # type: ignore[arg-type]
                unit=batch_rows(self.training_mesh) * config.train.accumulate,
                limit_gib=self.topology.chip.hbm_gib,
            )
            rows_and_peak = (largest.rows, largest.memory_gib["peak"]) if largest else (None, None)
            self.largest = LargestBatch(start.remat, *rows_and_peak)

    def training(self, config: RunConfig, policy: Remat, rows: int) -> Program:
        train = dataclasses.replace(config.train, remat=policy, batch_size=rows)
        return train_program(dataclasses.replace(config, train=train), self.model, self.training_mesh, dtype=self.dtype)

    def each(self) -> None:
        if "each" in self.taken:
            return
        config = each_config(self.config, self.model)
        found = self.run(train_program(config, self.model, self.training_mesh, dtype=self.dtype))
        found = dataclasses.replace(found, remat="full")
        self.measured.append(found)
        self.taken["each"] = found

    def sweep(self) -> None:
        """Prompts and cells of as many questions as fit, or of those that the configuration names; in parts where need be."""
        grid, tokens = coefficient_grid(2, 0.1), self.assumed.max_new_tokens
        batch_size = sweep_batch(self.config.eval.batch_size, len(grid))
        given = None if batch_size == "auto" else batch_size

        def prompts(size: Size) -> Program:
            settings = {"max_new_tokens": tokens, "cells": len(grid), "questions": size.questions, "dtype": self.dtype}
            return sweep_prompts(self.config, self.model, self.answering_mesh, **settings)

        def cells(size: Size, prompts: Program, compiled: Compiled) -> Program:
            return sweep_cells(prompts, compiled, self.model, coefficients=grid[: size.at_once(len(grid))])

        start = self.room.sweep(self.bucket, tokens, len(grid), questions=given)
        fewer = functools.partial(smaller, coefficients=len(grid), keep_questions=given is not None)
        self.in_turn("sweep", start, prompts, cells, fewer)

    def eval(self) -> None:
        """Prompts and answers of as many questions as fit, or of those that the configuration names."""
        tokens, batch_size = self.assumed.max_new_tokens, self.config.eval.batch_size
        method = self.config.get_method()
        room = dataclasses.replace(self.room, passes=2 if method.contrasts else 1)

        def prompts(size: Size) -> Program:
            config = dataclasses.replace(self.config, eval=dataclasses.replace(self.config.eval, batch_size=size.questions))
            return eval_prompts(config, self.model, self.answering_mesh, max_new_tokens=tokens, dtype=self.dtype)

        start = room.evaluation(self.bucket, tokens) if batch_size == "auto" else Size(batch_size)
        answers = lambda _, prompts, compiled: eval_answers(prompts, compiled)
        self.in_turn("eval", start, prompts, answers, smaller if batch_size == "auto" else lambda *_: None)

    @functools.cached_property
    def bucket(self) -> Bucket:
        return question_bucket(self.model, self.config.eval.max_length)

    def look(self) -> None:
        tokens = self.assumed.max_new_tokens
        program = look_program(self.config, self.model, self.answering_mesh, max_new_tokens=tokens, dtype=self.dtype)
        self.measured.append(self.run(program))

    def in_turn(
        self,
        name: str,
        size: Size,
        prompts: Callable[[Size], Program],
        then: Callable[[Size, Program, Compiled], Program],
        fewer: Callable[[Size, float], Size | None],
    ) -> None:
        """Measures a program and the one that takes its outputs, of the first size for which both fit."""
        limit = USED * self.room.memory / GIB
        before, weights = len(self.measured), self.room.weights / GIB
        while True:
            first = prompts(size)
            found, compiled = self.compile(first, f"{first.name}, {first.rows} questions")
            pair, made = [found], [compiled]
            if compiled is not None:
                second = then(size, first, compiled)
                found, compiled = self.compile(second, f"{second.name}, {second.rows} rows")
                pair, made = [*pair, found], [*made, compiled]
            self.measured[before:] = pair
            self.taken |= {one.program: one for one in pair}
            self.sizes[name] = size
            peak = max(
                one.memory_gib["peak"] if program is None else peak_bytes(program) / GIB
                for one, program in zip(pair, made, strict=True)
            )
            if peak <= limit or (smaller_one := fewer(size, (limit - weights) / (peak - weights))) is None:
                return
            size = smaller_one

    def check(self) -> None:
        """Raises ConfigError for settings that `lsg train` refuses."""
        if "train" in self.settings.programs or self.config.get_method().trains:
            trained_method(self.config, self.model)
        train = self.config.train
        if train.batch_size % (batch_rows(self.training_mesh) * train.accumulate):
            parts = f" times train.accumulate {train.accumulate}" if train.accumulate > 1 else ""
            raise ConfigError(
                f"{self.topology.name}: train.batch_size {train.batch_size} is no multiple of "
                f"{batch_rows(self.training_mesh)} devices along data and fsdp{parts}: set --batch or --rows-per-chip"
            )

    @functools.cached_property
    def forward_flops_a_row(self) -> float:
        """FLOPs of a forward pass over one row of the training batch, all chips together."""
        program = forward_program(self.config, self.model, self.training_mesh, dtype=self.dtype)
        return traced_flops(program.function, *program.arguments) / program.rows

    def advice(self, found: Measured) -> str:
        """What to change where a program does not fit."""
        if found.program in TRAINING:
            smaller = POLICIES[POLICIES.index(found.remat) + 1 :] if found.program == "train" else ()
            per_chip = found.rows // batch_rows(self.training_mesh)
            ways = [f"remat {smaller[0]}" if smaller else ""]
            ways += [f"train.accumulate = {2 * self.config.train.accumulate}", "a smaller batch"] if per_chip > 1 else []
        elif found.program.startswith("eval"):
            ways = ["a smaller eval.batch_size"] if self.sizes["eval"].questions > 1 else []
        elif found.program == "look":
            ways = ["a shorter answer"]
        else:
            ways = ["fewer coefficients at a time"]
        return ", or ".join(filter(None, [*ways, "more chips"]))
