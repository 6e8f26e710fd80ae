"""What a process knows, told to the others. With one process these functions return their argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np

from lsg_jax.errors import CheckpointError, LsgError

T = TypeVar("T")


def is_primary() -> bool:
    """Whether this process does the file operations. Call after `jax.distributed.initialize`."""
    return jax.process_index() == 0


def host_array(leaf: jax.Array | np.ndarray) -> np.ndarray:
    """The whole value on the host; for an array that is sharded across processes a collective of all of them."""
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        return np.asarray(leaf)
    if leaf.is_fully_replicated:
        return np.asarray(leaf.addressable_data(0))
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))


def share_bytes(data: bytes) -> bytes:
    """The bytes of process 0, everywhere; a collective."""
    if jax.process_count() == 1:
        return data
    from jax.experimental import multihost_utils

    size = int(multihost_utils.broadcast_one_to_all(np.asarray(len(data), np.int32)))
    if size == 0:
        return b""
    buffer = np.zeros(size, np.uint8)
    if is_primary():
        buffer[:] = np.frombuffer(data, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(buffer)).tobytes()


def on_primary(action: Callable[[], T]) -> T | None:
    """Runs `action` on process 0 and returns its result there, None elsewhere; a collective.

    Raises:
        LsgError: what `action` raised, on process 0; a CheckpointError with the same text on the others, so that none of them
            waits for a process that gave up.
    """
    if jax.process_count() == 1:
        return action()
    result, failure = None, None
    if is_primary():
        try:
            result = action()
        except LsgError as error:
            failure = error
    text = share_bytes(str(failure).encode() if failure else b"").decode()
    if failure is not None:
        raise failure
    if text:
        raise CheckpointError(text)
    return result


def on_all(action: Callable[[], T]) -> T:
    """Runs `action` on every process and returns its result; where it fails on one of them, it fails on all; a collective.

    Raises:
        LsgError: what `action` raised, on the first process where it did; a CheckpointError that names it on the others.
    """
    if jax.process_count() == 1:
        return action()
    failure: LsgError | None = None
    try:
        result = action()
    except LsgError as error:
        failure = error
    texts = gather_texts(str(failure) if failure else "")
    for rank, text in enumerate(texts):
        if failure is not None and rank == jax.process_index():
            raise failure
        if text:
            raise CheckpointError(f"process {rank}: {text}")
    return result


def gather_texts(text: str) -> list[str]:
    """The texts of all processes, by their index; a collective."""
    if jax.process_count() == 1:
        return [text]
    from jax.experimental import multihost_utils

    data = text.encode()
    sizes = np.asarray(multihost_utils.process_allgather(np.asarray(len(data), np.int32)))
    if not sizes.any():
        return [""] * len(sizes)
    buffer = np.zeros(sizes.max(), np.uint8)
    buffer[: len(data)] = np.frombuffer(data, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(buffer))
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)]
