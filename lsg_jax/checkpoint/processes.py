"""Values shared between processes, and errors raised on all of them. With one process these functions do nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np

from lsg_jax.digest import arrays_sha256
from lsg_jax.errors import CheckpointError, LsgError

T = TypeVar("T")


def is_primary() -> bool:
    """Whether this process writes files. Call it after `jax.distributed.initialize`."""
    return jax.process_index() == 0


def host_array(leaf: jax.Array | np.ndarray) -> np.ndarray:
    """The whole value on the host; a collective where the array is sharded across processes."""
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        return np.asarray(leaf)
    if leaf.is_fully_replicated:
        return np.asarray(leaf.addressable_data(0))
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))


def tree_sha256(tree: Any) -> str:
    """sha256 of the names, shapes and bytes of a tree of arrays; a collective where they are sharded across processes."""
    return arrays_sha256((jax.tree_util.keystr(path), host_array(leaf)) for path, leaf in jax.tree.leaves_with_path(tree))


def share_bytes(data: bytes) -> bytes:
    """The bytes of process 0, on all processes; a collective."""
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
    """Runs `action` on process 0; returns its result there and None elsewhere; a collective.

    Raises:
        LsgError: the error of `action` on process 0, and a CheckpointError with its text on the others, so that none of them
            waits for a process that has failed.
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
    """Runs `action` on every process and returns its result; if it fails on one, it fails on all; a collective.

    Raises:
        LsgError: the error of `action` on the first process that failed, and a CheckpointError naming that process on the
            others.
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
    """The texts of all processes, in the order of their index; a collective."""
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
