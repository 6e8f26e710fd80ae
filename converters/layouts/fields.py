"""Which fields of an original config.json change the model, and which do not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converters.families.values import shortened
from lsg_jax.errors import ConfigError

FILE_FIELDS = frozenset({"model_type", "architectures", "auto_map", "transformers_version"})
"""About the original's own class: the twin has others."""


def check_only(config: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]], where: str) -> None:
    """Raises ConfigError for fields that have another value than those with which the twin computes the same."""
    wrong = [name for name, values in allowed.items() if name in config and config[name] not in values]
    if wrong:
        listed = ", ".join(f"{name} = {shortened(config[name])}" for name in wrong)
        raise ConfigError(f"{where}: the Hugging Face layout cannot express {listed}")


def text_fields(config: Mapping[str, Any], own: frozenset[str], where: str) -> dict[str, Any]:
    """The fields of the language model: what is left of a flat config.json without the layout's own.

    Raises:
        ConfigError: a field `mm_*`, by which LLaVA's code names its own, is not known and has a value.
    """
    left = {name: value for name, value in config.items() if name not in own | FILE_FIELDS}
    unknown = {name: value for name, value in left.items() if name.startswith("mm_")}
    if refused := {name: value for name, value in unknown.items() if value not in (None, False, "")}:
        listed = ", ".join(f"{name} = {shortened(value)}" for name, value in refused.items())
        raise ConfigError(f"{where}: not understood, so it might change the results: {listed}")
    return {name: value for name, value in left.items() if name not in unknown}
