"""Calls into Orbax: one place that turns its failures into one line and silences its logs."""

from __future__ import annotations

import contextlib
import gc
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax

from lsg_jax.checkpoint.problem import first_line

logger = logging.getLogger(__name__)

T = TypeVar("T")

FOREVER = 4_000_000_000  # seconds; less than half of what Python lets a thread wait for, so that a clock may be set back too


class OrbaxError(Exception):
    """An error of Orbax or TensorStore, as one line."""


def call_orbax(action: Callable[[Any], T]) -> T:
    """Runs `action(ocp)` with Orbax's v1 module, which is imported here since that takes a second.

    All processes must make the same calls in the same order: Orbax matches them by their count.

    Raises:
        OrbaxError: any error of Orbax, which wraps those of its threads and of TensorStore in several ways.
        MemoryError, jax.errors.JaxRuntimeError: no memory left on the host or a device; passed on, since nothing is damaged.
    """
    from orbax.checkpoint import v1 as ocp

    # Its deadlines are times of day, which a clock that is set makes pass at once, so they are put beyond any clock's reach;
    # a process that waits for one that is gone ends by the heartbeat of JAX. Threads wait for each other until such deadlines
    # only where folders are made in the background.
    context = ocp.Context()
    context.asynchronous.timeout_secs = FOREVER
    context.asynchronous.create_directories_asynchronously = False
    with _quiet(), context:
        try:
            return action(ocp)
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:
            logger.debug("orbax: %s", error, exc_info=True)
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            text = first_line(cause)
            del cause
        gc.collect()  # unfinished tasks of Orbax, which would log when they are collected later
    raise OrbaxError(text)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the tracebacks that Orbax's threads log, and those of the tasks that it abandons after a failure."""

    noise = ("was destroyed but it is pending", "exception was never retrieved")

    def wanted(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return not any(part in text for part in noise)

    def not_failed(record: logging.LogRecord) -> bool:
        return record.levelno < logging.ERROR or logger.isEnabledFor(logging.DEBUG)

    asyncio, absl, hook = logging.getLogger("asyncio"), logging.getLogger("absl"), sys.unraisablehook
    asyncio.addFilter(wanted)
    absl.addFilter(not_failed)
    sys.unraisablehook = lambda raised: (
        hook(raised) if isinstance(raised.exc_value, KeyboardInterrupt) else logger.debug("%s", raised.exc_value)
    )
    try:
        yield
    finally:
        sys.unraisablehook = hook
        asyncio.removeFilter(wanted)
        absl.removeFilter(not_failed)
