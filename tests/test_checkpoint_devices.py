"""Stored arrays on several devices: a model and a run come back into their shardings, and no device holds a whole leaf."""

import os
import subprocess
import sys
from pathlib import Path

# one process of sixteen devices for all of it
CODE = """
import sys
from pathlib import Path
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from test_checkpoint_base import abstract, same, write_model
from lsg_jax.checkpoint import RunFolder, load_base
from lsg_jax.checkpoint.shares import shares_of
from lsg_jax.checkpoint.tree import flatten
from lsg_jax.checkpoint.writer import LeafSpec
from lsg_jax.config import MeshConfig
from lsg_jax.sharding import make_mesh

folder = Path(sys.argv[1])

# a model
leaves = write_model(folder / "model")
name = "language_model/layers/q_proj/kernel"
sharding = NamedSharding(Mesh(jax.devices()[:2], "x"), P(None, "x"))
struct = jax.ShapeDtypeStruct((3, 4, 5), leaves[name].dtype, sharding=sharding)
loaded = load_base(folder / "model", abstract(leaves, **{name: struct}))
same(loaded, leaves)
leaf = flatten(loaded)[name]
assert leaf.sharding == sharding and leaf.addressable_data(0).shape == (3, 2, 5)
cast = flatten(load_base(folder / "model", abstract(leaves, **{name: struct}), dtype="float32"))[name]
assert cast.dtype == np.float32 and cast.sharding.is_equivalent_to(sharding, 3)

# a run that is saved from four devices and restored on four, then on two
values, run = np.arange(8, dtype=np.float32), RunFolder(folder / "run")
for count in (4, 2):
    mesh = Mesh(jax.devices()[:count], "x")
    shard, whole = NamedSharding(mesh, P("x")), NamedSharding(mesh, P())
    state = {"w": jax.device_put(values, shard), "k": jax.device_put(jax.random.key(0), whole)}
    if count == 4:
        with run.lock():
            run.save(5, state)
    restored = run.latest(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)).state
    assert restored["w"].sharding == shard and len(restored["w"].addressable_shards) == count
    assert restored["k"].sharding.is_equivalent_to(whole, 0)
    np.testing.assert_array_equal(restored["w"], values)

# sixteen devices of four processes: XLA must not gather a whole leaf, as it does without the intermediate shardings
jax.process_count = lambda: 4
shape = (32, 64, 512)
for sizes, spec in (((2, 4, 2), P(None, "fsdp", "tensor")), ((2, 1, 8), P(None, None, "tensor"))):
    shares = shares_of(LeafSpec(shape, "float32", stacked=True), NamedSharding(make_mesh(MeshConfig(*sizes)), spec))
    struct = jax.ShapeDtypeStruct(shape, np.float32, sharding=shares.read)
    memory = shares.program.lower(struct).compile().memory_analysis()
    share = 4 * np.prod(shape) / 16
    assert memory.argument_size_in_bytes == share and memory.output_size_in_bytes == 2 * share, memory
    assert memory.temp_size_in_bytes <= 8 * share, memory
"""


def test_stored_arrays_on_several_devices(tmp_path):
    here = str(Path(__file__).parent)
    environment = {
        **os.environ,
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=16",
        "PYTHONPATH": os.pathsep.join([here, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
    }
    subprocess.run([sys.executable, "-c", CODE, str(tmp_path)], check=True, timeout=120, env=environment)
