"""Configuration: frozen dataclasses, strict TOML, dotted overrides.

`ModelConfig` describes a converted checkpoint and lives in its manifest. `RunConfig` describes a training or evaluation run
and is read from a TOML file. Every unknown field, wrong type and impossible value is a `ConfigError` of one line.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from lsg_jax.errors import ConfigError

Criterion = Literal["dim_abs", "dim_rms", "norm", "massive", "attention"]
Signal = Literal["last", "mean_all", "mean_visual"]
Grouping = Literal["v_sink_rest", "l_sink_rest", "three"]
Aspect = Literal["pad", "crop", "squash"]
Template = Literal["chat_template", "vicuna_v1", "qwen2", "phi3"]
Method = Literal["base", "lsg", "var", "sink_front", "diysink", "lora", "fixed", "full"]
Part = Literal["vision_tower", "projector", "language_model"]
Protocol = Literal["paper", "lmms_eval", "vlmevalkit", "cambrian"]
Activation = Literal["gelu", "gelu_exact", "quick_gelu", "silu", "relu"]
Remat = Literal["full", "mlp", "dots", "none", "offload", "auto"]


def _at_least_one(table: str, **fields: int | None) -> None:
    for name, value in fields.items():
        if value is not None and value < 1:
            raise ConfigError(f"{table}.{name} is {value}: it must be at least 1")


@dataclass(frozen=True)
class VisionConfig:
    """A vision transformer. `family` sets what differs: CLIP has a class token and a norm before its layers, SigLIP neither."""

    family: Literal["clip", "siglip"]
    image_size: int
    patch_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    layer_norm_eps: float
    hidden_act: Activation
    num_channels: int = 3

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def has_class_token(self) -> bool:
        return self.family == "clip"

    @property
    def num_positions(self) -> int:
        return self.num_patches + self.has_class_token

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding. `linear` divides the angles by `factor`; `llama3` interpolates by wavelength (Llama 3.1)."""

    theta: float
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    rotary_dim: int | None = None  # None: the whole head


@dataclass(frozen=True)
class TextConfig:
    """A pre-norm decoder with rotary positions and a gated MLP; Llama, Mistral, Qwen2 and Phi-3 differ in these settings."""

    family: Literal["llama", "mistral", "qwen2", "phi3"]
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_positions: int
    hidden_act: Activation = "silu"
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    tied_embeddings: bool = False
    sliding_window: int | None = None  # a sequence longer than this is refused: full attention would differ from the original


@dataclass(frozen=True)
class SinkConfig:
    """What counts as a sink (paper.md, "Two kinds of visual sink").

    The paper does not state its thresholds. `vit_tau` and `llm_tau` are in units of the activation for `dim_abs` and `massive`,
    multiples of the token's RMS for `dim_rms`, a Euclidean norm for `norm`, a share in [0, 1] for `attention`; `massive` asks
    for `massive_ratio` times the layer's median as well. Defaults: 70 lies between what norms leave to dimension 650 of CLIP
    (sinks above 100, most tokens below 60: at least 80 and at most 60); 100 is the absolute part of Sun et al.
    """

    criterion: Criterion = "dim_abs"
    vit_dims: tuple[int, ...] = ()
    vit_tau: float = 70.0
    llm_criterion: Criterion = "dim_abs"
    llm_dims: tuple[int, ...] = ()
    llm_tau: float = 100.0
    massive_ratio: float = 1000.0

    @property
    def knows_v_sinks(self) -> bool:
        """Whether the criterion of V-sinks can be applied: some need dimensions."""
        return bool(self.vit_dims) or self.criterion not in ("dim_abs", "dim_rms")

    @property
    def knows_l_sinks(self) -> bool:
        """The same of L-sinks."""
        return bool(self.llm_dims) or self.llm_criterion not in ("dim_abs", "dim_rms")


@dataclass(frozen=True)
class ImageConfig:
    """How pixels are prepared, as the checkpoint's image processor states it.

    `pad` pads to a square with the mean colour and then resizes (LLaVA-1.5); `crop` resizes the shortest edge and crops the
    centre (a plain CLIP processor); `squash` resizes to the square whatever the aspect (SigLIP).
    """

    size: int  # pixels of the square that the vision tower takes
    aspect: Aspect
    mean: tuple[float, ...]  # of pixels in [0, 1], one a channel
    std: tuple[float, ...]


@dataclass(frozen=True)
class ModelConfig:
    """A LLaVA-style stack: vision tower, two-layer projector, causal language model."""

    vision: VisionConfig
    text: TextConfig
    feature_layers: tuple[int, ...]  # indices into the ViT's hidden states (0 = embeddings); several are concatenated
    feature_select: Literal["default", "full"]  # "default" drops the first token, the class token of CLIP
    image_token_id: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    image: ImageConfig
    projector_hidden_act: Activation = "gelu_exact"
    projector_bias: bool = True
    sinks: SinkConfig = SinkConfig()

    @property
    def num_image_tokens(self) -> int:
        return self.vision.num_positions - (self.feature_select == "default")


@dataclass(frozen=True)
class GateConfig:
    """Layer-wise Sink Gating. The activation, the biases and `key_scale` are open in the paper; these are our defaults.

    `layers` lists the gated decoder layers, 0-based. `independent` trains the gate of each of them as if it were alone, all in
    one run; without `layers`, a gate at every decoder layer. In a file, `layers = "each"` says both. `biases` are those of the
    two linear layers; without them they stay zero. `key_scale` multiplies the ratios: 1.0 starts every visual key at 0.5, and
    2.0 makes the initial gate the identity.
    """

    layers: tuple[int, ...] = ()
    independent: bool = False
    width: int = 64
    activation: Activation = "gelu"
    biases: bool = True
    layer_norm_eps: float = 1e-5
    key_scale: float = 1.0
    signal: Signal = "last"
    grouping: Grouping = "v_sink_rest"

    def __post_init__(self) -> None:
        _at_least_one("gate", width=self.width)

    @property
    def num_groups(self) -> int:
        return 3 if self.grouping == "three" else 2

    def for_depth(self, num_layers: int) -> GateConfig:
        """The same with every layer named where `independent` gates name none."""
        every = self.independent and not self.layers
        return dataclasses.replace(self, layers=tuple(range(num_layers))) if every else self


@dataclass(frozen=True)
class FixedConfig:
    """Fixed coefficients instead of gates, the oracle of the paper: one for each group of `grouping`, at `layers`."""

    layers: tuple[int, ...] = ()
    coefficients: tuple[float, ...] = ()
    grouping: Grouping = "v_sink_rest"


@dataclass(frozen=True)
class VarConfig:
    """VAR (arXiv 2503.03321): in image-centric heads, attention goes from sinks to the other visual tokens. Not trained.

    It edits the queries after the image, in all layers from `first_layer` but the last.
    """

    tau: float = 20.0  # a token is a sink if some |h[d]| / rms(h) reaches it, d of sinks.llm_dims; it cannot exceed sqrt(D)
    rho: float = 0.5  # image-centric heads: at most this share of their visual attention falls on visual sinks ...
    min_visual: float = 0.2  # ... and at least this much of all attention is visual
    p: float = 0.6  # what is left of the attention on sinks
    first_layer: int = 2


@dataclass(frozen=True)
class SinkFrontConfig:
    """Sink-to-the-front (arXiv 2510.08510): visual tokens of large ViT norm come first among the visual tokens. Not trained.

    `VLM.v_sinks` lists the patches in the order of the image all the same.
    """

    tau: float = 100.0  # norm of the features before the projector


@dataclass(frozen=True)
class DiySinkConfig:
    """DIYSink (arXiv 2510.08510): one projector for sinks, one for the others, and a choice between them for each question.

    The projectors are trained, from the weights of the frozen one, and so is the network of `mlp`. With `cot` training keeps
    both sets of patches, and each question is answered after a short one on what it needs. See baselines/diysink.py.
    """

    tau: float = 100.0  # norm of the features before the projector
    routing: Literal["cot", "mlp"] = "cot"  # the model's own word on what the question needs; or weights of a small network
    width: int = 64  # of that network

    def __post_init__(self) -> None:
        _at_least_one("diysink", width=self.width)


@dataclass(frozen=True)
class LoraConfig:
    """LoRA at one decoder layer, on the projections of its attention. Rank 8 at D = 4096 has 262,144 parameters, as a gate."""

    layer: int = 10  # 0-based
    rank: int = 8
    alpha: float = 16.0  # the update counts alpha / rank times

    def __post_init__(self) -> None:
        _at_least_one("lora", rank=self.rank)


@dataclass(frozen=True)
class FullConfig:
    """Training of the model itself: all parameters of the parts that are named, the others frozen.

    LLaVA is made in two stages, with `["projector"]` on captions and the default on conversations.
    """

    parts: tuple[Part, ...] = ("projector", "language_model")

    def __post_init__(self) -> None:
        if not self.parts or len(set(self.parts)) < len(self.parts):
            raise ConfigError(f"full.parts is {list(self.parts)}: name some of {', '.join(typing.get_args(Part))}, each once")


MethodConfig = FixedConfig | VarConfig | SinkFrontConfig | DiySinkConfig | LoraConfig | FullConfig
"""What may be done to the model instead of gates."""


@dataclass(frozen=True)
class DataConfig:
    """Where training examples come from and the one shape they are padded to.

    A conversation of several answers gives an example for each, with the turns before as prompt (`split`), since a gate reads
    at the end of a prompt. `whole` makes one example of it in which every answer counts, for methods that train no gates.
    """

    records: str = ""  # folder written by `lsg prepare`
    max_length: int = 1024  # tokens per example, image tokens included
    max_answer_tokens: int = 256
    conversations: Literal["split", "whole"] = "split"
    num_threads: int = 2
    prefetch: int = 4
    image_aspect: Aspect | None = None  # None: as the model folder says
    template: Template | None = None  # None: the checkpoint's chat template, else that of its family

    def __post_init__(self) -> None:
        _at_least_one(
            "data",
            max_length=self.max_length,
            max_answer_tokens=self.max_answer_tokens,
            num_threads=self.num_threads,
            prefetch=self.prefetch,
        )


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation. The paper leaves the optimiser open: AdamW with warm-up and cosine decay are our defaults.

    `sgd` is stochastic gradient descent with momentum `beta1`. What `remat` names is kept for the backward pass: only the input
    of each layer (`full`; on the host with `offload`), also the wide activations of the MLP (`mlp`), all products with weights
    (`dots`), everything (`none`). `auto` is the fastest that fits the memory of the device.
    """

    batch_size: int = 64  # over all devices
    epochs: int = 2
    max_steps: int | None = None  # stop earlier than `epochs` passes over the records
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 1e-3
    warmup_fraction: float = 0.03
    final_lr_fraction: float = 0.0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    clip_norm: float = 1.0
    remat: Remat = "full"
    accumulate: int = 1  # parts of a batch that are computed one after the other, for less memory
    max_skipped: int = 5  # non-finite steps in a row before the run is aborted
    log_every: int = 1
    save_every: int = 100
    keep: int = 3
    tensorboard: bool = False  # event files in OUTPUT/tensorboard, beside metrics.jsonl
    wandb: str = ""  # project of Weights & Biases
    profile: tuple[int, ...] = ()  # first and last step to trace, into OUTPUT/profile

    def __post_init__(self) -> None:
        if self.profile and not (len(self.profile) == 2 and 1 <= self.profile[0] <= self.profile[1]):
            raise ConfigError(f"train.profile is {list(self.profile)}: give the first and the last step, as [10, 12]")
        if self.batch_size % max(self.accumulate, 1):
            raise ConfigError(f"train.accumulate {self.accumulate} does not divide train.batch_size {self.batch_size}")
        _at_least_one(
            "train",
            accumulate=self.accumulate,
            batch_size=self.batch_size,
            epochs=self.epochs,
            max_steps=self.max_steps,
            max_skipped=self.max_skipped,
            log_every=self.log_every,
            save_every=self.save_every,
            keep=self.keep,
        )


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the device mesh; -1 takes the devices that are left. See lsg_jax/sharding.py for what the axes do."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation by greedy generation.

    A question in whose answer a token leads by less than `near_tie` logits is answered again, alone on its device. Rounding
    errors depend on the batch size and the number of devices, and would otherwise decide such ties. None: 0.001 for float32
    weights, and 0 (never) for bfloat16, whose errors are so large that too many questions would be asked twice.
    """

    benchmarks: dict[str, str] = field(default_factory=dict)  # name -> Parquet file, folder or glob; JSONL for own questions
    protocol: Protocol = "paper"  # whose prompts, matchers and aggregate count
    limit: int | None = None  # questions of each benchmark, evenly spread; a partial run has no official score
    batch_size: int = 16  # questions at a time on each device along data and fsdp
    max_new_tokens: int | None = None  # None: the protocol's own for the benchmark, else 32
    max_length: int = 1024
    near_tie: float | None = None
    num_threads: int = 2  # that read and decode images
    image_aspect: Aspect | None = None
    template: Template | None = None
    mesh: MeshConfig | None = None  # None: as much along `tensor` as heads and hosts allow, the rest along `data`

    def __post_init__(self) -> None:
        _at_least_one(
            "eval",
            batch_size=self.batch_size,
            limit=self.limit,
            num_threads=self.num_threads,
            max_new_tokens=self.max_new_tokens,
            max_length=self.max_length,
        )


@dataclass(frozen=True)
class RunConfig:
    """One run. Relative paths are taken from the current folder, as everywhere on the command line."""

    model: str
    output: str
    seed: int = 0
    dtype: Literal["bfloat16", "float32"] | None = None  # None: as stored
    gate: GateConfig = GateConfig()
    sinks: SinkConfig | None = None  # None: those of the model folder
    method: Method = "lsg"  # what is trained and evaluated; the others are its baselines, each with a table of its own
    fixed: FixedConfig = FixedConfig()
    var: VarConfig = VarConfig()
    sink_front: SinkFrontConfig = SinkFrontConfig()
    diysink: DiySinkConfig = DiySinkConfig()
    lora: LoraConfig = LoraConfig()
    full: FullConfig = FullConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        if self.gate.independent and self.train.remat not in ("full", "auto"):
            raise ConfigError(f'train.remat is "{self.train.remat}": independent gates recompute every layer, choose "full"')
        if self.method == "lsg" and self.data.conversations == "whole":
            raise ConfigError('data.conversations = "whole" has no one place for a gate to read at: choose "split"')


T = TypeVar("T")


def load_run_config(path: str | Path, overrides: typing.Sequence[str] = ()) -> RunConfig:
    """Reads a TOML file and applies `a.b=value` overrides (values in TOML syntax; a bare word is a string).

    Raises:
        ConfigError: the file is missing or no TOML, or a field is unknown, missing or of another type.
    """
    path = Path(path)
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    for override in overrides:
        apply_override(tree, override, where="--set")
    return from_dict(RunConfig, _spell_out_each(tree, where=str(path)), where=str(path))


def _spell_out_each(tree: dict[str, Any], *, where: str) -> dict[str, Any]:
    """`gate.layers = "each"` as the fields of GateConfig that it stands for."""
    gate = tree.get("gate")
    if not isinstance(gate, dict) or gate.get("layers") != "each":
        return tree
    if gate.get("independent", True) is not True:
        raise ConfigError(f'{where}: gate: layers = "each" trains independent gates: name the layers, or drop independent')
    return {**tree, "gate": {**gate, "layers": [], "independent": True}}


def apply_override(tree: dict[str, Any], override: str, *, where: str) -> None:
    """Sets one field of plain data from text such as `a.b=1e-4`. `where` names the source in errors."""
    name, equals, text = override.partition("=")
    if not equals or not name.strip():
        raise ConfigError(f"{where} {override}: write it as a.b=value")
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    *parents, leaf = name.strip().split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{where} {override}: {parent} is not a table")
    tree[leaf] = value


def from_dict(cls: type[T], tree: dict[str, Any], *, where: str) -> T:
    """Builds a dataclass from plain data, strictly. `where` names the source in errors."""
    if not isinstance(tree, dict):
        raise ConfigError(f"{where}: expected a table, got {tree!r}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in tree:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known fields: {', '.join(fields)}"
            raise ConfigError(f"{where}: unknown field {name}; {hint}")
    required = [n for n, f in fields.items() if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
    if missing := [n for n in required if n not in tree]:
        raise ConfigError(f"{where}: missing field {', '.join(missing)}")
    return cls(**{name: _coerce(hints[name], value, f"{where}: {name}") for name, value in tree.items()})


def _coerce(hint: Any, value: Any, where: str) -> Any:
    """Checks `value` against a type hint; integers pass as floats, lists as tuples."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (hint,) = [a for a in args if a is not type(None)]  # every union here is `X | None`
        return _coerce(hint, value, where)
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{where}: {value!r} is not one of {', '.join(map(str, args))}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where}: expected a list, got {value!r}")
        return tuple(_coerce(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: expected a table, got {value!r}")
        return {k: _coerce(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where=where)  # type: ignore[arg-type]
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{where}: expected {hint.__name__}, got {value!r}")
    return value


def to_dict(config: Any) -> dict[str, Any]:
    """Plain data of a configuration, fit for JSON: tuples as lists, None kept."""
    return json.loads(json.dumps(dataclasses.asdict(config)))
