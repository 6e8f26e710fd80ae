"""`lsg plan`: what the programs of a configuration need on TPU slices, and what a study costs there. Nothing is allocated."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax
import jax.numpy as jnp

from lsg_jax.analysis.sweep import coefficient_grid
from lsg_jax.config import ModelConfig, Remat
from lsg_jax.errors import ConfigError, InputError
from lsg_jax.methods.method_model import abstract_model
from lsg_jax.model.language_model import REMAT
from lsg_jax.plan.chips import Topology, open_topology
from lsg_jax.plan.measure import measure
from lsg_jax.plan.programs import (
    Program,
    each_config,
    eval_answers,
    eval_prompts,
    forward_program,
    sweep_cells,
    sweep_prompts,
    train_program,
    trained_method,
)
from lsg_jax.plan.recipe import Assumptions, as_json, recipe
from lsg_jax.plan.search import fastest, largest_batch, try_policies
from lsg_jax.plan.traced import traced_flops
from lsg_jax.run_config import RunConfig
from lsg_jax.sharding import answering_mesh, batch_rows, make_mesh

PROGRAMS = ("forward", "train", "each", "sweep", "eval")
DEFAULT_PROGRAMS = ("train", "each", "sweep", "eval")
TRAINING = ("forward", "train", "each")  # of a training batch, and so multiples of its forward pass
POLICIES: tuple[Remat, ...] = tuple(REMAT)  # type: ignore[arg-type]


@dataclass(frozen=True)
class PlanSettings:
    """What is planned.

    Attributes:
        topologies: names such as `v5e:4x4`.
        programs: some of PROGRAMS.
        policies: remat policies to compile; None for the fastest that fits, and that of the configuration.
        rows_per_chip: training batch for each chip, instead of the configuration's batch.
        find_largest: whether the largest training batch is looked for.
    """

    topologies: tuple[str, ...]
    programs: tuple[str, ...] = DEFAULT_PROGRAMS
    policies: tuple[Remat, ...] | None = None
    rows_per_chip: int | None = None
    find_largest: bool = True


def plan(config: RunConfig, model: ModelConfig, settings: PlanSettings, assumed: Assumptions) -> dict[str, Any]:
    """Compiles the programs of a configuration for every topology and says what they need.

    Raises:
        InputError: an unknown topology, or no TPU compiler. ConfigError: the configuration does not fit the model or the slice.
    """
    if unknown := [name for name in settings.programs if name not in PROGRAMS]:
        raise InputError(f"--programs {unknown[0]}: no such program; known: {', '.join(PROGRAMS)}")
    # what is wrong shows before the first minute of compiling
    slices = [_Slice(config, model, settings, assumed, open_topology(name)) for name in settings.topologies]
    dtype = jnp.dtype(config.dtype or "bfloat16")
    _, params = abstract_model(model, dtype=dtype)
    return {
        "format": "lsg-plan-1",
        "model": {"parameters": sum(leaf.size for leaf in jax.tree.leaves(params)), "dtype": str(dtype)},
        "assumptions": as_json(assumed),
        "versions": {name: _version(name) for name in ("lsg_jax", "jax", "libtpu")},
        "topologies": [found.plan() for found in slices],
    }


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
        self.dtype = jnp.dtype(config.dtype or "bfloat16")
        self.training_mesh = make_mesh(config.mesh, devices)
        self.answering_mesh = answering_mesh(config.eval.mesh, model.text, devices)
        self.measured: list[dict[str, Any]] = []
        self.taken: dict[str, dict[str, Any]] = {}
        self.largest: dict[str, Any] | None = None
        if set(settings.programs) & set(TRAINING):
            self.check()

    def plan(self) -> dict[str, Any]:
        for name in self.settings.programs:
            {"forward": self.forward, "train": self.train, "each": self.each, "sweep": self.sweep, "eval": self.eval}[name]()
        for found in self.measured:
            if found["fits"] and found["program"] in TRAINING:
                found["times_forward"] = (
                    found["flops"] * len(self.topology.devices) / (self.forward_flops_a_row * found["rows"])
                )
            if found["fits"]:
                found["seconds"]["expected"] = found["seconds"]["bound"] / self.assumed.utilisation
            else:
                found["advice"] = self.advice(found)
        chip = self.topology.chip
        return {
            "name": self.topology.name,
            "devices": len(self.topology.devices),
            "hosts": self.topology.hosts,
            "device": {**dataclasses.asdict(chip), "ici_gbps": self.topology.ici_gbps},
            "mesh": {"training": dict(self.training_mesh.shape), "answering": dict(self.answering_mesh.shape)},
            "programs": self.measured,
            "largest_batch": self.largest,
            "recipe": recipe(self.taken, self.config, self.model.text.num_layers, self.topology, self.assumed),
        }

    def run(self, program: Program, what: str = "") -> dict[str, Any]:
        found = measure(program, self.topology, f"{program.name}{what}, {program.rows} rows")
        found.pop("compiled", None)
        return found

    def forward(self) -> None:
        self.measured.append(self.run(forward_program(self.config, self.model, self.training_mesh, dtype=self.dtype)))

    def train(self) -> None:
        """The step under the policies, then the largest batch under the fastest of them."""
        config = self.config
        if config.get_method().independent:
            self.each()
            return
        step = lambda policy, rows: self.run(self.training(config, policy, rows), f", remat {policy}")
        rows = config.train.batch_size
        chosen, own = self.settings.policies, config.train.remat
        if chosen is None:
            found = try_policies(POLICIES, lambda p: step(p, rows), also=[own] if own in POLICIES else [])
        else:
            found = [step(policy, rows) | {"remat": policy} for policy in chosen]
        self.measured += found
        best = fastest(found)
        if best is not None:
            best["take"] = True
            self.taken["train"] = best
        if self.settings.find_largest:
            start = best or found[-1]
            largest = largest_batch(
                start,
                lambda rows: step(start["remat"], rows),
                unit=batch_rows(self.training_mesh) * config.train.accumulate,
                limit_gib=self.topology.chip.hbm_gib,
            )
            peak = largest and largest["memory_gib"]["peak"]
            self.largest = {"remat": start["remat"], "rows": largest["rows"] if largest else None, "peak_gib": peak}

    def training(self, config: RunConfig, policy: Remat, rows: int) -> Program:
        train = dataclasses.replace(config.train, remat=policy, batch_size=rows)
        return train_program(dataclasses.replace(config, train=train), self.model, self.training_mesh, dtype=self.dtype)

    def each(self) -> None:
        if "each" in self.taken:
            return
        config = each_config(self.config, self.model)
        found = self.run(train_program(config, self.model, self.training_mesh, dtype=self.dtype)) | {"remat": "full"}
        self.measured.append(found)
        self.taken["each"] = found

    def sweep(self) -> None:
        grid = coefficient_grid(2, 0.1)
        prompts = sweep_prompts(
            self.config,
            self.model,
            self.answering_mesh,
            max_new_tokens=self.assumed.max_new_tokens,
            cells=len(grid),
            dtype=self.dtype,
        )
        self.in_turn(prompts, lambda compiled: sweep_cells(prompts, compiled, self.model, coefficients=grid))

    def eval(self) -> None:
        tokens = self.assumed.max_new_tokens
        prompts = eval_prompts(self.config, self.model, self.answering_mesh, max_new_tokens=tokens, dtype=self.dtype)
        self.in_turn(prompts, lambda compiled: eval_answers(prompts, compiled))

    def in_turn(self, prompts: Program, then: Callable[[Any], Program]) -> None:
        """Measures a program, and the one that goes on from what it gives."""
        first = measure(prompts, self.topology, f"{prompts.name}, {prompts.rows} questions")
        compiled = first.pop("compiled", None)
        found = {prompts.name: first}
        if compiled is not None:
            program = then(compiled)
            found[program.name] = self.run(program)
        self.measured += found.values()
        self.taken |= found

    def check(self) -> None:
        """Raises ConfigError for settings that `lsg train` would refuse."""
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
        """Of all chips together, for one row of the training batch."""
        program = forward_program(self.config, self.model, self.training_mesh, dtype=self.dtype)
        return traced_flops(program.function, *program.arguments) / program.rows

    def advice(self, found: dict[str, Any]) -> str:
        """What to change where a program does not fit."""
        rows = found["rows"]
        if found["program"] in TRAINING:
            smaller = POLICIES[POLICIES.index(found["remat"]) + 1 :] if found["program"] == "train" else ()
            per_chip = rows // batch_rows(self.training_mesh)
            ways = [f"remat {smaller[0]}" if smaller else ""]
            ways += [f"train.accumulate = {2 * self.config.train.accumulate}", "a smaller batch"] if per_chip > 1 else []
        elif found["program"].startswith("eval"):
            ways = ["a smaller eval.batch_size"] if self.config.eval.batch_size > 1 else []
        else:
            ways = ["fewer coefficients at a time"]
        return ", or ".join(filter(None, [*ways, "more chips"]))
