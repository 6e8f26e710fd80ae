"""Mesh and path rules: complete at true sizes, and a sharded model computes what an unsharded one does."""

import dataclasses
import os
import subprocess
import sys

import jax
import pytest
from jax.sharding import PartitionSpec

from converters.convert import convert
from converters.export import export
from converters.hf_config import model_config
from converters.tiny_checkpoint import CONFIG
from lsg_jax.config import GateConfig, MeshConfig, SinkConfig
from lsg_jax.errors import ConfigError
from lsg_jax.methods.gates import Gates
from lsg_jax.methods.method_model import abstract_model
from lsg_jax.sharding import make_mesh, param_spec, shard_params


def test_mesh_sizes():
    assert dict(make_mesh(MeshConfig()).shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    for sizes in [(2, 1, 1), (-1, -1, 1), (0, 1, 1), (1, -1, 3)]:
        with pytest.raises(ConfigError, match="mesh"):
            make_mesh(MeshConfig(*sizes))


def test_a_parameter_without_a_rule_is_an_error():
    with pytest.raises(ConfigError, match="0 rules match parameter language_model/new/kernel"):
        param_spec("language_model/new/kernel", (4, 4), make_mesh(MeshConfig()))


def test_every_parameter_has_a_rule():
    config = dataclasses.replace(model_config(CONFIG), sinks=SinkConfig(vit_dims=(1,)))
    _, abstract = abstract_model(config, Gates(GateConfig(layers=(0,))))
    sharded = shard_params(abstract, make_mesh(MeshConfig()))
    assert sharded["trained"]["fc1_kernel"].sharding.spec == PartitionSpec()
    assert sharded["language_model"]["lm_head"]["kernel"].sharding.spec == PartitionSpec("fsdp", "tensor")


SHARDED = """
import dataclasses, os, sys
import jax, numpy as np
import lsg_jax
from lsg_jax.config import MeshConfig, TrainConfig
from lsg_jax.methods.full import Full
from lsg_jax.methods.gates import Gates
from lsg_jax.methods.method_model import abstract_model
from lsg_jax.model.loss import answer_slots
from lsg_jax.sharding import make_mesh, state_shardings
from lsg_jax.train.step import compiled_step, init_state
sys.path.insert(0, os.environ["TESTS"])
from test_vlm import SINKS, gates

assert jax.device_count() == 8
model = sys.argv[1]
rng = np.random.default_rng(0)
ids = np.concatenate([np.full((8, 1), 1), np.full((8, 49), 3), rng.integers(4, 260, (8, 10))], axis=1)
pixels = rng.normal(size=(8, 3, 56, 56)).astype(np.float32)
labels = np.where(np.arange(60) >= 55, ids, -100)
whole = lsg_jax.load(model, gates())
logits, (loss, grads) = whole.logits(ids, pixels), whole.loss_and_grads(ids, pixels, labels)
tokens = whole.generate_ids(ids, pixels, max_new_tokens=4)
# every program on the mixed mesh; on the others one that such a mesh is for, since each has to be compiled
layouts = [((2, 2, 2), 4, ("logits", "gradients", "tokens")), ((1, 8, 1), 8, ("gradients",)), ((1, 1, 8), 8, ("tokens",))]
if sys.argv[3:] == ["long"]:
    layouts = [(sizes, parts, layouts[0][2]) for sizes, parts in [*(each[:2] for each in layouts), ((8, 1, 1), 1)]]
for sizes, parts, programs in layouts:
    vlm = lsg_jax.load(model, gates(), mesh=make_mesh(MeshConfig(*sizes)))
    kernel = vlm.frozen["language_model"]["layers"]["mlp"]["gate_proj"]["kernel"]
    assert len(kernel.sharding.device_set) == 8
    assert kernel.addressable_shards[0].data.size * parts == kernel.size, sizes
    if "logits" in programs:
        np.testing.assert_allclose(vlm.logits(ids, pixels), logits, atol=1e-4)
    if "gradients" in programs:
        other, others = vlm.loss_and_grads(ids, pixels, labels)
        np.testing.assert_allclose(other, loss, rtol=1e-5)
        for layer in grads:
            for name in grads[layer]:
                close = 1e-4 * np.abs(grads[layer][name]).max()
                np.testing.assert_allclose(others[layer][name], grads[layer][name], atol=close)
    if "tokens" in programs:
        np.testing.assert_array_equal(vlm.generate_ids(ids, pixels, max_new_tokens=4), tokens)

int8, mesh = sys.argv[2], make_mesh(MeshConfig(2, 2, 2))
sharded = lsg_jax.load(int8, gates(), dtype="float32", mesh=mesh)
projection = sharded.frozen["language_model"]["layers"]["mlp"]["gate_proj"]
assert str(projection["kernel"].dtype) == "int8"
assert projection["kernel"].addressable_shards[0].data.size * 4 == kernel.size
assert projection["kernel_scale"].addressable_shards[0].data.size * 2 == projection["kernel_scale"].size
whole = lsg_jax.load(int8, gates(), dtype="float32")
np.testing.assert_allclose(sharded.logits(ids, pixels), whole.logits(ids, pixels), atol=1e-4)


def trained_in_full(vlm, mesh, steps=2):
    # steps of training the model itself
    method, config = Full(), TrainConfig(optimizer="sgd", learning_rate=0.1)
    graphdef, _ = abstract_model(vlm.config, method, mesh=mesh)
    parts = method.initial(vlm.config, vlm.frozen, jax.random.key(0))
    frozen = {"vision_tower": vlm.frozen["vision_tower"]}
    state = init_state(parts, frozen, config=config, total_steps=4)
    state = jax.device_put(state, state_shardings(state, mesh))
    index, target = answer_slots(labels)
    batch = dataclasses.replace(vlm.batch(ids, pixels), answer_index=index, answer_target=target)
    step = compiled_step(graphdef, config, 4, mesh)
    metrics = {}
    for _ in range(steps):
        state, metrics = step(state, frozen, batch)
        same = lambda leaf, where: leaf.sharding.is_equivalent_to(where, leaf.ndim)
        assert all(jax.tree.leaves(jax.tree.map(same, state, state_shardings(state, mesh))))
        assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(metrics))
    return state, metrics


reference, expected = trained_in_full(lsg_jax.load(model), make_mesh(MeshConfig(), jax.devices()[:1]))
for sizes, parts, steps in [((1, 8, 1), 8, 0), ((2, 2, 2), 4, 2)]:  # the step keeps the shardings, so one mesh compiles it
    mesh = make_mesh(MeshConfig(*sizes))
    state, metrics = trained_in_full(lsg_jax.load(model, mesh=mesh), mesh, steps)
    kept = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == kernel.shape]
    assert len(kept) == 4  # gate_proj and up_proj, and the momentum of each
    assert all(leaf.addressable_shards[0].data.size * parts == leaf.size for leaf in kept)
np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-5)
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), jax.device_get(state), jax.device_get(reference))
"""


@pytest.mark.parametrize("long", [False, pytest.param(True, marks=pytest.mark.soak)], ids=["short", "long"])
def test_sharded_equals_unsharded_on_eight_devices_in_every_layout(tiny_model, tmp_path, long):
    """One program on a mesh of one axis and all on one of three; `pytest -m soak` compiles every program for every mesh."""
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": flags, "TESTS": os.path.dirname(__file__)}
    export(tiny_model, tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "int8", dtype="int8")
    command = [sys.executable, "-c", SHARDED, str(tiny_model), str(tmp_path / "int8"), *["long"] * long]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert jax.device_count() == 1
