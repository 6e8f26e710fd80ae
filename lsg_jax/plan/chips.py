"""Peak rates of TPUs, and topologies of slices that programs can be compiled for without the hardware."""

from __future__ import annotations

import importlib.util
import math
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lsg_jax.errors import InputError

if TYPE_CHECKING:
    import jax

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """Peak rates of one JAX device: a chip, or half a chip of tpu7x.

    Attributes:
        hbm_gib: main memory that a program may use, by libtpu 0.0.42; a little less than the chip has.
        tflops: matrix products of bfloat16, TFLOP/s.
        hbm_gbps: main memory, GB/s.
        link_gbps: one link to a neighbour, in one direction, GB/s.
        ring: sides of the slice whose length is a multiple of it are closed to rings.
        shapes: common slices.
        source: where the peak rates are published.
        per_chip: devices per chip.
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
    """A slice such as `v5e:4x4`, with devices that programs can be compiled for but not run on."""

    name: str
    chip: Chip
    shape: tuple[int, ...]
    devices: tuple[jax.Device, ...]

    @property
    def hosts(self) -> int:
        return len({device.process_index for device in self.devices})

    @property
    def has_links(self) -> bool:
        """Whether its chips have neighbours."""
        return math.isfinite(self.ici_gbps)

    @property
    def ici_gbps(self) -> float:
        """Receiving rate of a chip in a corner, which has the fewest links, GB/s; infinite for a single chip."""
        links = sum(0 if side == 1 else 2 if side % self.chip.ring == 0 else 1 for side in self.shape)
        return links * self.chip.link_gbps or math.inf


def parse_topology(name: str) -> tuple[Chip, tuple[int, ...]]:
    """`v5e:4x4` -> the chip and the sides of the slice. Raises InputError that lists the known ones."""
    found = re.fullmatch(r"(\w+):(\d{1,5}(?:x\d{1,5}){1,2})", name)
    if found is None or found[1] not in CHIPS:
        known = "; ".join(f"{chip.name}:{{{', '.join(chip.shapes)}}}" for chip in CHIPS.values())
        raise InputError(f"--topology {name}: no such topology; known: {known}")
    return CHIPS[found[1]], tuple(map(int, found[2].split("x")))


def open_topology(name: str) -> Topology:
    """The devices of a slice for ahead-of-time compilation; sets the environment variables that libtpu reads.

    Raises:
        InputError: no such topology, libtpu is not installed, or another process holds it.
    """
    import jax
    from jax.experimental import topologies

    chip, shape = parse_topology(name)
    if importlib.util.find_spec("libtpu") is None:
        raise InputError("the TPU compiler, libtpu, is not installed: pip install 'lsg_jax[plan]'")
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # there is no TPU to query
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # compiling does not occupy a TPU
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")  # libtpu warns without it, but uses the topology's name
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
                "libtpu is locked by another process: end it, or remove /tmp/libtpu_lockfile if there is none"
            ) from None
        raise InputError(f"--topology {name}: libtpu refuses it: {text.splitlines()[0][:200]}") from None
    return Topology(name, chip, shape, tuple(devices))
