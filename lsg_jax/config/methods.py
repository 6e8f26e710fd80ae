"""Schema of what is done to the model: gates, and the methods that they are compared with."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from lsg_jax.config.model import Activation
from lsg_jax.config.ranges import Range, Table
from lsg_jax.errors import ConfigError

Signal = Literal["last", "mean_all", "mean_visual"]
Grouping = Literal["v_sink_rest", "l_sink_rest", "three"]
Part = Literal["vision_tower", "projector", "language_model"]
Method = Literal["base", "lsg", "var", "sink_front", "diysink", "lora", "fixed", "full"]


@dataclass(frozen=True)
class GateConfig(Table, name="gate"):
    """Layer-wise Sink Gating. The activation, the biases and `key_scale` are open in the paper; these are our defaults.

    `layers` lists the gated decoder layers, 0-based. `independent` trains the gate of each of them as if it were alone, all in
    one run; without `layers`, a gate at every decoder layer. In a file, `layers = "each"` says both. `biases` are those of the
    two linear layers; without them they stay zero. `key_scale` multiplies the ratios: 1.0 starts every visual key at 0.5, and
    2.0 makes the initial gate the identity.
    """

    layers: tuple[Annotated[int, Range("[0, 1e4]")], ...] = ()
    independent: bool = False
    width: Annotated[int, Range("[1, 1e6]")] = 64
    activation: Activation = "gelu"
    biases: bool = True
    layer_norm_eps: Annotated[float, Range("[0, 1]")] = 1e-5
    key_scale: Annotated[float, Range("(0, 1000]")] = 1.0
    signal: Signal = "last"
    grouping: Grouping = "v_sink_rest"

    @property
    def num_groups(self) -> int:
        return 3 if self.grouping == "three" else 2

    def for_depth(self, num_layers: int) -> GateConfig:
        """The same with all layers of a decoder listed where `independent` gates list none."""
        every = self.independent and not self.layers
        return dataclasses.replace(self, layers=tuple(range(num_layers))) if every else self


@dataclass(frozen=True)
class FixedConfig(Table, name="fixed"):
    """Fixed coefficients instead of gates, the oracle of the paper: one for each group of `grouping`, at `layers`."""

    layers: tuple[Annotated[int, Range("[0, 1e4]")], ...] = ()
    coefficients: tuple[Annotated[float, Range("[-1000, 1000]")], ...] = ()
    grouping: Grouping = "v_sink_rest"


@dataclass(frozen=True)
class VarConfig(Table, name="var"):
    """VAR (arXiv 2503.03321): in image-centric heads, attention goes from sinks to the other visual tokens. Not trained.

    It edits the queries after the image, in all layers from `first_layer` but the last.
    """

    # a token is a sink if |h[d]| / rms(h) >= tau for some d of sinks.llm_dims; the ratio cannot exceed sqrt(D)
    tau: Annotated[float, Range("(0, 1e6]")] = 20.0
    # image-centric heads: at most `rho` of their visual attention is on visual sinks, at least `min_visual` of all is visual
    rho: Annotated[float, Range("[0, 1]")] = 0.5
    min_visual: Annotated[float, Range("[0, 1]")] = 0.2
    p: Annotated[float, Range("[0, 1]")] = 0.6  # share of the attention that sinks keep
    first_layer: Annotated[int, Range("[0, 1e4]")] = 2


@dataclass(frozen=True)
class SinkFrontConfig(Table, name="sink_front"):
    """Sink-to-the-front (arXiv 2510.08510): visual tokens of large ViT norm come first among the visual tokens. Not trained.

    `VLM.v_sinks` still lists the patches in the order of the image.
    """

    tau: Annotated[float, Range("(0, 1e9]")] = 100.0  # norm of the features before the projector


@dataclass(frozen=True)
class DiySinkConfig(Table, name="diysink"):
    """DIYSink (arXiv 2510.08510): one projector for sinks, one for the others, and a choice between them for each question.

    The projectors start from the weights of the frozen one and are trained, and so is the network of `mlp`. With `cot`,
    training keeps both sets of patches, and each question is answered after a short one on what it needs. See
    baselines/diysink.py.
    """

    tau: Annotated[float, Range("(0, 1e9]")] = 100.0  # norm of the features before the projector
    routing: Literal["cot", "mlp"] = "cot"  # the model's own answer on what the question needs; or weights of a small network
    width: Annotated[int, Range("[1, 1e6]")] = 64  # of that network


@dataclass(frozen=True)
class LoraConfig(Table, name="lora"):
    """LoRA at one decoder layer, on the projections of its attention. Rank 8 at D = 4096 has 262,144 parameters, as a gate."""

    layer: Annotated[int, Range("[0, 1e4]")] = 10  # 0-based
    rank: Annotated[int, Range("[1, 1e6]")] = 8
    alpha: Annotated[float, Range("(0, 1e6]")] = 16.0  # the update is multiplied by alpha / rank


@dataclass(frozen=True)
class FullConfig(Table, name="full"):
    """Training of the model itself: all parameters of the parts that are named, the others frozen.

    LLaVA is made in two stages, with `["projector"]` on captions and the default on conversations.
    """

    parts: tuple[Part, ...] = ("projector", "language_model")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.parts or len(set(self.parts)) < len(self.parts):
            raise ConfigError(f"full.parts is {list(self.parts)}: name some of {', '.join(get_args(Part))}, each once")


MethodConfig = FixedConfig | VarConfig | SinkFrontConfig | DiySinkConfig | LoraConfig | FullConfig
"""What may be done to the model instead of gates."""
