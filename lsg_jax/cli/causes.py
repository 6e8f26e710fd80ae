"""The one line that a command prints for an error."""

from __future__ import annotations

import os
import traceback

from lsg_jax.errors import LsgError
from lsg_jax.stopping import AGAIN


def cause_of(error: BaseException) -> str:
    """What went wrong, and for a machine that lacks what was asked for, what to do."""
    if isinstance(error, LsgError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return AGAIN
    if _from_backends(error):
        asked = os.environ.get("JAX_PLATFORMS")
        found = f"JAX cannot use JAX_PLATFORMS={asked}" if asked else "JAX finds no device that it can use"
        # JAX states no reason where the platform's plugin is missing or finds no device.
        reason = str(error).partition(" (set JAX_PLATFORMS")[0] or "there is no such device, or no plugin for it"
        return f"{found}: {reason}; set JAX_PLATFORMS=cpu, or install what the device needs, such as 'jax[cuda12]'"
    if is_about_a_file(error):
        return f"{error.filename}: {error.strerror}"  # type: ignore[attr-defined]
    return f"{type(error).__name__}: {error}"


def is_about_a_file(error: BaseException) -> bool:
    """Whether the system refused a file or folder that the user named or that is missing."""
    return isinstance(error, OSError) and bool(error.filename) and bool(error.strerror)


def _from_backends(error: BaseException) -> bool:
    """Whether JAX raised it while it looked for devices."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and frames[-1].f_globals.get("__name__") == "jax._src.xla_bridge"
