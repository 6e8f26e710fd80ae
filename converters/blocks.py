"""Reads tensors piece by piece, so that memory does not grow with the model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np

from converters.ops import Shape
from converters.reader import Source
from converters.rules import Part
from lsg_jax.errors import InputError

PIECE_BYTES = 16 << 20  # read at once
_EXPONENT = {"float32": (np.uint32, 0x7F800000), "bfloat16": (np.uint16, 0x7F80), "float16": (np.uint16, 0x7C00)}


def described(source: Source, names: Mapping[str, str]) -> dict[str, tuple[Shape, str]]:
    """Canonical name -> (shape, dtype name), the input of `rules.plan`. `names`: canonical -> original name."""
    return {name: (source.tensors[key].shape, source.tensors[key].dtype.name) for name, key in names.items()}


def pieces(source: Source, name: str, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
    """Rows `start : stop` of a tensor as (first row, rows), at most 16 MiB each. A tensor without axes is one row."""
    tensor = source.tensors[name]
    if stop is None:
        stop = tensor.shape[0] if tensor.shape else 1
    step = max(1, PIECE_BYTES // max(1, tensor.row_bytes))
    for begin in range(start, stop, step):
        yield begin, source.rows(name, begin, min(begin + step, stop))


def read_block(source: Source, name: str, part: Part, start: int, stop: int, dtype: str) -> np.ndarray:
    """Rows `start : stop` of one slice of a leaf: [stop - start, ...] in `dtype`.

    Args:
        name: original name of the tensor `part.source`.

    Raises:
        InputError: NaN or infinity, stored or from a cast to a smaller range; names the tensor.
    """
    block = np.empty((stop - start, *part.shape[1:]), dtype)
    first, last = part.op.source_rows(part.shape, start, stop)
    with np.errstate(over="ignore", invalid="ignore"):  # `check_finite` below names the tensor
        for begin, rows in pieces(source, name, part.first_row + first, part.first_row + last):
            part.op.fill(block, start, rows, begin - part.first_row)
    check_finite(name, block)
    return block


def equal_tensors(source: Source, first: str, second: str) -> bool:
    """Whether two tensors hold the same bytes in the same shape and dtype."""
    a, b = source.tensors[first], source.tensors[second]
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    both = zip(pieces(source, first), pieces(source, second), strict=True)
    return all(np.array_equal(as_bytes(x), as_bytes(y)) for (_, x), (_, y) in both)


def as_bytes(array: np.ndarray) -> np.ndarray:
    """The bytes of an array in C order: uint8 [n]. No copy where it is contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def check_finite(name: str, values: np.ndarray) -> None:
    """Raises InputError for NaN or infinity. Checks the exponent bits in runs of 1 Mi values, without a copy of the array."""
    if values.dtype.name not in _EXPONENT:
        return
    integer, mask = _EXPONENT[values.dtype.name]
    flat = np.ascontiguousarray(values).reshape(-1).view(integer)
    run = 1 << 20
    for start in range(0, math.prod(values.shape), run):
        if np.any((flat[start : start + run] & integer(mask)) == mask):
            raise InputError(f"tensor {name} holds NaN or infinity (in {values.dtype.name}): the checkpoint is damaged")
