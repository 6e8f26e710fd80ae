"""Several JAX processes on this machine, as in a run on several hosts."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

_IMPORTABLE = (Path(__file__).parent, Path(__file__).parent.parent)  # tests/ and the repository


class ProcessError(AssertionError):
    """A process failed or timed out. The message ends with its stderr."""


def with_torch() -> str:
    """PYTHONPATH of a process that needs PyTorch, which those that tests start do not see (conftest)."""
    return os.pathsep.join(path for path in sys.path if path and not path.endswith("without_torch"))


def run_processes(
    script: str, count: int, *, devices_each: int = 1, args: Sequence[object] = (), timeout: float = 60.0
) -> list[str]:
    """Runs Python source in `count` processes that form one JAX cluster on CPU, and waits for all of them.

    The cluster is up when the script starts: `jax.process_index()` and `jax.devices()` are those of the whole. The script gets
    `args` as `sys.argv[1:]` and can import the modules of `tests/`. It should write results to files: Gloo, which does the
    collectives, writes to stdout too.

    Args:
        devices_each: CPU devices of each process.
        timeout: seconds for all of them together.

    Returns:
        stdout of each process, by rank.

    Raises:
        ProcessError: a process ended with a status other than 0, or timed out; the others are killed at once.
    """
    processes = _start(script, count, devices_each, [str(arg) for arg in args])
    try:
        with ThreadPoolExecutor(count) as pool:
            ends = [pool.submit(_finish, process, rank) for rank, process in enumerate(processes)]
            done, running = wait(ends, timeout, return_when=FIRST_EXCEPTION)
            for process in processes:  # a process whose partner is gone would wait for its heartbeat
                process.kill()
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for end in done:
        if (error := end.exception()) is not None:
            raise error
    if running:
        said = "\n".join(str(end.exception()) for end in running)
        raise ProcessError(f"not done after {timeout} s: {len(running)} of {count} processes\n{said}")
    return [end.result() for end in ends]


def start_commands(
    arguments: Sequence[Sequence[object]], *, devices_each: int = 1, heartbeat: int = 10
) -> list[subprocess.Popen[str]]:
    """Starts `python -m lsg_jax` with each list of arguments, as the processes of one cluster."""
    address, count = free_address(), len(arguments)
    common = ["--multihost", "--coordinator", address, "--num-processes", count, "--heartbeat", heartbeat]
    return [_open(["-m", "lsg_jax", *arguments[rank], *common, "--process-id", rank], devices_each) for rank in range(count)]


def _start(script: str, count: int, devices: int, args: list[str]) -> list[subprocess.Popen[str]]:
    address = free_address()
    return [
        _open(["-c", f"import processes\nprocesses.join({address!r}, {count}, {rank})\n{script}", *args], devices)
        for rank in range(count)
    ]


def free_address() -> str:
    """HOST:PORT of this machine that is free."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def _open(arguments: Sequence[object], devices: int) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}".strip(),
        "PYTHONPATH": os.pathsep.join([*map(str, _IMPORTABLE), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
    }
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _finish(process: subprocess.Popen[str], rank: int) -> str:
    stdout, stderr = process.communicate()
    if process.returncode:
        raise ProcessError(f"process {rank} ended with status {process.returncode}:\n{stderr[-4000:]}")
    return stdout


def join(address: str, count: int, rank: int) -> None:
    """Joins the cluster; a started process calls it first."""
    import jax

    sys.excepthook = _end_at_once

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_compilation_cache", False)  # as in lsg_jax.distributed
    jax.distributed.initialize(
        address,
        num_processes=count,
        process_id=rank,
        initialization_timeout=60,
        heartbeat_timeout_seconds=10,
        shutdown_timeout_seconds=20,
    )


def _end_at_once(*error: Any) -> None:
    # A normal exit waits for the other processes, which may be waiting for this one.
    traceback.print_exception(*error)
    sys.stderr.flush()
    os._exit(1)
