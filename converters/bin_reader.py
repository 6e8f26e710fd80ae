"""Reads PyTorch `.bin` checkpoints (extra `[torch]`). Their pickles may hold code, which is never run."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from converters.reader import Tensor, open_binary
from lsg_jax.errors import InputError

if TYPE_CHECKING:
    import torch


class BinSource:
    """The tensors of `.bin` files, memory-mapped by torch with `weights_only=True`.

    Raises:
        InputError: torch is not installed, or a file is missing, damaged, or holds anything but plain tensors.
    """

    def __init__(self, files: Iterable[Path]):
        try:
            import torch  # noqa: F401
        except ImportError:
            raise InputError(".bin weights need PyTorch: pip install 'lsg_jax[torch]', or use safetensors") from None
        self.files = tuple(files)
        self.tensors: dict[str, Tensor] = {}
        self._tensors: dict[str, torch.Tensor] = {}
        for file in self.files:
            for name, tensor in _load(file).items():
                if name in self.tensors:
                    raise InputError(f"{file.parent}: tensors stored in two files: {name}")
                self._tensors[name] = tensor
                self.tensors[name] = Tensor(tuple(tensor.shape), _dtype(file, name, tensor), file)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        import torch

        tensor, dtype = self._tensors[name], self.tensors[name].dtype
        part = tensor[start:stop] if tensor.ndim else tensor.reshape(1)
        if part.dtype == torch.bfloat16:  # torch cannot convert it to numpy
            return part.contiguous().view(torch.int16).numpy().view(dtype)
        return part.contiguous().numpy()

    def close(self) -> None:
        self._tensors = {}


def _load(file: Path) -> dict[str, torch.Tensor]:
    import torch

    with open_binary(file) as stream:
        start = stream.read(8)
    if start == b"version ":
        raise InputError(f"{file}: a Git LFS pointer, not the file itself: run `git lfs pull` in its folder")
    try:
        # only the zip format can be mapped; the older one is read into memory
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=start[:2] == b"PK")
    except Exception as error:  # pickle, zip and torch errors alike
        reason = "holds objects other than tensors" if "weights_only" in str(error).lower() else "damaged"
        raise InputError(f"{file}: refused: {reason}; only plain PyTorch weights can be read safely") from None
    if not isinstance(tensors, dict) or not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in tensors.items()):
        raise InputError(f"{file}: refused: not a dictionary of tensors")
    if strange := [k for k, v in tensors.items() if v.layout != torch.strided or v.device.type != "cpu"]:
        raise InputError(f"{file}: tensor {strange[0]} is sparse or has no data")
    return tensors


def _dtype(file: Path, name: str, tensor: torch.Tensor) -> np.dtype:
    text = str(tensor.dtype).removeprefix("torch.")
    if text == "bfloat16":
        return np.dtype(ml_dtypes.bfloat16)
    try:
        return np.dtype(text)
    except TypeError:
        raise InputError(f"{file}: tensor {name} is of dtype {text}, which is not supported") from None
