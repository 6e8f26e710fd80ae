"""Schema of a converted checkpoint. `ModelConfig` lives in the manifest of a model folder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from lsg_jax.config.ranges import Range, Table
from lsg_jax.errors import ConfigError

Activation = Literal["gelu", "gelu_exact", "quick_gelu", "silu", "relu"]
Aspect = Literal["pad", "crop", "squash"]
Criterion = Literal["dim_abs", "dim_rms", "norm", "massive", "attention"]


@dataclass(frozen=True)
class VisionConfig(Table, name="vision"):
    """A vision transformer. `family` sets what differs: CLIP has a class token and a norm before its layers, SigLIP neither."""

    family: Literal["clip", "siglip"]
    image_size: Annotated[int, Range("[1, 1e5]")]  # pixels, side of the square image
    patch_size: Annotated[int, Range("[1, 1e4]")]  # pixels
    hidden_size: Annotated[int, Range("[1, 1e6]")]
    intermediate_size: Annotated[int, Range("[1, 1e7]")]
    num_layers: Annotated[int, Range("[1, 1e4]")]
    num_heads: Annotated[int, Range("[1, 1e4]")]
    layer_norm_eps: Annotated[float, Range("(0, 1]")]
    hidden_act: Activation
    num_channels: Annotated[int, Range("[1, 1000]")] = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_size % self.num_heads:
            raise ConfigError(f"vision.hidden_size {self.hidden_size} is no multiple of vision.num_heads {self.num_heads}")
        if self.patch_size > self.image_size:
            raise ConfigError(f"vision.patch_size {self.patch_size} is larger than vision.image_size {self.image_size}")

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
class RopeConfig(Table, name="rope"):
    """Rotary embedding. `linear` divides the angles by `factor`; `llama3` interpolates by wavelength (Llama 3.1)."""

    theta: Annotated[float, Range("(0, 1e12]")]
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: Annotated[float, Range("(0, 1e6]")] = 1.0
    low_freq_factor: Annotated[float, Range("(0, 1e6]")] = 1.0
    high_freq_factor: Annotated[float, Range("(0, 1e6]")] = 4.0
    original_max_positions: Annotated[int, Range("[1, 1e8]")] = 8192
    rotary_dim: Annotated[int, Range("[2, 1e4]")] | None = None  # None: the whole head

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.low_freq_factor, self.high_freq_factor
        if self.kind == "llama3" and low >= high:
            raise ConfigError(f"rope.low_freq_factor {low} is not below rope.high_freq_factor {high}")


@dataclass(frozen=True)
class TextConfig(Table, name="text"):
    """A pre-norm decoder with rotary positions and a gated MLP; Llama, Mistral, Qwen2 and Phi-3 differ in these settings."""

    family: Literal["llama", "mistral", "qwen2", "phi3"]
    vocab_size: Annotated[int, Range("[1, 1e8]")]
    hidden_size: Annotated[int, Range("[1, 1e6]")]
    intermediate_size: Annotated[int, Range("[1, 1e7]")]
    num_layers: Annotated[int, Range("[1, 1e4]")]
    num_heads: Annotated[int, Range("[1, 1e4]")]
    num_kv_heads: Annotated[int, Range("[1, 1e4]")]
    head_dim: Annotated[int, Range("[1, 1e4]")]
    rms_norm_eps: Annotated[float, Range("(0, 1]")]
    rope: RopeConfig
    max_positions: Annotated[int, Range("[1, 1e8]")]
    hidden_act: Activation = "silu"
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    tied_embeddings: bool = False
    # longer sequences are refused: full attention would differ from the original
    sliding_window: Annotated[int, Range("[1, 1e8]")] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"text.num_heads {self.num_heads} is no multiple of text.num_kv_heads {self.num_kv_heads}")
        rotary = self.rope.rotary_dim or self.head_dim
        if rotary % 2 or rotary > self.head_dim:
            raise ConfigError(f"text rotates {rotary} dimensions of text.head_dim {self.head_dim}: it must be an even number")


@dataclass(frozen=True)
class SinkConfig(Table, name="sinks"):
    """What counts as a sink (paper.md, "Two kinds of visual sink").

    The paper does not state its thresholds. `vit_tau` and `llm_tau` are in units of the activation for `dim_abs` and `massive`,
    multiples of the token's RMS for `dim_rms`, a Euclidean norm for `norm`, a share in [0, 1] for `attention`. `massive` also
    requires `massive_ratio` times the layer's median. Default of `vit_tau`: in dimension 650 of CLIP, the norms (sinks above
    100, most tokens below 60) leave at least 80 for sinks and at most 60 for other tokens; 70 lies between. Default of
    `llm_tau`: the absolute part of Sun et al.
    """

    criterion: Criterion = "dim_abs"
    vit_dims: tuple[Annotated[int, Range("[0, 1e7]")], ...] = ()
    vit_tau: Annotated[float, Range("[0, 1e9]")] = 70.0
    llm_criterion: Criterion = "dim_abs"
    llm_dims: tuple[Annotated[int, Range("[0, 1e7]")], ...] = ()
    llm_tau: Annotated[float, Range("[0, 1e9]")] = 100.0
    massive_ratio: Annotated[float, Range("[0, 1e9]")] = 1000.0

    @property
    def knows_v_sinks(self) -> bool:
        """Whether the criterion of V-sinks can be applied: `dim_abs` and `dim_rms` need dimensions."""
        return bool(self.vit_dims) or self.criterion not in ("dim_abs", "dim_rms")

    @property
    def knows_l_sinks(self) -> bool:
        """Whether the criterion of L-sinks can be applied."""
        return bool(self.llm_dims) or self.llm_criterion not in ("dim_abs", "dim_rms")


@dataclass(frozen=True)
class SinkSources(Table, name="sink_sources"):
    """Where the sink dimensions of a model folder come from, in words; empty where none are known or it was not recorded."""

    vit: str = ""
    llm: str = ""


@dataclass(frozen=True)
class Canvas(Table, name="canvas"):
    """What an image is resized into and cut into tiles, in pixels; HF's `image_grid_pinpoints`."""

    height: Annotated[int, Range("[1, 1e6]")]
    width: Annotated[int, Range("[1, 1e6]")]


@dataclass(frozen=True)
class ImageConfig(Table, name="image"):
    """How pixels are prepared, as the checkpoint's image processor states it.

    `pad` pads to a square with the mean colour and then resizes (LLaVA-1.5); `crop` resizes the shortest edge and crops the
    centre (a plain CLIP processor); `squash` resizes to the square whatever the aspect (SigLIP).
    """

    size: Annotated[int, Range("[1, 1e5]")]  # pixels, side of the square that the vision tower takes
    aspect: Aspect
    mean: tuple[Annotated[float, Range("[-1000, 1000]")], ...]  # one a channel, of pixels in [0, 1]
    std: tuple[Annotated[float, Range("(0, 1000]")], ...]  # one a channel
    canvases: tuple[Canvas, ...] = ()  # the best of them is cut into tiles beside the whole image; none: the whole image alone
    # N of OneVision's `anyres_max_N`: more patches than N tiles have are shrunk bilinearly, and each of several images of one
    # prompt is a square; None: neither (LLaVA-NeXT)
    max_tiles: Annotated[int, Range("[1, 1e4]")] | None = None


@dataclass(frozen=True)
class ModelConfig(Table):
    """A LLaVA-style stack: vision tower, two-layer projector, causal language model."""

    vision: VisionConfig
    text: TextConfig
    # indices into the ViT's hidden states (0: embeddings, -1: output of the last layer); several are concatenated
    feature_layers: tuple[Annotated[int, Range("[-1e4, 1e4]")], ...]
    feature_select: Literal["default", "full"]  # "default" drops the first token, the class token of CLIP
    image_token_id: Annotated[int, Range("[0, 1e8]")]
    eos_token_ids: tuple[Annotated[int, Range("[0, 1e8]")], ...]
    pad_token_id: Annotated[int, Range("[0, 1e8]")]
    image: ImageConfig
    projector_hidden_act: Activation = "gelu_exact"
    projector_bias: bool = True
    projector_norm_eps: Annotated[float, Range("(0, 1]")] | None = None  # of a layer norm before the projector (ViP-LLaVA)
    sink_sources: SinkSources = SinkSources()
    sinks: SinkConfig = SinkConfig()
    video_token_id: Annotated[int, Range("[0, 1e8]")] | None = None  # None: the model takes no video
    # which of converters/families it was converted by
    family: Literal["llava", "llava_next", "llava_onevision", "vipllava"] = "llava"

    def __post_init__(self) -> None:
        super().__post_init__()
        last = self.vision.num_layers
        if not self.feature_layers or any(not -last - 1 <= layer <= last for layer in self.feature_layers):
            raise ConfigError(f"feature_layers is {list(self.feature_layers)}: the tower has hidden states 0 to {last}")
        side = self.vision.image_size
        for canvas in self.image.canvases:
            if canvas.height % side or canvas.width % side:
                raise ConfigError(f"image.canvases: {canvas.height} x {canvas.width} pixels are no multiple of {side}")
        if self.image.canvases and self.num_image_tokens != self.vision.num_patches:
            raise ConfigError("image.canvases need one feature a patch: feature_select default for CLIP, full for SigLIP")

    @property
    def num_image_tokens(self) -> int:
        """Features of one tile that enter the connector."""
        return self.vision.num_positions - (self.feature_select == "default")

    @property
    def sources_per_token(self) -> int:
        """K, the connector outputs that a visual token may combine: 4 where patches are shrunk bilinearly."""
        return 1 if self.image.max_tiles is None else 4
