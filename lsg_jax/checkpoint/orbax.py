"""The one door to Orbax: what it may print, and how its failures look."""

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


class OrbaxError(Exception):
    """What Orbax or TensorStore said, as one line."""


def call_orbax(action: Callable[[Any], T]) -> T:
    """Runs `action(ocp)`, `ocp` being Orbax's v1 module, imported here since that takes a second.

    All processes must make the same calls in the same order: Orbax numbers them and waits for each other by number.

    Raises:
        OrbaxError: whatever Orbax raised: it wraps the errors of its threads and of TensorStore in several ways. Only a lack of
            memory, on the host or a device, is passed on as it is: that is no damage.
    """
    from orbax.checkpoint import v1 as ocp

    with _quiet():
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
        gc.collect()  # the tasks that Orbax gave up, which would complain later
    raise OrbaxError(text)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """After a failure Orbax drops its other tasks unfinished, each with a traceback of its own: not on the user's terminal."""

    noise = ("was destroyed but it is pending", "exception was never retrieved")

    def wanted(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return not any(part in text for part in noise)

    asyncio, hook = logging.getLogger("asyncio"), sys.unraisablehook
    asyncio.addFilter(wanted)
    sys.unraisablehook = lambda unraisable: logger.debug("%s", unraisable.exc_value)
    try:
        yield
    finally:
        sys.unraisablehook = hook
        asyncio.removeFilter(wanted)
