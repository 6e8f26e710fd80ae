"""How long-running functions report progress: one callback type, whatever shows it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Progress = Callable[[int, int | None, str], None]
"""Called with (done, total, what): how many of `what` are done, of how many (None: not known yet)."""


def silent(done: int, total: int | None, what: str) -> None:
    """The `Progress` that shows nothing."""


def training_progress(progress: Progress, what: str = "") -> Callable[[int, int, Mapping[str, Any]], None]:
    """The `on_step` of `train` that reports steps and the loss to `progress`; `what` goes before the loss."""
    return lambda step, total, metrics: progress(step, total, f"{what} loss {metrics['loss']:.4f}".lstrip())
