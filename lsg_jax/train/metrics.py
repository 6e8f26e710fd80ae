"""The metrics of each step: `metrics.jsonl` is the record, TensorBoard and Weights & Biases get copies.

A line of metrics.jsonl is the record of a step (n gated layers, G token groups) with its checksum, `check`:

| name | shape | what |
|---|---|---|
| step | | from 1 |
| loss | | nats a token, mean over the answer tokens of the batch; null where it is not finite |
| tokens, correct | | answer tokens, and how many of them are the most likely token |
| visual_tokens, v_sinks | | visual tokens of the batch, and how many of them are V-sinks; 0 without known dimensions |
| grad_norm | | norm of the whole gradient before clipping |
| finite | | whether loss and gradient were finite; if not, the step was skipped |
| gate_norm, gate_grad_norm | n | norm of each layer's gate before the step, and of its gradient |
| ratios | n, G | gate ratios, mean over the rows with an image |
| learning_rate | | of this step |
| step_s | | seconds since the end of the previous step, without saves and compilation |
| data_wait_s | | the part of it in which the devices waited for the batch |
| answer_tokens_per_s | | tokens / step_s |
| padding | | share of padding in the sequence positions of the batch, train.batch_size x the length of its bucket |
| positions_per_s | | these positions / step_s, of images, prompts and padding too |
| goodput | | seconds of this process so far by activity (goodput.py), and the share of `step` |

For independent gates loss, correct, grad_norm and finite have the shape n. Each of several seeds has a file of its own, whose
seconds are those of all seeds that were trained together. Other methods have no gates and ratios. In TensorBoard and Weights &
Biases each number has a name of its own: `ratios/layer10/v_sink`, `goodput/share`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import os
import socket
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from lsg_jax.checkpoint import METRICS, read_run
from lsg_jax.checkpoint.step_log import read_steps, step_line
from lsg_jax.config import TrainConfig, to_dict
from lsg_jax.digest import text_sha256
from lsg_jax.errors import ConfigError
from lsg_jax.files import naming, write_atomic
from lsg_jax.gating.keys import GROUPS
from lsg_jax.run_config import RunConfig

logger = logging.getLogger(__name__)


class Sink(Protocol):
    """A destination of records. Any method may raise anything."""

    def write(self, record: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


def check_installed_sinks(train: TrainConfig) -> None:
    """Raises ConfigError for a sink that is asked for, and whose package is not installed."""
    for name, package in (("tensorboard", "tensorboardX"), ("wandb", "wandb")):
        if getattr(train, name) and find_spec(package) is None:
            raise ConfigError(
                f'train.{name}: {package} is not installed; pip install "lsg_jax[metrics]", or leave train.{name} out'
            )


class MetricsLog:
    """All sinks that a configuration asks for. A failure gives one warning and never stops training.

    metrics.jsonl is tried again at the next step; other sinks are closed after a failure.

    Args:
        folder: the run folder; it holds run.json.
        after: the step that the run continues from. Records of later steps are dropped, since they are computed again.
    """

    def __init__(self, folder: Path, config: RunConfig, *, after: int):
        self._warned: set[str] = set()
        self._sinks: dict[str, Sink] = {}
        names = _Names(config)
        self._open(METRICS, lambda: JsonLines(folder / METRICS, after=after))
        if config.train.tensorboard:
            self._open("TensorBoard", lambda: TensorBoard(folder / "tensorboard", names, after=after))
        if config.train.wandb:
            self._open("Weights & Biases", lambda: WeightsAndBiases(folder, config.train.wandb, names))

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *unused: object) -> None:
        for name, sink in self._sinks.items():
            self._attempt(name, sink.close)

    def write(self, record: dict[str, Any]) -> None:
        """Writes the record of a step to all sinks."""
        for name, sink in list(self._sinks.items()):
            if not self._attempt(name, functools.partial(sink.write, record)) and name != METRICS:
                self._attempt(name, self._sinks.pop(name).close)

    def _open(self, name: str, make: Callable[[], Sink]) -> None:
        def opened() -> None:
            self._sinks[name] = make()

        self._attempt(name, opened)

    def _attempt(self, name: str, action: Callable[[], None]) -> bool:
        """Whether it worked; the first failure gives a warning."""
        try:
            action()
        except Exception as error:
            if name not in self._warned:
                self._warned.add(name)
                what = " ".join(f"{type(error).__name__}: {error}".split())
                remedy = '; pip install "lsg_jax[metrics]"' if isinstance(error, ImportError) else ""
                logger.warning("%s: metrics are not written (%s)%s; training goes on", name, what, remedy)
            return False
        return True


class JsonLines:
    """One record a line (`checkpoint.step_log`). The file always ends with a whole line: a partial one is cut off.

    Damaged lines of an earlier start are left out with one warning; the others stay.
    """

    def __init__(self, path: Path, *, after: int):
        records, damaged = read_steps(path)
        lines = "".join(step_line(record) for record in records if record["step"] <= after).encode()
        if not path.exists() or path.read_bytes() != lines:
            write_atomic(path, lines)
        missing = after - len({record["step"] for record in records if record["step"] <= after})
        if damaged and missing:
            logger.warning("%s: %d damaged lines left out; %d steps are missing there", path, damaged, missing)
        self.path = path
        self._file = path.open("ab", buffering=0)
        self._end = len(lines)

    def write(self, record: dict[str, Any]) -> None:
        line = step_line(_without_nan(record)).encode()
        left = memoryview(line)
        try:
            with naming(self.path):
                while left:
                    left = left[self._file.write(left) :]
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(self._end)
            raise
        self._end += len(line)

    def close(self) -> None:
        self._file.close()


def _without_nan(value: Any) -> Any:
    """Plain data with null for every number that is not finite, since NaN is no JSON."""
    if isinstance(value, dict):
        return {name: _without_nan(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class TensorBoard:
    """An event file for each start of the run.

    Records are written synchronously: tensorboardX's own event writer uses a thread, and waits for it for ever once it failed.
    """

    def __init__(self, folder: Path, names: _Names, *, after: int):
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.proto.summary_pb2 import Summary
        from tensorboardX.record_writer import RecordWriter

        self._event, self._summary, self._names = Event, Summary, names
        folder.mkdir(exist_ok=True)
        # TensorBoard reads the files in the order of their names
        self._file = RecordWriter(
            str(folder / f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}")
        )
        self._put(file_version="brain.Event:2")
        self._put(step=after + 1, session_log=SessionLog(status=SessionLog.START))  # hides what it has of this step and later

    def write(self, record: dict[str, Any]) -> None:
        values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in self._names.flat(record).items()]
        self._put(step=record["step"], summary=self._summary(value=values))

    def close(self) -> None:
        self._file.close()

    def _put(self, **fields: Any) -> None:
        self._file.write(self._event(wall_time=time.time(), **fields).SerializeToString())
        self._file.flush()


class WeightsAndBiases:
    """One W&B run for a run folder, however often it is resumed; W&B itself ignores steps that it already has."""

    def __init__(self, folder: Path, project: str, names: _Names):
        import wandb

        record = read_run(folder)
        started = json.dumps(to_dict(record.starts[0]), sort_keys=True)
        self._names = names
        self._run = wandb.init(
            project=project,
            id=text_sha256(started)[:16],
            resume="allow",
            reinit="create_new",  # seeds that are trained together have a run each
            name=folder.resolve().name,
            dir=str(folder),
            config=record.config,
        )

    def write(self, record: dict[str, Any]) -> None:
        self._run.log(self._names.flat(record), step=record["step"])

    def close(self) -> None:
        self._run.finish()


class _Names:
    """One name for each number of a record."""

    def __init__(self, config: RunConfig):
        gate = config.get_method().gate
        self._layers = [] if gate is None else [f"layer{layer}" for layer in gate.layers]
        self._groups = () if gate is None else GROUPS[gate.grouping]

    def flat(self, record: dict[str, Any]) -> dict[str, float]:
        """The finite numbers of a record but its step: {"ratios/layer10/v_sink": 0.4, ...}."""
        found = self._walk({name: value for name, value in record.items() if name != "step"}, ())
        return {"/".join(path): float(value) for path, value in found if math.isfinite(value)}

    def _walk(self, value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], float]]:
        if isinstance(value, list):
            value = dict(zip(self._layers if len(path) == 1 else self._groups, value, strict=True))
        if not isinstance(value, dict):
            yield path, value
            return
        for name, entry in value.items():
            yield from self._walk(entry, (*path, name))
