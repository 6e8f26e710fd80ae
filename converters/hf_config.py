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
from converters.families.fields import undefined_fields
from converters.families.values import shortened
from converters.json_file import read_object
from lsg_jax.config import ModelConfig
from lsg_jax.errors import ConfigError
from lsg_jax.installed import check_installed

logger = logging.getLogger(__name__)


def read_config(folder: str | Path, *, name: str | None = None) -> ModelConfig:
    """Reads the configuration of a local checkpoint in Hugging Face format.

    Args:
        folder: holds `config.json` and, where the checkpoint has them, `generation_config.json` and `preprocessor_config.json`
            or `processor_config.json`.
        name: Hub id of the checkpoint; None for the name of the folder.

    Raises:
        InputError: a file is missing or no proper JSON. ConfigError: the model or one of its settings is not supported.
    """
    folder = Path(folder)
    optional = lambda name: read_object(folder / name) if (folder / name).is_file() else None
    return model_config(
        read_object(folder / "config.json"),
        generation=optional("generation_config.json"),
        preprocessor=optional("preprocessor_config.json") or optional("processor_config.json"),
        where=str(folder / "config.json"),
        name=folder.resolve().name if name is None else name,
    )


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
    if ignored := ignored_fields(config, where=where):
        listed = ", ".join(f"{name} = {shortened(value)}" for name, value in ignored.items())
        logger.warning("%s: ignored, since transformers does not define them for this model: %s", where, listed)
    family = _family(config, where)
    files = CheckpointFiles(config, generation, preprocessor, where, name)
    return family.model_config(_with_defaults(family, config, where), files)


def ignored_fields(config: Mapping[str, Any], *, where: str = "config.json") -> dict[str, Any]:
    """The fields that the installed transformers does not define, by dotted name. They cannot change what it computes.

    Raises:
        ConfigError: the architecture is not supported, or a field might change the results; it is named.
    """
    family = _family(config, where)
    ignored = undefined_fields(config, family.fields, family.model_type, where)
    for name, part in family.parts.items():
        nested = config.get(name)
        if not isinstance(nested, Mapping):
            raise ConfigError(f"{where}: {name} is missing")
        kind = nested.get("model_type", part.default)
        if not isinstance(kind, str) or kind not in part.fields:
            supported = ", ".join(part.fields)
            raise ConfigError(f"{where}: {name} is of model_type {kind!r}, which is not supported; supported: {supported}")
        found = undefined_fields(nested, part.fields[kind], kind, f"{where}: {name}")
        ignored |= {f"{name}.{field}": value for field, value in found.items()}
    return ignored


def _family(config: Mapping[str, Any], where: str) -> Family:
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        supported = ", ".join(f"{name!r} ({family.architecture})" for name, family in FAMILIES.items())
        raise ConfigError(f"{where}: model_type {kind!r} is not supported; supported: {supported}")
    return FAMILIES[kind]


def _with_defaults(family: Family, config: Mapping[str, Any], where: str) -> HFConfig:
    """The same as a configuration object of transformers, with every default filled in."""
    check_installed("transformers")
    from transformers import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[family.model_type](**copy.deepcopy(dict(config)))
    except Exception as error:  # its validators raise many kinds
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ConfigError(f"{where}: transformers refuses it: {' '.join(lines)[:300]}") from None
