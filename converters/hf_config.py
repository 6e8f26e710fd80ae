"""Hugging Face `config.json` -> ModelConfig: finds the family, checks the fields, fills in defaults.

Strict: a field that might change what the model computes is refused by name (`families/fields.py`). The configuration classes
of transformers fill in what is left out; they also know the spellings of older versions. PyTorch is not needed.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters.families import FAMILIES
from converters.families.family import CheckpointFiles, Family, HFConfig
from converters.families.fields import defined_fields, undefined_fields
from converters.families.values import shortened
from lsg_jax.config import ModelConfig
from lsg_jax.config.model import PLANTED
from lsg_jax.config.ranges import Range
from lsg_jax.data.conversation import IMAGE_TAG
from lsg_jax.errors import ConfigError
from lsg_jax.installed import transformers
from lsg_jax.json_files import read_object

logger = logging.getLogger(__name__)

_GATED_ATTENTION = ("qwen3_next", "qwen3_5", "qwen4_exp")
"""Starts of the model_types whose attention output goes through a trained sigmoid gate (arXiv 2505.06708)."""

_SIZES = {
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layers", "depth"), Range("[1, 1e4]")),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "num_heads"), Range("[1, 1e4]")),
    **dict.fromkeys(("hidden_size", "embed_dim", "image_size", "head_dim", "patch_size"), Range("[1, 1e6]")),
    **dict.fromkeys(("vocab_size", "intermediate_size", "max_position_embeddings"), Range("[1, 1e9]")),
}
"""Fields of `config.json` that transformers or we make as many things of as they say."""


def read_config(folder: str | Path, *, name: str | None = None, where: str | None = None) -> ModelConfig:
    """Reads the configuration of a local checkpoint in Hugging Face format.

    Args:
        folder: holds `config.json` and, where the checkpoint has them, `generation_config.json` and `preprocessor_config.json`
            or `processor_config.json`.
        name: Hub id of the checkpoint; None for the name of the folder.
        where: names config.json in errors; None for its path.

    Raises:
        InputError: a file is missing or no proper JSON. ConfigError: the model or one of its settings is not supported.
    """
    folder = Path(folder)
    optional = lambda name: read_object(folder / name) if (folder / name).is_file() else None
    config = read_object(folder / "config.json")
    preprocessor = optional("preprocessor_config.json") or optional("processor_config.json")
    where = where or str(folder / "config.json")
    found = model_config(
        config | _image_token(config, folder),
        generation=optional("generation_config.json"),
        preprocessor=preprocessor,
        where=where,
        name=folder.resolve().name if name is None else name,
    )
    if preprocessor is None and found.image.kind in ("native", "tiles"):  # published ones differ from their class's defaults
        logger.warning(
            "%s: no preprocessor_config.json beside it: sizes are the tower's, the rest transformers' "
            "defaults, which published checkpoints may not use; copy the checkpoint's file there",
            where,
        )
    return found


def model_config(
    config: Mapping[str, Any],
    *,
    generation: Mapping[str, Any] | None = None,
    preprocessor: Mapping[str, Any] | None = None,
    where: str = "config.json",
    name: str = "",
) -> ModelConfig:
    """The ModelConfig of a `config.json`. Fields that are ignored (`ignored_fields`) are listed in the log.

    Args:
        config: its contents. generation, preprocessor: those of `generation_config.json` and of the image processor's file.
        where: names the file in errors.
        name: Hub id or folder of the checkpoint, to recognise it.

    Raises:
        ConfigError: an architecture, a field or a value is not supported; it is named.
    """
    _check_sizes(config, where)
    config = find_family(config, where).restated(config)
    if ignored := ignored_fields(config, where=where):
        listed = ", ".join(f"{name} = {shortened(value)}" for name, value in ignored.items())
        logger.warning("%s: ignored, since transformers does not define them for this model: %s", where, listed)
    family = find_family(config, where)
    hf = _with_defaults(family, config, where)
    _check_copies(family, config, hf, where)
    try:
        return family.model_config(hf, CheckpointFiles(config, generation, preprocessor, where, name))
    except (TypeError, ValueError, ArithmeticError) as error:  # a value that no check has foreseen
        raise ConfigError(f"{where}: a value cannot be used: {error}; compare the file with a published one") from error


def _check_sizes(part: Mapping[str, Any], where: str) -> None:
    """Refuses sizes beyond any model before transformers makes lists of that many entries. Other values are for the family."""
    for name, value in part.items():
        if isinstance(value, Mapping):
            _check_sizes(value, f"{where}: {name}")
        elif name in _SIZES and isinstance(value, int) and not isinstance(value, bool) and value > _SIZES[name].ends[1]:
            _SIZES[name].check(value, f"{where}: {name}", int)


def ignored_fields(config: Mapping[str, Any], *, where: str = "config.json") -> dict[str, Any]:
    """The fields that the installed transformers does not define, by dotted name. They cannot change what it computes.

    Raises:
        ConfigError: the architecture is not supported, or a field might change the results; it is named.
    """
    family = find_family(config, where)
    config = family.restated(config)
    ignored = undefined_fields(config, family.fields, family.model_type, where)
    not_lost = (*_text_fields(family), PLANTED)  # copies, and a note of what was done to the weights
    ignored = {name: value for name, value in ignored.items() if name not in not_lost}
    for name, part in family.parts.items():
        nested = config.get(name)
        if not isinstance(nested, Mapping):
            raise ConfigError(f"{where}: {name} is missing")
        kind = nested.get("model_type", part.default)
        if not isinstance(kind, str) or kind not in part.fields:
            supported = ", ".join(part.fields)
            _check_gated_attention(kind, where)
            raise ConfigError(f"{where}: {name} is of model_type {kind!r}, which is not supported; supported: {supported}")
        found = undefined_fields(nested, part.fields[kind], kind, f"{where}: {name}")
        ignored |= {f"{name}.{field}": value for field, value in found.items()}
    return ignored


def find_family(config: Mapping[str, Any], where: str) -> Family:
    """The family of a config.json. Raises ConfigError if it is not supported."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        supported = ", ".join(f"{name!r} ({family.architecture})" for name, family in FAMILIES.items())
        _check_gated_attention(kind, where)
        raise ConfigError(f"{where}: model_type {kind!r} is not supported; supported: {supported}")
    return FAMILIES[kind]


def _check_gated_attention(kind: Any, where: str) -> None:
    """Raises ConfigError, in words of its own, for a model that leaves nothing to gate."""
    if isinstance(kind, str) and kind.startswith(_GATED_ATTENTION):
        raise ConfigError(f"{where}: model_type {kind!r} gates its own attention, which leaves no sinks to gate: not supported")


def _text_fields(family: Family) -> frozenset[str]:
    """The fields of a language model. At the top of config.json, they are copies of those of text_config."""
    return frozenset().union(*family.parts["text_config"].fields.values())


def _check_copies(family: Family, config: Mapping[str, Any], hf: HFConfig, where: str) -> None:
    """Refuses copies of text_config's fields that differ from them: one of the two is wrong."""
    copies = _text_fields(family) - family.fields - defined_fields(family.model_type).keys()
    for name in sorted(copies & config.keys()):
        used = getattr(hf.text_config, name, config[name])
        if config[name] != used:
            stated = f"{name} = {shortened(config[name])}"
            raise ConfigError(f"{where}: {stated}, but text_config has {shortened(used)}; remove or correct the wrong one")


def _image_token(config: Mapping[str, Any], folder: Path) -> dict[str, int]:
    """The image token's id in the tokenizer, where config.json states a negative one, which stands for no token."""
    name = next((name for name in ("image_token_index", "image_token_id") if name in config), None)
    stated = config.get(name) if name else None
    if name is None or not isinstance(stated, int) or stated >= 0:
        return {}
    path = folder / "tokenizer.json"
    added = read_object(path, max_bytes=256 << 20).get("added_tokens") if path.is_file() else None
    for token in added if isinstance(added, list) else []:
        if isinstance(token, dict) and token.get("content") == IMAGE_TAG and isinstance(token.get("id"), int):
            return {name: token["id"]}
    raise ConfigError(
        f"{folder}/config.json: {name} = {stated} is no token, and tokenizer.json has no {IMAGE_TAG}; state its id"
    )


def _with_defaults(family: Family, config: Mapping[str, Any], where: str) -> HFConfig:
    """The same as a configuration object of transformers, with every default filled in."""
    CONFIG_MAPPING = transformers().CONFIG_MAPPING
    try:
        return CONFIG_MAPPING[family.model_type](**copy.deepcopy(dict(config)))
    except Exception as error:  # its validators raise many kinds
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ConfigError(f"{where}: transformers refuses it: {' '.join(lines)[:300]}") from None
