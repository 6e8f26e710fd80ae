"""Ahead-of-time compilation for TPUs that are not there: counts against closed forms, and a whole plan."""

import json
import os
import subprocess
import sys
import tomllib
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from converters.hf_config import read_config
from lsg_jax.cli import main
from lsg_jax.config import MeshConfig
from lsg_jax.errors import InputError
from lsg_jax.memory import shard_bytes
from lsg_jax.model.splash_attention import splash_attention
from lsg_jax.plan.chips import open_topology
from lsg_jax.plan.hlo import Work, analyse
from lsg_jax.plan.hlo_text import Array
from lsg_jax.plan.kernels import Kernel, kernel_flops
from lsg_jax.plan.measure import Measured, Seconds, measure
from lsg_jax.plan.plan import plan
from lsg_jax.plan.programs import Program, train_program
from lsg_jax.plan.record_lengths import RecordLengths
from lsg_jax.plan.table import table
from lsg_jax.plan.traced import traced_flops
from lsg_jax.run_config import run_config
from lsg_jax.sharding import make_mesh


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(), list(open_topology("v5e:2x2").devices))


def abstract(mesh, dtype, shape, *axes):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))


def test_a_sharded_scan(mesh):
    layers, width, rows = 6, 512, 1024

    def run(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    x = abstract(mesh, jnp.bfloat16, (rows, width), "fsdp")
    weights = abstract(mesh, jnp.bfloat16, (layers, width, width), None, "fsdp")
    work = analyse(jax.jit(run).lower(x, weights).compile().as_text())
    assert work.flops == traced_flops(run, x, weights) / 4 == layers * 2 * rows * width**2 / 4
    assert set(work.received) == {"all-gather"}
    assert work.received_bytes == layers * width**2 * 2 * 3 / 4


def test_splash_attention_counts_blocks_up_to_the_diagonal(mesh):
    rows, heads, width = 2, 2, 128
    one = make_mesh(MeshConfig(fsdp=1), list(mesh.devices.flat[:1]))

    def run(query, key, value, mask):
        return splash_attention(query, key, value, mask).astype(jnp.float32).sum()

    for length, blocks in ((256, 1), (1024, 3)):  # blocks of 256, and of 512
        arguments = (
            abstract(one, jnp.bfloat16, (rows, length, heads, width)),
            *[abstract(one, jnp.bfloat16, (rows, heads, length, width))] * 2,
            abstract(one, jnp.bool_, (rows, length, length)),
        )
        both = jax.grad(run, argnums=(0, 1, 2))
        product = 2 * rows * heads * blocks * min(length, 512) ** 2 * width
        assert traced_flops(run, *arguments) == 2 * product
        row_sums = 2 * rows * heads * length * width  # of outputs and their gradients, outside the kernel
        assert traced_flops(both, *arguments) == (2 + 5) * product + row_sums
    # which XLA does without matrix products
    assert analyse(jax.jit(both).lower(*arguments).compile().as_text()).flops == (2 + 5) * product
    arrays = [Array("bf16", (heads, length, width))] * 4
    apart = {"block_q_dkv": 512, "block_kv_dkv": 512, "block_q_dq": 512, "block_kv_dq": 512}
    names = ("splash_mha_dkv", "splash_mha_dq")
    assert sum(kernel_flops(Kernel(name, arrays, arrays, apart)) for name in names) == (4 + 3) * product / rows
    with pytest.raises(ValueError, match="its FLOPs are unknown"):
        kernel_flops(Kernel("another", (), (), {}))


CONFIG = """
model = "models/nowhere"
output = "runs/nowhere"
[gate]
layers = [2]
[sinks]
criterion = "norm"
[data]
max_length = 128
max_answer_tokens = 8
[train]
batch_size = 8
[eval]
batch_size = 2
max_new_tokens = 4
"""


MEASURED = Measured(
    program="train",
    rows=8,
    memory_gib={"peak": 1.0, "temporaries": 0.0},
    compile_s=0.0,
    work=Work(1e12, 1e9, 0.0, {}, {}),
    seconds=Seconds(1.0, 0.5, 0.25, expected=2.0),
)
"""A training step, in place of compiling one."""


@pytest.fixture
def lsg_plan(capfd, tmp_path, tiny_hf_folder, monkeypatch):
    """Runs `lsg plan --json` on the tiny model; returns what it printed, the table of the same plan, and its log."""
    plans = []

    def kept(*arguments, **settings):
        plans.append(plan(*arguments, **settings))
        return plans[-1]

    monkeypatch.setattr("lsg_jax.plan.plan.plan", kept)

    def run(*arguments):
        (tmp_path / "run.toml").write_text(CONFIG)
        code = main(["plan", str(tmp_path / "run.toml"), "--model-config", str(tiny_hf_folder), "--json", *arguments])
        out, err = capfd.readouterr()
        assert code == 0, err
        return json.loads(out), table(plans[-1]), err

    return run


def test_a_compiled_plan(lsg_plan):
    result, text, err = lsg_plan("--topology", "v5e:2x2", "--programs", "forward")
    assert err.splitlines() == ["v5e:2x2, forward, 8 rows: compiling 1 of at most 1"]
    (forward,) = result["topologies"][0]["programs"]
    memory, seconds = forward["memory_gib"], forward["seconds"]
    assert forward["fits"] and memory["peak"] == pytest.approx(sum(memory.values()) - memory["peak"] - memory["host"])
    assert forward["times_forward"] == pytest.approx(1.0, rel=0.02)
    assert seconds["mxu"] == pytest.approx(forward["flops"] / 197e12)
    assert seconds["expected"] == 2 * max(seconds["mxu"], seconds["hbm"], seconds["ici"])
    assert set(forward["collectives"]) == set(forward["received_bytes"]) and all(forward["received_bytes"].values())
    assert "forward" in text and "no TPU was run" in text
    assert result["assumptions"]["lengths"] is None and "Every training row is taken to be data.max_length long." in text
    assert result["topologies"][0]["attention"] in text and "are no multiple of 128" in text


def test_a_plan_from_the_lengths_of_records(lsg_plan, monkeypatch):
    """Compiled for the longest, hours by the mean."""
    compiled = []
    invented = lambda program, *_, **__: (compiled.append(program.arguments[-1].input_ids.shape) or MEASURED, None)
    monkeypatch.setattr("lsg_jax.plan.plan.measure", invented)
    arguments = "--topology", "v5e:2x2", "--programs", "train", "--remat", "full", "--no-largest-batch"
    hours = lsg_plan(*arguments)[0]["topologies"][0]["recipe"][0]["hours"]
    found = RecordLengths((64, 96), mean=72.0, padding=0.051)
    monkeypatch.setattr("lsg_jax.plan.record_lengths.record_lengths", lambda config, model: found)
    result, text, _ = lsg_plan(*arguments)
    assert compiled == [(8, 128), (8, 96)]
    assert result["topologies"][0]["recipe"][0]["hours"] == pytest.approx(0.75 * hours)
    assert result["assumptions"]["lengths"] == {"lengths": [64, 96], "mean": 72.0, "padding": 0.051}
    assert "Training rows are 64 or 96 tokens long, 72 on average, 5.1% of them padding" in text


def test_auto_sizes_and_what_binds_are_said(lsg_plan):
    result, text, _ = lsg_plan(
        "--topology", "v5e:2x2", "--programs", "eval", "--questions", "12", "--set", "eval.batch_size=auto"
    )
    (found,) = result["topologies"]
    assert found["mesh"]["answering"] == {"data": 4, "fsdp": 1, "tensor": 1}
    assert found["answering"] == {"eval": {"questions": 3, "parts": 1}}  # no more than there are
    assert [program["rows"] for program in found["programs"]] == [12, 12]
    for program in found["programs"]:
        seconds = program["seconds"]
        times = {"products": seconds["mxu"], "memory": seconds["hbm"], "transfers": seconds["ici"]}
        assert times[seconds["binds"]] == seconds["bound"] and f"{seconds['binds']}\n" in text
    assert "eval: 3 questions at a time on each of 4 groups of chips" in text


def test_what_a_plan_concludes(lsg_plan, monkeypatch):
    """With invented memory and times: 12 GiB + 0.5 a row and chip without remat, 2 + 0.25 with `dots`."""
    needs = {"none": (12.0, 0.5, 1.0), "dots": (2.0, 0.25, 2.0), "mlp": (2.0, 0.2, 2.5), "full": (1.0, 0.125, 3.0)}
    tried = []

    def invented(program, topology, what, *, utilisation):
        tried.append(what)
        policy = what.rpartition("remat ")[2].split(",")[0] if "remat" in what else "full"
        fixed, slope, second = needs[policy]
        peak = fixed + slope * program.rows / len(topology.devices)
        memory = {"weights": 1.0, "peak": peak}
        found = Measured(program=program.name, rows=program.rows, memory_gib=memory, compile_s=0.0)
        if peak > topology.chip.hbm_gib:
            return replace(found, over_gib=peak - topology.chip.hbm_gib), None
        work = Work(1e12, 1e9, 0.0, {"collective-permute": 2e9}, {"collective-permute": 2000.0})
        seconds = Seconds(second, 0.5, 0.25, expected=second / utilisation)
        return replace(found, memory_gib=memory | {"temporaries": peak - 1}, work=work, seconds=seconds), None

    monkeypatch.setattr("lsg_jax.plan.plan.measure", invented)
    result, text, _ = lsg_plan("--topology", "v5e:2x2", "v5e:4x4", "--programs", "train", "each", "--rows-per-chip", "8")
    for found, chips in zip(result["topologies"], (4, 16), strict=True):
        assert found["devices"] == chips and found["hosts"] == chips / 4
        entries = {(entry["program"], entry.get("remat")): entry for entry in found["programs"]}
        assert list(entries) == [("train", "none"), ("train", "dots"), ("train", "full"), ("each", "full")]
        assert [key for key, entry in entries.items() if entry.get("take")] == [("train", "dots")]
        none = entries["train", "none"]
        assert not none["fits"] and none["over_gib"] == pytest.approx(0.25) and "remat dots" in none["advice"]
        assert found["largest_batch"] == {"remat": "dots", "rows": 55 * chips, "peak_gib": 15.75}
        costs = {row["part"]: row["chip_hours"] for row in found["recipe"]}
        assert costs["train"] == pytest.approx(10_000 * 2 // (8 * chips) * 4.0 * chips / 3600)
        assert costs["each"] == pytest.approx(costs["train"] * 1.5)
    assert len(tried) == 2 * (5 + 1)
    assert "train, remat none: does not fit, 16.00 GiB a chip are 0.25 too many: remat dots" in text
    assert "largest training batch with remat dots: 220 rows, 15.75 GiB a chip" in text
    assert "train, remat dots *: 2000 collective-permutes" in text
    rows = [line.split() for line in text.splitlines() if line.startswith("v5e:") and " dots " in line]
    assert [row[:4] for row in rows] == [["v5e:2x2", "4", "32", "dots"], ["v5e:4x4", "16", "128", "dots"]]


def test_what_was_measured_before_an_error_is_printed(capfd, monkeypatch, tmp_path, tiny_hf_folder):
    """The error of a later program, policy or topology, and a stop; an error of the first program leaves nothing to print."""
    found = Measured(
        program="",
        rows=8,
        memory_gib={"peak": 1.0},
        compile_s=0.0,
        seconds=Seconds(1.0, 0.5, 0.25, 2.0),
        work=Work(1e12, 1e9),
    )
    (tmp_path / "run.toml").write_text(CONFIG)

    def planned(good, error, topologies, programs, *more):
        left = iter([found] * good)

        def measured(program, topology, what, *, utilisation):
            if (one := next(left, None)) is None:
                raise error
            return replace(one, program=program.name), None

        monkeypatch.setattr("lsg_jax.plan.plan.measure", measured)
        arguments = ["--model-config", tiny_hf_folder, "--topology", *topologies, "--programs", *programs, *more]
        code = main(["plan", str(tmp_path / "run.toml"), *map(str, arguments)])
        out, err = capfd.readouterr()
        return code, out, [line for line in err.splitlines() if ": compiling " not in line]

    refused, one = InputError("the disk is gone"), ["v5e:2x2"]
    for code, error, programs, more in (
        (65, refused, ["forward", "train"], []),
        (75, KeyboardInterrupt(), ["train"], ["--remat", "dots", "full"]),
        (1, ValueError("a loop of unknown length"), ["train"], ["--remat", "dots"]),  # of the largest batch
    ):
        ended, out, err = planned(1, error, one, programs, *more, "--json")
        result = json.loads(out)
        assert ended == code and len(err) == 1 and err[0].startswith("lsg plan: "), err
        assert not result["whole"]
        assert [program["program"] for program in result["topologies"][0]["programs"]] == programs[:1]
    code, out, err = planned(1, refused, ["v5e:2x2", "v5e:4x4"], ["forward"], "--batch", "16")
    assert (code, err) == (65, ["lsg plan: the disk is gone"]) and "v5e:2x2: 4 chips" in out and "v5e:4x4" not in out
    assert planned(0, refused, one, ["forward"]) == (65, "", err)


def test_programs_for_devices_that_are_not_there_are_not_kept(tmp_path, tiny_hf_folder):
    """JAX could not read them back, and would say so at the next plan."""
    (tmp_path / "run.toml").write_text(CONFIG)
    command = [sys.executable, "-m", "lsg_jax", "plan", tmp_path / "run.toml", "--model-config", tiny_hf_folder]
    settings = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"} | settings
    more = ["--topology", "v5e:1x1", "--programs", "look", "--json"]
    done = subprocess.run([*command, *more], env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "v5e:1x1, look, 1 rows: compiling 1 of at most 1\n")
    (look,) = json.loads(done.stdout)["topologies"][0]["programs"]
    assert look["fits"] and look["flops"] > 0 and "times_forward" not in look
    assert not list(tmp_path.glob("cache/*"))


def test_the_step_of_several_seeds(tiny_hf_folder, mesh):
    """Every chip holds the gates and optimiser states of all, and the compiled program shares what the traced one does."""
    config = run_config(tomllib.loads(CONFIG), where="test")
    model = replace(read_config(tiny_hf_folder), sinks=config.sinks)
    flops, state = {}, {}
    for seeds in (1, 3):
        program = train_program(replace(config, train=replace(config.train, seeds=seeds, remat="full")), model, mesh)
        flops[seeds], state[seeds] = traced_flops(program.function, *program.arguments), program.parts["trained and optimiser"]
        assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state[seeds]))
    compiled = program.compile()
    assert 4 * analyse(compiled.as_text()).flops == pytest.approx(flops[3], rel=0.05)
    assert compiled.memory_analysis().argument_size_in_bytes >= sum(map(shard_bytes, program.parts.values()))
    assert all(sharding.is_fully_replicated for sharding in jax.tree.leaves(compiled.output_shardings))
    assert shard_bytes(state[3]) == 3 * shard_bytes(state[1]) - 2 * state[1].step.dtype.itemsize  # they take the same steps
    assert flops[3] < 2.7 * flops[1]


def test_what_does_not_fit_says_by_how_much(mesh):
    topology = open_topology("v5e:2x2")
    x = abstract(mesh, jnp.bfloat16, (40, 2**30), "fsdp")  # 20 GiB a chip
    program = Program("forward", jax.jit(lambda x: jnp.sort(x, axis=1)), (x,), 40, {"batch": x})
    found, compiled = measure(program, topology, "a sort", utilisation=0.5)
    assert not found.fits and compiled is None and found.memory_gib["batch"] == 20 and found.memory_gib["peak"] > 40
    assert found.over_gib == pytest.approx(found.memory_gib["peak"] - 15.75)
