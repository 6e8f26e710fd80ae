"""Hugging Face PyTorch against lsg_jax on the CPU: training step, prefill, generation, and a whole evaluation.

    JAX_PLATFORMS=cpu python benchmarks/side_by_side.py --out side_by_side.json

Needs the extra [torch]. Both sides hold the same weights, gates and inputs, compute in float32 on the same number of threads,
and take turns (A B A B), so that whatever else the machine does falls on both. Reported are medians, and ratios of medians.
The first call, which compiles, is reported apart. PyTorch has the gate as hooks.

`evaluate` is a process from its start to its end: the embedded model answers questions on files of images, by `lsg eval` and by
Hugging Face's processor and `generate` on batches of the same size. Its first call has an empty cache of compiled programs.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

IMAGE_TOKEN, VOCABULARY = 31_999, 32_000
PATCHES, TEXT, ANSWER, BATCH = 196, 128, 32, 8
PATCH_SIZE = 16
LAYER, NEW_TOKENS = 4, 64
QUESTIONS, QUESTIONS_AT_ONCE, ANSWER_TOKENS = 2000, 50, 6  # of `evaluate`
NO_TOKEN = 10**8  # an end of text that no model writes: every row runs to the end


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    arguments.add_argument("--out", type=Path, help="JSON file for the results")
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--only", choices=TASKS)
    arguments.add_argument("--hf-answers", nargs=2, type=Path, metavar=("MODEL", "QUESTIONS"), help=argparse.SUPPRESS)
    args = arguments.parse_args()
    limit_threads(args.threads)
    if args.hf_answers:
        print(json.dumps(hf_answers(*args.hf_answers)))
        return
    model, gates, inputs = hugging_face_model(), make_gates(), make_inputs()
    results: dict[str, Any] = {"settings": settings(args), "versions": versions()}
    for name, make in TASKS.items():
        if args.only in (None, name):
            results[name] = interleave(make(model, gates, inputs), args.repeats)
    print(table(results))
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


def limit_threads(count: int) -> None:
    """The same number of threads for both. XLA takes as many as there are cores that it may run on."""
    cores = sorted(os.sched_getaffinity(0))[:count]
    os.sched_setaffinity(0, cores)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import torch

    torch.set_num_threads(len(cores))


def hugging_face_model() -> Any:
    """ViT of 6 layers x 256, language model of 8 layers x 512, 32,000 words; random weights."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=224,
        patch_size=PATCH_SIZE,
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, tie_word_embeddings=False)
    model = LlavaForConditionalGeneration(config).eval().requires_grad_(False)
    model.generation_config.eos_token_id = None  # every row runs to the end
    return model


def make_gates() -> Any:
    """One random gate at layer 4; a few of the patches are V-sinks."""
    from lsg_jax.config import GateConfig, SinkConfig
    from lsg_jax.gating.portable import PortableGates

    rng = np.random.default_rng(0)
    shapes = {"norm_scale": (1, 512), "norm_bias": (1, 512), "fc1_kernel": (1, 512, 64), "fc1_bias": (1, 64)}
    shapes |= {"fc2_kernel": (1, 64, 2), "fc2_bias": (1, 2)}
    parameters = {
        name: (0.1 * rng.normal(size=shape) + (name == "norm_scale")).astype(np.float32) for name, shape in shapes.items()
    }
    return PortableGates(GateConfig(layers=(LAYER,)), SinkConfig(vit_dims=(7,), vit_tau=1.5), parameters)


def make_inputs() -> dict[str, np.ndarray]:
    """Rows of 16 words, 196 patches and 112 more words, of which the last 32 are the answer."""
    rng = np.random.default_rng(1)
    words = rng.integers(3, IMAGE_TOKEN, size=(BATCH, TEXT))
    ids = np.concatenate([words[:, :16], np.full((BATCH, PATCHES), IMAGE_TOKEN), words[:, 16:]], axis=1)
    labels = ids.copy()
    labels[:, :-ANSWER] = -100
    pixels = rng.normal(size=(BATCH, 3, 224, 224)).astype(np.float32)
    return {"ids": ids, "labels": labels, "pixels": pixels}


def train_tasks(model: Any, gates: Any, inputs: dict[str, np.ndarray]) -> dict[str, Callable[[], Any]]:
    """One optimiser step a call: forward, backward, AdamW update of the gate."""
    return {
        "pytorch, all logits": torch_step(model, gates, inputs, answers_only=False),
        "pytorch, answer logits": torch_step(model, gates, inputs, answers_only=True),
        "lsg_jax, remat none": jax_step(model, gates, inputs, remat="none"),
        "lsg_jax, remat full": jax_step(model, gates, inputs, remat="full"),
    }


def torch_step(model: Any, gates: Any, inputs: dict[str, np.ndarray], *, answers_only: bool) -> Callable[[], Any]:
    """The stock loss computes logits at all positions; `answers_only` computes those that the loss needs."""
    import torch

    from converters.torch_gate import attach

    ids, labels, pixels = (torch.tensor(inputs[name]) for name in ("ids", "labels", "pixels"))
    mask, position = torch.ones_like(ids), torch.full((BATCH,), ids.shape[1] - ANSWER - 1)
    handle = attach(model, gates)
    optimizer = torch.optim.AdamW(handle.gates.parameters(), lr=1e-3, weight_decay=0.0)
    handle.remove()

    def step() -> float:
        with attach(model, gates, gate_position=position) as attached:
            attached.gates.update(handle.gates)
            inputs = {"input_ids": ids, "pixel_values": pixels, "attention_mask": mask}
            if answers_only:
                logits = model(**inputs, logits_to_keep=ANSWER + 1).logits[:, :-1]
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels[:, -ANSWER:].flatten())
            else:
                loss = model(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(handle.gates.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


def our_model(model: Any, gates: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Graph definition, frozen parameters and gates on the device."""
    import dataclasses

    import jax

    from converters.convert import tree_from_tensors
    from converters.hf_config import model_config
    from lsg_jax.methods.gates import Gates
    from lsg_jax.methods.method_model import abstract_model

    config = dataclasses.replace(model_config(model.config.to_diff_dict()), sinks=gates.sinks)
    graphdef, _ = abstract_model(config, Gates(gates.gate))
    frozen = tree_from_tensors(config, {name: tensor.numpy() for name, tensor in model.state_dict().items()})
    return graphdef, jax.device_put(frozen), jax.device_put(gates.parameters)


def our_batch(inputs: dict[str, np.ndarray], *, answers: bool) -> Any:
    import jax
    import jax.numpy as jnp

    from lsg_jax.data.images import to_patches
    from lsg_jax.model.loss import answer_slots
    from lsg_jax.types import Batch, VisualInput

    ids = inputs["ids"] if answers else inputs["ids"][:, :-ANSWER]
    index, target = answer_slots(inputs["labels"])
    is_image = ids == IMAGE_TOKEN
    source = np.where(is_image, np.cumsum(is_image, axis=1) - 1, -1)[..., None]
    return jax.device_put(
        Batch(
            input_ids=ids.astype(np.int32),
            attention_mask=np.ones(ids.shape, bool),
            images=VisualInput(
                np.stack([to_patches(image.transpose(1, 2, 0), PATCH_SIZE)[None] for image in inputs["pixels"]])
            ),
            source=source.astype(np.int32),
            gate_position=jnp.full((BATCH,), inputs["ids"].shape[1] - ANSWER - 1, jnp.int32),
            answer_index=index if answers else None,
            answer_target=target if answers else None,
        )
    )


def jax_step(model: Any, gates: Any, inputs: dict[str, np.ndarray], *, remat: Any) -> Callable[[], Any]:
    import jax

    from lsg_jax.config import TrainConfig
    from lsg_jax.train.step import init_state, train_step

    graphdef, frozen, parameters = our_model(model, gates)
    schedule = {"config": TrainConfig(warmup_fraction=0.0, final_lr_fraction=1.0, remat=remat), "total_steps": 1000}
    state = init_state(parameters, frozen, **schedule)
    batch = our_batch(inputs, answers=True)
    compiled = jax.jit(functools.partial(train_step, graphdef=graphdef, **schedule))

    def step() -> float:
        nonlocal state
        state, metrics = compiled(state, frozen, batch)
        return float(metrics["loss"])

    return step


def generate_tasks(
    model: Any, gates: Any, inputs: dict[str, np.ndarray], *, new_tokens: int = NEW_TOKENS
) -> dict[str, Callable[[], Any]]:
    """Prefill and greedy tokens, gated; no token ends a row early."""
    import dataclasses

    import jax
    import torch

    from converters.torch_gate import attach
    from lsg_jax.methods.method_model import assemble
    from lsg_jax.model.generate import generate

    ids, pixels = torch.tensor(inputs["ids"][:, :-ANSWER]), torch.tensor(inputs["pixels"])
    asked = {"input_ids": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids)}

    def torch_tokens() -> np.ndarray:
        with attach(model, gates), torch.no_grad():
            out = model.generate(**asked, max_new_tokens=new_tokens, do_sample=False)
        return out[:, ids.shape[1] :].numpy()

    graphdef, frozen, parameters = our_model(model, gates)
    batch = our_batch(inputs, answers=False)

    @jax.jit
    def run(frozen: Any, parameters: Any, batch: Any) -> Any:
        vlm = assemble(graphdef, frozen, parameters)
        vlm.config = dataclasses.replace(vlm.config, eos_token_ids=(NO_TOKEN,))
        return generate(vlm, batch, max_new_tokens=new_tokens)[0]

    return {"pytorch": torch_tokens, "lsg_jax": lambda: np.asarray(run(frozen, parameters, batch))}


def evaluate_tasks(*_: Any) -> dict[str, Callable[[], Any]]:
    """Answers of the embedded model to QUESTIONS questions, each call a process of its own."""
    from converters.convert import convert
    from lsg_jax.data.scene_questions import write_questions
    from lsg_jax.quickstart import CHECKPOINT

    folder = Path(tempfile.mkdtemp(prefix="side-by-side-"))
    convert(CHECKPOINT, folder / "model", dtype="float32")
    questions = write_questions(folder / "questions", "validation", QUESTIONS, side=112)
    config = folder / "config.toml"
    config.write_text(
        f'model = "{folder}/model"\noutput = "{folder}/run"\n'
        f"[eval]\nbatch_size = {QUESTIONS_AT_ONCE}\nmax_new_tokens = {ANSWER_TOKENS}\n"
    )
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}

    def ran(*command: object) -> str:
        done = subprocess.run([sys.executable, *map(str, command)], env=environment, check=True, capture_output=True, text=True)
        return done.stdout

    def hugging_face() -> np.ndarray:
        return np.array(json.loads(ran(__file__, "--hf-answers", CHECKPOINT, questions)))

    def ours() -> np.ndarray:
        out = Path(tempfile.mkdtemp(dir=folder))
        ran("-m", "lsg_jax", "eval", config, "--method", "base", "--benchmark", f"own={questions}", "--out", out)
        return np.array([json.loads(line)["output"] for line in (out / "own.base.jsonl").read_text().splitlines()])

    return {"pytorch": hugging_face, "lsg_jax": ours}


def hf_answers(model: Path, questions: Path) -> list[str]:
    """Greedy answers in batches, the prompts padded on the left."""
    import torch
    from PIL import Image
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    from lsg_jax.data.scene_questions import scene_questions

    processor = AutoProcessor.from_pretrained(model, padding_side="left")
    answering = LlavaForConditionalGeneration.from_pretrained(model, dtype=torch.float32).eval()
    prompts = []
    for asked in scene_questions("validation", QUESTIONS):
        content = [{"type": "image"}, {"type": "text", "text": asked.prompt}]
        prompts.append(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))
    files = [questions.parent / json.loads(line)["image"] for line in questions.read_text().splitlines()]
    answers: list[str] = []
    for start in range(0, len(files), QUESTIONS_AT_ONCE):
        part = slice(start, start + QUESTIONS_AT_ONCE)
        images = [Image.open(file).convert("RGB") for file in files[part]]
        inputs = processor(images=images, text=prompts[part], padding=True, return_tensors="pt")
        with torch.no_grad():
            out = answering.generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False)
        answers += processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


TASKS: dict[str, Callable[..., dict[str, Callable[[], Any]]]] = {
    "train": train_tasks,
    "prefill": functools.partial(generate_tasks, new_tokens=1),
    "generate": generate_tasks,
    "evaluate": evaluate_tasks,
}


def interleave(tasks: dict[str, Callable[[], Any]], repeats: int) -> dict[str, Any]:
    """Calls the tasks alternately, after one call each that compiles; checks that their results agree."""
    first, results = {}, {}
    for name, task in tasks.items():
        start = time.perf_counter()
        results[name] = task()
        first[name] = time.perf_counter() - start
        print(f"{name}: first call {first[name]:.2f} s", file=sys.stderr, flush=True)
    reference, *others = results.values()
    same = lambda a, b: np.mean(a == b if np.asarray(a).dtype.kind == "U" else np.isclose(a, b, rtol=1e-4))
    agreement = min(float(same(other, reference)) for other in others)
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(repeats):
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            times[name].append(time.perf_counter() - start)
            print(f"{name}: {times[name][-1]:.3f} s", file=sys.stderr, flush=True)
    median = {name: statistics.median(seconds) for name, seconds in times.items()}
    return {"median_s": median, "first_call_s": first, "all_s": times, "agreement": agreement}


def table(results: dict[str, Any]) -> str:
    """Markdown: one row per variant, with its speed relative to each PyTorch variant."""
    lines = ["| task | variant | median s | first call s | PyTorch / this |", "|---|---|---|---|---|"]
    for task in TASKS:
        if task not in results:
            continue
        median, first = results[task]["median_s"], results[task]["first_call_s"]
        for name, seconds in median.items():
            ratios = [f"{median[other] / seconds:.2f}" for other in median if other.startswith("pytorch")]
            lines.append(f"| {task} | {name} | {seconds:.3f} | {first[name]:.2f} | {' / '.join(ratios)} |")
    agreement = {task: results[task]["agreement"] for task in TASKS if task in results}
    if "evaluate" in results:
        rates = {name: round(60 * QUESTIONS / seconds) for name, seconds in results["evaluate"]["median_s"].items()}
        lines += ["", f"Questions a minute, with start and end: {rates}"]
    return "\n".join([*lines, "", f"Share of equal results (first loss, tokens, answers): {agreement}"])


def settings(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "batch": BATCH,
        "image_tokens": PATCHES,
        "text_tokens": TEXT,
        "answer_tokens": ANSWER,
        "new_tokens": NEW_TOKENS,
        "questions": QUESTIONS,
        "questions_at_once": QUESTIONS_AT_ONCE,
        "gated_layer": LAYER,
        "threads": args.threads,
        "repeats": args.repeats,
        "dtype": "float32",
    }


def versions() -> dict[str, str]:
    packages: Sequence[str] = ("jax", "jaxlib", "flax", "optax", "torch", "transformers")
    return {"python": platform.python_version(), "machine": platform.machine(), **{p: version(p) for p in packages}}


if __name__ == "__main__":
    main()
