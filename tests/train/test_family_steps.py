"""Steps of Gemma 3, InternVL, SmolVLM and Qwen-VL: on a mesh, under remat policies, and of several gates at once."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
from family_models import family_inputs, preprocessor, save_family, tiny_family
from hf_models import state_arrays
from PIL import Image
from processes import with_torch

from converters.convert import convert, tree_from_tensors
from converters.hf_config import model_config
from lsg_jax.config import DataConfig, GateConfig, MeshConfig, SinkConfig, TrainConfig
from lsg_jax.data.records import prepare_llava
from lsg_jax.methods.gates import Gates
from lsg_jax.methods.method_model import abstract_model
from lsg_jax.model.loss import answer_slots
from lsg_jax.run_config import RunConfig
from lsg_jax.sharding import abstract_batch, make_mesh, place_rows, shard_params, state_shardings
from lsg_jax.train.independent import losses_and_gradients
from lsg_jax.train.loop import METRICS, train
from lsg_jax.train.step import _loss_and_gradients, compiled_step, in_parts, init_state
from lsg_jax.vlm import VLM

SINKS = SinkConfig(vit_dims=(3, 7), vit_tau=1.5)  # some of the patches
ROWS = [
    [(60, 200), (77, 90)],
    [(300, 101)],
    [],
    [(42, 42), (99, 100)],
    [(60, 60)],
    [(200, 60)],
    [],
    [(64, 90)],
]  # width, height
NAMES = ("gemma3", "internvl-qwen3", "smolvlm", "qwen2_5_vl", "qwen3_vl")  # squares, tiles, grids, windows, deepstack
LAYERS = (0, 1, 4)  # tokens are added to the outputs of layers 0 and 1 (Qwen3-VL); the last layer runs apart


def close(a, b):
    a, b = np.asarray(a), np.asarray(b)
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * max(float(np.abs(b).max(initial=0.0)), 1e-3))


@cache
def made(name, count):
    """A model, and a batch of `count` left-padded rows with none to two images and a few answer tokens each."""
    hf, rng = tiny_family(name), np.random.default_rng(0)
    config = model_config(hf.config.to_diff_dict(), preprocessor=preprocessor(name))
    vlm = VLM(config, tree_from_tensors(config, state_arrays(hf)))
    vlm = vlm.with_method(vlm.method, None, sinks=SINKS)
    draw = lambda width, height: Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
    arrays = family_inputs(name, [[draw(*size) for size in row] for row in ROWS[:count]], "left")
    ids = arrays["input_ids"]
    supervised = np.arange(ids.shape[1]) >= ids.shape[1] - rng.integers(1, 4, (len(ids), 1))
    index, target = answer_slots(np.where(supervised, ids, -100))
    batch = vlm.batch(**arrays, gate_position=np.full(len(ids), ids.shape[1] - 4))
    return vlm, batch.replace(answer_index=index, answer_target=target, row_id=np.arange(len(ids), dtype=np.int32))


@pytest.mark.parametrize("name", NAMES)
def test_abstract_batches_are_like_those_of_the_data(name):
    vlm, batch = made(name, 4)
    tiles, patches = batch.images.patches.shape[1:3]
    sizes = {"tiles": tiles, "patches": patches, "answers": batch.answer_index.shape[1]}
    planned = abstract_batch(vlm.config, make_mesh(MeshConfig(), jax.devices()[:1]), *batch.input_ids.shape, **sizes)
    pixels = batch.replace(images=batch.images.replace(patches=batch.images.patches.astype(np.uint8)))
    like = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype)), tree)
    assert like(planned) == like(pixels)


def graph_and_gates(vlm, layers, *, mesh=None, independent=False):
    gate = GateConfig(layers=layers, independent=independent)
    gates = Gates(gate).initial(vlm.config, vlm.frozen, jax.random.key(0))
    gates["fc2_kernel"] = 0.3 * jax.random.normal(jax.random.key(1), gates["fc2_kernel"].shape)
    return abstract_model(vlm.config, Gates(gate), mesh=mesh)[0], gates


def differentiated(name, layers, differentiate, *, take=None, parts=1):
    """Loss, metrics and gradients of gates at `layers`, or of those of several layers that `take` picks."""
    vlm, batch = made(name, 4)
    graphdef, gates = graph_and_gates(vlm, layers, independent=differentiate is losses_and_gradients)
    if take is not None:
        _, several = graph_and_gates(vlm, LAYERS)
        gates = jax.tree.map(lambda leaf: leaf[take : take + 1], several)
    step = jax.jit(lambda frozen, gates, batch: in_parts(differentiate, graphdef, frozen, gates, batch, parts=parts))
    return step(vlm.frozen, gates, batch)


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("gemma3", [("full", 2)]),
        ("qwen3_vl", [("dots", 1)]),
        *[pytest.param(name, [("full", 2), ("dots", 1)], marks=pytest.mark.soak) for name in ("gemma3", "qwen3_vl")],
    ],
    ids=["gemma3", "qwen3_vl", "gemma3-long", "qwen3_vl-long"],
)
def test_remat_policies_and_parts_of_a_batch_change_nothing(name, others):
    """A policy for each family, since each has to be compiled; test_step has all, and `pytest -m soak` all of both."""
    policy = lambda remat: lambda *arguments: _loss_and_gradients(*arguments, remat=remat)
    expected = differentiated(name, LAYERS, policy("none"))
    assert all(np.abs(leaf).max() > 0 for leaf_name, leaf in expected[2].items() if leaf_name != "fc2_bias")
    assert 0 < expected[1]["v_sinks"] < expected[1]["visual_tokens"]
    for remat, parts in others:
        jax.tree.map(close, differentiated(name, LAYERS, policy(remat), parts=parts), expected)


@pytest.mark.parametrize("name", ["gemma3", "qwen3_vl"])
@pytest.mark.parametrize("long", [False, pytest.param(True, marks=pytest.mark.soak)], ids=["short", "long"])
def test_independent_gates_are_what_single_gates_give(name, long):
    """The gate of the second layer; `pytest -m soak` has that of the first, and test_step that of the last layer."""
    losses, metrics, gradients = differentiated(name, LAYERS, losses_and_gradients)
    for slot in (0, 1) if long else (1,):
        loss, told, own = differentiated(name, (LAYERS[slot],), lambda *a: _loss_and_gradients(*a, remat="none"), take=slot)
        close(losses[slot], loss)
        close(metrics["ratios"][slot], told["ratios"][0])
        for counted in ("tokens", "visual_tokens", "v_sinks"):
            assert metrics[counted] == told[counted]
        jax.tree.map(lambda a, b, slot=slot: close(a[slot], b[0]), gradients, own)


def stepped(name, sizes, *, independent=False, **settings):
    """State and metrics after a step of plain descent, whose change is the gradient, on a mesh of the first devices."""
    vlm, batch = made(name, 8)
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
    graphdef, gates = graph_and_gates(vlm, LAYERS, mesh=mesh, independent=independent)
    gates = jax.device_get(gates)  # the step takes over the arrays of its state
    config = TrainConfig(optimizer="sgd", learning_rate=1.0, warmup_fraction=0.0, clip_norm=1e6, batch_size=8, **settings)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, shard_params(jax.tree.map(jax.typeof, vlm.frozen), mesh))
    frozen = jax.device_put(vlm.frozen, shardings)
    state = init_state(gates, frozen, config=config, total_steps=2, independent=independent)
    state = jax.device_put(state, state_shardings(state, mesh))
    step = compiled_step(graphdef, config, 2, mesh, independent=independent)
    state, metrics = step(state, frozen, place_rows(batch, mesh, 8))
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(metrics))
    changes = jax.tree.map(lambda after, before: np.asarray(after) - np.asarray(before), state.trained, gates)
    return jax.device_get((changes, metrics))


def compare(*names):
    """In a process with eight devices: a step on a mesh of all axes is that of one device."""
    assert jax.device_count() == 8
    # each has other settings, since each has to be compiled
    settings = {"gemma3": {"independent": True}, "qwen2_5_vl": {"accumulate": 2}, "smolvlm": {"remat": "dots"}}
    for name in names:
        found = stepped(name, (2, 2, 2), **settings.get(name, {}))
        expected = stepped(name, (1, 1, 1), independent=name == "gemma3", remat="none")
        assert all(np.abs(leaf).max() > 0 for leaf_name, leaf in expected[0].items() if leaf_name != "fc2_bias")
        assert 0 < expected[1]["v_sinks"] < expected[1]["visual_tokens"], name
        jax.tree.map(close, found, expected)


@pytest.mark.parametrize(
    "names",
    [("gemma3", "qwen2_5_vl"), pytest.param(("internvl-qwen3", "smolvlm"), marks=pytest.mark.soak)],
    ids="-".join,
)
def test_a_step_on_a_mesh_equals_that_of_one_device(names):
    """Layers of two kinds, and images of any number of patches; `pytest -m soak` has tiles."""
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8"
    command = [sys.executable, "-c", f"import test_family_steps as here; here.compare(*{names})"]
    here = Path(__file__).parent
    env = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": with_torch()}
    done = subprocess.run(command, env=env, cwd=here, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("name", ["internvl-qwen3", "qwen2_5_vl"])
def test_auto_remat_compiles_for_the_tiles_patches_and_lengths_of_the_data(name, tmp_path):
    save_family(name, tiny_family(name), tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "model")
    records = []
    for index, size in enumerate([(60, 200), (77, 90)]):
        Image.new("RGB", size, (40 * index, 90, 200)).save(tmp_path / f"{index}.png")
        turns = [{"from": "human", "value": "<image>\n" + "How many? " * (1 + 9 * index)}, {"from": "gpt", "value": "two"}]
        records.append({"id": str(index), "image": f"{index}.png", "conversations": turns})
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in records))
    prepare_llava(tmp_path / "records.jsonl", tmp_path, tmp_path / "records")
    config = RunConfig(
        model=str(tmp_path / "model"),
        output=str(tmp_path / "run"),
        tables={"gate": GateConfig(layers=(3,))},
        sinks=SINKS,
        data=DataConfig(records=str(tmp_path / "records"), max_length=256, max_answer_tokens=8, buckets=2),
        train=TrainConfig(batch_size=1, epochs=1, remat="auto"),
    )
    lines = [*map(json.loads, (train(config) / METRICS).read_text().splitlines())]
    assert len(lines) == 2 and all(line["finite"] for line in lines)
    assert sum(line["visual_tokens"] for line in lines) > 2 * 4  # more than a tile of each image
    assert len({round(line["positions_per_s"] * line["step_s"]) for line in lines}) == 2  # lengths
