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

    `order` seeds the order of the records. Without it, that is the run's `seed`; of several seeds (`train.seeds`) that share
    their passes over the model, the first. -1 gives each seed an order of its own, and a run after the others.
    """

    records: str = ""  # folder written by `lsg prepare`
    max_length: Annotated[int, Range("[1, 1e8]")] = 1024  # tokens per example, image tokens included
    max_answer_tokens: Annotated[int, Range("[1, 1e8]")] = 256
    buckets: Annotated[int, Range("[1, 64]")] = 1  # most lengths that batches are padded to
    conversations: Literal["split", "whole"] = "split"
    order: Annotated[int, Range("[-1, 4294967295]")] | None = None
    num_threads: Annotated[int, Range("[1, 1024]")] = 2
    prefetch: Annotated[int, Range("[1, 1e4]")] = 4  # batches
    image_aspect: Aspect | None = None  # None: as the model folder says
    template: Template | None = None  # None: the checkpoint's chat template, else that of its family


@dataclass(frozen=True)
class TrainConfig(Table, name="train"):
    """Optimisation. The paper leaves the optimiser open: AdamW with warm-up and cosine decay are our defaults.

    `sgd` is stochastic gradient descent with momentum `beta1`. `remat` names what is kept for the backward pass: only the input
    of each layer (`full`; in host memory with `offload`), also the wide activations of the MLP (`mlp`), all products with
    weights (`dots`), everything (`none`). `auto` is the fastest that fits the memory of the device.

    `seeds` trains so many runs, from the seeds `seed`, `seed` + 1, ..., each into a folder of its own, OUTPUT/seed0, ...
    """

    batch_size: Annotated[int, Range("[1, 1e6]")] = 64  # over all devices
    epochs: Annotated[int, Range("[1, 1e6]")] = 2
    max_steps: Annotated[int, Range("[1, 1e9]")] | None = None  # stop earlier than `epochs` passes over the records
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: Annotated[float, Range("(0, 1000]")] = 1e-3
    warmup_fraction: Annotated[float, Range("[0, 1]")] = 0.03  # of the steps
    final_lr_fraction: Annotated[float, Range("[0, 1]")] = 0.0  # of `learning_rate`
    weight_decay: Annotated[float, Range("[0, 1000]")] = 0.0
    beta1: Annotated[float, Range("[0, 1)")] = 0.9
    beta2: Annotated[float, Range("[0, 1)")] = 0.999
    clip_norm: Annotated[float, Range("(0, 1e12]")] = 1.0  # of the global gradient norm
    remat: Remat = "full"
    seeds: Annotated[int, Range("[1, 1000]")] = 1
    accumulate: Annotated[int, Range("[1, 1e6]")] = 1  # parts of a batch that are computed in turn, for less memory
    max_skipped: Annotated[int, Range("[1, 1e6]")] = 5  # non-finite steps in a row before the run is aborted
    log_every: Annotated[int, Range("[1, 1e9]")] = 1  # steps
    save_every: Annotated[int, Range("[1, 1e9]")] = 100  # steps
    keep: Annotated[int, Range("[1, 1e6]")] = 3  # checkpoints
    tensorboard: bool = False  # event files in OUTPUT/tensorboard, beside metrics.jsonl
    wandb: str = ""  # project of Weights & Biases
    profile: tuple[Annotated[int, Range("[1, 1e9]")], ...] = ()  # first and last step to trace, into OUTPUT/profile

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.profile and not (len(self.profile) == 2 and self.profile[0] <= self.profile[1]):
            raise ConfigError(f"train.profile is {list(self.profile)}: give the first and the last step, as [10, 12]")
        if self.batch_size % self.accumulate:
            raise ConfigError(f"train.accumulate {self.accumulate} does not divide train.batch_size {self.batch_size}")


@dataclass(frozen=True)
class MeshConfig(Table, name="mesh"):
    """Sizes of the device mesh; -1 takes the remaining devices. See lsg_jax/sharding.py for what the axes do."""

    data: Annotated[int, Range("[1, 1e6]", also=-1)] = 1
    fsdp: Annotated[int, Range("[1, 1e6]", also=-1)] = -1
    tensor: Annotated[int, Range("[1, 1e6]", also=-1)] = 1


@dataclass(frozen=True)
class EvalConfig(Table, name="eval"):
    """Evaluation by greedy generation.

    A question is answered again, alone on its device, where two tokens of its answer were closer than `near_tie` logits.
    Rounding errors depend on the batch size and the number of devices, and would otherwise decide such ties. None: 0.001 for
    float32 weights, and 0 (never) for bfloat16, whose errors are so large that too many questions would be asked twice.
    """

    benchmarks: dict[str, str] = field(default_factory=dict)  # name -> file, folder or glob; JSONL for own questions
    protocol: Protocol = "paper"  # sets the prompts, the matchers and the aggregate
    limit: Annotated[int, Range("[1, 1e9]")] | None = None  # questions a benchmark, evenly spread; no official score then
    batch_size: BatchSize = 16
    max_new_tokens: Annotated[int, Range("[1, 1e8]")] | None = None  # None: the protocol's own for the benchmark, else 32
    max_length: Annotated[int, Range("[1, 1e8]")] = 1024  # tokens per prompt, image tokens included
    near_tie: Annotated[float, Range("[0, 1e9]")] | None = None
    num_threads: Annotated[int, Range("[1, 1024]")] = 2  # that read and decode images
    image_aspect: Aspect | None = None
    template: Template | None = None
    mesh: MeshConfig | None = None  # None: as `sharding.answering_mesh` chooses
