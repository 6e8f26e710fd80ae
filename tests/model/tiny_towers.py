"""Tiny random models of the families beside LLaVA, and their towers and connectors under our rules."""

import dataclasses
from typing import Any

import hf_models
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax import nnx

from converters.families import decoders, towers
from converters.ops import Copy, Flat, Linear, Rule
from converters.rules import Layout, layout
from lsg_jax.checkpoint.tree import flatten
from lsg_jax.config import ImageConfig, ModelConfig, RopeConfig, SinkConfig, TextConfig
from lsg_jax.model.multimodal import VisionLanguageModel
from lsg_jax.types import VisualInput

WIDTH = 24  # of the language model
_TEXT = {
    "hidden_size": WIDTH, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 12, "vocab_size": 50, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
_SQUARE = {"hidden_size": 20, "intermediate_size": 28, "num_hidden_layers": 3, "num_attention_heads": 2}
_NATIVE = {"depth": 4, "num_heads": 2, "patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2}
_M_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}}

_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "internvl": (
        "InternVL",
        {
            "vision_config": _SQUARE
            | {
                "image_size": [24, 24],
                "patch_size": [4, 4],
                "attention_bias": True,
                "use_qk_norm": True,
                "norm_type": "rms_norm",
            },
            "text_config": _TEXT | {"model_type": "llama"},
        },
    ),
    "internvl_plain": (
        "InternVL",
        {
            "vision_config": _SQUARE | {"image_size": [12, 12], "patch_size": [3, 3]},
            "text_config": _TEXT | {"model_type": "llama"},
            "vision_feature_layer": -2,
            "downsample_ratio": 0.25,
        },
    ),
    "smolvlm": (
        "SmolVLM",
        {
            "vision_config": _SQUARE | {"image_size": 24, "patch_size": 4},
            "text_config": _TEXT | {"model_type": "llama"},
            "scale_factor": 3,
        },
    ),
    "gemma3": (
        "Gemma3",
        {
            "vision_config": _SQUARE | {"model_type": "siglip_vision_model", "image_size": 24, "patch_size": 4},
            "text_config": _TEXT,
            "mm_tokens_per_image": 9,
        },
    ),
    "qwen2_vl": (
        "Qwen2VL",
        {
            "vision_config": _NATIVE | {"embed_dim": 24, "hidden_size": WIDTH, "mlp_ratio": 2},
            "text_config": _TEXT | _M_ROPE,
        },
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VL",
        {
            "vision_config": _NATIVE
            | {"hidden_size": 24, "out_hidden_size": WIDTH, "intermediate_size": 28, "window_size": 16}
            | {"fullatt_block_indexes": [1]},
            "text_config": _TEXT | _M_ROPE,
        },
    ),
    "qwen3_vl": (
        "Qwen3VL",
        {
            "vision_config": _NATIVE
            | {"hidden_size": 24, "out_hidden_size": WIDTH, "intermediate_size": 28, "num_position_embeddings": 25}
            | {"deepstack_visual_indexes": [0, 2]},
            "text_config": _TEXT | _M_ROPE,
        },
    ),
}
NAMES = tuple(_MODELS)
SQUARE = ("internvl", "internvl_plain", "smolvlm", "gemma3")
NATIVE = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")

_PREFIXES = {
    "model.visual.merger.": "multi_modal_projector.",
    "model.visual.": "vision_tower.",
    "model.vision_model.": "vision_tower.",
    "model.connector.modality_projection.": "multi_modal_projector.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.vision_tower.": "vision_tower.",
}


_PROJECTORS = {
    "internvl": (
        Rule("projector/norm/scale", "multi_modal_projector.layer_norm.weight", Copy()),
        Rule("projector/norm/bias", "multi_modal_projector.layer_norm.bias", Copy()),
        Rule("projector/linear_1/kernel", "multi_modal_projector.linear_1.weight", Linear()),
        Rule("projector/linear_1/bias", "multi_modal_projector.linear_1.bias", Flat()),
        Rule("projector/linear_2/kernel", "multi_modal_projector.linear_2.weight", Linear()),
        Rule("projector/linear_2/bias", "multi_modal_projector.linear_2.bias", Flat()),
    ),
    "smolvlm": (Rule("projector/linear_1/kernel", "multi_modal_projector.proj.weight", Linear()),),
    "gemma3": (
        Rule("projector/norm/scale", "multi_modal_projector.mm_soft_emb_norm.weight", Copy()),
        Rule("projector/linear_1/kernel", "multi_modal_projector.mm_input_projection_weight", Copy()),
    ),
}
_ONE_MATRIX = {"projector_layers": 1, "projector_bias": False}
_CONNECTORS: dict[str, dict[str, Any]] = {
    "internvl": {"merge": 2, "projector_norm_eps": 1e-5, "projector_norm_merged": True},
    "internvl_plain": {"merge": 4, "projector_norm_eps": 1e-5, "projector_norm_merged": True},
    "smolvlm": {"merge": 3, **_ONE_MATRIX},
    "gemma3": {
        "merge": 2,
        "merge_mean": True,
        "projector_norm": "rms_offset",
        "projector_norm_eps": 1e-6,
        "projector_norm_merged": True,
        **_ONE_MATRIX,
    },
}
"""The fields of ModelConfig about the connectors of square towers."""


@dataclasses.dataclass(frozen=True)
class Pair:
    """A model of transformers, and ours with the same tower and connector.

    Attributes:
        tensors: of the tower and the connector, by canonical name. layout: by which ours was filled.
    """

    hf: Any
    config: ModelConfig
    model: VisionLanguageModel
    tensors: dict[str, np.ndarray]
    layout: Layout


def hf_model(name: str) -> Any:
    """A random model in evaluation mode, float32."""
    kind, fields = _MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**fields, tie_word_embeddings=False)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    hf_models.randomise(model, torch.Generator().manual_seed(1), tied=False)
    return model


def model_config(name: str, hf: Any) -> ModelConfig:
    """Tower and connector as `hf` states them, before a tiny Llama."""
    vision = towers.vision_config(hf.vision_config, "config.json")
    if name == "gemma3":
        vision = dataclasses.replace(vision, final_norm=True)
    settings = _CONNECTORS[name] if name in _CONNECTORS else towers.merger(hf.vision_config, "config.json")
    text = TextConfig(
        family="llama", vocab_size=50, hidden_size=WIDTH, intermediate_size=16, num_layers=4, num_heads=2, num_kv_heads=1,
        head_dim=12, rms_norm_eps=1e-6, rope=RopeConfig(1e4), max_positions=64,
    )  # fmt: skip
    return ModelConfig(
        vision=vision,
        text=text,
        feature_layers=(getattr(hf, "vision_feature_layer", -1),),
        feature_select="default" if vision.has_class_token else "full",
        image_token_id=3,
        eos_token_ids=(2,),
        pad_token_id=0,
        image=ImageConfig(size=vision.image_size, aspect="squash", mean=(0.5,) * 3, std=(0.5,) * 3),
        sinks=SinkConfig(criterion="norm", vit_tau=4.0),
        family=name.removesuffix("_plain"),
        **settings,
    )


def rules(config: ModelConfig) -> tuple:
    """The rules of tower, connector and a Llama."""
    projector = _PROJECTORS.get(config.family) or towers.PROJECTOR_RULES[config.family]
    return towers.TOWER_RULES[config.vision.family] + projector + decoders.DECODERS["llama"].rules


def pair(name: str) -> Pair:
    """Both models, with equal weights."""
    hf = hf_model(name)
    config = model_config(name, hf.config)
    tensors = {}
    for key, array in hf_models.state_arrays(hf).items():
        if prefix := next((prefix for prefix in _PREFIXES if key.startswith(prefix)), None):
            tensors[_PREFIXES[prefix] + key.removeprefix(prefix)] = array
    table = layout(config, rules(config))
    model = VisionLanguageModel(config, rngs=nnx.Rngs(0), dtype=jnp.float32)
    state = nnx.state(model)
    leaves = {key: np.array(leaf) for key, leaf in flatten(nnx.to_pure_dict(state)).items()}
    for part in table.parts:
        if not part.leaf.startswith("language_model"):
            block = leaves[part.leaf] if part.layer is None else leaves[part.leaf][part.layer]
            first, last = part.op.source_rows(part.shape, 0, part.shape[0])
            rows = tensors[part.source][part.first_row + first : part.first_row + last]
            part.op.fill(block, 0, rows, first)
    filled: dict = {}
    for key, leaf in leaves.items():
        *path, last_name = key.split("/")
        at = filled
        for step in path:
            at = at.setdefault(step, {})
        at[last_name] = jnp.asarray(leaf)
    nnx.replace_by_pure_dict(state, filled)
    nnx.update(model, state)
    return Pair(hf, config, model, tensors, table)


@dataclasses.dataclass(frozen=True)
class NativeImage:
    """One image of a native tower.

    Attributes:
        grid: rows and columns of patches. flat: float32 [patches, C T h w], as HF's processor flattens them.
        squares: int [slots], the square of patches in each slot of the arrangement, -1 for filling.
    """

    grid: tuple[int, int]
    flat: np.ndarray
    squares: np.ndarray


def native_image(grid: tuple[int, int], config: ModelConfig, seed: int) -> NativeImage:
    """An image of random values, its squares arranged window by window, where the tower has windows."""
    rows, columns = (side // config.merge for side in grid)
    squares = np.arange(rows * columns).reshape(rows, columns)
    if config.vision.window_size is not None:
        side = config.vision.window_size // config.vision.patch_size // config.merge
        windows = []
        for top in range(0, rows, side):
            for left in range(0, columns, side):
                inside = squares[top : top + side, left : left + side].ravel()
                windows.append(np.pad(inside, (0, side**2 - len(inside)), constant_values=-1))
        squares = np.concatenate(windows)
    flat = np.random.default_rng(seed).normal(size=(grid[0] * grid[1], config.vision.patch_values)).astype(np.float32)
    return NativeImage(grid, flat, squares.ravel())


def arranged(rows: list[list[NativeImage]], patches: int, config: ModelConfig) -> VisualInput:
    """Images of each row -> arrays of `patches` each; a row with fewer images than others has unused ones."""
    count, merge, vision = max(map(len, rows)), config.merge, config.vision
    shape = (len(rows), count, patches)
    values = np.zeros((*shape, vision.patch_values), np.float32)
    used, place = np.zeros(shape, bool), np.zeros((*shape, 2), np.int32)
    table, weight = np.zeros((*shape, 4), np.int32), np.zeros((*shape, 4), np.float32)
    for i, images in enumerate(rows):
        for s, image in enumerate(images):
            own, (height, width) = np.flatnonzero(image.squares >= 0), image.grid
            at = (own[:, None] * merge**2 + np.arange(merge**2)).ravel()
            flat = (image.squares[own][:, None] * merge**2 + np.arange(merge**2)).ravel()
            by_axes = image.flat.reshape(-1, 3, vision.frames, vision.patch_size, vision.patch_size)
            values[i, s, at] = by_axes.transpose(0, 2, 3, 4, 1).reshape(len(image.flat), -1)[flat]
            used[i, s, at] = True
            grid = np.stack(np.indices(image.grid), -1).reshape(height // merge, merge, width // merge, merge, 2)
            place[i, s, at] = grid.swapaxes(1, 2).reshape(-1, 2)[flat]
            if vision.table_side is not None:  # corners of the cell of the table, and bilinear weights
                where = place[i, s, at] / (np.array(image.grid) - 1) * (vision.table_side - 1)
                low = np.minimum(where.astype(int), vision.table_side - 2)
                share = where - low
                for k, (down, right) in enumerate(np.ndindex(2, 2)):
                    table[i, s, at, k] = (low[:, 0] + down) * vision.table_side + low[:, 1] + right
                    sides = [share[:, a] if far else 1 - share[:, a] for a, far in enumerate((down, right))]
                    weight[i, s, at, k] = sides[0] * sides[1]
    if vision.table_side is None:
        return VisualInput(values, used, place)
    return VisualInput(values, used, place, table, weight)
