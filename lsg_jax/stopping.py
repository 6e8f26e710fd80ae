"""What SIGTERM and Ctrl-C do to a command: a loop that saves finishes its step and saves first, all else ends at once.

The rule of one process, however often it is told to stop:

- inside `stop_signals`, signals are only noted; the loop asks, saves, and raises `Preempted`;
- while a module is imported, the process is ended: modules in C++ turn an exception from their own imports into an abort;
- elsewhere the first signal raises KeyboardInterrupt, and later ones do nothing, since the command is ending;
- where that does not end it within GRACE seconds, in a compilation or a library that drops the exception, the process is ended;
- the third Ctrl-C ends the process at once.

Signals belong to the process, so what has come is held here once. Python calls handlers in the main thread, and only between
two of its own instructions; so a command also has a thread that hears of signals while the main thread computes (`watch`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from lsg_jax.errors import Preempted

SIGNALS = (signal.SIGTERM, signal.SIGINT)
FINISHING = "stopping once the step that runs is done and saved"
AGAIN = "stopped before it was done; run the same command again"
PATIENCE = 3  # Ctrl-C this often ends the process at once
GRACE = 10.0  # seconds for a command with nothing to save to end by itself


class _Signals:
    """The signals that have come since the handlers were installed."""

    def __init__(self) -> None:
        self.came = False
        self.saving = 0  # loops that ask whether to stop, one within the other
        self._interrupts = 0

    def note(self, number: int, frame: FrameType | None) -> None:
        """The handler."""
        self._interrupts += number == signal.SIGINT
        if self._interrupts >= PATIENCE:
            end_now()
        first, self.came = not self.came, True
        if first and not self.saving:
            if _importing(frame):
                end_now()
            raise KeyboardInterrupt


def _importing(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code.co_filename != "<frozen importlib._bootstrap>":
        frame = frame.f_back
    return frame is not None


_signals = _Signals()


def handle_signals() -> dict[signal.Signals, Any]:
    """Handles SIGTERM and SIGINT from here on. Returns the handlers that were replaced.

    It replaces none the second time, in a thread, and in a process that has joined a cluster: JAX handles SIGTERM there.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) == _signals.note or _in_cluster():
        return {}
    _signals.__init__()  # type: ignore[misc]  # what came in an earlier command of this process is over
    return {number: signal.signal(number, _signals.note) for number in SIGNALS}


def _in_cluster() -> bool:
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def watch() -> None:
    """Starts the thread that ends this process after the third Ctrl-C, or if it does not end by itself (see above)."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)

    def hear() -> None:
        interrupts, ending, told = 0, False, False
        while number := os.read(read, 1):
            interrupts += number[0] == signal.SIGINT
            if interrupts >= PATIENCE:
                end_now()
            if number[0] not in SIGNALS or ending:
                continue
            if _signals.saving:
                if not told:
                    told = True
                    _say(FINISHING)
            else:
                ending = True
                late = threading.Timer(GRACE, end_now)
                late.daemon = True
                late.start()

    threading.Thread(target=hear, name="lsg signals", daemon=True).start()


def was_stopped() -> bool:
    """Whether a signal has come, although whatever ran then went on."""
    return _signals.came


def ignore_signals() -> None:
    """Ignores SIGTERM and SIGINT from here on: the command is done, and reports."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Handles SIGTERM and SIGINT inside the block."""
    before = handle_signals()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_now() -> None:
    """Ends the process without waiting for anything, with one line."""
    _say(AGAIN)
    os._exit(Preempted.exit_code)


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"lsg: {text}\n".encode())


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether to stop, to be called after each step.

    Several processes must all call it after each step: after a signal to one of them it returns True at the same step in all.

    Raises:
        Preempted: a signal came, and the block ended without looking: what it has done is saved.
    """
    if _in_cluster():
        # JAX handles SIGTERM itself; our handler would replace its own.
        with _sigint_as_sigterm(), _saving():
            yield _together
        return
    with handled():
        with _saving():
            yield lambda: _signals.came
        if _signals.came and not _signals.saving:
            raise Preempted(AGAIN)


@contextlib.contextmanager
def finishing() -> Iterator[None]:
    """Inside the block, what runs handles signals, and ends in its own time. The third Ctrl-C still ends the process."""
    with _saving():
        yield


@contextlib.contextmanager
def _saving() -> Iterator[None]:
    _signals.saving += 1
    try:
        yield
    finally:
        _signals.saving -= 1


@contextlib.contextmanager
def _sigint_as_sigterm() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupts = 0

    def pass_on(*_: Any) -> None:
        nonlocal interrupts
        interrupts += 1
        if interrupts >= PATIENCE:
            end_now()
        signal.raise_signal(signal.SIGTERM)

    before = signal.signal(signal.SIGINT, pass_on)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class _SyncPoint:
    """Whether all processes have reached the step at which they stop together.

    JAX agrees on that step once in the life of a process: the highest number that any process has reached. So the count goes on
    through all loops of a command, and a loop that ends before that step passes the stop on to the next loop.
    """

    def __init__(self) -> None:
        self._asked = 0
        self._reached = False

    def __call__(self) -> bool:
        from jax.experimental import multihost_utils

        self._asked += 1
        self._reached = self._reached or multihost_utils.reached_preemption_sync_point(self._asked)
        return self._reached


_together = _SyncPoint()
