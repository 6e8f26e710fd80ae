"""Writes a safetensors file; its tensors may come in any order and in parts."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from converters.blocks import as_bytes
from converters.ops import Shape
from converters.reader import DTYPES
from lsg_jax.errors import CheckpointError

_NAMES = {dtype.name: name for name, dtype in DTYPES.items()}


class SafetensorsWriter:
    """One file; the header is written first. A context manager. The caller must write every byte of every tensor.

    Args:
        path: the file, overwritten.
        tensors: name -> (shape, numpy dtype name), in the order of the data.

    Raises:
        CheckpointError: a write fails (disk full).
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[Shape, str]]):
        self.path = path
        self._tensors = dict(tensors)
        self._offsets: dict[str, int] = {}
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers requires it
        end = 0
        for name, (shape, dtype) in self._tensors.items():
            self._offsets[name] = end
            end += math.prod(shape) * np.dtype(dtype).itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [self._offsets[name], end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the data begin aligned
        self._start = 8 + len(text)
        try:
            self._file = open(path, "wb", buffering=0)  # noqa: SIM115  (closed in __exit__)
            self._write(0, struct.pack("<Q", len(text)) + text)
            self._file.truncate(self._start + end)
        except OSError as error:
            raise self._failed(error) from None

    def put(self, name: str, matrix: np.ndarray, row: int = 0, column: int = 0) -> None:
        """Writes a rectangle of a tensor, viewed as a matrix [axis 0, all other axes].

        Args:
            matrix: [rows, columns] in the tensor's dtype.
            row, column: position of its first element.
        """
        shape, dtype = self._tensors[name]
        size, width = np.dtype(dtype).itemsize, math.prod(shape[1:])
        begin = self._start + self._offsets[name] + (row * width + column) * size
        try:
            if matrix.shape[1] == width:
                self._write(begin, as_bytes(matrix).data)
            else:
                for index, values in enumerate(np.ascontiguousarray(matrix)):
                    self._write(begin + index * width * size, as_bytes(values).data)
        except OSError as error:
            raise self._failed(error) from None

    def _write(self, offset: int, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while len(view):
            count = os.pwrite(self._file.fileno(), view, offset)
            view, offset = view[count:], offset + count

    def _failed(self, error: OSError) -> CheckpointError:
        return CheckpointError(f"{self.path}: cannot be written: {error.strerror}")

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, *unused: object) -> None:
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._failed(error) from None
        finally:
            self._file.close()
