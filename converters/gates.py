"""Published gates -> portable gates.

The authors' gate sets are folders with `non_lora_trainables.bin` and `sink_cfg.json`, whose names and keys are not documented.
So gates are found by the shapes of their parameters (`gate_modules`), and their layers in several sources that must agree
(`gate_layers`). `ImportedGates.described` says what was understood, and what no file states.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from converters.gate_layers import Layers, assign_layers, layers_of_name, layers_of_paths
from converters.gate_modules import FoundGate, find_gates
from converters.gate_settings import SETTINGS_FILE, SinkSettings, read_settings
from converters.gate_tensors import find_gate_file, read_tensors
from lsg_jax.config import GateConfig, SinkConfig, to_dict
from lsg_jax.errors import ConfigError, InputError
from lsg_jax.gating.keys import GROUPS
from lsg_jax.gating.portable import PortableGates, from_torch_layout, is_portable


@dataclass(frozen=True)
class ImportedGates:
    """Gates of a published file, and what was understood of it.

    Attributes:
        described: plain data. `file`; `gates`: rows of layer, module, shapes of norm, fc1 and fc2, and modules without bias;
            `layers_from`: the sources that state the layers, the one that orders the gates first; `in_a_list`: the gates have
            no layers of their own; `sinks`: field -> value and source; `applied`: options or defaults of what no file of this
            kind states; `not_used`: tensors and keys.
    """

    gates: PortableGates
    described: dict[str, Any]


def import_gates(
    path: str | Path,
    *,
    layers: Sequence[int] = (),
    gate: GateConfig | None = None,
    sinks: Callable[[SinkConfig], SinkConfig] | None = None,
    ignore: Collection[str] = (),
    backbone: str = "",
) -> ImportedGates:
    """Reads a published gate file; nothing in it is executed.

    A state dict does not say how a gate is applied: activation, key scale, grouping and signal come from `gate`; `layers` and
    `width` come from the file. Missing biases are zero. A file that is named itself is read alone: neither the name of its
    folder nor a `sink_cfg.json` counts.

    Args:
        path: the file, or its folder.
        layers: the decoder layers, 0-based, in the order of the gates where these are a list.
        sinks: changes the sink settings of `sink_cfg.json`; what that file does not say has its default.
        ignore: names of tensors to leave out.

    Raises:
        InputError: no gate can be read, or nothing says which layers it belongs to, or the sources disagree.
    """
    path = Path(path)
    file = find_gate_file(path)
    if is_portable(file):
        raise InputError(f"{file}: a portable gate file already, with its settings in it: use it as it is, with --gates")
    found, left = find_gates(read_tensors(file), frozenset(ignore), str(file))
    settings, stated = SinkSettings(), [Layers("--layers", tuple(layers))] if layers else []
    if path.is_dir():
        if (path / SETTINGS_FILE).exists():
            settings = read_settings(path / SETTINGS_FILE)
        stated = settings.layers + stated + layers_of_name(path.resolve().name)
    by_path = layers_of_paths(found)
    stated = ([by_path] if by_path else []) + stated
    order = assign_layers(found, stated, str(path))
    gate = gate or GateConfig()
    outputs, groups = len(found[0].tensors["fc2.bias"]), len(GROUPS[gate.grouping])
    if outputs != groups:
        raise InputError(f"{file}: the gates have {outputs} outputs, grouping {gate.grouping} needs {groups}")
    parameters = from_torch_layout({layer: each.tensors for layer, each in zip(order, found, strict=True)})
    try:
        gate = replace(gate, layers=tuple(sorted(order)), width=parameters["fc1_bias"].shape[-1])
        published = SinkConfig(**settings.sinks)
    except ConfigError as error:
        raise InputError(f"{path}: {error}") from None
    chosen = sinks(published) if sinks else published
    gates = PortableGates(gate=gate, sinks=chosen, parameters=parameters, backbone=backbone)
    return ImportedGates(gates, _described(file, gates, dict(zip(order, found, strict=True)), stated, settings, left))


def _described(
    file: Path,
    gates: PortableGates,
    found: dict[int, FoundGate],
    stated: list[Layers],
    settings: SinkSettings,
    left: list[str],
) -> dict[str, Any]:
    gate, sinks = to_dict(gates.gate), to_dict(gates.sinks)
    taken = {name: value for name, value in settings.sinks.items() if getattr(gates.sinks, name) == value}
    source = lambda name: f"{SETTINGS_FILE}: {settings.keys[name]}" if name in taken else "not from the file"
    return {
        "file": str(file),
        "gates": [
            {
                "layer": layer,
                "module": each.path,
                **{role: list(each.tensors[f"{role}.weight"].shape) for role in ("norm", "fc1", "fc2")},
                "no_bias": list(each.no_bias),
            }
            for layer, each in sorted(found.items())
        ],
        "layers_from": [str(each) for each in stated],
        "in_a_list": stated[0].ordered and len(found) > 1,
        "sinks": {
            name: {"value": sinks[name], "from": source(name)}
            for name in ("criterion", "vit_dims", "vit_tau", "llm_criterion", "llm_dims", "llm_tau")
        },
        "applied": {name: gate[name] for name in ("activation", "layer_norm_eps", "key_scale", "signal", "grouping")},
        "not_used": left + [f"{SETTINGS_FILE}: {key} = {value}" for key, value in settings.unused.items()],
    }


def as_table(described: dict[str, Any]) -> str:
    """What was understood, for people."""
    rows: list[tuple[str, ...]] = [("layer", "module", "norm", "fc1", "fc2", "without bias")]
    for each in described["gates"]:
        shapes = [" x ".join(map(str, each[role])) for role in ("norm", "fc1", "fc2")]
        rows.append((str(each["layer"]), each["module"] or "(the file)", *shapes, ", ".join(each["no_bias"])))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"file      {described['file']}"]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += [f"layers    from {source}" for source in described["layers_from"]]
    if described["in_a_list"]:
        lines.append("          the gates are a list: the first gate takes the first layer stated, and so on")
    lines += [f"sinks     {name} = {each['value']} ({each['from']})" for name, each in described["sinks"].items()]
    lines += [f"applied   {name} = {value}" for name, value in described["applied"].items()]
    lines.append("          no file of this kind states these, nor that layers count from 0 and the first output is of V-sinks")
    left = described["not_used"]
    lines += [f"not used  {name}" for name in left[:20]] + ([f"not used  and {len(left) - 20} more"] if len(left) > 20 else [])
    return "\n".join([*lines, f"written   {described['written']}"] if "written" in described else lines)
