"""Schema of a converted checkpoint. `ModelConfig` lives in the manifest of a model folder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from lsg_jax.config.loading import to_dict
from lsg_jax.config.ranges import Range, Table
from lsg_jax.errors import ConfigError

Activation = Literal["gelu", "gelu_exact", "quick_gelu", "silu", "relu"]
Aspect = Literal["pad", "crop", "squash"]
Criterion = Literal["dim_abs", "dim_rms", "norm", "massive", "attention_share"]


@dataclass(frozen=True)
class VisionConfig(Table, name="vision"):
    """A vision transformer. `family` names its rules; what it computes is in the other fields.

    CLIP and InternViT have a class token, CLIP a norm before its layers. A native tower (Qwen-VL) takes images of any size, and
    has rotary positions of rows and columns.
    """

    family: Literal["clip", "siglip", "internvit", "smolvlm", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
    # pixels, side of the square image; of a native tower, of the square that stands for an image of unknown size
    image_size: Annotated[int, Range("[1, 1e5]")]
    patch_size: Annotated[int, Range("[1, 1e4]")]  # pixels
    hidden_size: Annotated[int, Range("[1, 1e6]")]
    intermediate_size: Annotated[int, Range("[1, 1e7]")]
    num_layers: Annotated[int, Range("[1, 1e4]")]
    num_heads: Annotated[int, Range("[1, 1e4]")]
    layer_norm_eps: Annotated[float, Range("(0, 1]")]
    hidden_act: Activation
    num_channels: Annotated[int, Range("[1, 1000]")] = 3
    norm: Literal["layer", "rms"] = "layer"
    qkv_bias: bool = True
    qk_norm: bool = False  # RMS norm of queries and of keys, over all heads (InternViT)
    layer_scale: bool = False  # a factor for each channel of what attention and MLP add (InternViT)
    final_norm: bool = False  # hidden state -1 is after the norm that follows the layers (Gemma 3, SmolVLM)
    gated_mlp: bool = False  # down(act(gate(x)) * up(x)) (Qwen2.5-VL)
    patch_bias: bool | None = None  # of the patch embedding; None: where there is no class token
    frames: Annotated[int, Range("[1, 100]")] = 1  # frames that a patch spans; those of an image are equal (Qwen-VL)
    rotary_theta: Annotated[float, Range("(0, 1e12]")] | None = None  # of a native tower; None: positions from a table alone
    # a native tower's table of positions, which is interpolated to the grid of each image: its side; None: it has no table
    table_side: Annotated[int, Range("[1, 1e4]")] | None = None
    window_size: Annotated[int, Range("[1, 1e5]")] | None = None  # pixels; attention stays within squares of this side
    full_layers: tuple[Annotated[int, Range("[0, 1e4]")], ...] = ()  # layers without windows

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_size % self.num_heads:
            raise ConfigError(f"vision.hidden_size {self.hidden_size} is no multiple of vision.num_heads {self.num_heads}")
        if self.patch_size > self.image_size:
            raise ConfigError(f"vision.patch_size {self.patch_size} is larger than vision.image_size {self.image_size}")
        if self.window_size is not None and self.window_size % self.patch_size:
            raise ConfigError(f"vision.window_size {self.window_size} is no multiple of vision.patch_size {self.patch_size}")
        if self.native and self.head_dim % 4:
            raise ConfigError(f"vision heads of width {self.head_dim} do not turn with rows and columns: 4 must divide it")

    @property
    def native(self) -> bool:
        """Whether images of any size are taken, instead of squares."""
        return self.rotary_theta is not None

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def patch_values(self) -> int:
        """Values of one patch: frames, rows, columns, channels."""
        return self.frames * self.patch_size**2 * self.num_channels

    @property
    def patch_shape(self) -> tuple[int, ...]:
        """Axes of a patch: rows, columns, channels; of a native tower, frames before them."""
        shape = (self.patch_size, self.patch_size, self.num_channels)
        return (self.frames, *shape) if self.native else shape

    @property
    def window_patches(self) -> int | None:
        """Patches of a whole window; None without windows."""
        return None if self.window_size is None else (self.window_size // self.patch_size) ** 2

    def is_windowed(self, layer: int) -> bool:
        """Whether attention of a layer stays within windows."""
        return self.window_size is not None and layer not in self.full_layers

    @property
    def has_class_token(self) -> bool:
        return self.family in ("clip", "internvit")

    @property
    def has_pre_norm(self) -> bool:
        return self.family == "clip"

    @property
    def num_table_entries(self) -> int:
        """Entries of the table of positions; 0 without one."""
        return (self.table_side or 0) ** 2 if self.native else self.num_positions

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
    # frequencies that turn with frame, row and column (M-RoPE); none: all turn with one position
    sections: tuple[Annotated[int, Range("[0, 1e4]")], ...] = ()
    interleaved: bool = False  # the three take turns (Qwen3-VL), instead of one section after the other

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.low_freq_factor, self.high_freq_factor
        if self.kind == "llama3" and low >= high:
            raise ConfigError(f"rope.low_freq_factor {low} is not below rope.high_freq_factor {high}")


Weights = Literal["float", "int8"]
"""Of the linear maps of the decoder layers."""


def is_scale(name: str) -> bool:
    """Whether a leaf scales an int8 kernel: then it is float32, whatever the dtype of the other leaves."""
    return name.endswith("/kernel_scale")


@dataclass(frozen=True)
class TextConfig(Table, name="text"):
    """A pre-norm decoder with rotary positions and a gated MLP. Llama, Mistral, Qwen, Phi-3 and Gemma differ in settings."""

    family: Literal["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma3"]
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
    # a query sees this many tokens, itself included, in `sliding_layers`
    sliding_window: Annotated[int, Range("[1, 1e8]")] | None = None
    sliding_layers: tuple[Annotated[int, Range("[0, 1e4]")], ...] | None = None  # None: all, if there is a window
    sliding_rope: RopeConfig | None = None  # of the sliding layers; None: that of all (Gemma 3 has one)
    qk_norm: bool = False  # RMS norm of each query head and key head (Qwen3, Gemma 3); key scales come after it
    sandwich_norms: bool = False  # a norm also after attention and after the MLP (Gemma 3)
    norm_offset: bool = False  # RMS norms multiply by 1 + scale, in float32 (Gemma 3)
    scaled_embeddings: bool = False  # embeddings of text are multiplied by sqrt(hidden_size) (Gemma 3)
    query_scale: Annotated[float, Range("(0, 1e6]")] | None = None  # of the attention logits; None: 1 / sqrt(head_dim)
    images_see_themselves: bool = False  # the tokens of one image attend to each other in both directions (Gemma 3)
    weights: Weights = "float"  # of the linear maps in the layers; `model.layers.Linear` has what int8 means

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"text.num_heads {self.num_heads} is no multiple of text.num_kv_heads {self.num_kv_heads}")
        rotary = self.rope.rotary_dim or self.head_dim
        if rotary % 2 or rotary > self.head_dim:
            raise ConfigError(f"text rotates {rotary} dimensions of text.head_dim {self.head_dim}: it must be an even number")
        if self.rope.sections and sum(self.rope.sections) != rotary // 2:
            sections = list(self.rope.sections)
            raise ConfigError(f"text.rope.sections {sections} sum to {sum(sections)}: there are {rotary // 2} frequencies")
        if bad := [layer for layer in self.sliding_layers or () if layer >= self.num_layers]:
            raise ConfigError(f"text.sliding_layers has {bad[0]}: there are layers 0 to {self.num_layers - 1}")


@dataclass(frozen=True)
class SinkConfig(Table, name="sinks"):
    """What counts as a sink (arXiv 2604.03316; the other criteria have their sources in `lsg_jax.sinks.criteria`).

    The paper does not state its thresholds. `vit_tau` and `llm_tau` are in units of the activation for `dim_abs` and `massive`,
    multiples of the token's RMS for `dim_rms`, a Euclidean norm for `norm`, a share in [0, 1] for `attention_share`. `massive`
    also requires `massive_ratio` times the layer's median. Default of `vit_tau`: in dimension 650 of CLIP, the norms (sinks
    above 100, most tokens below 60) leave at least 80 for sinks and at most 60 for other tokens; 70 lies between. Default of
    `llm_tau`: the absolute part of Sun et al.

    Files of earlier versions write `attention` for `attention_share`; they are read as what they meant.

    Attributes:
        criterion: what tells V-sinks, on the features before the projector.
        vit_dims: dimensions of the features before the projector that tell V-sinks, for `dim_abs` and `dim_rms`.
        vit_tau: threshold of V-sinks, in units of the criterion.
        llm_criterion: what tells L-sinks, on the residual stream that enters each decoder layer.
        llm_dims: dimensions of the residual stream that tell L-sinks, for `dim_abs` and `dim_rms`.
        llm_tau: threshold of L-sinks, in units of the criterion.
        massive_ratio: for `massive`: least activation, in units of the layer's median.
    """

    criterion: Criterion = "dim_abs"
    vit_dims: tuple[Annotated[int, Range("[0, 1e7]")], ...] = ()
    vit_tau: Annotated[float, Range("[0, 1e9]")] = 70.0
    llm_criterion: Criterion = "dim_abs"
    llm_dims: tuple[Annotated[int, Range("[0, 1e7]")], ...] = ()
    llm_tau: Annotated[float, Range("[0, 1e9]")] = 100.0
    massive_ratio: Annotated[float, Range("[0, 1e9]")] = 1000.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("criterion", "llm_criterion"):
            if getattr(self, name) not in get_args(Criterion):
                raise ConfigError(f"sinks.{name}: {getattr(self, name)!r} is not one of {', '.join(get_args(Criterion))}")

    @classmethod
    def renamed(cls, tree: dict[str, Any]) -> dict[str, Any]:
        """`attention` became `attention_share`."""
        return {name: "attention_share" if value == "attention" else value for name, value in tree.items()}

    @property
    def knows_v_sinks(self) -> bool:
        """Whether the criterion of V-sinks can be applied: `dim_abs` and `dim_rms` need dimensions."""
        return bool(self.vit_dims) or self.criterion not in ("dim_abs", "dim_rms")

    @property
    def knows_l_sinks(self) -> bool:
        """Whether the criterion of L-sinks can be applied."""
        return bool(self.llm_dims) or self.llm_criterion not in ("dim_abs", "dim_rms")


PLANTED = "lsg_planted_sinks"
"""Field of config.json in which `lsg plant` says what it did to the weights."""


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

    `layout` says what an image becomes: one `square`; tiles of the best canvas beside the whole image (`anyres`: LLaVA-NeXT,
    OneVision); `tiles` of a grid of the image's aspect, and the whole image last (InternVL); a grid `split` after resizing, and
    the whole image last (SmolVLM); or patches of its `native` size (Qwen-VL).
    """

    size: Annotated[int, Range("[1, 1e5]")]  # pixels, side of the square that the vision tower takes
    aspect: Aspect
    mean: tuple[Annotated[float, Range("[-1000, 1000]")], ...]  # one a channel, of pixels in [0, 1]
    std: tuple[Annotated[float, Range("(0, 1000]")], ...]  # one a channel
    canvases: tuple[Canvas, ...] = ()  # the best of them is cut into tiles beside the whole image; none: the whole image alone
    # N of OneVision's `anyres_max_N`: more patches than N tiles have are shrunk bilinearly, and each of several images of one
    # prompt is a square; None: neither (LLaVA-NeXT)
    max_tiles: Annotated[int, Range("[1, 1e4]")] | None = None
    layout: Literal["square", "anyres", "tiles", "split", "native"] | None = None  # None: anyres with canvases, else square
    min_grid: Annotated[int, Range("[1, 1e4]")] = 1  # fewest and most tiles of a grid (`tiles`)
    max_grid: Annotated[int, Range("[1, 1e4]")] = 1
    thumbnail: bool = True  # the whole image follows the tiles of a grid of more than one (`tiles`)
    longest_edge: Annotated[int, Range("[1, 1e6]")] | None = None  # pixels, that images are resized to (`split`)
    min_pixels: Annotated[int, Range("[1, 1e9]")] = 1  # of an image after resizing (`native`)
    max_pixels: Annotated[int, Range("[1, 1e9]")] = 1_000_000_000
    resample: Literal["bilinear", "bicubic", "lanczos"] = "bicubic"  # PIL's filter that images are resized with
    tag: str = "<image>"  # how the chat template writes an image
    before: str = ""  # text in front of an image's tokens
    after: str = ""  # text behind them

    @property
    def kind(self) -> str:
        """`layout`, filled in."""
        return self.layout or ("anyres" if self.canvases else "square")


@dataclass(frozen=True)
class ModelConfig(Table):
    """The whole stack: vision tower, projector, causal language model."""

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
    projector_norm_eps: Annotated[float, Range("(0, 1]")] | None = None  # of a norm before the projector; None: no norm
    projector_norm: Literal["layer", "rms", "rms_offset"] = "layer"  # `rms_offset` multiplies by 1 + scale (Gemma 3)
    projector_norm_merged: bool = False  # the norm is over the merged patches, not over each (InternVL)
    projector_layers: Annotated[int, Range("[1, 2]")] = 2
    projector_width: Annotated[int, Range("[1, 1e7]")] | None = None  # between its two layers; None: text.hidden_size
    merge: Annotated[int, Range("[1, 100]")] = 1  # side of the square of patches behind one token
    merge_mean: bool = False  # they are averaged (Gemma 3), instead of concatenated row by row
    # hidden states of the tower that have a projector of their own, and are added after the first decoder layers (Qwen3-VL)
    deepstack: tuple[Annotated[int, Range("[1, 1e4]")], ...] = ()
    sink_sources: SinkSources = SinkSources()
    sinks: SinkConfig = SinkConfig()
    video_token_id: Annotated[int, Range("[0, 1e8]")] | None = None  # None: the model takes no video
    # which of converters/families it was converted by
    family: Literal[
        "llava", "llava_next", "llava_onevision", "vipllava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "gemma3",
        "smolvlm",
    ] = "llava"  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        last = self.vision.num_layers
        if not self.feature_layers or any(not -last - 1 <= layer <= last for layer in self.feature_layers):
            raise ConfigError(f"feature_layers is {list(self.feature_layers)}: the tower has hidden states 0 to {last}")
        if (patches := self.vision.image_size // self.vision.patch_size) % self.merge:
            raise ConfigError(f"merge is {self.merge}, but an image has {patches} x {patches} patches")
        if self.merge > 1 and self.num_image_tokens != self.vision.num_patches:
            raise ConfigError(f"merge is {self.merge}, which needs one feature a patch: feature_select default or full")
        if self.vision.window_size is not None and self.vision.window_size // self.vision.patch_size % self.merge:
            raise ConfigError(f"merge is {self.merge}, but windows are {self.vision.window_size} pixels wide")
        side = self.vision.image_size
        for canvas in self.image.canvases:
            if canvas.height % side or canvas.width % side:
                raise ConfigError(f"image.canvases: {canvas.height} x {canvas.width} pixels are no multiple of {side}")
        if self.image.canvases and self.num_image_tokens != self.vision.num_patches:
            raise ConfigError("image.canvases need one feature a patch: feature_select default for CLIP, full for SigLIP")

    @property
    def num_image_tokens(self) -> int:
        """Features of one square tile that enter the connector."""
        return self.vision.num_positions - (self.feature_select == "default")

    @property
    def tokens_per_tile(self) -> int:
        """Visual tokens that the connector makes of one square tile."""
        return self.num_image_tokens // self.merge**2

    @property
    def sources_per_token(self) -> int:
        """K, the connector outputs that a visual token may combine: 4 where patches are shrunk bilinearly."""
        return 1 if self.image.max_tiles is None else 4


def identity(config: ModelConfig) -> dict[str, Any]:
    """What numbers depend on of a configuration besides sinks, as plain data for digests.

    A field that a later version added is left out at its default, so that runs and answers of earlier versions stay valid.
    """
    described = {name: value for name, value in to_dict(config).items() if name not in ("sinks", "sink_sources")}
    if config.text.weights == "float":
        del described["text"]["weights"]
    return described
