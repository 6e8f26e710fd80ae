"""Dispatches training steps one ahead; a thread reads their metrics, which are logged one step late."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from lsg_jax import sharding
from lsg_jax.checkpoint.processes import host_array, is_primary
from lsg_jax.errors import NonFiniteError
from lsg_jax.sinks.plausible import implausible
from lsg_jax.train.metrics import MetricsLog
from lsg_jax.train.optimizer import learning_rate
from lsg_jax.train.trainer import Trainer

logger = logging.getLogger(__name__)

WATCHED = 10  # steps after which the share of V-sinks is looked at

IMPLAUSIBLE_SHARE_OF_STEPS = 0.5
"""Larger than that of patches: a token of several patches is a V-sink if any of them is."""

OnStep = Callable[[int, int, dict[str, Any]], None]
"""Called with (step, total steps, metrics)."""


@dataclass(frozen=True)
class _InFlight:
    """A step that was dispatched and whose metrics are not yet handled. Times are of `time.monotonic`.

    Attributes:
        metrics: future of its metrics on the host, and the time at which they arrived.
        row_id: of its batch, int32 [B], on the devices.
        positions: of its batch, B x T.
        requested: when its batch was requested.
        received: when the batch arrived.
        dispatched: when the step was dispatched, after its compilation if it needed one.
    """

    step: int
    metrics: Future[tuple[dict[str, Any], float]]
    row_id: jax.Array
    positions: int
    requested: float
    received: float
    dispatched: float


class Steps:
    """Dispatches steps, and handles the metrics of each after the next is dispatched, so that the devices do not wait.

    A thread reads the metrics: the main thread may be waiting for data when a step ends, and the time of its end is recorded.

    Args:
        logs: one for each seed; none on other processes than 0.
    """

    def __init__(self, trainer: Trainer, logs: Sequence[MetricsLog], on_step: OnStep | None):
        self._trainer, self._logs, self._on_step = trainer, logs, on_step
        self._seeds = trainer.config.train.seeds
        self._first, total = int(trainer.state.step) + 1, trainer.total_steps
        # all at once: computed between steps, each would queue up after the step in flight
        schedule = learning_rate(trainer.config.train, total)
        self._rates = np.asarray(jax.vmap(schedule)(np.arange(self._first - 1, total))).tolist()
        self._skipped = np.asarray(trainer.state.skipped)  # in a row; the state itself is donated to the next step
        self._batches = iter(trainer.data)
        self._reader = ThreadPoolExecutor(1, "metrics")
        self._in_flight: _InFlight | None = None
        self._seen = np.zeros(2, np.int64)  # visual tokens and V-sinks of the steps so far, up to WATCHED

    def __enter__(self) -> Steps:
        return self

    def __exit__(self, *unused: object) -> None:
        self._reader.shutdown()

    def take(self, step: int) -> None:
        """Dispatches the next step, then handles the metrics of the one before."""
        trainer, requested = self._trainer, time.monotonic()
        try:
            batch = next(self._batches)
        except Exception:
            self.flush()
            raise
        batch = sharding.place_rows(batch, trainer.vlm.mesh, trainer.config.train.batch_size)
        received = time.monotonic()
        trainer.state, metrics = trainer.step(trainer.state, trainer.vlm.frozen, batch)
        dispatched = time.monotonic()
        before = self._in_flight
        read, positions = self._reader.submit(_read, metrics), batch.input_ids.size
        self._in_flight = _InFlight(step, read, batch.row_id, positions, requested, received, dispatched)
        if before:
            self._handle(before)

    def wait(self) -> None:
        """Waits until the devices are idle."""
        if self._in_flight:
            wait([self._in_flight.metrics])

    def flush(self) -> None:
        """Waits for the step in flight, if there is one, and handles its metrics.

        Raises:
            NonFiniteError: too many steps in a row had a non-finite loss or gradient.
        """
        done, self._in_flight = self._in_flight, None
        if done:
            self._handle(done)

    def _handle(self, done: _InFlight) -> None:
        """Logs the metrics of a finished step, and warns or aborts if they are not finite."""
        config, total = self._trainer.config, self._trainer.total_steps
        metrics, ready = done.metrics.result()
        finite = metrics["finite"]
        self._skipped = np.where(finite, 0, self._skipped + 1)
        spent = self._count(done, ready)
        # of several seeds each value is a list
        each = [{name: of[i] for name, of in metrics.items()} for i in range(self._seeds)] if self._seeds > 1 else [metrics]
        self._watch_sinks(done.step, each[0])
        if done.step % config.train.log_every == 0 or done.step == total or not np.all(finite):
            common: dict[str, Any] = {"learning_rate": self._rates[done.step - self._first], **spent}
            for name, count in {"answer_tokens_per_s": each[0]["tokens"], "positions_per_s": done.positions}.items():
                common[name] = count / max(spent["step_s"], 1e-9)  # the clock may be coarse
            common["goodput"] = self._trainer.goodput.as_metrics()
            for log, own in zip(self._logs, each, strict=False):  # no logs on other processes
                log.write({"step": done.step, **own, **common})
            if self._on_step and is_primary():
                self._on_step(done.step, total, metrics | common | {"loss": float(np.mean(metrics["loss"]))})
        if not np.all(finite):
            self._not_finite(done, finite)

    def _watch_sinks(self, step: int, metrics: dict[str, Any]) -> None:
        """Warns once, after the first steps, if gates of V-sinks see none of them, or implausibly many."""
        gate, last = self._trainer.config.get_method().gate, min(self._first + WATCHED - 1, self._trainer.total_steps)
        if step > last or gate is None or gate.grouping == "l_sink_rest":
            return
        self._seen += metrics["visual_tokens"], metrics["v_sinks"]
        if step < last or not is_primary():
            return
        visual, v_sinks = self._seen.tolist()
        steps = f"steps {self._first} to {last}"
        if wrong := implausible(v_sinks, visual, self._trainer.vlm.config.sinks, steps, most=IMPLAUSIBLE_SHARE_OF_STEPS):
            logger.warning("%s: %s", self._trainer.run.path, wrong)

    def _count(self, done: _InFlight, ready: float) -> dict[str, float]:
        """Adds the seconds up to the end of a step to the goodput; returns those of the step itself."""
        goodput = self._trainer.goodput
        goodput.until(done.requested, "other")
        waited = goodput.until(done.received, "data")
        if done.step == self._first:
            goodput.until(done.dispatched, "compile")
        return {"data_wait_s": waited, "step_s": waited + goodput.until(ready, "step")}

    def _not_finite(self, done: _InFlight, finite: Any) -> None:
        """Warns of a skipped step, or aborts after too many in a row; of several gates or seeds, if none is finite."""
        config = self._trainer.config
        if self._seeds == 1:
            where = self._layers(finite)
        else:
            seeds = enumerate(finite, start=config.seed)
            where = ", ".join(f" of seed {seed}{self._layers(good)}" for seed, good in seeds if not np.all(good))
        records = host_array(done.row_id).tolist()
        what = f"step {done.step}: loss or gradient{where} is not finite, records {records}"
        in_a_row = int(np.min(self._skipped))
        if in_a_row >= config.train.max_skipped:
            remedy = "lower train.learning_rate, or look at these records"
            raise NonFiniteError(f"{self._trainer.run.path}: {what}; {in_a_row} steps in a row: {remedy}")
        if self._logs:
            logger.warning("%s; step skipped", what)

    def _layers(self, finite: bool | list[bool]) -> str:
        """The layers of independent gates that are not finite."""
        gate = self._trainer.config.get_method().gate
        if gate is None or not isinstance(finite, list):
            return ""
        return f" at layers {[layer for layer, good in zip(gate.layers, finite, strict=True) if not good]}"


def _read(metrics: dict[str, jax.Array]) -> tuple[dict[str, Any], float]:
    """Metrics as plain data, and the time at which they arrived."""
    values = jax.device_get(metrics)
    ready = time.monotonic()
    return {name: np.asarray(value).tolist() for name, value in values.items()}, ready
