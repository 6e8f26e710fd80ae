"""Do the models at true size fit on TPU slices, and is the work of each program within its bound? Needs no TPU.

    JAX_PLATFORMS=cpu python benchmarks/scale.py [--only NAME ...] [--json FILE]

Compiles ahead of time, without weights, as `lsg plan` does, each case in a process of its own, and compares with its bounds.
A broken bound gives exit code 1. `traced` counts without compiling.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from converters.hf_config import model_config
from lsg_jax.analysis.sweep import coefficient_grid
from lsg_jax.analysis.sweep_cells import PromptPass, resume_cells
from lsg_jax.config import GateConfig, MeshConfig, ModelConfig, SinkConfig, Weights
from lsg_jax.memory import device_bytes
from lsg_jax.methods.fixed import Fixed, FixedConfig
from lsg_jax.methods.method_model import abstract_model, assemble
from lsg_jax.model.generate import cache_of, last_token
from lsg_jax.plan.chips import GIB, open_topology
from lsg_jax.plan.hlo import analyse
from lsg_jax.plan.hlo_text import Module
from lsg_jax.plan.plan import PlanSettings, plan
from lsg_jax.plan.programs import (
    Program,
    each_config,
    eval_answers,
    eval_prompts,
    forward_program,
    train_program,
)
from lsg_jax.plan.recipe import assume
from lsg_jax.plan.traced import traced_flops
from lsg_jax.run_config import RunConfig, load_run_config
from lsg_jax.sharding import abstract_batch, make_mesh
from lsg_jax.train.remat import fastest_that_fits
from lsg_jax.types import Batch

CONFIGS = Path(__file__).parent.parent / "configs"
CONFIG = CONFIGS / "llava15_7b.toml"
TRAINING, ANSWERING = MeshConfig(), MeshConfig(data=1, fsdp=1, tensor=-1)
ALL = tuple(range(32))
HBM = 15.75  # GiB of a v5e chip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--timed", action="store_true", help="bounds of seconds count too: on a quiet machine of two cores")
    parser.add_argument("--case", choices=list(CASES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(CASES[options.case]()))
        return
    results, failed = {}, False
    for name in options.only:
        command = [sys.executable, __file__, "--case", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"{name}: ended with {done.returncode}")
        results[name] = json.loads(done.stdout.splitlines()[-1])
        for what, (value, bound) in results[name].items():
            broken = bound is not None and value > bound and (options.timed or not what.endswith(", s"))
            failed |= broken
            limit = "" if bound is None else f"  {'ABOVE' if broken else '<='} {bound:g}"
            print(f"{name:12} {what:44} {value:10.3f}{limit}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    sys.exit(failed)


Found = dict[str, tuple[float, float | None]]
"""What was measured -> (value, upper bound)."""


def settings(*, layers: tuple[int, ...] = ALL, remat: str = "full", rows: int = 64) -> RunConfig:
    config = load_run_config(CONFIG, [f"train.batch_size={rows}", f'train.remat="{remat}"'])
    return config.with_settings(GateConfig(layers=layers))


def model(name: str = "llava15_7b", weights: Weights = "float") -> ModelConfig:
    raw = json.loads((files("lsg_jax.plan") / "models" / f"{name}.json").read_text(encoding="utf-8"))
    config = model_config(raw, preprocessor=raw.pop("preprocessor", None), where=name)
    return dataclasses.replace(
        config, sinks=SinkConfig(vit_dims=(650,)), text=dataclasses.replace(config.text, weights=weights)
    )


def mesh(topology: str, axes: MeshConfig = TRAINING) -> jax.sharding.Mesh:
    return make_mesh(axes, list(open_topology(topology).devices))


def compiled(program: Program) -> tuple[Any, Found]:
    start = time.perf_counter()
    result = program.compile()
    seconds = time.perf_counter() - start
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return result, {"compile, s": (seconds, None), "memory of the compiling process, GiB": (host, None)}


def training(topology: str, limit: float, *, shapes: str = "llava15_7b", **of: Any) -> Found:
    """A step that must fit."""
    result, found = compiled(train_program(settings(**of), model(shapes), mesh(topology)))
    return {"GiB a chip": (device_bytes(result) / GIB, limit), **found}


def one_chip() -> Found:
    """8-bit weights on a single chip: a gate at layer 10, full remat, 8 sequences."""
    program = train_program(settings(layers=(10,), rows=8), model(weights="int8"), mesh("v5e:1x1"))
    result, found = compiled(program)
    weights = device_bytes_of(program.parts["weights"]) / GIB
    copied = copied_layers(result.as_text(), program.parts["weights"])
    return {
        "GiB": (device_bytes(result) / GIB, HBM),
        "GiB of weights": (weights, 7.2),
        "layers of a kernel held in floats": (copied, 1.0),
        "TFLOP": (analyse(result.as_text()).flops / 1e12, None),
        **found,
    }


def device_bytes_of(tree: Any) -> float:
    return float(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)))


def copied_layers(hlo: str, weights: Any) -> float:
    """How many layers the largest floating array holds that has the shape of an 8-bit kernel, or of some layers of its stack.

    Arrays inside fusions are not held in memory, so these are left out.
    """
    kernels = [leaf.shape[1:] for leaf in jax.tree.leaves(weights) if leaf.dtype == jnp.int8]
    matrices = [(math.prod(shape[:axes]), math.prod(shape[axes:])) for shape in kernels for axes in range(1, len(shape))]
    one_layer = {tuple(sorted(shape)) for shape in (*kernels, *matrices)}
    computations = Module(hlo).computations.values()
    fused = {name for computation in computations for i in computation if i.op == "fusion" for name in i.calls}
    held = (i for computation in computations if computation.name not in fused for i in computation)
    floats = (array.shape for i in held for array in i.arrays if array.dtype in ("bf16", "f32"))
    most = 0
    for shape in floats:
        wide = [size for size in shape if size > 1]
        stacks = [(1, wide), *((size, wide[:i] + wide[i + 1 :]) for i, size in enumerate(wide))]
        most = max([most, *(layers for layers, rest in stacks if tuple(sorted(rest)) in one_layer)])
    return float(most)


def answering(
    topology: str, programs: tuple[str, ...], *, weights: Weights = "float", hours: float | None = None, least: int = 1
) -> Found:
    """What `lsg plan` says of a sweep or an evaluation whose sizes are "auto"; `hours` bounds the sweep's.

    Seconds are those at peak rates. All programs must fit, an evaluation takes at least `least` questions at a time, and
    transfers take no longer than products while prompts are read.
    """
    config = load_run_config(CONFIG, ['eval.batch_size="auto"'])
    assumed = assume(config, utilisation=0.5, records=None, questions=None)
    (found,) = plan(config, model(weights=weights), PlanSettings((topology,), programs), assumed).topologies
    result: Found = {f"answering mesh, {axis}": (size, None) for axis, size in found.answering_mesh.items() if size > 1}
    for name, size in found.sizes.items():
        result |= {f"{name}: questions a group": (size.questions, None), f"{name}: parts": (size.parts, None)}
        if name == "eval" and least > 1:
            result[f"eval: questions short of {least}"] = (max(0, least - size.questions), 0)
    for one in found.programs:
        assert one.seconds is not None and one.work is not None, f"{one.program} does not fit"
        at_peak = {"products": one.seconds.mxu, "memory": one.seconds.hbm, "transfers": one.seconds.ici}
        result |= {f"{one.program}, GiB": (one.memory_gib["peak"], None), f"{one.program}, compile, s": (one.compile_s, None)}
        result |= {f"{one.program}, s, {what}": (seconds, None) for what, seconds in at_peak.items()}
        if one.program == "eval prompts":
            result["eval prompts, transfers to products"] = (one.seconds.ici / one.seconds.mxu, 1.0)
    return result | {f"{cost.part}, hours": (cost.hours, hours if cost.part == "sweep" else None) for cost in found.costs}


def four_chips(shapes: str, axes: MeshConfig, received: float | None) -> Found:
    """8-bit weights on v5e:2x2, 8 sequences a chip, full remat: what the chips send each other."""
    of = model(shapes, weights="int8")
    result, found = compiled(train_program(settings(layers=(10,), rows=32), of, mesh("v5e:2x2", axes)))
    work = analyse(result.as_text())
    return {
        "GiB a chip": (device_bytes(result) / GIB, HBM),
        "GB received a chip": (work.received_bytes / 1e9, received),
        "TFLOP a chip": (work.flops / 1e12, None),
        **found,
    }


def shipped(name: str, seconds: float = 120.0) -> Found:
    """The step of a shipped configuration, whose remat is "full"."""
    config = load_run_config(CONFIGS / f"{name}.toml", [])
    result, found = compiled(train_program(config, model(name), mesh("v5e:4x4")))
    limits = {"compile, s": seconds, "memory of the compiling process, GiB": 4.0}
    bounded = {what: (value, limits[what]) for what, (value, _) in found.items()}
    return {"GiB a chip": (device_bytes(result) / GIB, HBM), **bounded}


def step_work(layers: tuple[int, ...], most: float) -> Found:
    """The step with the policy that `auto` takes, against the forward pass."""
    of, devices, spent = model(), mesh("v5e:4x4"), {}

    def compile_with(policy: str) -> Any:
        result, spent["found"] = compiled(train_program(settings(layers=layers, remat=policy), of, devices))
        return result

    policy, result = fastest_that_fits(compile_with, int(HBM * GIB))
    print(f"auto takes {policy}", file=sys.stderr)
    forward = forward_program(settings(), of, devices)
    # attention kernels apart: their backward pass computes the scores again, so alone they cost 2.5 times their forward pass
    products, everything = (
        analyse(result.as_text(), **kernels).flops
        * devices.size
        / traced_flops(forward.function, *forward.arguments, **kernels)
        for kernels in ({"kernels": lambda kernel: 0.0}, {})
    )
    work = analyse(result.as_text())
    found = spent["found"]
    return {
        "GiB a chip": (device_bytes(result) / GIB, HBM),
        "TFLOP a chip": (work.flops / 1e12, None),
        "FLOPs of matrix products, times forward": (products, most),
        "the same with attention kernels": (everything, None),
        "GB received a chip": (work.received_bytes / 1e9, 30.0),
        "collective-permutes": (work.collectives.get("collective-permute", 0.0), 1000.0),
        "compile, s": (found["compile, s"][0], 120.0),
        "memory of the compiling process, GiB": (found["memory of the compiling process, GiB"][0], 2.0),
    }


def each() -> Found:
    program = train_program(each_config(settings(), model()), model(), mesh("v5e:4x4"))
    result, found = compiled(program)
    work = analyse(result.as_text(), trips=program.trips)
    received = {"TFLOP a chip": (work.flops / 1e12, None), "GB received a chip": (work.received_bytes / 1e9, None)}
    return {"GiB a chip": (device_bytes(result) / GIB, HBM), **received, **found}


def seeds() -> Found:
    """Gates of three seeds in one run, against one seed: the compiled step at layer 10, the traced one also higher."""
    of, devices = model(), mesh("v5e:4x4")

    def step(layer: int, count: int) -> Program:
        config = settings(layers=(layer,))
        return train_program(dataclasses.replace(config, train=dataclasses.replace(config.train, seeds=count)), of, devices)

    flops = lambda program: traced_flops(program.function, *program.arguments)
    low, high = (flops(step(layer, 1)) for layer in (10, 24))
    result, found = compiled(step(10, 3))
    work = analyse(result.as_text()).flops
    return {
        "GiB a chip": (device_bytes(result) / GIB, 8.0),
        "TFLOP a chip": (work / 1e12, None),
        "FLOPs of three seeds, of one": (work * devices.size / low, 2.75),
        "the same at layer 24": (flops(step(24, 3)) / high, 2.0),
        **found,
    }


def generation() -> Found:
    """64 questions on eight chips, with tensor parallelism over all of them."""
    config = settings(layers=(10,))
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, batch_size=64))
    prompts = eval_prompts(config, model(), mesh("v5e:2x4", ANSWERING), max_new_tokens=64)
    read, found = compiled(prompts)
    answered, more = compiled(eval_answers(prompts, read))
    hlo = answered.as_text()
    gathered = [analyse(hlo, trips={"decode_greedily": trips}).received.get("all-gather", 0.0) for trips in (0, 1)]
    return {
        "GiB a chip, prompts": (device_bytes(read) / GIB, 10.0),
        "GiB a chip, answers": (device_bytes(answered) / GIB, 10.0),
        # a layer's smallest matrix alone has 34 MB
        "MB gathered for each token": ((gathered[1] - gathered[0]) / 1e6, 10.0),
        **{f"{what}, prompts": value for what, value in found.items()},
        **{f"{what}, answers": value for what, value in more.items()},
    }


def traced() -> Found:
    """Work of all gates in one run, and of a sweep, against that of separate runs."""
    of, devices = model(), mesh("v5e:4x4")

    def flops(config: RunConfig) -> float:
        program = train_program(config, of, devices)
        return traced_flops(program.function, *program.arguments, trips=program.trips)

    low, middle, high, last = 0, 15, 30, 31
    alone = {layer: flops(settings(layers=(layer,))) for layer in (low, middle, high, last)}
    if alone[middle] * 2 != alone[low] + alone[high]:
        raise SystemExit(f"the cost of a gate is not linear in its layer: {alone}")
    separate = last * (alone[low] + alone[high]) / 2 + alone[last]
    together = flops(each_config(settings(), of))
    shared, naive = sweep_flops(of)
    return {
        "all gates in one run, of separate runs": (together / separate, 0.75),
        "sweep, of separate runs": (shared / naive, 0.52),
    }


def sweep_flops(config: ModelConfig) -> tuple[float, float]:
    """FLOPs of the prompt passes of a sweep over all layers for one question: as `lsg sweep` runs them, and each cell apart."""
    length, coefficients = 1024, coefficient_grid(2, 0.1)
    layers = range(config.text.num_layers)
    batch = abstract_batch(config, make_mesh(MeshConfig(fsdp=1), jax.devices()[:1]), 1, length)
    graphdef, params = abstract_model(config, dtype=jnp.bfloat16)

    def prompts(params: dict, batch: Batch) -> tuple[jax.Array, PromptPass]:
        model = assemble(graphdef, params)
        sequence = model.sequence(batch)
        assert sequence.visual is not None
        rows = last_token(sequence.valid)[:, None]
        out = model(batch, sequence=sequence, rows=rows, keep_kv=True, observe=lambda view: view.hidden)
        shared = PromptPass.of(batch, sequence, out.observed, cache_of(sequence, out))
        return model.language_model.logits(out.hidden), shared

    def cells(params: dict, shared: PromptPass, layer: int) -> jax.Array:
        model = assemble(graphdef, params)
        values = jnp.array(coefficients, jnp.float32)
        return model.language_model.logits(resume_cells(model, shared, layer, values, "v_sink_rest", room=0)[0])

    def alone(params: dict, batch: Batch, layer: int) -> jax.Array:
        fixed, _ = abstract_model(config, Fixed(FixedConfig((layer,), coefficients[0])), dtype=jnp.bfloat16)
        model = assemble(fixed, params)
        rows = last_token(batch.attention_mask)[:, None]
        return model.language_model.logits(model(batch, rows=rows, keep_kv=True).hidden)

    base, (_, shared) = traced_flops(prompts, params, batch), jax.eval_shape(prompts, params, batch)
    trips = lambda layer: {"resume": config.text.num_layers - 1 - layer}
    cell = lambda layer: traced_flops(lambda p, s: cells(p, s, layer), params, shared, trips=trips(layer))
    apart = lambda layer: traced_flops(lambda p, b: alone(p, b, layer), params, batch)
    once = base + sum(map(cell, layers))
    naive = base + len(coefficients) * sum(map(apart, layers))
    return once, naive


CASES: dict[str, Callable[[], Found]] = {
    "traced": traced,
    "auto": lambda: step_work(ALL, 2.0),
    "one gate": lambda: step_work((10,), 1.75),
    "full": lambda: training("v5e:4x4", 4.0),
    "each": each,
    "seeds": seeds,
    "7b on 8": lambda: training("v5e:2x4", HBM, rows=32),
    "13b on 16": lambda: training("v5e:4x4", HBM, shapes="llava15_13b", layers=tuple(range(40))),
    "qwen25-vl": lambda: shipped("qwen25_vl_7b"),
    "internvl3": lambda: shipped("internvl3_8b"),
    "gemma3": lambda: shipped("gemma3_12b"),
    "generation": generation,
    "sweep": lambda: answering("v5e:4x4", ("sweep",), hours=2.0),
    "evaluation": lambda: answering("v5e:4x4", ("eval",)),
    "one chip": one_chip,
    "one chip answers": lambda: answering("v5e:1x1", ("sweep", "eval"), weights="int8", least=8),
    "int8 7b on 4": lambda: four_chips("llava15_7b", MeshConfig(data=4, fsdp=1), 1.0),
    "int8 13b on 4": lambda: four_chips("llava15_13b", TRAINING, None),
}

if __name__ == "__main__":
    main()
