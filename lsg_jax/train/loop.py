"""`lsg train`: trains gates or another method, writes metrics and checkpoints, resumes where it stopped."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lsg_jax import sharding
from lsg_jax.checkpoint import Computation, RunFolder, StepMeta
from lsg_jax.checkpoint.processes import host_array, is_primary
from lsg_jax.data.pipeline import TrainingData
from lsg_jax.errors import ConfigError, NonFiniteError, Preempted
from lsg_jax.methods.method import Method
from lsg_jax.methods.method_model import abstract_model
from lsg_jax.methods.registry import METHODS
from lsg_jax.opening import load_backbone
from lsg_jax.run_config import RunConfig
from lsg_jax.stopping import stop_signals
from lsg_jax.train.goodput import Goodput
from lsg_jax.train.independent import independent_gates
from lsg_jax.train.metrics import METRICS, MetricsLog
from lsg_jax.train.optimizer import learning_rate
from lsg_jax.train.profiler import StepProfiler
from lsg_jax.train.remat import device_memory, fastest_that_fits
from lsg_jax.train.run_record import check_same, record_start
from lsg_jax.train.step import compiled_step, init_state
from lsg_jax.types import Batch, TrainState
from lsg_jax.vlm import VLM

__all__ = ["METRICS", "OnStep", "Trainer", "set_up", "train"]

logger = logging.getLogger(__name__)

OnStep = Callable[[int, int, dict[str, Any]], None]


@dataclass
class Trainer:
    """A run that is ready to step; `state` is the last one saved, or the initial one.

    Attributes:
        step: jitted (state, frozen, batch) -> (state, metrics); donates the state.
        total_steps: the step at which the run is complete.
        goodput: where the time goes, since the start of this process or of `train`.
    """

    config: RunConfig
    vlm: VLM
    data: TrainingData
    step: Callable[[TrainState, Any, Batch], tuple[TrainState, dict[str, Any]]]
    state: TrainState
    total_steps: int
    run: RunFolder
    goodput: Goodput

    def save(self) -> None:
        """Saves gates, optimiser, counters and the data position as the step reached."""
        self.run.save(int(self.state.step), self.state, meta=StepMeta(self.data.get_state(), self.vlm.digest))


def train(config: RunConfig, *, on_step: OnStep | None = None, began: float | None = None) -> Path:
    """Trains what `config.method` names and returns the run folder; continues the run that is there.

    Args:
        on_step: called on process 0 with (step, total steps, metrics) for each logged step, when the next one is under way; the
            loss of independent gates as their mean.
        began: `time.monotonic()` from which the time is counted that goes into starting; the call by default.

    Raises:
        ConfigError, InputError: the run cannot start, or the folder holds a run that computes something else.
        BusyError: the folder is in use. NonFiniteError: too many steps in a row were not finite.
        Preempted: SIGTERM or SIGINT came; the state is saved.
    """
    run = RunFolder(config.output, keep=config.train.keep)
    with stop_signals() as stopped, run.lock():
        trainer = set_up(config, run, began)
        with contextlib.closing(trainer.data):
            _loop(trainer, stopped, on_step)
    return run.path


def set_up(config: RunConfig, run: RunFolder, began: float | None = None) -> Trainer:
    """Loads model and data, compares them with the run that is there, and restores its newest sound step."""
    goodput = Goodput(began)
    mesh = sharding.make_mesh(config.mesh)
    rows = sharding.batch_rows(mesh)
    if config.train.batch_size % (rows * config.train.accumulate):
        parts = f" times train.accumulate {config.train.accumulate}" if config.train.accumulate > 1 else ""
        raise ConfigError(
            f"train.batch_size {config.train.batch_size} is no multiple of the {rows} devices along data and fsdp{parts}"
        )
    method = _trained_method(config)
    vlm = load_backbone(config.model, dtype=config.dtype, sinks=config.sinks, mesh=mesh)
    method = method.for_model(vlm.config)
    config = config.with_settings(method.settings)
    data = TrainingData(
        config.data.records,
        vlm.make_processor(config.data.image_aspect, config.data.template),
        config.data,
        batch_size=config.train.batch_size,
        seed=config.seed,
        epochs=config.train.epochs,
        rows=sharding.local_rows(mesh, config.train.batch_size),
    )
    total = min(data.num_batches, config.train.max_steps or data.num_batches)
    computation = Computation(config.as_dict(), vlm.config.sinks, vlm.digest, data.digest, total)
    check_same(run, computation)

    graphdef, _ = abstract_model(vlm.config, method, mesh=mesh)
    state = _initial_state(config, method, vlm, mesh, total)
    if restored := run.latest(state):
        state = restored.state
        data.set_state(restored.meta.data)
        where = "complete" if restored.step == total else "resuming"
        logger.info("%s: %s at step %d of %d", run.path, where, restored.step, total)
    step = restored.step if restored else 0
    if step < total or not restored:
        record_start(run, computation, mesh=mesh, step=step)
    goodput.now("init")
    compiled = _step(config, method, graphdef, total, mesh, state, vlm)
    goodput.now("compile")
    return Trainer(
        config=config,
        vlm=vlm,
        data=data,
        step=compiled,
        state=state,
        total_steps=total,
        run=run,
        goodput=goodput,
    )


def _initial_state(config: RunConfig, method: Method, vlm: VLM, mesh: Mesh, total_steps: int) -> TrainState:
    """The state before the first step; takes the parts that are trained out of `vlm.frozen`."""
    params, key = vlm.frozen, jax.random.key(config.seed)
    if method.independent:
        trained = independent_gates(vlm.config, method, params, key)
    else:
        trained = method.initial(vlm.config, params, key)
    vlm.frozen = {part: params[part] for part in params if part not in trained}
    state = init_state(trained, vlm.frozen, config=config.train, total_steps=total_steps, independent=method.independent)
    return jax.device_put(state, sharding.state_shardings(state, mesh))


def _step(config: RunConfig, method: Method, graphdef: Any, total_steps: int, mesh: Mesh, state: TrainState, vlm: VLM) -> Any:
    """The jitted step; with `remat = "auto"`, the one that was compiled under the fastest policy that fits."""
    make = functools.partial(compiled_step, graphdef, total_steps=total_steps, mesh=mesh)
    if config.train.remat != "auto" or method.independent:
        return make(config=config.train, independent=method.independent)
    slots, length = config.data.max_answer_tokens, config.data.max_length
    batch = sharding.abstract_batch(vlm.config, mesh, config.train.batch_size, length, answers=slots)
    compile_with = lambda policy: make(config=replace(config.train, remat=policy)).lower(state, vlm.frozen, batch).compile()
    return fastest_that_fits(compile_with, device_memory())[1]


def _trained_method(config: RunConfig) -> Method:
    method = config.get_method()
    if not method.trains:
        trainable = ", ".join(name for name, kind in METHODS.items() if kind.trains)
        raise ConfigError(f'method = "{config.method}" has nothing to train: choose one of {trainable}, or run `lsg eval`')
    return method


def _loop(trainer: Trainer, stopped: Callable[[], bool], on_step: OnStep | None) -> None:
    config, total, goodput = trainer.config.train, trainer.total_steps, trainer.goodput
    first = int(trainer.state.step)
    if first >= total:
        return
    goodput.now("init")
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(MetricsLog(trainer.run.path, trainer.config, after=first)) if is_primary() else None
        steps = stack.enter_context(_Steps(trainer, log, on_step))
        traced = config.profile if is_primary() else ()
        profiler = stack.enter_context(StepProfiler(trainer.run.path / "profile", traced, settle=steps.wait))
        if log:
            stack.callback(lambda: logger.info("%s: %s", trainer.run.path, goodput.summary()))
        for step in range(first + 1, total + 1):
            profiler.before(step)
            steps.take(step)
            profiler.after(step)
            stop = stopped()
            if step % config.save_every == 0 or step == total or stop:
                steps.look()
                goodput.now("other")
                trainer.save()
                goodput.now("save")
            if stop and step < total:
                raise Preempted(f"{trainer.run.path}: stopped at step {step} of {total}, saved; run the same command to go on")


@dataclass(frozen=True)
class _InFlight:
    """A step that the devices have, and that nobody has looked at.

    Attributes:
        told: its metrics on the host, and the moment at which they were there.
        row_id: of its batch, int32 [B], on the devices.
        asked: the moment at which its batch was asked for; `got`: at which the batch was there; `given`: at which the step was
            compiled, if it had to be, and on its way.
    """

    step: int
    told: Future[tuple[dict[str, Any], float]]
    row_id: Any
    asked: float
    got: float
    given: float


class _Steps:
    """Takes steps, and looks at each when the next one is on its way, so that the devices need not wait for this process.

    A thread reads the metrics, since this one may be waiting for data when a step ends, and that moment is to be known.
    """

    def __init__(self, trainer: Trainer, log: MetricsLog | None, on_step: OnStep | None):
        self._trainer, self._log, self._on_step = trainer, log, on_step
        self._first, total = int(trainer.state.step) + 1, trainer.total_steps
        # all at once and now: computed between steps, each would queue up behind the step that is in flight
        schedule = learning_rate(trainer.config.train, total)
        self._rates = np.asarray(jax.vmap(schedule)(np.arange(self._first - 1, total))).tolist()
        self._skipped = np.asarray(trainer.state.skipped)  # in a row; the state itself is gone when a step is looked at
        self._batches = iter(trainer.data)
        self._reader = ThreadPoolExecutor(1, "metrics")
        self._in_flight: _InFlight | None = None

    def __enter__(self) -> _Steps:
        return self

    def __exit__(self, *unused: object) -> None:
        self._reader.shutdown()

    def take(self, step: int) -> None:
        """Sends the next step to the devices, then looks at the one before."""
        trainer, asked = self._trainer, time.monotonic()
        try:
            batch = next(self._batches)
        except Exception:
            self.look()
            raise
        batch = sharding.place_rows(batch, trainer.vlm.mesh, trainer.config.train.batch_size)
        got = time.monotonic()
        trainer.state, metrics = trainer.step(trainer.state, trainer.vlm.frozen, batch)
        given = time.monotonic()
        before = self._in_flight
        self._in_flight = _InFlight(step, self._reader.submit(_read, metrics), batch.row_id, asked, got, given)
        if before:
            self._look_at(before)

    def wait(self) -> None:
        """Waits until the devices have nothing to do."""
        if self._in_flight:
            wait([self._in_flight.told])

    def look(self) -> None:
        """Looks at the step in flight, if there is one, as soon as it is done.

        Raises:
            NonFiniteError: it is one too many whose loss or gradient is not finite.
        """
        done, self._in_flight = self._in_flight, None
        if done:
            self._look_at(done)

    def _look_at(self, done: _InFlight) -> None:
        config, total = self._trainer.config, self._trainer.total_steps
        metrics, ready = done.told.result()
        finite = metrics["finite"]
        self._skipped = np.where(finite, 0, self._skipped + 1)
        spent = self._count(done, ready)
        if done.step % config.train.log_every == 0 or done.step == total or not np.all(finite):
            metrics |= {"learning_rate": self._rates[done.step - self._first], **spent}
            positions = config.train.batch_size * config.data.max_length
            for name, count in {"answer_tokens_per_s": metrics["tokens"], "positions_per_s": positions}.items():
                metrics[name] = count / max(spent["step_s"], 1e-9)  # the clock may be coarse
            metrics["goodput"] = self._trainer.goodput.as_metrics()
            if self._log:
                self._log.write({"step": done.step, **metrics})
            if self._on_step and is_primary():
                self._on_step(done.step, total, metrics | {"loss": float(np.mean(metrics["loss"]))})
        if not np.all(finite):
            self._not_finite(done, finite)

    def _count(self, done: _InFlight, ready: float) -> dict[str, float]:
        """Counts the seconds up to the end of a step; returns those that are its own."""
        goodput = self._trainer.goodput
        goodput.until(done.asked, "other")
        waited = goodput.until(done.got, "data")
        if done.step == self._first:
            goodput.until(done.given, "compile")
        return {"data_wait_s": waited, "step_s": waited + goodput.until(ready, "step")}

    def _not_finite(self, done: _InFlight, finite: bool | list[bool]) -> None:
        """Warns of a skipped step, or aborts after too many in a row; independent gates go on while one of them is sound."""
        config, where = self._trainer.config, ""
        if isinstance(finite, list):
            gate = config.get_method().gate
            assert gate is not None
            layers = [layer for layer, good in zip(gate.layers, finite, strict=True) if not good]
            where = f" at layers {layers}"
        records = host_array(done.row_id).tolist()
        what = f"step {done.step}: loss or gradient{where} is not finite, records {records}"
        in_a_row = int(np.min(self._skipped))
        if in_a_row >= config.train.max_skipped:
            remedy = "lower train.learning_rate, or look at these records"
            raise NonFiniteError(f"{self._trainer.run.path}: {what}; {in_a_row} steps in a row: {remedy}")
        if self._log:
            logger.warning("%s; step skipped", what)


def _read(metrics: dict[str, jax.Array]) -> tuple[dict[str, Any], float]:
    """Metrics as plain data, and the moment at which they were there."""
    values = jax.device_get(metrics)
    ready = time.monotonic()
    return {name: np.asarray(value).tolist() for name, value in values.items()}, ready
