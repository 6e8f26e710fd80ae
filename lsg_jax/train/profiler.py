"""`train.profile`: a trace of some steps, for TensorBoard's profiler or Perfetto."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import jax

logger = logging.getLogger(__name__)


class StepProfiler:
    """Traces the steps of a range that this run takes. A failure is a warning, and training continues.

    Args:
        folder: where the trace goes.
        steps: the first and the last step; empty for none.
        settle: waits until the devices are idle, so that the trace holds these steps only.
    """

    def __init__(self, folder: Path, steps: tuple[int, ...], settle: Callable[[], None]):
        self._folder, self._steps, self._settle = folder, steps, settle
        self._tracing = False

    def __enter__(self) -> StepProfiler:
        return self

    def __exit__(self, *unused: object) -> None:
        self._stop()

    def before(self, step: int) -> None:
        """Call before each step."""
        if self._steps and not self._tracing and self._steps[0] <= step <= self._steps[1]:
            self._settle()
            self._tracing = True
            self._attempt(self._start)

    def after(self, step: int) -> None:
        """Call after a step is dispatched."""
        if self._tracing and step >= self._steps[1]:
            self._settle()
            self._stop()

    def _start(self) -> None:
        # a trace that ends in a folder that can't be made stays open in JAX, and no other can start in this process
        self._folder.mkdir(parents=True, exist_ok=True)
        jax.profiler.start_trace(self._folder)

    def _stop(self) -> None:
        if self._tracing:
            self._tracing = False
            self._attempt(jax.profiler.stop_trace)

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            logger.warning("%s: no trace of steps: %s", self._folder, " ".join(str(error).split()))
            self._tracing, self._steps = False, ()
