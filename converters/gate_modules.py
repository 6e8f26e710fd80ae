"""Finds gates in a state dict by the shapes of their parameters, whatever their names.

A gate is three modules below one: a LayerNorm with a weight [D], a linear layer with a weight [H, D], and one with a weight
[G, H], where G is 2 or 3. Each may have a bias of its first length.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from converters.gate_tensors import listed
from lsg_jax.errors import InputError
from lsg_jax.gating.keys import GROUPS

OUTPUTS = {len(groups) for groups in GROUPS.values()}

_LISTS = {"layers", "layer", "h", "blocks", "block"}  # what libraries call the list of a decoder's layers
_MODELS = {
    "model", "base_model", "decoder", "transformer", "language_model", "text_model", "llm", "lm", "backbone", "gpt_neox",
}  # fmt: skip

Modules = dict[str, dict[str, np.ndarray]]
"""Path of a module -> its `weight` and `bias`."""


@dataclass(frozen=True)
class FoundGate:
    """One gate of a file.

    Attributes:
        path: of the lowest module that holds its three modules; empty for the file itself.
        names: role (norm, fc1, fc2) -> path of the module.
        tensors: as in a portable file: "norm.weight" [D], "fc1.weight" [H, D], "fc2.weight" [G, H] and biases, float32.
        no_bias: roles whose module has no bias; theirs is zero.
    """

    path: str
    names: dict[str, str]
    tensors: dict[str, np.ndarray] = field(repr=False)
    no_bias: tuple[str, ...] = ()

    @property
    def decoder_layer(self) -> int | None:
        """The number N of `model.layers.N.<...>`: the gate is a part of a decoder layer. None if the path names none.

        A list below a module that is called after gates or sinks is theirs, not the decoder's, and so is one whose members are
        the gates.
        """
        parts = self.path.split(".")
        for place in range(1, len(parts) - 2):
            if re.search("gate|sink", parts[place - 1], re.IGNORECASE):
                return None
            if parts[place] in _LISTS and parts[place + 1].isdecimal() and _MODELS & set(parts[:place]):
                return int(parts[place + 1])
        return None

    @property
    def numbers(self) -> tuple[int, ...]:
        """All numbers that end a part of the path, such as (10,) of `gates.10` or `gate_layer10`."""
        ends = [re.search(r"\d{1,9}$", part) for part in self.path.split(".")]
        return tuple(int(end[0]) for end in ends if end)


def find_gates(tensors: Mapping[str, np.ndarray], ignore: frozenset[str], where: str) -> tuple[list[FoundGate], list[str]]:
    """All gates of a state dict, in the order of the numbers in their paths, and the names of the tensors beside them.

    Args:
        ignore: names of tensors to leave out.

    Raises:
        InputError: there is no gate; modules can be put together in several ways; a tensor within a gate is none of its
            parts; or a shape or value does not fit.
    """
    if unknown := sorted(ignore - tensors.keys()):
        raise InputError(f"{where}: no tensor {unknown[0]} to ignore; found {listed(tensors)}")
    modules: Modules = {}
    for name, array in tensors.items():
        module, _, kind = name.rpartition(".")
        if kind in ("weight", "bias") and name not in ignore:
            modules.setdefault(module, {})[kind] = array
    gates = [_gate(path, roles, modules, where) for path, roles in _owners(modules, tensors, where).items()]
    if not gates:
        raise InputError(
            f"{where}: not a gate file: no module holds a norm [D], a linear map [H, D] and one [2, H]; found {listed(tensors)}"
        )
    used = {f"{module}.{kind}".lstrip(".") for gate in gates for module in gate.names.values() for kind in modules[module]}
    left = sorted(tensors.keys() - used)
    _check_inside(gates, [name for name in left if name not in ignore], tensors, where)
    if len({tuple(array.shape for _, array in sorted(gate.tensors.items())) for gate in gates}) > 1:
        raise InputError(f"{where}: the gates {gates[0].path} and {gates[-1].path} differ in shape")
    _check_biases(gates, where)
    return sorted(gates, key=lambda gate: (gate.numbers, gate.path)), left


def _owners(modules: Modules, tensors: Mapping[str, np.ndarray], where: str) -> dict[str, dict[str, str]]:
    """Path -> roles of the lowest modules below which just one gate can be put together."""
    below: dict[str, list[str]] = {}
    for module in modules:
        parts = module.split(".")[:-1] if module else []
        for end in range(len(parts) + 1):
            below.setdefault(".".join(parts[:end]), []).append(module)
    owners: dict[str, dict[str, str]] = {}
    for path in sorted(below, key=lambda path: (-len(path.split(".")) if path else 0, path)):
        if any(not path or owner.startswith(f"{path}.") for owner in owners):
            continue
        ways = _ways({module: modules[module] for module in below[path]})
        if len(ways) > 1:
            raise InputError(
                f"{where}: not a gate file: norms and linear maps below {path or 'its root'} fit each other in several ways; "
                f"found {listed(tensors)}"
            )
        if ways:
            owners[path] = ways[0]
    return owners


def _ways(modules: Modules) -> list[dict[str, str]]:
    """The ways to put modules together to one gate, at most two of them."""
    shapes = {name: named["weight"].shape for name, named in modules.items() if "weight" in named}
    ways = []
    for fc2, last in shapes.items():
        if len(last) != 2 or last[0] not in OUTPUTS:
            continue
        for fc1, first in shapes.items():
            if len(first) != 2 or first[0] != last[1] or fc1 == fc2:
                continue
            for norm, width in shapes.items():
                if width == first[1:]:
                    ways.append({"norm": norm, "fc1": fc1, "fc2": fc2})
                    if len(ways) == 2:
                        return ways
    return ways


def _gate(path: str, names: dict[str, str], modules: Modules, where: str) -> FoundGate:
    tensors: dict[str, np.ndarray] = {}
    for role, module in names.items():
        weight = modules[module]["weight"]
        bias = modules[module].get("bias", np.zeros(weight.shape[0], np.float32))
        if bias.shape != weight.shape[:1]:
            raise InputError(
                f"{where}: {module}.bias has shape {list(bias.shape)}, its weight {list(weight.shape)} needs {weight.shape[0]}"
            )
        for kind, array in (("weight", weight), ("bias", bias)):
            if array.dtype.kind != "f":
                raise InputError(
                    f"{where}: {module}.{kind} is {array.dtype}; the parameters of a gate are floating-point numbers"
                )
            tensors[f"{role}.{kind}"] = array = array.astype(np.float32)
            if not np.isfinite(array).all():
                raise InputError(f"{where}: {module}.{kind} holds values that are not finite")
    return FoundGate(path, names, tensors, tuple(role for role, module in names.items() if "bias" not in modules[module]))


def _check_biases(gates: list[FoundGate], where: str) -> None:
    """Raises InputError for a gate that lacks a bias which others have: modules of one kind all have it, or none does."""
    for role in gates[0].names:
        lacking = [gate for gate in gates if role in gate.no_bias]
        if lacking and len(lacking) < len(gates):
            other = next(gate for gate in gates if role not in gate.no_bias)
            raise InputError(
                f"{where}: incomplete: {lacking[0].names[role]}.bias is missing, while {other.names[role]} has one; save all "
                "gates again"
            )


def _check_inside(gates: list[FoundGate], left: list[str], tensors: Mapping[str, np.ndarray], where: str) -> None:
    """Raises InputError for a tensor within a gate that is none of its parts, and for a part of a gate that is incomplete.

    The former may change what the gate computes; without the latter, a stack would lose a gate.
    """
    for name in left:
        if tensors[name].shape == gates[0].tensors["fc2.weight"].shape:
            raise InputError(
                f"{where}: {name} {list(tensors[name].shape)} looks like a part of a gate whose other parts are missing; "
                f"--ignore {name} leaves it out"
            )
    for gate in gates:
        inside = [name for name in left if not gate.path or name.startswith(f"{gate.path}.")]
        if inside:
            name, shape = inside[0], list(tensors[inside[0]].shape)
            raise InputError(
                f"{where}: {name} {shape} lies within the gate {gate.path or '(the whole file)'} and is none of its parts "
                f"(norm, two linear maps): it may change the ratios; --ignore {name} leaves it out"
            )
