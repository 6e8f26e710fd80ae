"""SIGTERM and Ctrl-C as something that a loop looks at between its steps, so that it can save first."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Turns SIGTERM and SIGINT into a question that the loop asks after each step; a second SIGINT does not wait for it.

    With several processes all of them must ask after each step: a signal to one makes the answer True at the same step in all.
    """
    if jax.distributed.is_initialized():
        # JAX handles SIGTERM itself, and a handler of ours would take it away.
        with _handlers({signal.SIGINT: lambda: signal.raise_signal(signal.SIGTERM)}):
            yield _together
        return
    came: list[bool] = []
    note = lambda: came.append(True)
    with _handlers({signal.SIGTERM: note, signal.SIGINT: note}):
        yield lambda: bool(came)


@contextlib.contextmanager
def _handlers(actions: dict[signal.Signals, Callable[[], Any]]) -> Iterator[None]:
    """Does something on signals, where this is the main thread, which alone may; a second SIGINT interrupts."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupted = False

    def handle(number: int, _: Any) -> None:
        nonlocal interrupted
        if number == signal.SIGINT and interrupted:
            raise KeyboardInterrupt
        interrupted = interrupted or number == signal.SIGINT
        actions[signal.Signals(number)]()

    before = {number: signal.signal(number, handle) for number in actions}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _SyncPoint:
    """Whether all processes have come to the step at which they stop together.

    JAX agrees on that step once in the life of a process, by the highest number that any process has reached. So the numbers go
    on through all loops of a command, and a step that a loop could not stop at stops the next one.
    """

    def __init__(self) -> None:
        self._asked = 0
        self._reached = False

    def __call__(self) -> bool:
        self._asked += 1
        self._reached = self._reached or multihost_utils.reached_preemption_sync_point(self._asked)
        return self._reached


_together = _SyncPoint()
