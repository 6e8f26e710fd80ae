"""The one door to Orbax: which context it works in, what it may print, and how its failures look."""

from __future__ import annotations

import contextlib
import gc
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax

from lsg_jax.checkpoint.digest import first_line

logger = logging.getLogger(__name__)

T = TypeVar("T")


class OrbaxError(Exception):
    """What Orbax or TensorStore said, as one line."""


def call_orbax(action: Callable[[Any], T], *, alone: bool) -> T:
    """Runs `action(ocp)`, `ocp` being Orbax's v1 module, imported here since that takes a second.

    Args:
        action: what to do.
        alone: this process works without the others. Otherwise all of them must make the same call.

    Raises:
        OrbaxError: whatever Orbax raised: it wraps the errors of its threads and of TensorStore in several ways. Only a lack of
            memory, on the host or a device, is passed on as it is: that is no damage.
    """
    from orbax.checkpoint import v1 as ocp

    context = ocp.Context()
    if alone:
        context.multiprocessing.primary_host = jax.process_index()
        context.multiprocessing.active_processes = {jax.process_index()}
        context.multiprocessing.barrier_sync_key_prefix = f"lsg_{jax.process_index()}"
    with _quiet():
        try:
            with context:
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
        gc.collect()  # the reads that Orbax gave up, which would complain later
    raise OrbaxError(text)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps two things off the terminal: Orbax takes zarr3 without OCDBT for a malformed checkpoint and says so on each load,
    and after a failed read it drops the others unfinished, each with a traceback of its own."""

    noise = ("TensorStore data files not found", "was destroyed but it is pending", "exception was never retrieved")

    def wanted(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return not any(part in text for part in noise)

    names, hook = ("absl", "asyncio"), sys.unraisablehook
    for name in names:
        logging.getLogger(name).addFilter(wanted)
    sys.unraisablehook = lambda unraisable: logger.debug("%s", unraisable.exc_value)
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for name in names:
            logging.getLogger(name).removeFilter(wanted)
