"""The vision towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL, which take images of any size, and the mergers behind them."""

from __future__ import annotations

import math
from typing import Any

from converters.families.family import HFConfig, prefixed
from converters.families.values import activation, positive, shortened, square_side
from converters.ops import Conv, Copy, Flat, Linear, Rule
from lsg_jax.config import VisionConfig
from lsg_jax.errors import ConfigError

LAYER_NORM_EPS = 1e-6
"""Of every norm of these towers and mergers; their configurations do not state it."""

_SQUARE_SIDE = 32
"""Patches along the side of the square that stands for an image of unknown size."""

_FIELDS = frozenset(
    {
        "depth", "num_hidden_layers", "num_heads", "num_attention_heads", "hidden_size", "hidden_act", "in_channels",
        "patch_size", "spatial_merge_size", "temporal_patch_size", "rope_parameters",
    }
)  # fmt: skip

FIELDS: dict[str, frozenset[str]] = {
    "qwen2_vl": _FIELDS | {"embed_dim", "mlp_ratio"},
    "qwen2_5_vl": _FIELDS
    | {"intermediate_size", "out_hidden_size", "window_size", "fullatt_block_indexes"}
    | {"tokens_per_second"},  # of videos
    "qwen3_vl": _FIELDS | {"intermediate_size", "out_hidden_size", "num_position_embeddings", "deepstack_visual_indexes"},
}
"""By `VisionConfig.family`, the fields of its configuration that are handled."""


def _layers(*mlp: tuple[str, str]) -> tuple[Rule, ...]:
    """The rules of the layers; `mlp`: names of its linear maps here and there."""
    rules: tuple[Rule, ...] = (
        Rule("layer_norm1/scale", "norm1.weight", Copy()),
        Rule("layer_norm1/bias", "norm1.bias", Copy()),
        Rule("attention/q_proj/kernel", "attn.qkv.weight", Linear()),
        Rule("attention/k_proj/kernel", "attn.qkv.weight", Linear()),
        Rule("attention/v_proj/kernel", "attn.qkv.weight", Linear()),
        Rule("attention/q_proj/bias", "attn.qkv.bias", Flat()),
        Rule("attention/k_proj/bias", "attn.qkv.bias", Flat()),
        Rule("attention/v_proj/bias", "attn.qkv.bias", Flat()),
        Rule("attention/out_proj/kernel", "attn.proj.weight", Linear(in_axes=2)),
        Rule("attention/out_proj/bias", "attn.proj.bias", Flat()),
        Rule("layer_norm2/scale", "norm2.weight", Copy()),
        Rule("layer_norm2/bias", "norm2.bias", Copy()),
    )
    for ours, theirs in mlp:
        rules += (
            Rule(f"{ours}/kernel", f"mlp.{theirs}.weight", Linear()),
            Rule(f"{ours}/bias", f"mlp.{theirs}.bias", Flat()),
        )
    return prefixed("layers/", "blocks.{layer}.", rules)


_PATCHES = (
    Rule("patch_embedding/kernel", "patch_embed.proj.weight", Conv()),
    Rule("patch_embedding/bias", "patch_embed.proj.bias", Flat()),
    Rule("position_embedding", "pos_embed.weight", Copy()),
)

RULES: dict[str, tuple[Rule, ...]] = {
    "qwen2_vl": _PATCHES + _layers(("fc1", "fc1"), ("fc2", "fc2")),
    "qwen2_5_vl": _PATCHES + _layers(*((name, name) for name in ("gate_proj", "up_proj", "down_proj"))),
    "qwen3_vl": _PATCHES + _layers(("fc1", "linear_fc1"), ("fc2", "linear_fc2")),
}
"""By `VisionConfig.family`; names without the prefix of the tower."""


def _merger(leaf: str, source: str, norm: str, first: str, second: str) -> tuple[Rule, ...]:
    """The rules of a merger whose norm and linear maps have these names there."""
    return prefixed(
        leaf,
        source,
        (
            Rule("norm/scale", f"{norm}.weight", Copy()),
            Rule("norm/bias", f"{norm}.bias", Copy()),
            Rule("linear_1/kernel", f"{first}.weight", Linear()),
            Rule("linear_1/bias", f"{first}.bias", Flat()),
            Rule("linear_2/kernel", f"{second}.weight", Linear()),
            Rule("linear_2/bias", f"{second}.bias", Flat()),
        ),
    )


_QWEN3_NAMES = ("norm", "linear_fc1", "linear_fc2")

MERGER_RULES: dict[str, tuple[Rule, ...]] = {
    "qwen2_vl": _merger("projector/", "multi_modal_projector.", "ln_q", "mlp.0", "mlp.2"),
    "qwen2_5_vl": _merger("projector/", "multi_modal_projector.", "ln_q", "mlp.0", "mlp.2"),
    "qwen3_vl": _merger("projector/", "multi_modal_projector.", *_QWEN3_NAMES)
    + _merger("projector/deepstack/", "vision_tower.deepstack_merger_list.{layer}.", *_QWEN3_NAMES),
}
"""By `ModelConfig.family`."""


def vision_config(family: Any, hf: HFConfig, where: str) -> VisionConfig:
    """The configuration of a tower.

    Args:
        family: of VisionConfig.

    Raises:
        ConfigError: a value is not supported.
    """
    # Qwen2-VL calls the width of the language model hidden_size
    width = hf.embed_dim if family == "qwen2_vl" else hf.hidden_size
    inner = int(width * hf.mlp_ratio) if family == "qwen2_vl" else hf.intermediate_size
    patch = square_side(hf.patch_size, f"{where}: patch_size")
    if hf.in_channels != 3:
        raise ConfigError(f"{where}: in_channels = {hf.in_channels}, only 3 is supported")
    for name in ("num_heads", "depth", "spatial_merge_size", "num_position_embeddings"):
        positive(getattr(hf, name, 1), f"{where}: {name}")
    if width % hf.num_heads or width // hf.num_heads % 4:
        raise ConfigError(f"{where}: {width} is not the width of {hf.num_heads} heads that turn with rows and columns")
    if getattr(hf, "head_dim", None) not in (None, width // hf.num_heads):
        raise ConfigError(f"{where}: head_dim = {hf.head_dim}, only {width} / {hf.num_heads} heads is supported")
    settings: dict[str, Any] = {"patch_bias": family == "qwen3_vl"}
    if family == "qwen2_5_vl":
        settings |= {"norm": "rms", "gated_mlp": True} | _windows(hf, patch, where)
    if family == "qwen3_vl":
        side = math.isqrt(hf.num_position_embeddings)
        if side**2 != hf.num_position_embeddings:
            raise ConfigError(f"{where}: num_position_embeddings = {hf.num_position_embeddings} is no square")
        settings["table_side"] = side
    return VisionConfig(
        family=family,
        image_size=_SQUARE_SIDE * patch,
        patch_size=patch,
        hidden_size=width,
        intermediate_size=inner,
        num_layers=hf.depth,
        num_heads=hf.num_heads,
        layer_norm_eps=LAYER_NORM_EPS,
        hidden_act=activation(hf.hidden_act, f"{where}: hidden_act"),
        frames=square_side(hf.temporal_patch_size, f"{where}: temporal_patch_size"),
        rotary_theta=_theta(hf, where),
        **settings,
    )


def _windows(hf: HFConfig, patch: int, where: str) -> dict[str, Any]:
    size, full = hf.window_size, tuple(hf.fullatt_block_indexes)
    if size % (patch * hf.spatial_merge_size):
        raise ConfigError(f"{where}: window_size = {size} is no multiple of {hf.spatial_merge_size} patches of {patch} pixels")
    if bad := [layer for layer in full if not 0 <= layer < hf.depth]:
        raise ConfigError(f"{where}: fullatt_block_indexes: layer {bad[0]} does not exist, the tower has {hf.depth}")
    return {"window_size": size, "full_layers": full}


def _theta(hf: HFConfig, where: str) -> float:
    given = dict(hf.rope_parameters or {})
    theta, kind = given.pop("rope_theta", 10000.0), given.pop("rope_type", "axial")
    if kind != "axial" or given:
        raise ConfigError(f"{where}: rope_parameters = {shortened(hf.rope_parameters)} is not supported, only type axial")
    return float(theta)


def merger(family: Any, hf: HFConfig, where: str) -> dict[str, Any]:
    """The fields of ModelConfig about the merger.

    Args:
        family: of the tower's VisionConfig. hf: the tower's configuration.

    Raises:
        ConfigError: a value is not supported.
    """
    width, merge = hf.embed_dim if family == "qwen2_vl" else hf.hidden_size, hf.spatial_merge_size
    settings: dict[str, Any] = {
        "merge": merge,
        "projector_norm": "rms" if family == "qwen2_5_vl" else "layer",
        "projector_norm_eps": LAYER_NORM_EPS,
        "projector_width": width * merge**2,
    }
    if family == "qwen3_vl":
        layers = list(hf.deepstack_visual_indexes)
        if layers != sorted(set(layers)) or any(not 0 <= layer < hf.depth for layer in layers):
            raise ConfigError(f"{where}: deepstack_visual_indexes = {layers} are not ascending layers of the tower")
        settings["deepstack"] = tuple(layer + 1 for layer in layers)
    return settings
