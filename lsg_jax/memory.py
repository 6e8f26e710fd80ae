"""Sizes that cannot fit are refused by arithmetic, before anything is allocated or compiled.

A size is a lower bound of what is needed and is compared with all memory there is: what passes may still be too large, what is
refused never fits.
"""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from lsg_jax.errors import ConfigError

if TYPE_CHECKING:
    from jax.sharding import Mesh

GIB = 2**30


def device_memory() -> int:
    """Bytes that a program may use on one device; of CPU devices, their share of the machine's memory."""
    device = jax.local_devices()[0]
    if stats := device.memory_stats():
        return stats["bytes_limit"]
    return host_memory() // jax.local_device_count()


def agreed_memory() -> int:
    """`device_memory` of the process that has the least, the same in all of them; a collective."""
    if jax.process_count() == 1:
        return device_memory()
    from jax.experimental import multihost_utils

    kib = np.asarray(device_memory() // 1024, np.int32)  # 64 bits would be cut
    return int(multihost_utils.process_allgather(kib).min()) * 1024


def host_memory() -> int:
    """Bytes of the machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_fits(needed: float, what: str, remedy: str, *, mesh: Mesh | None = None, host: bool = False) -> None:
    """Refuses what cannot fit.

    Args:
        needed: bytes, a lower bound.
        what: for the error; it begins with the setting that asks for so much.
        remedy: what to lower.
        mesh: the devices that share it; None for one. CPU devices share the memory of the machine in any case.
        host: compares with the memory of this machine, not that of devices.

    Raises:
        ConfigError: it is more than all of their memory; says how much.
    """
    there = host_memory() * (1 if host else jax.process_count())
    if not host and jax.default_backend() != "cpu":
        there = device_memory() * (1 if mesh is None else mesh.size)
    if needed > there:
        raise ConfigError(f"{what} needs {needed / GIB:,.1f} GiB or more, and there are {there / GIB:,.1f} GiB: {remedy}")


def check_answers(vlm: Any, rows: int, length: int, remedy: str) -> None:
    """Refuses a batch of answers of a `VLM` whose keys and values cannot fit.

    Args:
        rows: of the batch, over all devices. length: tokens of prompt and answer, or less.

    Raises:
        ConfigError: as `check_fits`.
    """
    text = vlm.config.text
    value = np.dtype(vlm.frozen["language_model"]["embed_tokens"].dtype).itemsize  # keys have the dtype of the weights
    passes = 2 if vlm.method.contrasts else 1
    cache = 2.0 * passes * value * text.num_layers * text.num_kv_heads * text.head_dim * rows * length
    check_fits(cache, f"a batch of {rows} answers of {length} tokens, prompt included,", remedy, mesh=vlm.mesh)


def tree_bytes(tree: Any) -> float:
    """Bytes of a tree of arrays or of their shapes."""
    return float(sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree)))


def shard_bytes(tree: Any) -> int:
    """Bytes of one device of a tree of sharded arrays, or of their shapes."""

    def leaf_bytes(leaf: Any) -> int:
        return math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize

    return sum(map(leaf_bytes, jax.tree.leaves(tree)))


def device_bytes(compiled: Any) -> int:
    """What a compiled program needs on each device: arguments, results that are not written into them, and temporaries."""
    sizes = compiled.memory_analysis()
    new = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return sizes.argument_size_in_bytes + new + sizes.temp_size_in_bytes


def peak_bytes(compiled: Any) -> int:
    """`device_bytes` at the fullest moment, which a TPU's compiler states; elsewhere temporaries are allocated at once."""
    platform = next(iter(jax.tree.leaves(compiled.input_shardings)[0].device_set)).platform
    return compiled.memory_analysis().peak_memory_in_bytes if platform == "tpu" else device_bytes(compiled)
