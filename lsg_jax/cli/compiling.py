"""Says on stderr what JAX compiles and how long that takes, as JAX reports it to `jax.monitoring`."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any, TextIO

from lsg_jax import distributed
from lsg_jax.cli.printable import say
from lsg_jax.progress import PROGRAM

SLOW = 2.0  # seconds from which a program is named

_TRACE = "/jax/core/compile/jaxpr_trace_duration"
_LOWER = "/jax/core/compile/jaxpr_to_mlir_module_duration"
_COMPILE = "/jax/core/compile/backend_compile_duration"
_SAVED = "/jax/compilation_cache/compile_time_saved_sec"


@contextlib.contextmanager
def compilations_told() -> Iterator[None]:
    """Inside the block, a line on stderr for each program that takes SLOW seconds to compile, or did when it was kept on disk.

    The line begins once the program is slow, and ends with the seconds of tracing and compiling. Process 0 only. A program that
    `progress.tracing` does not name is not told when it is read from the disk.
    """
    from jax import monitoring

    listener = _Listener(sys.stderr)
    monitoring.register_event_listener(listener.named)
    monitoring.register_scalar_listener(listener.begun)
    monitoring.register_event_duration_secs_listener(listener.ended)
    try:
        yield
    finally:
        monitoring.unregister_event_listener(listener.named)
        monitoring.unregister_scalar_listener(listener.begun)
        monitoring.unregister_event_duration_listener(listener.ended)


class _Listener(threading.local):
    """What each thread compiles: JAX traces a function, lowers it, and compiles it or reads it from the cache."""

    def __init__(self, stream: TextIO):
        self.stream = stream
        self.tracing: list[str] = []  # functions, the innermost last
        self.names: dict[str, str] = {}  # function -> what it is called
        self.spent: dict[str, float] = {}  # function -> seconds since its trace began
        self.saved = 0.0  # seconds that the cache saves
        self.line: _Line | None = None

    def named(self, event: str, **about: Any) -> None:
        if event == PROGRAM and self.tracing:
            self.names[self.tracing[-1]] = about["what"]

    def begun(self, event: str, value: float, **about: Any) -> None:
        if event == _TRACE:
            function = about["fun_name"]
            self.tracing.append(function)
            self.names.pop(function, None)
            self.spent[function] = 0.0
        elif event == _COMPILE and distributed.is_first():
            function = _function(about["fun_name"])
            self.saved = 0.0
            self.line = _Line(self.names.get(function, function), SLOW - self.spent.get(function, 0.0), self.stream)

    def ended(self, event: str, duration_secs: float, **about: Any) -> None:
        if event == _SAVED:
            self.saved = duration_secs
        if event not in (_TRACE, _LOWER, _COMPILE):
            return
        function = _function(about["fun_name"])
        self.spent[function] = self.spent.get(function, 0.0) + duration_secs
        if event == _TRACE and self.tracing:
            self.tracing.pop()
        elif event == _COMPILE:
            total = self.spent.pop(function)
            if self.line is not None:
                self.line.end(total, self.saved if function in self.names else 0.0)
            self.line = None


class _Line:
    """The line about one program. It begins after some seconds, if it has not ended by then."""

    def __init__(self, program: str, after: float, stream: TextIO):
        self._text, self._stream, self._begun = f"compiling {program} ...", stream, False
        self._timer = threading.Timer(max(after, 0.0), self._begin)
        self._timer.daemon = True
        self._timer.start()

    def _begin(self) -> None:
        # where a progress bar has taken the place of stderr, only whole lines appear
        self._begun = sys.stderr is self._stream
        say(self._text if self._begun else f"{self._text}\n")

    def end(self, seconds: float, saved: float) -> None:
        """Ends it, with its seconds; `saved` are those that the cache has saved."""
        self._timer.cancel()
        self._timer.join()
        if self._begun or seconds + saved >= SLOW:  # JAX's clock may be a little behind the timer
            found = "found in the cache of compiled programs, " if saved else ""
            say(f"{'' if self._begun else self._text} {found}{seconds:.{0 if seconds >= 10 else 1}f} s\n")


def _function(module: str) -> str:
    """`jit(f)` -> `f`."""
    return module.removeprefix("jit(").removesuffix(")")
