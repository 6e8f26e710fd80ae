"""Turns a checkpoint in an original layout into its Hugging Face twin: small files and tensors."""

from __future__ import annotations

import dataclasses
import json
import re
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.adapters import Trained, derived_tensors, language_model_dtype, with_replaced, with_updates
from converters.derived_source import Derived, DerivedSource
from converters.families.decoders import EMBEDDING, HEAD
from converters.hf_config import find_family
from converters.layouts.layout import Layout, Twin
from converters.layouts.tokens import Tokens, complete_tokenizer
from converters.layouts.tower import Tower, find_tower, hf_name, twin_preprocessor
from converters.reader import Source, open_source


@dataclass(frozen=True)
class Original:
    """A checkpoint in an original layout.

    Attributes:
        folder: the checkpoint, or what was trained of it.
        layout: its layout. twin: what its config.json says.
        weights: of the checkpoint, or of the base of what was trained.
        trained: to be merged into the weights; None for nothing.
    """

    folder: Path
    layout: Layout
    twin: Twin
    weights: Source
    trained: Trained | None = None


def write_twin(original: Original, work: Path, stack: ExitStack) -> tuple[DerivedSource, dict[str, str]]:
    """Writes the twin's small files.

    Args:
        work: a folder with the original's small files, which the twin's replace.
        stack: closes what is opened.

    Returns:
        The twin's tensors, and what of the original was dropped -> why.

    Raises:
        InputError: files are missing, damaged or do not belong together. ConfigError: a setting is not supported.
    """
    folder, twin, trained, name = original.folder, original.twin, original.trained, original.layout.hf_name
    architecture = find_family({"model_type": twin.model_type}, f"{folder}/config.json").architecture
    tokens = complete_tokenizer(work, twin, folder)
    tensors = derived_tensors(original.weights, name, folder)
    opened = [original.weights]
    if trained:
        opened += trained.opened
        tensors = with_replaced(tensors, trained, name)
    tower, tensors, ignored = _with_tower(original, tensors, opened, stack)
    if trained:
        tensors = with_updates(tensors, trained, name, folder)
    if twin.model_type == "llava" and "image_newline" in tensors:
        del tensors["image_newline"]
        ignored["image_newline"] = "images are not cut into tiles"
    tensors, rows = _with_rows(tensors, tokens)
    config = {
        "model_type": twin.model_type,
        "architectures": [architecture],
        "text_config": twin.text_config | rows,
        "vision_config": tower.config,
        **twin.fields,
        **tokens.fields,
    }
    _write_json(work / "config.json", config)
    pinpoints = twin.fields.get("image_grid_pinpoints")
    _write_json(work / "preprocessor_config.json", twin_preprocessor(tower, twin.aspect, twin.model_type, pinpoints))
    _write_json(work / "processor_config.json", _processor(tower, twin))
    ignored |= {f"config.json: {field}": reason for field, reason in twin.ignored.items()}
    return DerivedSource(tensors, opened), ignored


def _with_rows(tensors: dict[str, Derived], tokens: Tokens) -> tuple[dict[str, Derived], dict[str, int]]:
    """With rows of the embedding and the head for added tokens. Also the vocabulary's size, if there is an embedding."""
    grown, size = dict(tensors), {}
    for name in (HEAD, EMBEDDING):
        if name in tensors:
            stored = tensors[name].tensor.shape[0]
            size = {"vocab_size": tokens.rows(stored)}
            grown[name] = dataclasses.replace(tensors[name], added_rows=size["vocab_size"] - stored)
    return grown, size


def _with_tower(
    original: Original, tensors: dict[str, Derived], opened: list[Source], stack: ExitStack
) -> tuple[Tower, dict[str, Derived], dict[str, str]]:
    """The tower's configuration, all tensors with those of the tower, and the parts of it that the original code removes."""
    twin = original.twin
    inside = any(name.startswith("vision_tower.") for name in tensors)
    if inside and twin.vision_config is not None:
        tower = Tower(twin.vision_config)
    else:
        tower = find_tower(twin.tower, original.folder, weights=not inside)
    if not inside and tower.checkpoint is not None:
        source = stack.enter_context(closing(open_source(tower.checkpoint.folder)))
        opened.append(source)
        dtype = language_model_dtype(tensors)  # LLaVA's code loads the tower in the dtype of the language model
        found = {hf_name(name): Derived(source, name, dtype) for name in source.tensors}
        tensors = tensors | {name: derived for name, derived in found.items() if name is not None}
    if not twin.unused_layers:
        return tower, tensors, {}
    layers = int(tower.config["num_hidden_layers"]) - twin.unused_layers
    config = {**tower.config, "num_hidden_layers": layers, "vision_use_head": False}
    kept, dropped = {}, {}
    for name, derived in tensors.items():
        layer = re.match(r"vision_tower\.encoder\.layers\.(\d+)\.", name)
        if name.startswith("vision_tower.head.") or (layer and int(layer[1]) >= layers):
            dropped[name] = "the original code removes it from the tower"
        else:
            kept[name] = derived
    return dataclasses.replace(tower, config=config), kept, dropped


def _processor(tower: Tower, twin: Twin) -> dict[str, Any]:
    """What the twin's processor class needs to count the tokens of an image."""
    kinds = {"llava": "LlavaProcessor", "llava_next": "LlavaNextProcessor", "llava_onevision": "LlavaOnevisionProcessor"}
    return {
        "processor_class": kinds[twin.model_type],
        "patch_size": tower.config.get("patch_size"),
        "num_additional_image_tokens": int(tower.kind == "clip"),
        "vision_feature_select_strategy": twin.fields["vision_feature_select_strategy"],
        "image_token": "<image>",
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
