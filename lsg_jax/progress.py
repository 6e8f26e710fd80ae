"""How long-running functions report progress: one callback type, whatever shows it, and the names of compiled programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Progress = Callable[[int, int | None, str], None]
"""Called with (done, total, what): how many of `what` are done, of how many (None: not known yet)."""


def silent(done: int, total: int | None, what: str) -> None:
    """The `Progress` that shows nothing."""


PROGRAM = "/lsg_jax/program"
"""Event of `jax.monitoring` that `tracing` records, with the text `what`."""


def tracing(what: str, tokens: Any) -> None:
    """Names the program that JAX traces: called in a jitted function, it runs once for each shape that is compiled.

    Args:
        what: as in "the training step".
        tokens: [B, T, ...], whose shape is named too.
    """
    import jax

    rows, length = tokens.shape[:2]
    jax.monitoring.record_event(PROGRAM, what=f"{what} for {rows} x {length} tokens")


def training_progress(progress: Progress, what: str = "") -> Callable[[int, int, Mapping[str, Any]], None]:
    """The `on_step` of `train` that reports steps and the loss to `progress`; `what` goes before the loss."""
    return lambda step, total, metrics: progress(step, total, f"{what} loss {metrics['loss']:.4f}".lstrip())
