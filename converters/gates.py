"""PyTorch state dicts (`.pt`, `.pth`, `.bin`) of published gates -> portable gates (extra [torch]).

The tensor names in the paper's own files are not known, so roles are assigned by shape. Accepted is a state dict, possibly
nested in other dicts (`{"state_dict": ...}`, `{10: {...}}`), whose keys are

    [prefix.][layer.][prefix.]MODULE.weight|bias

with MODULE one of norm, ln, layer_norm, layernorm, fc1, fc2, linear1, linear2 or the index in a Sequential. The last number
before MODULE is the layer. In each layer the one-dimensional weight is the norm, the matrix with 2 or 3 rows the last linear,
the other matrix the first. Examples: `gates.10.norm.weight`, `layers.10.net.1.weight`, `gate.fc1.bias`, `0.weight`.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lsg_jax.config import GateConfig, SinkConfig
from lsg_jax.errors import InputError
from lsg_jax.gating.keys import GROUPS
from lsg_jax.gating.portable import PortableGates, from_torch_layout

_MODULE = re.compile(r"norm|ln|layer_?norm|(fc|linear)[12]|\d+")


def import_torch_gates(
    path: str | Path,
    *,
    gate: GateConfig | None = None,
    sinks: SinkConfig | None = None,
    layer: int | None = None,
    backbone: str = "",
) -> PortableGates:
    """Reads a PyTorch gate file; nothing in it is executed (`weights_only=True`).

    A state dict does not say how the gate is applied: activation, key scale, grouping and signal come from `gate`, thresholds
    from `sinks`; `layers` and `width` come from the file. Missing biases are zero.

    Args:
        layer: the decoder layer, for a file with one gate and no layer number in its keys.

    Raises:
        InputError: the file cannot be read, or its keys or shapes are none of the layouts above; the keys found are listed.
    """
    path = Path(path)
    state = _load_state_dict(path)
    modules: dict[str, dict[str, np.ndarray]] = {}
    for key, array in state.items():
        module, _, kind = key.rpartition(".")
        if kind not in ("weight", "bias") or not _MODULE.fullmatch(module.rpartition(".")[2]):
            raise _unknown(path, state, f"{key} is in no layout that is known")
        modules.setdefault(module, {})[kind] = array
    by_owner: dict[str, list[dict[str, np.ndarray]]] = {}
    for module, named in modules.items():
        by_owner.setdefault(module.rpartition(".")[0], []).append(named)
    layers: dict[int, dict[str, np.ndarray]] = {}
    for owner, parts in by_owner.items():
        numbers = re.findall(r"(?<![^.])\d+(?![^.])", owner)
        found = int(numbers[-1]) if numbers else layer
        if found is None:
            raise InputError(f"{path}: no layer number in the keys ({', '.join(sorted(state)[:6])}): say which layer it gates")
        if found in layers:
            raise _unknown(path, state, f"two gates for layer {found}")
        layers[found] = _assign(parts, path, state)
    gate = gate or GateConfig()
    parameters = _stack(layers, path, state)
    outputs, groups = parameters["fc2_bias"].shape[-1], len(GROUPS[gate.grouping])
    if outputs != groups:
        raise InputError(f"{path}: the gates have {outputs} outputs, grouping {gate.grouping} needs {groups}")
    gate = replace(gate, layers=tuple(sorted(layers)), width=parameters["fc1_bias"].shape[-1])
    return PortableGates(gate=gate, sinks=sinks or SinkConfig(), parameters=parameters, backbone=backbone)


def _assign(parts: list[dict[str, np.ndarray]], path: Path, state: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Assigns roles to the three modules of one gate by shape."""
    roles: dict[str, dict[str, np.ndarray]] = {}
    for part in parts:
        weight = part.get("weight", np.zeros(()))
        role = "norm" if weight.ndim == 1 else "fc2" if weight.ndim == 2 and weight.shape[0] in (2, 3) else "fc1"
        if weight.ndim not in (1, 2) or role in roles:
            raise _unknown(path, state, "not one norm, one first and one last linear map")
        roles[role] = part
    if missing := {"norm", "fc1", "fc2"} - set(roles):
        raise _unknown(path, state, f"no tensor has the shape of {', '.join(sorted(missing))}")
    out = {}
    for role, part in roles.items():
        out[f"{role}.weight"] = part["weight"]
        out[f"{role}.bias"] = part.get("bias", np.zeros(part["weight"].shape[0], np.float32))
    (hidden, width), groups = out["fc1.weight"].shape, out["fc2.weight"].shape[0]
    expected: dict[str, tuple[int, ...]] = {"norm.weight": (width,), "norm.bias": (width,), "fc1.bias": (hidden,)}
    expected |= {"fc2.weight": (groups, hidden), "fc2.bias": (groups,)}
    if bad := [name for name, shape in expected.items() if out[name].shape != shape]:
        raise _unknown(path, state, f"the shapes do not fit each other at the {bad[0]}")
    return out


def _stack(layers: dict[int, dict[str, np.ndarray]], path: Path, state: Mapping[str, Any]) -> dict[str, np.ndarray]:
    if not layers:
        raise _unknown(path, state, "no tensors")
    if len({tuple(named[name].shape for name in sorted(named)) for named in layers.values()}) > 1:
        raise _unknown(path, state, "the gates of different layers differ in shape")
    parameters = from_torch_layout(layers)
    if bad := [name for name, array in parameters.items() if not np.isfinite(array).all()]:
        raise InputError(f"{path}: {bad[0]} holds values that are not finite")
    return parameters


def _load_state_dict(path: Path) -> dict[str, np.ndarray]:
    """{dotted key: float32 array} of all tensors in the file; other values (steps, settings) are skipped."""
    import torch

    if not path.is_file():
        raise InputError(f"{path}: no such gate file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{path}: not a PyTorch file of plain tensors: {reason}") from None
    if not isinstance(content, Mapping):
        raise InputError(f"{path}: expected a state dict, found {type(content).__name__}")
    flat: dict[str, np.ndarray] = {}

    def walk(tree: Mapping[Any, Any], prefix: str) -> None:
        for key, value in tree.items():
            if isinstance(value, Mapping):
                walk(value, f"{prefix}{key}.")
            elif isinstance(value, torch.Tensor):
                flat[f"{prefix}{key}"] = value.detach().to(torch.float32).numpy()

    walk(content, "")
    return flat


def _unknown(path: Path, state: Mapping[str, Any], reason: str) -> InputError:
    shapes = [f"{key} {list(np.shape(array))}" for key, array in sorted(state.items())]
    more = f" and {len(shapes) - 12} more" if len(shapes) > 12 else ""
    return InputError(f"{path}: not a gate file: {reason}; found {', '.join(shapes[:12]) or 'nothing'}{more}")
