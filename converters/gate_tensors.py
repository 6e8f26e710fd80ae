"""Reads the tensors of a published gate file: PyTorch (extra [torch]) or safetensors. No code in it is run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from converters.reader import SafetensorsSource, open_binary
from lsg_jax.errors import InputError

if TYPE_CHECKING:
    import torch

GATES_FILE = "non_lora_trainables.bin"
"""The file of the authors' gate sets, and of what LLaVA's trainer saves beside a PEFT adapter."""

SUFFIXES = (".bin", ".pt", ".pth", ".safetensors")
MAX_DEPTH = 8  # of dictionaries in a PyTorch file
MAX_ENTRIES = 100_000
MAX_ELEMENTS = 1 << 28  # of all tensors together: a gate of a 7B model has 2.7e5
_ENOUGH = 12  # names in an error


def find_gate_file(path: Path) -> Path:
    """The gate file that a path names: itself, or the one in a folder, `non_lora_trainables.bin` before others.

    Raises:
        InputError: there is none, or the choice is open.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise InputError(f"{path}: no such gate file or folder")
    if (path / GATES_FILE).is_file():
        return path / GATES_FILE
    found = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES and p.is_file())
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(p.name for p in found[:_ENOUGH])
        raise InputError(f"{path}: no {GATES_FILE}, and several files that may hold gates: give one of {names}")
    sets = sorted(p.name for p in path.iterdir() if (p / GATES_FILE).is_file())
    if sets:
        raise InputError(f"{path}: a folder of gate sets: give one of {', '.join(sets[:_ENOUGH])}")
    raise InputError(f"{path}: no gate file in it ({GATES_FILE}, or one file of {', '.join(SUFFIXES)})")


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """{dotted name: array as stored, bfloat16 as float32} of all tensors in a file. Values that are no tensors are skipped.

    Raises:
        InputError: the file cannot be read, is damaged, holds objects other than plain data, or a tensor without data.
    """
    with open_binary(path) as stream:
        if stream.read(8) == b"version ":
            raise InputError(f"{path}: a Git LFS pointer, not the file itself: run `git lfs pull` in its folder")
    tensors = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    return _without_untrained_copies(tensors)


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    source = SafetensorsSource([path])
    try:
        _check_size(path, sum(tensor.nbytes // tensor.dtype.itemsize for tensor in source.tensors.values()))
        out = {}
        for name, tensor in source.tensors.items():
            array = source.rows(name, 0, tensor.shape[0] if tensor.shape else 1).reshape(tensor.shape)
            out[name] = array.astype(np.float32) if tensor.dtype.name == "bfloat16" else array
        return out
    finally:
        source.close()


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError:
        raise InputError(f"{path}: a PyTorch file needs PyTorch to be read: pip install 'lsg_jax[torch]'") from None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch errors alike
        held = "weights_only" in str(error).lower() or "unsupported" in str(error).lower()
        reason = "it holds objects other than tensors and plain data" if held else "it is damaged or something else"
        raise InputError(f"{path}: not a PyTorch file of plain tensors: {reason}") from None
    if not isinstance(content, Mapping):
        raise InputError(f"{path}: expected a state dict, found {type(content).__name__}")
    found = _flatten(path, content)
    _check_size(path, sum(tensor.numel() for tensor in found.values()))
    return {name: _to_numpy(path, name, tensor) for name, tensor in found.items()}


def _flatten(path: Path, content: Mapping[Any, Any]) -> dict[str, torch.Tensor]:
    """{dotted name: tensor} of nested dictionaries, which may be hostile: deep, within themselves, or endless."""
    import torch

    found: dict[str, torch.Tensor] = {}
    pending: list[tuple[str, int, Mapping[Any, Any]]] = [("", 0, content)]
    entries = 0
    while pending:
        prefix, depth, tree = pending.pop()
        entries += len(tree)
        if depth > MAX_DEPTH or entries > MAX_ENTRIES:
            raise InputError(f"{path}: dictionaries nested deeper than {MAX_DEPTH} levels, or too large: not a state dict")
        for key, value in tree.items():
            name = f"{prefix}{' '.join(str(key).split())}"
            if isinstance(value, Mapping):
                pending.append((f"{name}.", depth + 1, value))
            elif isinstance(value, torch.Tensor):
                if name in found:
                    raise InputError(f"{path}: two tensors are called {name[:120]}")
                found[name] = value
    return found


def _to_numpy(path: Path, name: str, tensor: torch.Tensor) -> np.ndarray:
    import torch

    plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    if not plain or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise InputError(f"{path}: tensor {name} is sparse, quantized or without data of its own")
    tensor = tensor.detach().resolve_conj().resolve_neg()
    try:
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).contiguous().numpy()
    except (TypeError, RuntimeError):
        raise InputError(f"{path}: tensor {name} is of dtype {tensor.dtype}, which is not supported") from None


def _check_size(path: Path, elements: int) -> None:
    if elements > MAX_ELEMENTS:
        raise InputError(f"{path}: {elements:,} numbers: too many for gates; a whole model is converted with `lsg convert`")


def _without_untrained_copies(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """PEFT keeps a module twice: `original_module`, and the trained `modules_to_save.<adapter>`. Drops the former."""
    owners = {name.split(".modules_to_save.")[0] for name in tensors if ".modules_to_save." in name}
    untrained = lambda name: ".original_module." in name and name.split(".original_module.")[0] in owners
    return {name: array for name, array in tensors.items() if not untrained(name)}


def listed(tensors: Mapping[str, np.ndarray]) -> str:
    """Names and shapes of the first tensors, for errors."""
    shapes = [f"{name[:120]} {list(array.shape)}" for name, array in sorted(tensors.items())]
    more = f" and {len(shapes) - _ENOUGH} more" if len(shapes) > _ENOUGH else ""
    return f"{', '.join(shapes[:_ENOUGH]) or 'nothing'}{more}"
