"""The backbone read by several processes: each reads its share, and every leaf ends in its sharding."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from processes import run_processes
from test_checkpoint_base import write_model

from lsg_jax.checkpoint import shares, writer
from lsg_jax.checkpoint.writer import LeafSpec

# leaf -> shape, mesh axes
LEAVES = {
    "layers/q_proj": ((3, 8, 4, 2), ("fsdp", "tensor", None)),  # an odd number of layers
    "layers/down": ((6, 4, 12), ("tensor", "fsdp")),
    "layers/both": ((2, 5, 8), (None, ("fsdp", "tensor"))),
    "layers/scale": ((6, 6), (None,)),  # no axis that four devices divide
    "embed": ((10, 8), ("tensor", "fsdp")),  # not stacked: five blocks of two rows
    "one_block": ((2, 4), (None, "fsdp")),
    "whole": ((7, 4), ()),
    "number": ((), ()),
}
MESHES = ((1, 4, 1), (4, 1, 1), (1, 2, 2), (2, 1, 2))


def example() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, (shape, _) in LEAVES.items()}


def target(name: str, mesh: Mesh) -> NamedSharding:
    shape, axes = LEAVES[name]
    axes = ((None, *axes) if "layers" in name else axes)[: len(shape)]
    size = {axis: mesh.shape[axis] for axis in mesh.axis_names}
    split = lambda axis: np.prod([size[a] for a in ((axis,) if isinstance(axis, str) else axis or ())])
    return NamedSharding(mesh, PartitionSpec(*(a if n % split(a) == 0 else None for n, a in zip(shape, axes, strict=False))))


# Loads the folder on every mesh and reports what was read; then a damaged folder, whose bad block only one process reads.
WORKER = """
import json, sys
from pathlib import Path
import jax, numpy as np
sys.path.insert(0, sys.argv[2])
from test_checkpoint_shares import LEAVES, MESHES, example, target
from test_checkpoint_base import abstract
from lsg_jax.checkpoint import base, load_base, shares, writer
from lsg_jax.checkpoint.tree import flatten
from lsg_jax.config import MeshConfig
from lsg_jax.errors import CheckpointError
from lsg_jax.sharding import make_mesh

out = Path(sys.argv[1])
shares.SMALL, writer.BLOCK_BYTES = 0, 64
leaves, read, report = example(), [], {}
read_block = base._read_block

def counted(folder, name, spec, offset, digest):
    read.append((name, offset))
    return read_block(folder, name, spec, offset, digest)

base._read_block = counted
for sizes in MESHES:
    mesh = make_mesh(MeshConfig(*sizes))
    structs = {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=target(n, mesh)) for n, x in leaves.items()}
    loaded = flatten(load_base(out / "model", abstract(leaves, **structs)))
    report[str(sizes)] = read[:]
    read.clear()
    for name, leaf in loaded.items():
        assert leaf.sharding.is_equivalent_to(structs[name].sharding, leaf.ndim), name
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), leaves[name][shard.index], err_msg=f"{sizes} {name}")

def fails(folder):
    try:
        load_base(folder, abstract(leaves, **structs), dtype="bfloat16")
    except CheckpointError as error:
        return str(error)

cast = flatten(load_base(out / "model", abstract(leaves, **structs), dtype="bfloat16"))
assert {str(leaf.dtype) for leaf in cast.values()} == {"bfloat16"}
errors = {"damaged": fails(out / "damaged"), "other": fails(out / ("model", "other")[jax.process_index()])}
(out / f"{jax.process_index()}.json").write_text(json.dumps({"read": report, "errors": errors}))
"""


def test_each_process_reads_its_share(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "BLOCK_BYTES", 64)
    leaves = write_model(tmp_path / "model", example())
    write_model(tmp_path / "damaged", leaves)
    write_model(tmp_path / "other", {**leaves, "number": np.asarray(1.0, np.float32)})
    chunk = tmp_path / "damaged/base/state/layers.down/c/5/0/0"  # the last layer, which the second process reads
    data = bytearray(chunk.read_bytes())
    data[8] ^= 1
    chunk.write_bytes(data)
    run_processes(WORKER, 2, devices_each=2, args=[tmp_path, Path(__file__).parent], timeout=120)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))

    blocks = {name: len(LeafSpec(x.shape, "float32", stacked="layers" in name).offsets()) for name, x in leaves.items()}
    assert blocks == {"layers/q_proj": 3, "layers/down": 6, "layers/both": 2, "layers/scale": 6, "embed": 5, "one_block": 1} | {
        "whole": 2,
        "number": 1,
    }
    by_all = {"layers/scale", "number"}
    for sizes in map(str, MESHES):
        parts = [sorted(map(tuple, report["read"][sizes])) for report in (first, second)]
        for name, count in blocks.items():
            here, there = ([offset for of, offset in part if of == name] for part in parts)
            assert len({*here, *there}) == count
            if name in by_all:
                assert here == there
            else:
                assert not {*here} & {*there} and len(here) == -(-count // 2), name

    assert first["errors"]["damaged"].startswith(f"process 1: {tmp_path}/damaged: damaged: leaf layers/down: block 5")
    assert second["errors"]["damaged"] == first["errors"]["damaged"].removeprefix("process 1: ")
    assert "process 1 has another model" in first["errors"]["other"] and "process 0 has" in second["errors"]["other"]


@pytest.mark.parametrize("size, shared", [(shares.SMALL - 4, False), (shares.SMALL, True)])
def test_small_leaves_are_read_by_all(monkeypatch, size, shared):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    sharding = NamedSharding(jax.make_mesh((1,), ("x",)), PartitionSpec())
    spec = LeafSpec((1, size // 4), "float32")
    assert (shares.shares_of(spec, sharding) is not None) == shared
    assert shares.shares_of(spec, None) is None
