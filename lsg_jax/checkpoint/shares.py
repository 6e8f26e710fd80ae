"""Splits the reading of a leaf between processes: each reads an equal share of the blocks, and a collective moves them on.

So each block is read from storage once, however many processes hold a part of it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from lsg_jax.checkpoint.writer import LeafSpec

SMALL = 1 << 20  # bytes; a smaller leaf is read by every process, which takes less time than a program that moves it


@dataclass(frozen=True)
class Shares:
    """How a leaf is read: process r reads rows r * `rows` to (r + 1) * `rows`; the last processes may read less or nothing.

    Attributes:
        target: the sharding that the leaf ends in.
        axis: an axis that the number of devices divides. Intermediate shardings split it among all devices, so that none of
            them ever holds more than a few shares of the leaf.
    """

    spec: LeafSpec
    target: NamedSharding
    axis: int

    @property
    def rows(self) -> int:
        """Rows of a share: whole blocks."""
        return -(-len(self.spec.offsets()) // jax.process_count()) * self.spec.rows

    def offsets(self) -> range:
        """Where the blocks of this process start along axis 0."""
        start = jax.process_index() * self.rows
        return range(start, min(start + self.rows, self.spec.shape[0]), self.spec.rows)

    @property
    def read(self) -> NamedSharding:
        """Sharding of the concatenated shares; the devices of a process split its share along `axis`."""
        by_process = sorted(self.target.mesh.devices.flat, key=lambda device: (device.process_index, device.id))
        mesh = Mesh(np.reshape(by_process, (jax.process_count(), -1)), ("process", "local"))
        return NamedSharding(mesh, self._at_axis("local", first="process"))

    @property
    def program(self) -> Any:
        """Jitted: concatenated shares -> the leaf in its target sharding."""
        return _program(self.spec.shape[0], self._intermediate(), self.target)

    def spread(self, share: np.ndarray) -> jax.Array:
        """Assembles the leaf in its target sharding from the share [rows, ...] of each process; a collective."""
        start = jax.process_index() * self.rows

        def part(index: Any) -> Any:
            return share[(slice(index[0].start - start, index[0].stop - start), *index[1:])]

        whole = (self.rows * jax.process_count(), *self.spec.shape[1:])
        return self.program(jax.make_array_from_callback(whole, self.read, part))

    def _intermediate(self) -> tuple[NamedSharding, ...]:
        """Shardings between `read` and `target`, one collective apart. Without them XLA may gather the whole leaf."""
        names = [(entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in self.target.spec]
        here = names[self.axis] if self.axis < len(names) else ()
        used = (*here, *(name for entry in names for name in entry if name not in here))
        unused = tuple(name for name in self.target.mesh.axis_names if name not in used)
        return tuple(NamedSharding(self.target.mesh, self._at_axis(split)) for split in ((*used, *unused), used))

    def _at_axis(self, split: tuple[str, ...] | str, first: str | None = None) -> PartitionSpec:
        return PartitionSpec(first, *[None] * (self.axis - 1), split)


def shares_of(spec: LeafSpec, sharding: Sharding | None) -> Shares | None:
    """How several processes split the reading of a leaf; None where each of them should read all of it."""
    if not isinstance(sharding, NamedSharding) or sharding.mesh.size != jax.device_count() or jax.process_count() == 1:
        return None
    if spec.block_bytes * len(spec.offsets()) < SMALL:
        return None
    targets = [*sharding.spec, *[None] * len(spec.shape)]
    fits = [axis for axis in range(1, len(spec.shape)) if spec.shape[axis] % jax.device_count() == 0]
    return Shares(spec, sharding, max(fits, key=lambda axis: (bool(targets[axis]), spec.shape[axis]))) if fits else None


@functools.cache
def _program(length: int, intermediate: tuple[NamedSharding, ...], target: NamedSharding) -> Any:
    """Reshards an array through `intermediate` to `target` and cuts it to `length` rows; one program for each leaf shape."""

    def move(x: jax.Array) -> jax.Array:
        for sharding in intermediate:
            x = jax.lax.with_sharding_constraint(x, sharding)
        return x[:length]

    return jax.jit(move, out_shardings=target)
