"""`lsg`, and `python -m lsg_jax`: handles stop signals and closed streams before anything large is imported."""

import contextlib
import os
import sys

from lsg_jax import stopping


def run() -> None:
    """Runs the command of `sys.argv` and ends the process with its exit code."""
    try:
        stopping.handle_signals()
        _open_standard_streams()
        stopping.watch()
        sys.unraisablehook = _unraisable
        from lsg_jax.cli import main

        code = main()
        stopping.ignore_signals()
    except KeyboardInterrupt:  # while the commands were imported, or just after one
        stopping.end_now()
    _flush()
    if code == stopping.Preempted.exit_code:
        os._exit(code)  # JAX's threads may be in the middle of something that they would wait for, or abort
    sys.exit(code)


def _open_standard_streams() -> None:
    """Replaces closed ones: otherwise a file that is opened next becomes, say, descriptor 2, and logs are written into it."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115


def _flush() -> None:
    """Empties the streams, whose readers may have gone, so that Python has nothing to complain about at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _unraisable(raised: "sys.UnraisableHookArgs") -> None:
    """A signal that came within a destructor or callback of C code, where Python drops exceptions, ends the command too."""
    if isinstance(raised.exc_value, KeyboardInterrupt):
        stopping.end_now()
    sys.__unraisablehook__(raised)


if __name__ == "__main__":
    run()
