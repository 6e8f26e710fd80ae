"""Reads checkpoint files part by part.

safetensors files are read with seek and readinto. They are not memory-mapped: mapped pages count as resident, and a file that
shrinks under a map kills the process.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import ml_dtypes
import numpy as np

from converters.ops import Shape
from lsg_jax.errors import InputError
from lsg_jax.json_files import parse_object, read_object

MAX_HEADER_BYTES = 100 << 20  # the limit of the safetensors library
SAFETENSORS = "model.safetensors"
INDEX = "model.safetensors.index.json"
BIN = "pytorch_model.bin"
BIN_INDEX = "pytorch_model.bin.index.json"

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
"""Names of safetensors -> numpy dtypes."""


@dataclass(frozen=True)
class Tensor:
    """Metadata of a stored tensor.

    Attributes:
        shape, dtype: as stored.
        file: the file that holds it; None in memory.
        offset: of its first byte in the file; 0 where the reader does not use it.
    """

    shape: Shape
    dtype: np.dtype
    file: Path | None = None
    offset: int = 0

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Source(Protocol):
    """A set of named tensors.

    Attributes:
        tensors: original name -> Tensor, in the order of the files.
        files: the files that hold them.
    """

    tensors: dict[str, Tensor]
    files: tuple[Path, ...]

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `start : stop` along axis 0, as stored. A tensor without axes is one row."""
        ...

    def close(self) -> None: ...


def canonical_names(names: Iterable[str], canonical_name: Callable[[str], str]) -> dict[str, str]:
    """Canonical name -> original name, by `Family.canonical_name`.

    Raises:
        InputError: two tensors are the same one by two names; lists all of them.
    """
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(canonical_name(name), []).append(name)
    if twice := [" and ".join(originals) for originals in found.values() if len(originals) > 1]:
        raise InputError(f"the checkpoint holds the same tensor by two names: {'; '.join(twice)}")
    return {name: originals[0] for name, originals in found.items()}


class ArraySource:
    """Tensors in memory."""

    def __init__(self, tensors: Mapping[str, np.ndarray]):
        self._arrays = dict(tensors)
        self.tensors = {name: Tensor(tuple(array.shape), array.dtype) for name, array in tensors.items()}
        self.files: tuple[Path, ...] = ()

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        array = self._arrays[name]
        return array[start:stop] if array.shape else array.reshape(1)

    def close(self) -> None:
        self._arrays = {}


class SafetensorsSource:
    """The tensors of one or several safetensors files, checked by their headers when opened.

    Args:
        files: the shards. index: tensor name -> file name, to check the files against; None if there is none.

    Raises:
        InputError: a file is missing, truncated, a Git LFS pointer, or not what its header says.
    """

    def __init__(self, files: Iterable[Path], index: Mapping[str, str] | None = None):
        self.files = tuple(files)
        self.tensors: dict[str, Tensor] = {}
        self._open: tuple[Path, BinaryIO] | None = None
        twice = []
        for file in self.files:
            entries = read_header(file)
            twice += sorted(entries.keys() & self.tensors.keys())
            self.tensors |= entries
        if twice:
            raise InputError(f"{self.files[0].parent}: tensors stored in two files: {', '.join(twice)}")
        if index is not None:
            _check_index(self.files[0].parent, index, self.tensors)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        tensor = self.tensors[name]
        shape = (stop - start, *tensor.shape[1:])
        data = np.empty(math.prod(shape) * tensor.dtype.itemsize, np.uint8)
        file = self._file(tensor.file)  # type: ignore[arg-type]
        try:
            file.seek(tensor.offset + start * tensor.row_bytes)
            view, count = memoryview(data), 0  # type: ignore[arg-type]
            while count < len(data) and (step := file.readinto(view[count:])):  # type: ignore[attr-defined]
                count += step
        except OSError as error:
            raise InputError(f"{tensor.file}: cannot be read: {error.strerror}") from None
        if count < len(data):
            raise InputError(f"{tensor.file}: ended while tensor {name} was read: did the file change?")
        return data.view(tensor.dtype).reshape(shape)

    def close(self) -> None:
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def _file(self, path: Path) -> BinaryIO:
        if self._open is None or self._open[0] != path:
            self.close()
            self._open = (path, open_binary(path))
        return self._open[1]


def open_binary(path: Path) -> BinaryIO:
    """Opens a file for unbuffered reading. Raises InputError if that fails."""
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: no regular file but a folder, pipe, socket or device; give a checkpoint's own files")
        return open(path, "rb", buffering=0)  # type: ignore[return-value]
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; is the download complete?") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def read_header(path: Path) -> dict[str, Tensor]:
    """Reads and checks the header of a safetensors file.

    Returns:
        Tensor name -> Tensor, in the order of the data.

    Raises:
        InputError: the file is missing, no safetensors file, or shorter or longer than its header says.
    """
    with open_binary(path) as file:
        size = path.stat().st_size
        start = file.read(8)
        if start == b"version ":
            raise InputError(f"{path}: a Git LFS pointer, not the file itself: run `git lfs pull` in its folder")
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size + 1
        if length > MAX_HEADER_BYTES and size >= 8:
            raise InputError(f"{path}: not a safetensors file (its header would be {length} bytes)")
        if 8 + length > size:
            raise InputError(f"{path}: truncated within its header ({size} bytes); download it again")
        header = parse_object(_read_exactly(file, length, path), where=f"{path}: header")
    entries = {name: _entry(path, name, value, 8 + length) for name, value in header.items() if name != "__metadata__"}
    entries = dict(sorted(entries.items(), key=lambda item: item[1].offset))
    end = 8 + length
    for name, tensor in entries.items():
        if tensor.offset != end:
            raise InputError(f"{path}: tensor {name} does not begin where the one before it ends")
        end += tensor.nbytes
    if end > size:
        raise InputError(f"{path}: truncated: {size} bytes, its header describes {end}; download it again")
    if end < size:
        raise InputError(f"{path}: {size - end} bytes more than its header describes")
    return entries


def _read_exactly(file: BinaryIO, length: int, path: Path) -> bytes:
    data = file.read(length)
    if len(data) != length:
        raise InputError(f"{path}: truncated within its header; download it again")
    return data


def _entry(path: Path, name: str, value: Any, base: int) -> Tensor:
    try:
        dtype, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
        numbers = [*shape, begin, end]
        if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers):
            raise ValueError
    except (TypeError, KeyError, ValueError):
        raise InputError(f"{path}: the header's entry for {name} is malformed") from None
    if dtype not in DTYPES:
        raise InputError(f"{path}: tensor {name} is of dtype {dtype}, which is not supported")
    tensor = Tensor(tuple(shape), DTYPES[dtype], path, base + begin)
    if end - begin != tensor.nbytes:
        raise InputError(f"{path}: tensor {name} has {end - begin} bytes, its shape and dtype need {tensor.nbytes}")
    return tensor


def _check_index(folder: Path, index: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    wrong = [f"{n} is not in {f}" for n, f in index.items() if n not in tensors or tensors[n].file != folder / f]
    wrong += [f"{n} is not in the index" for n in tensors if n not in index]
    if wrong:
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise InputError(f"{folder}: the index and the files disagree: {'; '.join(wrong[:8])}{more}")


def open_source(folder: Path) -> Source:
    """Opens the weights of a local checkpoint: safetensors, or `.bin` files if there are none.

    Raises:
        InputError: there are no weights, or they are damaged.
    """
    if (folder / INDEX).is_file():
        index = _weight_map(folder / INDEX)
        return SafetensorsSource([folder / name for name in sorted(set(index.values()))], index)
    if (folder / SAFETENSORS).exists():
        return SafetensorsSource([folder / SAFETENSORS])
    from converters.bin_reader import BinSource

    if (folder / BIN_INDEX).is_file():
        return BinSource([folder / name for name in sorted(set(_weight_map(folder / BIN_INDEX).values()))])
    if (folder / BIN).exists():
        return BinSource([folder / BIN])
    raise InputError(f"{folder}: no weights: expected {SAFETENSORS}, {INDEX} or {BIN}")


def _weight_map(path: Path) -> dict[str, str]:
    index = read_object(path).get("weight_map")
    if not isinstance(index, dict) or not index or not all(isinstance(name, str) for name in index.values()):
        raise InputError(f"{path}: no weight_map of tensor names to file names")
    if unsafe := [name for name in index.values() if Path(name).name != name or name in ("", ".", "..")]:
        raise InputError(f"{path}: names a file outside of its folder: {unsafe[0]}")
    return index
