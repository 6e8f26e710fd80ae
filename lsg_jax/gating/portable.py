"""Portable gate files: safetensors in torch layout, readable without JAX (docs/formats.md).

A file holds `{layer}.norm.weight`, `{layer}.fc1.weight`, ... for each gated layer. Its metadata hold what is needed to apply
them: activation, key scale, grouping, signal and sink criterion. This module uses numpy only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lsg_jax.config import GateConfig, SinkConfig, from_dict
from lsg_jax.digest import arrays_sha256, canonical_json, json_sha256
from lsg_jax.errors import ConfigError, InputError
from lsg_jax.files import write_atomic
from lsg_jax.gating.keys import GROUPS
from lsg_jax.json_files import damaged_name
from lsg_jax.types import Array

FORMAT = "lsg-gates-1"

CHECKSUM = "sha256"
"""Metadata field: sha256 of all other metadata and of the tensors' names, shapes and values."""

TORCH_NAMES = {
    "norm_scale": "norm.weight",
    "norm_bias": "norm.bias",
    "fc1_kernel": "fc1.weight",
    "fc1_bias": "fc1.bias",
    "fc2_kernel": "fc2.weight",
    "fc2_bias": "fc2.bias",
}
"""Leaf of the model's `gates` subtree -> name in the file. Kernels are [in, out] in the model and [out, in] in the file."""

GATE_FIELDS = ("activation", "layer_norm_eps", "key_scale", "grouping", "signal")
"""Fields of GateConfig that a file holds beside the tensors."""

_REQUIRED = ("activation", "layer_norm_eps", "key_scale", "grouping", "signal", "criterion", "vit_dims", "vit_tau")
_SINK_FIELDS = ("criterion", "vit_dims", "vit_tau", "llm_criterion", "llm_dims", "llm_tau", "massive_ratio")
_FLOATS = ("layer_norm_eps", "key_scale", "vit_tau", "llm_tau", "massive_ratio")
_DIMS = ("vit_dims", "llm_dims")


@dataclass(frozen=True)
class PortableGates:
    """Gates of one or more layers with what is needed to apply them.

    Attributes:
        gate: `layers` in the order of the stacked parameters, `width` as in the arrays.
        sinks: the sink settings that the gates were trained with.
        parameters: float32, stacked over the n = len(gate.layers) layers as under `gates` in the model: norm_scale [n, D],
            norm_bias [n, D], fc1_kernel [n, D, H], fc1_bias [n, H], fc2_kernel [n, H, G], fc2_bias [n, G].
        backbone: name and digest of the model that they were trained on; empty if unknown.
        checked: whether they come from a file whose checksum fits; files of other tools and of earlier versions have none.
        origin: `owner/name@commit` of gates that were fetched from the Hugging Face Hub; empty for others.
    """

    gate: GateConfig
    sinks: SinkConfig
    parameters: dict[str, Array]
    backbone: str = ""
    checked: bool = False
    origin: str = ""

    @property
    def width_in(self) -> int:
        """D, the width of the language model that the gates read."""
        return int(np.shape(self.parameters["norm_scale"])[-1])


def combine_gates(parts: Sequence[PortableGates]) -> PortableGates:
    """Joins gates that were trained in separate runs: the paper's stack.

    Raises:
        InputError: two parts gate the same layer or differ in more than their layers, or one part is independent gates.
    """
    first = parts[0]
    for part in parts:
        check_together(part)
    for other in parts[1:]:
        # switched-off biases are zeros
        plain = [replace(gates.gate, layers=(), biases=True, independent=False) for gates in (first, other)]
        if plain[0] != plain[1] or other.sinks != first.sinks:
            raise InputError(f"gates of layers {first.gate.layers} and {other.gate.layers} differ in gate or sink settings")
        if {k: v.shape[1:] for k, v in other.parameters.items()} != {k: v.shape[1:] for k, v in first.parameters.items()}:
            raise InputError(f"gates of layers {first.gate.layers} and {other.gate.layers} are of different widths")
        if first.backbone and other.backbone and first.backbone != other.backbone:
            raise InputError(f"gates were trained on different backbones: {first.backbone} and {other.backbone}")
    layers = [layer for part in parts for layer in part.gate.layers]
    if len(set(layers)) < len(layers):
        raise InputError(f"layer {next(layer for layer in layers if layers.count(layer) > 1)} is gated twice")
    order = np.argsort(layers)
    parameters = {k: np.concatenate([np.asarray(p.parameters[k]) for p in parts])[order] for k in first.parameters}
    gate = replace(first.gate, layers=tuple(sorted(layers)), independent=False)
    return replace(first, gate=gate, parameters=parameters, origin="")


def choose_gates(gates: PortableGates, layers: Sequence[int], *, where: str) -> PortableGates:
    """The gates of these layers, to be applied together.

    Args:
        where: the source, for errors.

    Raises:
        InputError: a layer has no gate.
    """
    if missing := [layer for layer in layers if layer not in gates.gate.layers]:
        raise InputError(f"{where}: no gate at layer {missing[0]}; there are {', '.join(map(str, gates.gate.layers))}")
    chosen = tuple(sorted(set(layers)))
    slots = [gates.gate.layers.index(layer) for layer in chosen]
    parameters = {name: np.asarray(leaf)[slots] for name, leaf in gates.parameters.items()}
    return replace(gates, gate=replace(gates.gate, layers=chosen, independent=False), parameters=parameters)


def check_together(gates: PortableGates) -> None:
    """Raises InputError for independent gates of several layers: which of them form a stack has to be chosen first."""
    layers = gates.gate.layers
    if gates.gate.independent and len(layers) > 1:
        raise InputError(
            f"the {len(layers)} gates, at layers {layers[0]} to {layers[-1]}, were trained each alone and are no stack until "
            f"layers are chosen: RUN@{layers[0]} for one of the run folder RUN, RUN@{layers[0]},{layers[1]} for several"
        )


def write_gates(path: str | Path, gates: PortableGates) -> None:
    """Writes a gate file atomically.

    Raises:
        InputError: as `gate_bytes`, or the folder cannot be written.
    """
    path = Path(path)
    data = gate_bytes(gates, where=str(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, data)
    except OSError as error:
        raise InputError(f"{path}: cannot write the gate file: {error.strerror or error}") from None


def gate_bytes(gates: PortableGates, *, where: str) -> bytes:
    """The content of a gate file; equal gates give equal bytes.

    Args:
        where: the file, for errors.

    Raises:
        InputError: the parameters do not fit the configuration or are not finite, or independent gates are no stack yet.
    """
    from safetensors.numpy import save

    check_together(gates)
    layers = to_torch_layout(gates.parameters, gates.gate.layers)
    tensors = {f"{layer}.{name}": array for layer, named in layers.items() for name, array in named.items()}
    _check_tensors(tensors, gates.gate, where=where)
    metadata = _to_metadata(gates)
    return _in_order(save(tensors, metadata=metadata | {CHECKSUM: _checksum(tensors, metadata)}))


def _in_order(data: bytes) -> bytes:
    """A safetensors file with its header in the order of names; `save` writes metadata in another order each time."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = canonical_json(json.loads(data[8:end])).encode()
    header += b" " * (-len(header) % 8)  # as the format aligns what follows
    return len(header).to_bytes(8, "little") + header + data[end:]


def read_gates(path: str | Path) -> PortableGates:
    """Reads a gate file strictly; layers come in ascending order.

    Unknown metadata are ignored. L-sink fields that are absent take their defaults.

    Raises:
        InputError: no such file, no safetensors file or a truncated one, another format, another checksum, a missing or unknown
            tensor, or a wrong shape, dtype or value.
    """
    path = Path(path)
    tensors, metadata = _load(path)
    checksum = metadata.pop(CHECKSUM, None)
    if damaged_name(metadata, CHECKSUM) or checksum not in (None, _checksum(tensors, metadata)):
        advice = f"if you changed it yourself, leave out the metadata field {CHECKSUM}"
        raise InputError(f"{path}: changed or damaged: its content does not fit its checksum; {advice}")
    config, sinks = _from_metadata(metadata, where=str(path))
    layers: dict[int, dict[str, np.ndarray]] = {}
    for key, array in tensors.items():
        match = re.fullmatch(r"(0|[1-9][0-9]{0,8})\.(\w+\.\w+)", key)
        if not match or match[2] not in TORCH_NAMES.values():
            raise InputError(f"{path}: unknown tensor {key}; a gate file holds {{layer}}.norm|fc1|fc2.weight|bias")
        layers.setdefault(int(match[1]), {})[match[2]] = array
    if not layers:
        raise InputError(f"{path}: the file holds no gates")
    for layer, named in sorted(layers.items()):
        if missing := [name for name in TORCH_NAMES.values() if name not in named]:
            raise InputError(f"{path}: missing tensor {layer}.{missing[0]}")
    first = layers[min(layers)]["fc1.weight"]
    try:
        config = replace(config, layers=tuple(sorted(layers)), width=max(first.shape[0], 1) if first.ndim else 1)
    except ConfigError as error:
        raise InputError(f"{path}: {error}") from None
    _check_tensors(tensors, config, where=str(path))
    parameters, backbone = from_torch_layout(layers), metadata.get("backbone", "")
    return PortableGates(gate=config, sinks=sinks, parameters=parameters, backbone=backbone, checked=checksum is not None)


def is_portable(path: Path) -> bool:
    """Whether a file is one of `write_gates`, by its metadata."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():  # opening a pipe would wait
        return False
    try:
        with safe_open(path, framework="np") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (SafetensorError, OSError, ValueError):  # ValueError: metadata that are no UTF-8
        return False


def check_width(gates: PortableGates, text_hidden_size: int, num_layers: int) -> None:
    """Raises InputError for gates that do not fit the language model: another width, or a layer that it does not have."""
    start = f"{gates.origin}: " if gates.origin else ""
    if gates.width_in != text_hidden_size:
        raise InputError(
            f"{start}the gates read a width of {gates.width_in}, the language model has {text_hidden_size}: they belong to "
            f"another backbone{f' ({gates.backbone})' if gates.backbone else ''}; give gates that were trained on this model"
        )
    if bad := [layer for layer in gates.gate.layers if not 0 <= layer < num_layers]:
        raise InputError(f"{start}the gates are for layer {bad[0]}, the language model has layers 0 to {num_layers - 1}")


def to_torch_layout(parameters: Mapping[str, Array], layers: tuple[int, ...]) -> dict[int, dict[str, np.ndarray]]:
    """Stacked parameters of the model -> {layer: {"norm.weight" [D], "fc1.weight" [H, D], "fc2.weight" [G, H], ...}}.

    Raises:
        InputError: a parameter is missing or unknown, or its first axis is not the number of layers.
    """
    if set(parameters) != set(TORCH_NAMES):
        raise InputError(f"gate parameters are {', '.join(sorted(TORCH_NAMES))}; got {', '.join(sorted(parameters)) or 'none'}")
    out: dict[int, dict[str, np.ndarray]] = {layer: {} for layer in layers}
    for leaf, name in TORCH_NAMES.items():
        stacked = np.asarray(parameters[leaf])
        if stacked.ndim == 0 or stacked.shape[0] != len(out):
            raise InputError(f"gate parameter {leaf} has shape {list(stacked.shape)} for {len(out)} layers")
        for layer, array in zip(layers, stacked, strict=True):
            out[layer][name] = np.ascontiguousarray(array.T if leaf.endswith("kernel") else array)
    return out


def from_torch_layout(layers: Mapping[int, Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The inverse of `to_torch_layout`: parameters stacked over ascending layers, kernels [n, in, out]."""
    ordered = [layers[layer] for layer in sorted(layers)]
    return {
        leaf: np.stack([np.asarray(named[name]).T if leaf.endswith("kernel") else np.asarray(named[name]) for named in ordered])
        for leaf, name in TORCH_NAMES.items()
    }


def _checksum(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    return json_sha256([dict(metadata), arrays_sha256(sorted(tensors.items(), key=lambda named: named[0]))])


def _load(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise InputError(f"{path}: no such run folder or gate file")
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                found = metadata.get("format")
                raise InputError(f"{path}: not a gate file: metadata format is {found!r}, expected {FORMAT!r}")
            for key in file.keys():  # noqa: SIM118  (a reader, not a dict)
                if (dtype := file.get_slice(key).get_dtype()) != "F32":
                    raise InputError(f"{path}: {key} is {dtype}, gates are float32")
            return {key: file.get_tensor(key) for key in file.keys()}, metadata  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: not a readable safetensors file, or cut short: {reason}") from None


def _check_tensors(tensors: Mapping[str, np.ndarray], config: GateConfig, *, where: str) -> None:
    """Raises InputError for wrong shapes or dtypes or non-finite values of `{layer}.{name}` tensors. The first norm sets D."""
    norm = tensors[f"{config.layers[0]}.norm.weight"] if config.layers else np.zeros(0)
    if norm.ndim != 1 or norm.size == 0:
        raise InputError(f"{where}: {config.layers[:1]}.norm.weight has shape {list(norm.shape)}, expected one width")
    width_in, hidden, groups = norm.size, config.width, len(GROUPS[config.grouping])
    shapes = {
        "norm.weight": (width_in,),
        "norm.bias": (width_in,),
        "fc1.weight": (hidden, width_in),
        "fc1.bias": (hidden,),
        "fc2.weight": (groups, hidden),
        "fc2.bias": (groups,),
    }
    for key, array in tensors.items():
        expected = shapes[key.split(".", 1)[1]]
        if array.shape != expected:
            hint = f" (grouping {config.grouping} has {groups} groups)" if ".fc2." in key else ""
            raise InputError(f"{where}: {key} has shape {list(array.shape)}, expected {list(expected)}{hint}")
        if array.dtype != np.float32:
            raise InputError(f"{where}: {key} is {array.dtype}, gates are float32")
        if not np.isfinite(array).all():
            raise InputError(f"{where}: {key} holds values that are not finite")


def _to_metadata(gates: PortableGates) -> dict[str, str]:
    fields = {name: getattr(gates.gate, name) for name in GATE_FIELDS}
    fields |= {name: getattr(gates.sinks, name) for name in _SINK_FIELDS}
    text = {"format": FORMAT, "backbone": gates.backbone}
    for name, value in fields.items():
        if name in _FLOATS:
            text[name] = re.sub(r"e([+-])0*(\d)", r"e\1\2", repr(float(value)))  # 1e-5, where Python writes 1e-05
        elif name in _DIMS:
            text[name] = ",".join(map(str, value))
        else:
            text[name] = value
    return text


def _from_metadata(metadata: Mapping[str, str], *, where: str) -> tuple[GateConfig, SinkConfig]:
    if missing := [name for name in _REQUIRED if name not in metadata]:
        raise InputError(f"{where}: metadata field {missing[0]} is missing")
    values: dict[str, str | float | list[int]] = {}
    for name in (*GATE_FIELDS, *_SINK_FIELDS):
        if name not in metadata:
            continue
        text = metadata[name]
        try:
            if name in _FLOATS:
                values[name] = float(text)
            elif name in _DIMS:
                values[name] = [int(word) for word in re.split(r"[\s,]+", text.strip("[](){} ")) if word]
            else:
                values[name] = text
        except ValueError:
            raise InputError(f"{where}: metadata field {name} is {text!r}, which is not a number") from None
    try:
        gate = from_dict(GateConfig, {k: v for k, v in values.items() if k in GATE_FIELDS}, where=where)
        return gate, from_dict(SinkConfig, {k: v for k, v in values.items() if k in _SINK_FIELDS}, where=where)
    except ConfigError as error:
        raise InputError(str(error)) from None
