"""`lsg train`: trains gates or another method, writes metrics and checkpoints, resumes where it stopped."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from lsg_jax import sharding
from lsg_jax.checkpoint import Computation, RunFolder, read_manifest
from lsg_jax.checkpoint.processes import is_primary
from lsg_jax.data.pipeline import TrainingData
from lsg_jax.errors import ConfigError, Preempted
from lsg_jax.memory import check_fits, device_memory
from lsg_jax.methods.method import Method
from lsg_jax.methods.method_model import abstract_model
from lsg_jax.methods.registry import METHODS
from lsg_jax.opening import load_backbone
from lsg_jax.run_config import RunConfig
from lsg_jax.stopping import stop_signals
from lsg_jax.train.goodput import Goodput
from lsg_jax.train.independent import independent_gates
from lsg_jax.train.metrics import METRICS, MetricsLog, check_installed_sinks
from lsg_jax.train.profiler import StepProfiler
from lsg_jax.train.remat import fastest_that_fits
from lsg_jax.train.run_record import check_same, record_start
from lsg_jax.train.seeds import SeedFolders, claim, members, seed_runs, stack_seeds, together
from lsg_jax.train.step import compiled_step, init_state
from lsg_jax.train.steps import OnStep, Steps
from lsg_jax.train.trainer import Trainer
from lsg_jax.types import Batch, TrainState
from lsg_jax.vlm import VLM

__all__ = ["METRICS", "OnStep", "Trainer", "set_up", "train"]

logger = logging.getLogger(__name__)


def train(config: RunConfig, *, on_step: OnStep | None = None, began: float | None = None) -> Path:
    """Trains what `config.method` names and returns the run folder; continues the run that is there.

    With several seeds (`train.seeds`) it holds a run folder for each.

    Args:
        on_step: called on process 0 for each logged step, after the next is dispatched; the loss of independent gates, and of
            seeds that are trained together, is their mean.
        began: `time.monotonic()` at which the start-up time begins to count; by default that of the call.

    Raises:
        ConfigError, InputError: the run cannot start, or the folder holds a run that computes something else.
        BusyError: the folder is in use. NonFiniteError: too many steps in a row were not finite.
        Preempted: SIGTERM or SIGINT was received; the state is saved.
    """
    check_installed_sinks(config.train)
    if config.train.seeds == 1:
        _train(config, RunFolder(config.output, keep=config.train.keep), on_step, began)
        return Path(config.output)
    _trained_method(config)
    claim(config)
    if together(config):
        logger.info("%s: seeds in one order of the records: they differ in initial values alone (data.order)", config.output)
        _train(config, SeedFolders(config), on_step, began)
    else:
        for run in seed_runs(config).values():
            train(run, on_step=on_step, began=began)
            began = None
    return Path(config.output)


def _train(config: RunConfig, run: RunFolder | SeedFolders, on_step: OnStep | None, began: float | None) -> None:
    with run.lock():
        trainer = set_up(config, run, began)
        with contextlib.closing(trainer.data), stop_signals() as stopped:
            _loop(trainer, stopped, on_step)


def set_up(config: RunConfig, run: RunFolder | SeedFolders, began: float | None = None) -> Trainer:
    """Loads model and data, compares them with the run that is there, and restores its newest sound step."""
    goodput = Goodput(began)
    mesh = sharding.make_mesh(config.mesh)
    _check_division(config, sharding.batch_rows(mesh))
    method = _trained_method(config)
    _check_batch(config, mesh)
    vlm = load_backbone(config.model, dtype=config.dtype, sinks=config.sinks, mesh=mesh)
    method = method.for_model(vlm.config)
    config = config if method.settings is None else config.with_settings(method.settings)
    data = TrainingData(
        config.data.records,
        vlm.make_processor(config.data.image_aspect, config.data.template),
        config.data,
        batch_size=config.train.batch_size,
        seed=config.order_seed,
        epochs=config.train.epochs,
        steps=config.train.max_steps,
        rows=sharding.local_rows(mesh, config.train.batch_size),
    )
    total = data.num_batches
    files = read_manifest(config.model).preparation
    computations = [
        (folder, Computation(own.as_dict(), vlm.config.sinks, vlm.digest, data.digest, total, model_files=files))
        for folder, own in members(run, config)
    ]
    for folder, computation in computations:
        check_same(folder, computation)

    graphdef, _ = abstract_model(vlm.config, method, mesh=mesh)
    state = _initial_state(config, method, vlm, mesh, total)
    if restored := run.latest(state):
        state = restored.state
        data.set_state(restored.meta.data)
        where = "complete" if restored.step == total else "resuming"
        logger.info("%s: %s at step %d of %d", run.path, where, restored.step, total)
    step = restored.step if restored else 0
    if step < total or not restored:
        for folder, computation in computations:
            record_start(folder, computation, mesh=mesh, step=step, dropped=data.dropped)
    goodput.now("init")
    shapes = functools.partial(
        sharding.abstract_batch, tiles=data.tiles, patches=data.patches, answers=config.data.max_answer_tokens
    )
    lengths = data.lengths if step < total else ()  # a finished run makes no step
    batches = [shapes(vlm.config, mesh, config.train.batch_size, length) for length in reversed(lengths)]
    compiled = _step(config, method, graphdef, total, mesh, state, vlm.frozen, batches)
    goodput.now("compile")
    return Trainer(config=config, vlm=vlm, data=data, step=compiled, state=state, total_steps=total, run=run, goodput=goodput)


def _check_division(config: RunConfig, rows: int) -> None:
    """Refuses a batch that cannot be split over `rows` devices and into its parts."""
    size, accumulate = config.train.batch_size, config.train.accumulate
    if size % (rows * accumulate):
        parts = f" times train.accumulate {accumulate}" if accumulate > 1 else ""
        raise ConfigError(f"train.batch_size {size} is no multiple of the {rows} devices along data and fsdp{parts}")


def _check_batch(config: RunConfig, mesh: Mesh) -> None:
    """Refuses a batch that cannot fit, before the model is loaded: the states of one layer, and the token ids on the host."""
    model, train = read_manifest(config.model).config, config.train
    length = config.data.max_length if config.data.buckets == 1 else 1  # buckets are as long as the records need
    what = f"train.batch_size {train.batch_size} with data.max_length {length}"
    rows = train.batch_size // train.accumulate
    check_fits(2.0 * rows * length * model.text.hidden_size, what, "lower one of them, or raise train.accumulate", mesh=mesh)
    own = len(sharding.local_rows(mesh, train.batch_size))
    check_fits(4.0 * own * length, what, "lower one of them", host=True)


def _initial_state(config: RunConfig, method: Method, vlm: VLM, mesh: Mesh, total_steps: int) -> TrainState:
    """The state before the first step; takes the parts that are trained out of `vlm.frozen`."""
    params = vlm.frozen
    initial = functools.partial(independent_gates, method=method) if method.independent else method.initial
    each = [initial(vlm.config, params=params, key=jax.random.key(config.seed + i)) for i in range(config.train.seeds)]
    vlm.frozen = {part: params[part] for part in params if part not in each[0]}
    init = functools.partial(
        init_state, frozen=vlm.frozen, config=config.train, total_steps=total_steps, independent=method.independent
    )
    states = [init(trained) for trained in each]
    state = states[0] if len(states) == 1 else stack_seeds(states)
    return jax.device_put(state, sharding.state_shardings(state, mesh))


def _step(
    config: RunConfig,
    method: Method,
    graphdef: Any,
    total: int,
    mesh: Mesh,
    state: TrainState,
    frozen: Any,
    batches: Sequence[Batch],
) -> Any:
    """The jitted step, with `remat = "auto"` under the fastest policy that fits the longest batch.

    For batches of several lengths it is compiled here, so that none is too large, or makes the run wait, in the middle of it.

    Args:
        batches: shapes and shardings for each length, the longest first; none where no step is made.
    """
    make = functools.partial(compiled_step, graphdef, total_steps=total, mesh=mesh, independent=method.independent)
    train = config.train
    if train.remat == "auto" and not method.independent and batches:
        compile_with = lambda policy: make(replace(train, remat=policy)).lower(state, frozen, batches[0]).compile()
        remat: Any = fastest_that_fits(compile_with, device_memory())[0]
        train = replace(train, remat=remat)
    step = make(train)
    for batch in batches if len(batches) > 1 else ():
        step.lower(state, frozen, batch).compile()  # jax keeps it for the call
    return step


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
        runs = members(trainer.run, trainer.config) if is_primary() else []
        logs = [stack.enter_context(MetricsLog(folder.path, own, after=first)) for folder, own in runs]
        steps = stack.enter_context(Steps(trainer, logs, on_step))
        traced = config.profile if is_primary() else ()
        profiler = stack.enter_context(StepProfiler(trainer.run.path / "profile", traced, settle=steps.wait))
        if logs:
            stack.callback(lambda: logger.info("%s: %s", trainer.run.path, goodput.summary()))
        for step in range(first + 1, total + 1):
            profiler.before(step)
            steps.take(step)
            profiler.after(step)
            stop = stopped()
            if step % config.save_every == 0 or step == total or stop:
                steps.flush()
                goodput.now("other")
                trainer.save()
                goodput.now("save")
            if stop and step < total:
                raise Preempted(f"{trainer.run.path}: stopped at step {step} of {total}, saved; run the same command to go on")
