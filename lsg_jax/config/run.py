"""Schema of a training or evaluation run, which is read from a TOML file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from lsg_jax.config.model import Aspect
from lsg_jax.config.ranges import Range, Table
from lsg_jax.errors import ConfigError

Template = Literal[
    "chat_template", "vicuna_v1", "qwen2", "qwen_1_5", "chatml_direct", "mistral_instruct", "llava_llama_3", "llama3", "phi3",
    "qwen2_base", "qwen2_instruct", "qwen2_vl", "qwen3_vl", "internvl", "gemma3", "smolvlm", "vlmevalkit_llava",
]  # fmt: skip
Protocol = Literal["paper", "lmms_eval", "vlmevalkit", "cambrian", "mmstar"]
BenchmarkKind = Literal["general", "hallucination", "vision_centric"]
"""What a benchmark is about."""
Remat = Literal["full", "mlp", "dots", "none", "offload", "auto"]
BatchSize = Annotated[int, Range("[1, 1e6]")] | Literal["auto"]
"""Questions at a time on each device along `data` and `fsdp`. `auto`: as many as its memory holds (`lsg_jax.sizes`)."""


@dataclass(frozen=True)
class DataConfig(Table, name="data"):
    """Where training examples come from, and the lengths they are padded to.

    A conversation of several answers gives an example for each, with the turns before as prompt (`split`), since a gate reads
    at the end of a prompt. `whole` makes one example of it in which every answer counts, for methods that train no gates.

    With `buckets` = 1 every row is padded to `max_length`. With more, a batch holds examples of similar length and is padded to
    one of so many lengths, or of fewer where those leave hardly more padding. They follow from the records. A program is
    compiled for each.

    Attributes:
        records: folder written by `lsg prepare`.
        max_length: tokens of an example, image tokens included; longer examples are left out.
        max_answer_tokens: tokens of an answer; examples with longer ones are left out.
        buckets: most lengths that batches are padded to; 1: all to `max_length`.
        conversations: an example for each answer, or for the `whole` conversation.
        order: seeds the order of the records; unset: the run's `seed`, the first of several (`train.seeds`), which then share
            their passes over the model; -1: each seed has an order of its own, and runs after the others.
        num_threads: threads that read and decode images.
        prefetch: batches that are prepared ahead.
        image_aspect: what is done to images that are no squares; unset: as the model folder says.
        template: text template of prompts; unset: the checkpoint's chat template, else that of its family.
    """

    records: str = ""
    max_length: Annotated[int, Range("[1, 1e8]")] = 1024
    max_answer_tokens: Annotated[int, Range("[1, 1e8]")] = 256
    buckets: Annotated[int, Range("[1, 64]")] = 1
    conversations: Literal["split", "whole"] = "split"
    order: Annotated[int, Range("[-1, 4294967295]")] | None = None
    num_threads: Annotated[int, Range("[1, 1024]")] = 2
    prefetch: Annotated[int, Range("[1, 1e4]")] = 4
    image_aspect: Aspect | None = None
    template: Template | None = None


@dataclass(frozen=True)
class TrainConfig(Table, name="train"):
    """Optimisation. The paper leaves the optimiser open: AdamW with warm-up and cosine decay are our defaults.

    Attributes:
        batch_size: examples of a step, over all devices.
        epochs: passes over the records.
        max_steps: stop earlier than `epochs` passes over the records.
        optimizer: AdamW, or stochastic gradient descent with momentum `beta1` (`sgd`).
        learning_rate: the highest one, after the warm-up.
        warmup_fraction: share of the steps in which the learning rate rises.
        final_lr_fraction: learning rate at the end, in units of `learning_rate`.
        weight_decay: share of each parameter that a step takes off, in units of the learning rate.
        beta1: decay of the mean of the gradients.
        beta2: decay of the mean of the squares of the gradients.
        clip_norm: largest norm of the gradient, over all parameters.
        remat: what is kept for the backward pass: only the input of each layer (`full`; in host memory with `offload`), also
            the wide activations of the MLP (`mlp`), all products with weights (`dots`), everything (`none`); `auto`: the
            fastest that fits the memory of the device.
        seeds: runs to train, from the seeds `seed`, `seed` + 1, ..., each into a folder of its own, OUTPUT/seed0, ...
        accumulate: parts of a batch that are computed in turn, for less memory.
        max_skipped: non-finite steps in a row before the run is aborted.
        log_every: steps between two lines of metrics.jsonl.
        save_every: steps between two checkpoints.
        keep: checkpoints that are kept.
        tensorboard: write event files into OUTPUT/tensorboard, beside metrics.jsonl.
        wandb: project of Weights & Biases; empty: none.
        profile: first and last step to trace, into OUTPUT/profile.
    """

    batch_size: Annotated[int, Range("[1, 1e6]")] = 64
    epochs: Annotated[int, Range("[1, 1e6]")] = 2
    max_steps: Annotated[int, Range("[1, 1e9]")] | None = None
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: Annotated[float, Range("(0, 1000]")] = 1e-3
    warmup_fraction: Annotated[float, Range("[0, 1]")] = 0.03
    final_lr_fraction: Annotated[float, Range("[0, 1]")] = 0.0
    weight_decay: Annotated[float, Range("[0, 1000]")] = 0.0
    beta1: Annotated[float, Range("[0, 1)")] = 0.9
    beta2: Annotated[float, Range("[0, 1)")] = 0.999
    clip_norm: Annotated[float, Range("(0, 1e12]")] = 1.0
    remat: Remat = "full"
    seeds: Annotated[int, Range("[1, 1000]")] = 1
    accumulate: Annotated[int, Range("[1, 1e6]")] = 1
    max_skipped: Annotated[int, Range("[1, 1e6]")] = 5
    log_every: Annotated[int, Range("[1, 1e9]")] = 1
    save_every: Annotated[int, Range("[1, 1e9]")] = 100
    keep: Annotated[int, Range("[1, 1e6]")] = 3
    tensorboard: bool = False
    wandb: str = ""
    profile: tuple[Annotated[int, Range("[1, 1e9]")], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.profile and not (len(self.profile) == 2 and self.profile[0] <= self.profile[1]):
            raise ConfigError(f"train.profile is {list(self.profile)}: give the first and the last step, as [10, 12]")
        if self.batch_size % self.accumulate:
            raise ConfigError(f"train.accumulate {self.accumulate} does not divide train.batch_size {self.batch_size}")


@dataclass(frozen=True)
class MeshConfig(Table, name="mesh"):
    """Sizes of the device mesh; -1 takes the remaining devices. See lsg_jax/sharding.py for what the axes do.

    Attributes:
        data: devices that each hold a copy of the model, and share the batch.
        fsdp: devices that share the parameters and the batch.
        tensor: devices that share the heads and the width of the MLP.
    """

    data: Annotated[int, Range("[1, 1e6]", also=-1)] = 1
    fsdp: Annotated[int, Range("[1, 1e6]", also=-1)] = -1
    tensor: Annotated[int, Range("[1, 1e6]", also=-1)] = 1


@dataclass(frozen=True)
class EvalConfig(Table, name="eval"):
    """Evaluation by greedy generation.

    A question is answered again, alone on its device, where two tokens of its answer were closer than `near_tie` logits.
    Rounding errors depend on the batch size and the number of devices, and would otherwise decide such ties. None: 0.001 for
    float32 weights, and 0 (never) for bfloat16, whose errors are so large that too many questions would be asked twice.

    Attributes:
        benchmarks: name of each benchmark with its file, folder or glob; own questions as JSONL.
        protocol: sets the prompts, the matchers and the aggregate.
        limit: questions of each benchmark, evenly spread; there is no official score then.
        batch_size: questions at a time on each device; `auto`: as many as its memory holds.
        max_new_tokens: tokens of the longest answer; unset: the protocol's own for the benchmark, else 32.
        max_length: tokens of a prompt, image tokens included.
        near_tie: difference of two logits under which a question is asked again alone; unset: 0.001 for float32 weights, else
            0.
        num_threads: threads that read and decode images.
        image_aspect: what is done to images that are no squares; unset: as the model folder says.
        template: text template of prompts; unset: the checkpoint's chat template, else that of its family.
        mesh: devices of evaluation; unset: chosen by what the model and the memory need.
    """

    benchmarks: dict[str, str] = field(default_factory=dict)
    protocol: Protocol = "paper"
    limit: Annotated[int, Range("[1, 1e9]")] | None = None
    batch_size: BatchSize = 16
    max_new_tokens: Annotated[int, Range("[1, 1e8]")] | None = None
    max_length: Annotated[int, Range("[1, 1e8]")] = 1024
    near_tie: Annotated[float, Range("[0, 1e9]")] | None = None
    num_threads: Annotated[int, Range("[1, 1024]")] = 2
    image_aspect: Aspect | None = None
    template: Template | None = None
    mesh: MeshConfig | None = None
