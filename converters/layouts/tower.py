"""Vision towers that an original checkpoint names: where they are, their configuration and their image processor."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.hub import Checkpoint, find_checkpoint
from converters.image_processor import image_config
from converters.layouts.layout import Aspect
from lsg_jax.errors import ConfigError, InputError
from lsg_jax.json_files import read_object

_CLIP_L = {
    "model_type": "clip_vision_model",
    "hidden_act": "quick_gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "layer_norm_eps": 1e-5,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
}

KNOWN: dict[str, dict[str, Any]] = {
    "clip-vit-large-patch14": _CLIP_L | {"image_size": 224},
    "clip-vit-large-patch14-336": _CLIP_L | {"image_size": 336},
    "siglip-so400m-patch14-384": {
        "model_type": "siglip_vision_model",
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 1152,
        "image_size": 384,
        "intermediate_size": 4304,
        "layer_norm_eps": 1e-6,
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
    },
}
"""Name of a tower's repository -> its configuration, for checkpoints that hold the tower's weights themselves."""


@dataclass(frozen=True)
class Tower:
    """A vision tower.

    Attributes:
        config: its `vision_config`.
        preprocessor: contents of its preprocessor_config.json; None for the defaults of its kind.
        checkpoint: where its weights are; None where they are not needed.
    """

    config: dict[str, Any]
    preprocessor: dict[str, Any] | None = None
    checkpoint: Checkpoint | None = None

    @property
    def kind(self) -> str:
        """`clip` or `siglip`."""
        return str(self.config.get("model_type", "clip_vision_model")).partition("_")[0]


def find_tower(name: str, near: Path, *, weights: bool) -> Tower:
    """The tower that a checkpoint names.

    A folder of this name is taken first, then one beside the checkpoint, then the Hugging Face cache and Hub.

    Args:
        name: Hub id or folder. near: the folder of the checkpoint.
        weights: whether they are needed. If not, the configuration of a known tower is not looked for elsewhere.

    Raises:
        InputError: it is not found. ConfigError: its configuration is not understood.
    """
    last = Path(name).name
    folder = next((path for path in _places(name, near) if (path / "config.json").is_file()), None)
    if folder is None and not weights and last in KNOWN:
        return Tower(KNOWN[last])
    if folder is None and not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        raise InputError(f"{near}: its vision tower {name} is not on this machine; put its folder at {near.parent / last}")
    try:
        checkpoint = find_checkpoint(name if folder is None else folder)
    except InputError as error:
        raise InputError(
            f"{near}: its vision tower is missing; put the folder of {name} at {near.parent / last} ({error})"
        ) from None
    return _read(checkpoint)


def _places(name: str, near: Path) -> list[Path]:
    """Local folders that may hold the tower `owner/name`."""
    near, given = near.resolve(), Path(name)
    return [given, near / given, near.parent / given.name, near.parent.parent / given, near.parent / name.replace("/", "--")]


def _read(checkpoint: Checkpoint) -> Tower:
    """The tower of a repository of CLIP, of SigLIP, or of the vision part alone."""
    path = checkpoint.folder / "config.json"
    config = read_object(path)
    kinds = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
    if config.get("model_type") in kinds:
        nested = config.get("vision_config")
        if not isinstance(nested, Mapping):
            raise ConfigError(f"{path}: no vision_config; a CLIP or SigLIP repository is expected")
        config = {**nested, "model_type": kinds[config["model_type"]]}
    if config.get("model_type") not in kinds.values():
        raise ConfigError(f"{path}: model_type {config.get('model_type')!r}: the vision tower must be CLIP or SigLIP")
    processor = checkpoint.folder / "preprocessor_config.json"
    return Tower(config, read_object(processor) if processor.is_file() else None, checkpoint)


def hf_name(name: str) -> str | None:
    """A tensor of the tower's own repository -> its name in the twin; None for a part that is no vision tower."""
    for prefix in ("vision_model.", "vision_tower."):
        if name.startswith(prefix):
            return f"vision_tower.{name.removeprefix(prefix)}"
    return f"vision_tower.{name}" if re.match(r"(embeddings|encoder|pre_layrnorm|post_layernorm|head)\.", name) else None


def twin_preprocessor(tower: Tower, aspect: Aspect, model_type: str, pinpoints: Any) -> dict[str, Any]:
    """The twin's preprocessor_config.json.

    Args:
        aspect: how the original code makes an image fit. model_type: of the twin. pinpoints: `image_grid_pinpoints`.

    Raises:
        ConfigError: the tower's own image processor is not understood.
    """
    size = tower.config.get("image_size")
    if not isinstance(size, int):
        raise ConfigError(f"vision_config: image_size = {size!r} is not the side of a square")
    clip = tower.kind == "clip"
    image = image_config(tower.preprocessor, size=size, tower="clip" if clip else "siglip")
    square = {"height": size, "width": size}
    crop = {"size": {"shortest_edge": size}, "do_center_crop": True, "crop_size": square}
    settings = {
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(image.mean),
        "image_std": list(image.std),
    }
    if aspect == "pad":
        return {"image_processor_type": "LlavaImageProcessor", "do_pad": True, **settings, **crop}
    if model_type == "llava_next":
        tiles = {"image_processor_type": "LlavaNextImageProcessor", "image_grid_pinpoints": pinpoints, "do_pad": True}
        return {**tiles, **settings, **crop} if clip else {**tiles, **settings, "size": square, "do_center_crop": False}
    if model_type == "llava_onevision":
        tiles = {"image_processor_type": "LlavaOnevisionImageProcessor", "image_grid_pinpoints": pinpoints, "do_pad": True}
        return {**tiles, **settings, "size": square}
    if image.aspect == "crop":
        return {"image_processor_type": "CLIPImageProcessor", **settings, **crop}
    return {"image_processor_type": "SiglipImageProcessor", **settings, "size": square}
