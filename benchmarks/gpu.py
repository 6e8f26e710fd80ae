"""The shapes of LLaVA-1.5-7B in bfloat16 on one NVIDIA GPU, with random weights: a gate's training step, and generation.

    python benchmarks/gpu.py --out gpu.json                  # at most 10 minutes
    JAX_PLATFORMS=cpu python benchmarks/gpu.py --tiny        # the same program on a tiny model, anywhere

Beside lsg_jax stands Hugging Face PyTorch with the gate as hooks (extra [torch]), if it is installed with CUDA. `attention`
compares cuDNN's kernel with XLA's computation of the same call. Each task has a process of its own, and the GPU to itself.
Reported are the first call, which compiles, the median of the others, and the most memory that was in use.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

SECONDS = {"attention": 60, "train": 180, "generate": 90}  # limits, with loading; pytorch has no task `attention`
GIB = 2**30
FIRST_WORDS = 16  # in front of the image
NO_TOKEN = 10**8  # an end of text that no model writes: every row runs to the end


@dataclass(frozen=True)
class Sizes:
    """Rows, tokens a row, answer tokens among them, new tokens, the gated layer."""

    batch: int
    length: int
    answer: int
    new: int
    layer: int


TRUE, TINY = Sizes(8, 1024, 64, 64, 10), Sizes(2, 64, 8, 4, 1)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    arguments.add_argument("--out", type=Path, help="JSON file for the results")
    arguments.add_argument("--tiny", action="store_true", help="a tiny model, on any device")
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument("--one", nargs=2, metavar=("SIDE", "TASK"), help="run one task in this process, and print its JSON")
    args = arguments.parse_args()
    if args.one:
        side, task = args.one
        print(json.dumps(TASKS[side][task](args.tiny, args.repeats)))
        return
    results: dict[str, Any] = {}
    for side, tasks in TASKS.items():
        for task in tasks:
            found = in_process(side, task, args)
            results.setdefault(task, {})[side] = found
            print(f"{task:10} {side:8} {shown(found)}", flush=True)
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


def in_process(side: str, task: str, args: argparse.Namespace) -> dict[str, Any]:
    """The result of a task, or why there is none."""
    command = [sys.executable, __file__, "--one", side, task, "--repeats", str(args.repeats), *["--tiny"] * args.tiny]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS[task])
    except subprocess.TimeoutExpired:
        return {"none": f"not done within {SECONDS[task]} s"}
    if done.returncode:
        return {"none": (done.stderr.strip().splitlines() or ["no reason given"])[-1][:300]}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def shown(found: dict[str, Any]) -> str:
    return "; ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in found.items())


def timed(call: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Seconds of the first call, and the median of the others; `call` returns when its result is there."""
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return {"first_s": seconds[0], "median_s": statistics.median(seconds[1:])}


# ---------------------------------------------------------------------------------------------------- what both sides share


def hf_config(tiny: bool) -> dict[str, Any]:
    """The model's config.json."""
    stated = json.loads((files("lsg_jax.plan") / "models" / "llava15_7b.json").read_text(encoding="utf-8"))
    if tiny:
        heads = {"num_attention_heads": 4, "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96}
        stated["text_config"] |= heads | {"num_key_value_heads": 4}
        stated["vision_config"] |= heads | {"image_size": 56, "num_hidden_layers": 3}
    return dict(stated)


def portable_gates(width: int, layer: int) -> Any:
    """A random gate; a few of the patches are V-sinks."""
    from lsg_jax.config import GateConfig, SinkConfig
    from lsg_jax.gating.portable import PortableGates

    rng = np.random.default_rng(0)
    shapes = {"norm_scale": (1, width), "norm_bias": (1, width), "fc1_kernel": (1, width, 64), "fc1_bias": (1, 64)}
    shapes |= {"fc2_kernel": (1, 64, 2), "fc2_bias": (1, 2)}
    parameters = {name: 0.1 * rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    parameters["norm_scale"] += 1
    return PortableGates(GateConfig(layers=(layer,)), SinkConfig(vit_dims=(7,), vit_tau=1.5), parameters)


def inputs(stated: dict[str, Any], sizes: Sizes) -> dict[str, np.ndarray]:
    """`ids`, `labels` int64 [B, T] and `pixels` float32 [B, 3, side, side]: words, an image, words, the answer."""
    rng, vision = np.random.default_rng(1), stated["vision_config"]
    side, image = vision["image_size"], stated["image_token_index"]
    count = (side // vision["patch_size"]) ** 2
    ids = rng.integers(3, image, size=(sizes.batch, sizes.length))
    ids[:, FIRST_WORDS : FIRST_WORDS + count] = image
    labels = np.where(np.arange(sizes.length) < sizes.length - sizes.answer, -100, ids)
    pixels = rng.normal(size=(sizes.batch, 3, side, side)).astype(np.float32)
    return {"ids": ids, "labels": labels, "pixels": pixels}


# ------------------------------------------------------------------------------------------------------------------- lsg_jax


def random_vlm(tiny: bool, sizes: Sizes) -> Any:
    """A `VLM` with random bfloat16 weights on the device, and a gate."""
    import jax
    import jax.numpy as jnp

    from converters.hf_config import model_config
    from lsg_jax.methods.gates import Gates
    from lsg_jax.methods.method_model import TRAINED, abstract_model
    from lsg_jax.vlm import VLM

    config = model_config(hf_config(tiny), where="gpu.py")
    gates = portable_gates(config.text.hidden_size, sizes.layer)
    config = dataclasses.replace(config, sinks=gates.sinks, eos_token_ids=(NO_TOKEN,))
    _, shapes = abstract_model(config, Gates(gates.gate), dtype=jnp.bfloat16)
    shapes.pop(TRAINED)

    def draw(path: Any, leaf: Any) -> Any:
        # all layers alike: drawing them takes no memory that would count as the most in use
        one = jax.random.normal(jax.random.key(leaf.size), leaf.shape[1:] if leaf.ndim > 2 else leaf.shape, leaf.dtype)
        return jnp.broadcast_to(0.02 * one + (path[-1].key == "scale"), leaf.shape)

    frozen = jax.tree_util.tree_map_with_path(jax.jit(draw, static_argnums=(0, 1)), shapes)
    return VLM(config, frozen, method=Gates(gates.gate), trained=jax.device_put(gates.parameters))


def peak_gib() -> float | None:
    """The most memory of the device that was in use; None where JAX does not say."""
    import jax

    stats = jax.local_devices()[0].memory_stats()
    return stats["peak_bytes_in_use"] / GIB if stats else None


def device_and_attention(vlm: Any) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    from lsg_jax.model.cudnn_attention import why_not_cudnn

    reason = why_not_cudnn(jnp.bfloat16, vlm.config.text.head_dim, None)
    return {"device": jax.devices()[0].device_kind, "attention": "cuDNN" if reason is None else f"plain, since {reason}"}


def our_step(tiny: bool, repeats: int) -> dict[str, Any]:
    """A training step of the gate, under the fastest remat policy that fits."""
    import functools

    import jax

    from lsg_jax.config import MeshConfig, TrainConfig
    from lsg_jax.memory import device_memory
    from lsg_jax.model.loss import answer_slots
    from lsg_jax.sharding import make_mesh
    from lsg_jax.train.remat import fastest_that_fits
    from lsg_jax.train.step import compiled_step, init_state

    sizes = TINY if tiny else TRUE
    vlm, given = random_vlm(tiny, sizes), inputs(hf_config(tiny), sizes)
    config = TrainConfig(batch_size=sizes.batch, warmup_fraction=0.0)
    index, target = answer_slots(given["labels"])
    batch = vlm.batch(given["ids"], given["pixels"], gate_position=index[:, 0])
    batch = jax.device_put(dataclasses.replace(batch, answer_index=index, answer_target=target))
    state = init_state(vlm.trained, vlm.frozen, config=config, total_steps=1000)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    make = functools.partial(compiled_step, vlm.graphdef, total_steps=1000, mesh=mesh)
    compile_with = lambda policy: (
        make(config=dataclasses.replace(config, remat=policy)).lower(state, vlm.frozen, batch).compile()
    )
    began = time.perf_counter()
    policy, step = fastest_that_fits(compile_with, device_memory())
    compile_s = time.perf_counter() - began

    def call() -> None:
        nonlocal state
        state, metrics = step(state, vlm.frozen, batch)
        assert np.isfinite(float(metrics["loss"]))

    found = timed(call, repeats)
    return {"compile_s": compile_s, **found, "remat": policy, "peak_gib": peak_gib(), **device_and_attention(vlm)}


def our_answers(tiny: bool, repeats: int) -> dict[str, Any]:
    """Prompts without the answer, and new tokens, greedy and gated."""
    sizes = TINY if tiny else TRUE
    vlm, given = random_vlm(tiny, sizes), inputs(hf_config(tiny), sizes)
    batch = vlm.batch(given["ids"][:, : -sizes.answer], given["pixels"])
    found = timed(lambda: vlm.generate_in_full(batch, sizes.new), repeats)
    return {**found, "peak_gib": peak_gib(), **device_and_attention(vlm)}


def attention(tiny: bool, repeats: int) -> dict[str, Any]:
    """Largest differences of cuDNN from XLA, output and gradients, on left- and right-padded rows, and the seconds of both."""
    import jax
    import jax.numpy as jnp

    from lsg_jax.model.cudnn_attention import cudnn_attention, why_not_cudnn
    from lsg_jax.model.scope import causal_mask

    rows, length, heads, width = (2, 64, 4, 16) if tiny else (8, 1024, 32, 128)
    draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape, jnp.bfloat16)
    query = draw(0, rows, length, heads, width)
    key, value, up = draw(1, rows, heads, length, width), draw(2, rows, heads, length, width), draw(3, *query.shape)
    places, padded = jnp.arange(length), (jnp.arange(rows) * length // (2 * rows))[:, None]
    valid = jnp.where((jnp.arange(rows) % 2 == 0)[:, None], places >= padded, places < length - padded)
    mask, up = causal_mask(valid), jnp.where(valid[..., None, None], up, 0)

    def run(implementation: Any) -> Callable[[], Any]:
        @jax.jit
        def both(query: jax.Array, key: jax.Array, value: jax.Array) -> Any:
            attend = lambda *qkv: cudnn_attention(*qkv, mask, implementation=implementation)
            out, backward = jax.vjp(attend, query, key, value)
            return out, *backward(up)

        return lambda: jax.block_until_ready(both(query, key, value))

    xla, reason = run("xla"), why_not_cudnn(jnp.bfloat16, width, None)
    found: dict[str, Any] = {f"xla {name}": value for name, value in timed(xla, repeats).items()}
    if reason is not None:
        return found | {"cudnn": reason}
    fused = run("cudnn")
    found |= {f"cudnn {name}": value for name, value in timed(fused, repeats).items()}
    gap = lambda ours, want: float(jnp.abs(ours.astype(jnp.float32) - want.astype(jnp.float32)).max())
    named = zip(("output", "query", "key", "value"), fused(), xla(), strict=True)
    return found | {f"largest difference, {name}": gap(ours, want) for name, ours, want in named}


# ------------------------------------------------------------------------------------------------------------------- PyTorch


def torch_model(tiny: bool, sizes: Sizes) -> tuple[Any, Any, dict[str, Any]]:
    """The model with random bfloat16 weights on the GPU (of the tiny one, wherever there is one), gates, and inputs."""
    if find_spec("torch") is None:
        raise SystemExit("PyTorch is not installed")
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    if not (tiny or torch.cuda.is_available()):
        raise SystemExit("PyTorch finds no GPU")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    stated = hf_config(tiny)
    with torch.device(device):
        model = LlavaForConditionalGeneration._from_config(LlavaConfig(**stated), dtype=torch.bfloat16)
    model = model.eval().requires_grad_(False)
    model.generation_config.eos_token_id = None  # every row runs to the end
    given = {name: torch.tensor(array, device=device) for name, array in inputs(stated, sizes).items()}
    given["pixels"] = given["pixels"].to(torch.bfloat16)
    return model, portable_gates(model.config.text_config.hidden_size, sizes.layer), given


def torch_peak() -> dict[str, Any]:
    import torch

    if not torch.cuda.is_available():
        return {"peak_gib": None, "device": "cpu"}
    return {"peak_gib": torch.cuda.max_memory_allocated() / GIB, "device": torch.cuda.get_device_name()}


def torch_step(tiny: bool, repeats: int) -> dict[str, Any]:
    """The same step; logits at the answer only, as in lsg_jax."""
    import torch

    from converters.torch_gate import attach

    sizes = TINY if tiny else TRUE
    model, gates, given = torch_model(tiny, sizes)
    ids, answer = given["ids"], sizes.answer
    position = torch.full((len(ids),), sizes.length - answer - 1, device=ids.device)
    with attach(model, gates, gate_position=position) as handle:
        parameters = list(handle.gates.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
        asked = {"input_ids": ids, "pixel_values": given["pixels"], "attention_mask": torch.ones_like(ids)}

        def call() -> None:
            logits = model(**asked, logits_to_keep=answer + 1, use_cache=False).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), given["labels"][:, -answer:].flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            assert np.isfinite(loss.item())

        return timed(call, repeats) | torch_peak()


def torch_answers(tiny: bool, repeats: int) -> dict[str, Any]:
    """The same prompts and tokens."""
    import torch

    from converters.torch_gate import attach

    sizes = TINY if tiny else TRUE
    model, gates, given = torch_model(tiny, sizes)
    ids = given["ids"][:, : -sizes.answer]
    asked = {"input_ids": ids, "pixel_values": given["pixels"], "attention_mask": torch.ones_like(ids)}
    with attach(model, gates), torch.no_grad():
        call = lambda: model.generate(**asked, max_new_tokens=sizes.new, do_sample=False).cpu()
        assert call().shape[1] == ids.shape[1] + sizes.new
        return timed(call, repeats) | torch_peak()


TASKS: dict[str, dict[str, Callable[[bool, int], dict[str, Any]]]] = {
    "lsg_jax": {"attention": attention, "train": our_step, "generate": our_answers},
    "pytorch": {"train": torch_step, "generate": torch_answers},
}

if __name__ == "__main__":
    main()
