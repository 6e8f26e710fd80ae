"""`lsg train`: trains gates or a baseline, writes metrics and checkpoints, resumes where it stopped."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lsg_jax import sharding
from lsg_jax.checkpoint import RunFolder
from lsg_jax.config import GateConfig, MethodConfig, RunConfig, to_dict
from lsg_jax.data.pipeline import TrainingData
from lsg_jax.errors import ConfigError, NonFiniteError, Preempted
from lsg_jax.model.llava import abstract_model, initial_parameters
from lsg_jax.opening import load_backbone
from lsg_jax.stopping import stop_signals
from lsg_jax.train.independent import independent_gates
from lsg_jax.train.optimizer import learning_rate
from lsg_jax.train.step import compiled_step, init_state
from lsg_jax.types import Batch, TrainState
from lsg_jax.vlm import VLM, check_gate_input, check_method_input

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
RUN = "run.json"

_MAY_CHANGE = frozenset(
    {"model", "output", "mesh", "eval", "data.records", "data.num_threads", "data.prefetch"}
    | {"train.log_every", "train.save_every", "train.keep", "train.max_skipped", "train.remat", "train.accumulate"}
    | {"train.tensorboard", "train.wandb", "train.profile"}
)
"""Settings that a continued run may have otherwise: they do not change what is computed. Model and data count by digest."""

OnStep = Callable[[int, int, dict[str, Any]], None]


@dataclass
class Trainer:
    """A run that is ready to step; `state` is the last one saved, or the initial one.

    Attributes:
        step: jitted (state, frozen, batch) -> (state, metrics); donates the state.
        total_steps: the step at which the run is complete.
    """

    config: RunConfig
    vlm: VLM
    data: TrainingData
    step: Callable[[TrainState, Any, Batch], tuple[TrainState, dict[str, Any]]]
    state: TrainState
    total_steps: int
    run: RunFolder

    def save(self) -> None:
        """Saves gates, optimiser, counters and the data position as the step reached."""
        self.run.save(int(self.state.step), self.state, meta={"data": self.data.get_state(), "backbone": self.vlm.digest})


def train(config: RunConfig, *, on_step: OnStep | None = None) -> Path:
    """Trains what `config.method` says, gates or a baseline, and returns the run folder; continues the run that is there.

    Args:
        on_step: called with (step, total steps, metrics) after each logged step; the loss of independent gates as their mean.

    Raises:
        ConfigError, InputError: the run cannot start, or the folder holds a run that computes something else.
        BusyError: the folder is in use. NonFiniteError: too many steps in a row were not finite.
        Preempted: SIGTERM or SIGINT came; the state is saved.
    """
    run = RunFolder(config.output, keep=config.train.keep)
    with stop_signals() as stopped, run.lock():
        trainer = set_up(config, run)
        with contextlib.closing(trainer.data):
            _loop(trainer, stopped, on_step)
    return run.path


def set_up(config: RunConfig, run: RunFolder) -> Trainer:
    """Loads model and data, compares them with the run that is there, and restores its newest sound step."""
    mesh = sharding.make_mesh(config.mesh)
    rows = sharding.batch_rows(mesh)
    if config.train.batch_size % rows:
        raise ConfigError(
            f"train.batch_size {config.train.batch_size} is no multiple of the {rows} devices along data and fsdp"
        )
    gate, method = _what_is_trained(config)
    vlm = load_backbone(config.model, dtype=config.dtype, sinks=config.sinks, mesh=mesh)
    if gate is not None:
        gate = gate.for_depth(vlm.config.text.num_layers)
        check_gate_input(gate, vlm.config)
        config = replace(config, gate=gate)
    if method is not None:
        check_method_input(method, vlm.config)
    data = TrainingData(
        config.data.records,
        vlm.make_processor(config.data.image_aspect, config.data.template),
        config.data,
        batch_size=config.train.batch_size,
        seed=config.seed,
        epochs=config.train.epochs,
    )
    total = min(data.num_batches, config.train.max_steps or data.num_batches)
    _claim(run, config, vlm, data, total)

    graphdef, _ = abstract_model(vlm.config, gate, method=method)
    key, independent = jax.random.key(config.seed), gate is not None and gate.independent
    if gate is not None and independent:
        gates = independent_gates(vlm.config, gate, vlm.frozen, key)
    else:
        gates = initial_parameters(vlm.config, gate, method, vlm.frozen, key)
    state = init_state(gates, vlm.frozen, config=config.train, total_steps=total, independent=independent)
    state = jax.device_put(state, sharding.replicated(mesh))
    if restored := run.latest(state):
        state = restored.state
        data.set_state(restored.meta["data"])
        where = "complete" if restored.step == total else "resuming"
        logger.info("%s: %s at step %d of %d", run.path, where, restored.step, total)
    return Trainer(
        config=config,
        vlm=vlm,
        data=data,
        step=compiled_step(graphdef, config.train, total, sharding.replicated(mesh), independent=independent),
        state=state,
        total_steps=total,
        run=run,
    )


def _what_is_trained(config: RunConfig) -> tuple[GateConfig | None, MethodConfig | None]:
    """Gates, or one of the baselines that have parameters."""
    if config.method == "lsg":
        return config.gate, None
    if config.method not in ("lora", "diysink"):
        raise ConfigError(f'method = "{config.method}" has nothing to train: choose lsg, lora or diysink, or run `lsg eval`')
    return None, config.lora if config.method == "lora" else config.diysink


def _claim(run: RunFolder, config: RunConfig, vlm: VLM, data: TrainingData, total_steps: int) -> None:
    """Writes run.json for a new run; refuses to continue one that computes something else."""
    meaning = {
        "config": to_dict(config),
        "sinks": to_dict(vlm.config.sinks),
        "backbone": vlm.digest,
        "data": data.digest,
        "total_steps": total_steps,
    }
    if (run.path / RUN).exists():
        before = run.read_json(RUN)
        if changed := [name for name in _differences(before, meaning, keys=list(meaning)) if name not in _MAY_CHANGE]:
            raise ConfigError(
                f"{run.path}: holds a run with another {', '.join(changed)}; choose another output, or undo the change"
            )
        return
    packages = ("lsg_jax", "jax", "flax", "optax", "orbax-checkpoint", "grain")
    run.write_json(
        RUN,
        {
            "format": "lsg-run-1",
            **meaning,
            "model_name": Path(config.model).resolve().name,
            "versions": {name: version(name) for name in packages},
            "devices": f"{jax.device_count()} {jax.devices()[0].device_kind}",
        },
    )


def _differences(before: dict, after: dict, keys: list[str]) -> list[str]:
    """Dotted names of settings that differ; those of the configuration without the leading "config."."""

    def walk(a: Any, b: Any, name: str) -> Iterator[str]:
        if isinstance(a, dict) and isinstance(b, dict) and name not in _MAY_CHANGE:
            for key in sorted({*a, *b}):
                yield from walk(a.get(key), b.get(key), f"{name}.{key}" if name else key)
        elif a != b:
            yield name

    return [name for key in keys for name in walk(before.get(key), after.get(key), "" if key == "config" else key)]


def _loop(trainer: Trainer, stopped: Callable[[], bool], on_step: OnStep | None) -> None:
    config, total = trainer.config.train, trainer.total_steps
    schedule = learning_rate(config, total)
    batches = iter(trainer.data)
    first = int(trainer.state.step)
    with _Metrics(trainer.run.path / METRICS, after=first) as log:
        for step in range(first + 1, total + 1):
            began = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - began
            placed = sharding.place_rows(batch, trainer.vlm.mesh, config.batch_size)
            trainer.state, metrics = trainer.step(trainer.state, trainer.vlm.frozen, placed)
            metrics = {name: np.asarray(value).tolist() for name, value in metrics.items()}
            metrics |= {"learning_rate": float(schedule(step - 1)), "data_wait_s": waited}
            metrics["step_s"] = time.perf_counter() - began
            finite = np.all(metrics["finite"])
            if step % config.log_every == 0 or step == total or not finite:
                log.write({"step": step, **metrics})
                if on_step:
                    on_step(step, total, metrics | {"loss": float(np.mean(metrics["loss"]))})
            if not finite:
                _not_finite(trainer, step, batch, metrics["finite"])
            stop = stopped()
            if step % config.save_every == 0 or step == total or stop:
                trainer.save()
            if stop and step < total:
                raise Preempted(f"{trainer.run.path}: stopped at step {step} of {total}, saved; run the same command to go on")


def _not_finite(trainer: Trainer, step: int, batch: Batch, finite: bool | list[bool]) -> None:
    """Warns of a skipped step, or aborts after too many in a row; independent gates go on as long as one of them is sound."""
    where = ""
    if isinstance(finite, list):
        layers = trainer.config.gate.layers
        where = f" at layers {[layer for layer, good in zip(layers, finite, strict=True) if not good]}"
    what = f"step {step}: loss or gradient{where} is not finite, records {np.asarray(batch.row_id).tolist()}"
    in_a_row = int(np.min(trainer.state.skipped))
    if in_a_row >= trainer.config.train.max_skipped:
        raise NonFiniteError(
            f"{trainer.run.path}: {what}; {in_a_row} steps in a row: lower train.learning_rate, or look at these records"
        )
    logger.warning("%s; step skipped", what)


class _Metrics:
    """Appends JSON lines; lines after the step that a run resumes from are dropped, since they are computed again."""

    def __init__(self, path: Path, *, after: int):
        kept = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    if json.loads(line)["step"] <= after:
                        kept.append(line + "\n")
                except ValueError:
                    break  # the line that a kill cut short
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> _Metrics:
        return self

    def __exit__(self, *unused: object) -> None:
        self._file.close()

    def write(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(_without_nan(entry)) + "\n")
        self._file.flush()


def _without_nan(value: Any) -> Any:
    """Plain data with null for every number that is not finite, since NaN is no JSON."""
    if isinstance(value, dict):
        return {name: _without_nan(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
