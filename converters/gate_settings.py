"""Reads the `sink_cfg.json` of a published gate set. Its keys are not documented, so they are matched by their words.

A key with the word `layer` or `layers` states the gated layers (`gate_layers`, `layer_idx`), unless another word of its path
speaks of something else (`num_layers`, `vision.feature_layer`, `layer_norm_eps`). Sink dimensions and thresholds need a word
for the stage and one for the quantity: `vit_dims`, `D_llm`, `tau_vit`, `{"v_sink": {"threshold": ...}}`. Numbers may be text.
A single number may mean something else: under `layers` it counts them, under `vision_dim` it may be a width. These, and all
else, are listed and not used: what a word such as `prior` does to a gate is not known.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from converters.families.values import shortened
from converters.gate_layers import Layers
from lsg_jax.errors import InputError
from lsg_jax.json_files import read_object

SETTINGS_FILE = "sink_cfg.json"

_LAYER = {"layer", "layers", "layeridx", "layerid"}
_OF_GATES = {"gate", "gates", "gated", "sink", "sinks"}
_ONE_DIMENSION = {"dim", "dimension", "channel", "d"}
_SMALLEST_WIDTH, _WIDTH_MULTIPLE = 256, 64  # of the models whose widths are told from sink dimensions
_NOT_GATED = {
    "norm", "num", "n", "number", "count", "total", "max", "min", "depth", "hidden", "eps", "vit", "v", "vision", "visual",
    "clip", "tower", "feature", "features", "select", "image", "mm", "lr", "drop", "dropout", "detect", "detection", "start",
    "end", "first", "last", "from", "until", "range", "step", "probe", "lora",
}  # fmt: skip

_STAGES = {
    "vit": {"vit", "v", "vision", "visual", "clip", "vsink", "siglip"},
    "llm": {"llm", "l", "lm", "text", "language", "lsink", "decoder"},
}
_QUANTITIES = {
    "dims": {"dim", "dims", "dimension", "dimensions", "channel", "channels", "d"},
    "tau": {"tau", "thr", "thres", "thresh", "threshold"},
}
_NOT_SINKS = {
    "hidden", "model", "embed", "embedding", "in", "out", "num", "n", "size", "proj", "projector", "head", "mlp", "width",
    "inner", "feature", "lora", "gate", "max", "min",
}  # fmt: skip


@dataclass
class SinkSettings:
    """What a `sink_cfg.json` says.

    Attributes:
        layers: one statement for each key that names layers.
        sinks: field of SinkConfig -> value. keys: the same field -> the key that states it.
        unused: key -> value, of everything else.
    """

    layers: list[Layers] = field(default_factory=list)
    sinks: dict[str, Any] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)


def read_settings(path: Path) -> SinkSettings:
    """Reads the file.

    Raises:
        InputError: it is no JSON object, or two keys state different values of the same setting.
    """
    found = SinkSettings()
    for key, value in _leaves(read_object(path), ""):
        words = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", key)]
        last = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", key.rpartition(".")[2])]
        layers = _gated_layers(set(last), value) if not set(words) & _NOT_GATED else None
        name = _sink_field(set(words))
        taken = None if name is None else _sink_value(name, set(last), value)
        if layers is not None:
            found.layers.append(Layers(f"{path.name}: {key}", layers))
        elif name is not None and taken is not None:
            if found.sinks.setdefault(name, taken) != taken:
                raise InputError(f"{path}: {found.keys[name]} and {key} state different values of sinks.{name}")
            found.keys.setdefault(name, key)
        else:
            found.unused[key] = shortened(value)
    return found


def _leaves(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything that is no object. An object whose keys are all numbers is the list of these too."""
    for name, value in tree.items():
        key = f"{prefix}{' '.join(name.split())[:80]}"
        if not isinstance(value, dict):
            yield key, value
            continue
        if value and all(inner.isdecimal() for inner in value):
            yield key, list(value)
        yield from _leaves(value, f"{key}.")


def _gated_layers(last: set[str], value: Any) -> tuple[int, ...] | None:
    """The layers that a key with these words states; None for another key, and for `layers` with one number: how many."""
    if not last & _LAYER or ("layers" in last and not last & _OF_GATES and _number(value) is not None):
        return None
    return _indices(value, prefix="[Ll]?")


def _indices(value: Any, prefix: str = "") -> tuple[int, ...] | None:
    """Indices from 10, [3, 6], "3,6,7" or ["3", "6"], in text after the pattern `prefix`; None for anything else."""
    if isinstance(value, str):
        parts = re.split(r"[\s,_;]+", value.strip().strip("[](){}").strip())
        digits = [re.fullmatch(rf"{prefix}(\d{{1,6}})", part, re.ASCII) for part in parts]
        return tuple(int(match[1]) for match in digits if match) if digits and all(digits) else None
    if isinstance(value, list):
        nested = [_indices(entry, prefix) for entry in value if not isinstance(entry, list)]
        flat = tuple(entry[0] for entry in nested if entry is not None and len(entry) == 1)
        return flat if flat and len(flat) == len(value) else None
    return (value,) if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _number(value: Any) -> float | None:
    """A number, or text that is one; None for anything else."""
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*", value, re.ASCII):
        value = float(value)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if number and math.isfinite(value) else None


def _sink_field(words: set[str]) -> str | None:
    """`vit_dims`, `vit_tau`, `llm_dims` or `llm_tau`, for the words of a key that speak of one stage and one quantity."""
    stages = [stage for stage, names in _STAGES.items() if words & names]
    quantities = [quantity for quantity, names in _QUANTITIES.items() if words & names]
    if len(stages) != 1 or len(quantities) != 1 or words & _NOT_SINKS:
        return None
    return f"{stages[0]}_{quantities[0]}"


def _sink_value(name: str, last: set[str], value: Any) -> tuple[int, ...] | float | None:
    """The value of a field of SinkConfig, stated by a key with the words `last`; None if it may mean something else."""
    number = _number(value)
    if name.endswith("tau"):
        return number
    a_width = number is not None and number >= _SMALLEST_WIDTH and number % _WIDTH_MULTIPLE == 0
    return None if a_width and last & _ONE_DIMENSION else _indices(value)
