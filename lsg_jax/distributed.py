"""Several processes that compute together, one on each host: joining them, and ending them.

Inside `joined`, `jax.process_index()` and `jax.devices()` are those of the whole cluster, and every process must make the same
collective calls in the same order. JAX ends all processes if one of them sends no heartbeat for longer than its timeout.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lsg_jax.errors import ConfigError, LsgError, Preempted

HEARTBEAT = 60  # seconds without a heartbeat after which a process counts as gone
START = 300  # seconds within which all processes must have joined
SHUTDOWN = 5.0  # seconds for which a failed process waits for the others to shut down too

_BY_HAND = "give --coordinator HOST:PORT, --num-processes N and --process-id I"


@contextlib.contextmanager
def joined(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    heartbeat: int = HEARTBEAT,
    start: float = START,
) -> Iterator[None]:
    """Joins the cluster, and leaves it at the end of the block. Call it before anything is computed.

    JAX finds what is not given: from the metadata of a TPU slice, from Slurm, Open MPI or Kubernetes, and the coordinator from
    JAX_COORDINATOR_ADDRESS.

    A process that fails inside the block does not wait for the others, which may be waiting for it: it ends with the exit code
    of its error, and they end within the heartbeat. If all fail, as after a wrong file, each ends with its own code.

    Args:
        coordinator: HOST:PORT of process 0; the port must be free there and open to the others.
        process_id: index of this process among `num_processes`, from 0.
        heartbeat: seconds without a heartbeat after which a process counts as gone.
        start: seconds within which all processes must have joined.

    Raises:
        ConfigError: the cluster was not found, or not all processes joined.
    """
    import jax

    _check(coordinator, num_processes, process_id, heartbeat)
    _join(coordinator, num_processes, process_id, heartbeat, start)
    try:
        if jax.default_backend() == "cpu" and jax.process_count() > 1:
            # Only process 0 would find its programs in the cache, and Gloo waits at most 30 s for the others to compile.
            jax.config.update("jax_enable_compilation_cache", False)
        yield
    except (Preempted, BrokenPipeError):  # raised by all processes at the same step, or after the last collective
        jax.distributed.shutdown()
        raise
    except BaseException as error:
        # The process ends at exit, since the error has yet to be reported.
        atexit.register(_end_after, _begin(jax.distributed.shutdown), _exit_code(error))
        raise
    else:
        jax.distributed.shutdown()


def is_first() -> bool:
    """Whether this process reports; does not initialise devices if there is only one process."""
    import jax

    return not jax.distributed.is_initialized() or jax.process_index() == 0


def _check(coordinator: str | None, num_processes: int | None, process_id: int | None, heartbeat: int) -> None:
    """Refuses arguments that would make JAX crash or wait for nothing."""
    if heartbeat < 1:
        raise ConfigError(f"--heartbeat {heartbeat}: it must be at least 1 second")
    if process_id is not None and num_processes is not None and not 0 <= process_id < num_processes:
        raise ConfigError(f"--process-id {process_id}: with {num_processes} processes it is one of 0 to {num_processes - 1}")
    if coordinator is None:
        return
    port = coordinator.rpartition(":")[2]
    if ":" not in coordinator or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ConfigError(f"--coordinator {coordinator}: it must be HOST:PORT, the address of process 0")
    if process_id == 0:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", int(port)))
            except OSError as error:
                raise ConfigError(f"--coordinator {coordinator}: port {port}: {error.strerror}; choose another one") from None


def _join(coordinator: str | None, num_processes: int | None, process_id: int | None, heartbeat: int, start: float) -> None:
    """`jax.distributed.initialize` with a timeout: JAX's own timeout aborts the process and does not name the cause."""
    import jax

    def initialize() -> None:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            initialization_timeout=int(start) + 60,
            heartbeat_timeout_seconds=heartbeat,
        )

    joining = _begin(initialize)
    joining.thread.join(start)
    if joining.failure is not None:
        what = " ".join(str(joining.failure).split()) or type(joining.failure).__name__
        raise ConfigError(f"--multihost: no cluster of several processes was found here ({what}): {_BY_HAND}")
    if joining.thread.is_alive():
        atexit.register(_end, ConfigError.exit_code)  # JAX is still waiting, and would abort the process later
        raise ConfigError(f"--multihost: {_what_is_missing(coordinator, process_id)} within {start:g} s: {_TO_CHECK}")


_TO_CHECK = (
    "check that all processes run, that each has an id of its own and the same number of processes and coordinator, and that "
    "the coordinator's port is open between the hosts"
)


def _what_is_missing(coordinator: str | None, process_id: int | None) -> str:
    if coordinator is None or process_id == 0:
        return "not all processes came"
    host, _, port = coordinator.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        return f"the coordinator did not answer at {coordinator} ({error.strerror or error})"
    return "the coordinator answered, but not all processes came"


def _end_after(shutdown: _Begun, code: int) -> None:
    """Ends this process with `code`, once all processes have shut down or after SHUTDOWN seconds.

    Registered last and so run first, before JAX's own exit handler, which would wait for all processes.
    """
    shutdown.thread.join(SHUTDOWN)
    _end(code)


def _end(code: int) -> None:
    """Ends this process now, without waiting for its threads."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@dataclass
class _Begun:
    """A call in a thread, since it cannot be interrupted, and the exception that it raised."""

    thread: threading.Thread
    failure: Exception | None = None


def _begin(action: Callable[[], None]) -> _Begun:
    def run() -> None:
        try:
            action()
        except Exception as error:
            begun.failure = error

    begun = _Begun(threading.Thread(target=run, daemon=True))
    begun.thread.start()
    return begun


def _exit_code(error: BaseException) -> int:
    if isinstance(error, LsgError):
        return error.exit_code
    return Preempted.exit_code if isinstance(error, KeyboardInterrupt) else 1
