"""The one line that a command prints for an error."""

from __future__ import annotations

import errno
import os
import traceback

from lsg_jax.errors import LsgError
from lsg_jax.stopping import AGAIN

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
        return f"{found}: {reason}; set JAX_PLATFORMS=cpu, or install what the device needs, such as 'lsg_jax[cuda]'"
    if _is_out_of_memory(error):
        return f"no memory is left: {_first_line(error)}; lower the batch size or max_length, or take more devices"
    if isinstance(error, OSError):
        return _of_the_system(error)
    return (
        f"{type(error).__name__}: {_first_line(error)}; this is a fault of lsg, not yours: please report it with what "
        "--traceback prints"
    )


def is_about_a_file(error: BaseException) -> bool:
    """Whether the system refused a file or folder that the user named or that is missing. A full disk is no such case."""
    return isinstance(error, OSError) and bool(error.filename) and bool(error.strerror) and error.errno not in _FULL


def _of_the_system(error: OSError) -> str:
    """The cause of what the system refused, and for a full disk what to do."""
    where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) and error.filename else ""
    what = error.strerror or _first_line(error)
    if error.errno in _FULL:
        return f"{where}cannot be written: {what}; free space on the disk, or choose another output"
    return where + what


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether the host or a device has no memory left."""
    return isinstance(error, MemoryError) or (type(error).__name__ == "JaxRuntimeError" and "RESOURCE_EXHAUSTED" in str(error))


def _first_line(error: BaseException) -> str:
    """What the error says, in at most 300 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def _from_backends(error: BaseException) -> bool:
    """Whether JAX raised it while it looked for devices."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and frames[-1].f_globals.get("__name__") == "jax._src.xla_bridge"
