"""SIGTERM and Ctrl-C as a flag that a loop checks between its steps, so that it can save first."""

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
    """Yields a function that tells whether SIGTERM or SIGINT came, to be called after each step. A second SIGINT interrupts.

    Several processes must all call it after each step: after a signal to one of them it returns True at the same step in all.
    """
    if jax.distributed.is_initialized():
        # JAX handles SIGTERM itself; our handler would replace its own.
        with _handlers({signal.SIGINT: lambda: signal.raise_signal(signal.SIGTERM)}):
            yield _together
        return
    came: list[bool] = []
    note = lambda: came.append(True)
    with _handlers({signal.SIGTERM: note, signal.SIGINT: note}):
        yield lambda: bool(came)


@contextlib.contextmanager
def _handlers(actions: dict[signal.Signals, Callable[[], Any]]) -> Iterator[None]:
    """Runs an action for each signal; a second SIGINT interrupts. Does nothing outside the main thread, which alone may."""
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
    """Whether all processes have reached the step at which they stop together.

    JAX agrees on that step once in the life of a process: the highest number that any process has reached. So the count goes on
    through all loops of a command, and a loop that ends before that step passes the stop on to the next loop.
    """

    def __init__(self) -> None:
        self._asked = 0
        self._reached = False

    def __call__(self) -> bool:
        self._asked += 1
        self._reached = self._reached or multihost_utils.reached_preemption_sync_point(self._asked)
        return self._reached


_together = _SyncPoint()
