"""Reads single values of Hugging Face configurations. Every function raises ConfigError for a value that is not supported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converters.families.family import CheckpointFiles, HFConfig
from lsg_jax.config import Activation, SinkConfig, from_dict
from lsg_jax.errors import ConfigError

ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu_exact",
    "gelu_python": "gelu_exact",
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
}
"""Names of transformers -> ours."""


def activation(name: str, where: str) -> Activation:
    """Our name of an activation function."""
    if name not in ACTIVATIONS:
        raise ConfigError(f"{where} = {name!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def positive(value: Any, where: str) -> int:
    """A whole number above 0."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{where} = {shortened(value)} is no whole number above 0")
    return value


def square_side(value: Any, where: str) -> int:
    """The side of a square, which may be given as [height, width]."""
    sides = set(value) if isinstance(value, (list, tuple)) else {value}
    side = sides.pop() if len(sides) == 1 else None
    if not isinstance(side, int) or side < 1:
        raise ConfigError(f"{where} = {shortened(value)} is not the side of a square")
    return side


def token_ids(hf: HFConfig, files: CheckpointFiles, name: str, *, from_generation: bool) -> tuple[int, ...]:
    """Token ids, from the first place that states any: generation_config.json, config.json, its text_config with defaults.

    -1 stands for no token, as in the first Llama checkpoints.
    """
    generation: Mapping[str, Any] = (files.generation or {}) if from_generation else {}
    for value in (generation.get(name), files.config.get(name), getattr(hf.text_config, name, None)):
        if value is None or value in (-1, [-1]):
            continue
        ids = value if isinstance(value, list) else [value]
        if not ids or not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise ConfigError(f"{files.where}: {name} = {shortened(value)} is neither a token id nor a list of them")
        return tuple(ids)
    return ()


def stated_sinks(files: CheckpointFiles) -> SinkConfig | None:
    """The sinks that a checkpoint states in `lsg_sinks`, in the fields of SinkConfig; None if it states none."""
    if "lsg_sinks" not in files.config:
        return None
    return from_dict(SinkConfig, files.config["lsg_sinks"], where=f"{files.where}: lsg_sinks")


def shortened(value: Any) -> str:
    """A value for a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
