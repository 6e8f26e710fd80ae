"""What TPUs can do, and opening the topology of a slice that is not there."""

from __future__ import annotations

import importlib.util
import math
import os
import re
from dataclasses import dataclass
from typing import Any

from lsg_jax.errors import InputError

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """Peak rates of one JAX device, which is a chip, but half a chip of tpu7x.

    Attributes:
        hbm_gib: main memory that a program may use, as libtpu 0.0.42 states it; a little less than the chip has.
        tflops: matrix products of bfloat16, TFLOP/s.
        hbm_gbps: main memory, GB/s.
        link_gbps: one link to a neighbour, in one direction, GB/s.
        ring: a side of the slice whose length is a multiple of it is closed to a ring.
        shapes: common slices.
        source: where the peak rates are published.
    """

    name: str
    hbm_gib: float
    tflops: float
    hbm_gbps: float
    link_gbps: float
    ring: int
    shapes: tuple[str, ...]
    source: str
    per_chip: int = 1


_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_DEEP = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8")
_DOCS = "cloud.google.com/tpu/docs/"
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 30.75, 275, 1228, 50, 4, _DEEP, _DOCS + "v4"),
        Chip("v5e", 15.75, 197, 819, 50, 16, ("1x1", *_FLAT), _DOCS + "v5e"),
        Chip("v5p", 95.74, 459, 2765, 100, 4, _DEEP, _DOCS + "v5p"),
        Chip("v6e", 31.25, 918, 1638, 100, 16, ("1x1", *_FLAT), _DOCS + "v6e"),
        Chip("tpu7x", 94.75, 1153.5, 3690, 50, 4, _DEEP, _DOCS + "tpu7x", per_chip=2),
    )
}


@dataclass(frozen=True)
class Topology:
    """A slice by name, such as `v5e:4x4`, and devices that programs can be compiled for, but not run on."""

    name: str
    chip: Chip
    shape: tuple[int, ...]
    devices: tuple[Any, ...]

    @property
    def hosts(self) -> int:
        return len({device.process_index for device in self.devices})

    @property
    def ici_gbps(self) -> float:
        """What the chip with the fewest links, in a corner, can receive, GB/s; infinite for a chip alone."""
        links = sum(0 if side == 1 else 2 if side % self.chip.ring == 0 else 1 for side in self.shape)
        return links * self.chip.link_gbps or math.inf


def parse_topology(name: str) -> tuple[Chip, tuple[int, ...]]:
    """`v5e:4x4` -> the chip and the sides of the slice. Raises InputError that lists what is known."""
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+){1,2})", name)
    if found is None or found[1] not in CHIPS:
        known = "; ".join(f"{chip.name}:{{{', '.join(chip.shapes)}}}" for chip in CHIPS.values())
        raise InputError(f"--topology {name}: no such topology; known: {known}")
    return CHIPS[found[1]], tuple(map(int, found[2].split("x")))


def open_topology(name: str) -> Topology:
    """The devices of a slice for ahead-of-time compilation; sets what libtpu reads from the environment.

    Raises:
        InputError: no such topology, libtpu is not installed, or another process holds it.
    """
    import jax
    from jax.experimental import topologies

    chip, shape = parse_topology(name)
    if importlib.util.find_spec("libtpu") is None:
        raise InputError("the TPU compiler, libtpu, is not installed: pip install 'lsg_jax[plan]'")
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # there is no TPU to ask about
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # compiling takes no TPU from anyone
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")  # it would complain, and goes by the name of the topology
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    options: dict[str, Any] = {"chip_config_name": "megacore"} if chip.name == "v4" else {}
    if shape == (1, 1):
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        devices = topologies.get_topology_desc(topology_name=name, platform="tpu", **options).devices
    except (jax.errors.JaxRuntimeError, RuntimeError, ValueError) as error:
        text = str(error)
        if "lockfile" in text or "in use" in text:
            raise InputError(
                "libtpu is locked by another process: end it, or remove /tmp/libtpu_lockfile if none runs"
            ) from None
        raise InputError(f"--topology {name}: libtpu refuses it: {text.splitlines()[0][:200]}") from None
    return Topology(name, chip, shape, tuple(devices))
