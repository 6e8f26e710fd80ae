"""Invertible operations between tensors of a checkpoint and parameters of the model, and the rule that names one.

Both directions work on parts of a tensor, so that no tensor is in memory twice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np

Shape = tuple[int, ...]


class Op(Protocol):
    """An invertible operation from a source tensor to a slice of a leaf: one layer of a stacked leaf, or another leaf.

    Tensors are read in ranges of rows (axis 0), slices are written in blocks (ranges of axis 0).
    """

    def source_shape(self, shape: Shape) -> Shape:
        """Shape of the tensor for a slice of `shape`."""
        ...

    def source_rows(self, shape: Shape, start: int, stop: int) -> tuple[int, int]:
        """The range of tensor rows that the rows `start : stop` of the slice need."""
        ...

    def fill(self, block: np.ndarray, start: int, rows: np.ndarray, first_row: int) -> None:
        """Writes tensor rows `first_row` and on into the block that begins at row `start` of the slice.

        Rows are cast to the dtype of the block.
        """
        ...

    def invert(self, block: np.ndarray, start: int) -> tuple[np.ndarray, int, int]:
        """A block -> (matrix [rows, columns], first row, first column) of the tensor, whose axes above 0 are the columns."""
        ...


@dataclass(frozen=True)
class Copy:
    """The tensor itself."""

    def source_shape(self, shape: Shape) -> Shape:
        return shape

    def source_rows(self, shape: Shape, start: int, stop: int) -> tuple[int, int]:
        return start, stop

    def fill(self, block: np.ndarray, start: int, rows: np.ndarray, first_row: int) -> None:
        begin = first_row - start
        block[begin : begin + len(rows)] = rows

    def invert(self, block: np.ndarray, start: int) -> tuple[np.ndarray, int, int]:
        return block.reshape(len(block), -1), start, 0


@dataclass(frozen=True)
class Flat:
    """A vector that the model splits into heads: [N * H] -> [N, H]."""

    def source_shape(self, shape: Shape) -> Shape:
        return (math.prod(shape),)

    def source_rows(self, shape: Shape, start: int, stop: int) -> tuple[int, int]:
        width = math.prod(shape[1:])
        return start * width, stop * width

    def fill(self, block: np.ndarray, start: int, rows: np.ndarray, first_row: int) -> None:
        begin = first_row - start * math.prod(block.shape[1:])
        block.reshape(-1)[begin : begin + len(rows)] = rows

    def invert(self, block: np.ndarray, start: int) -> tuple[np.ndarray, int, int]:
        return block.reshape(-1, 1), start * math.prod(block.shape[1:]), 0


@dataclass(frozen=True)
class Linear:
    """A torch linear weight [out, in] -> kernel [*in_shape, *out_shape]; the first `in_axes` axes of the kernel are inputs."""

    in_axes: int = 1

    def source_shape(self, shape: Shape) -> Shape:
        return math.prod(shape[self.in_axes :]), math.prod(shape[: self.in_axes])

    def source_rows(self, shape: Shape, start: int, stop: int) -> tuple[int, int]:
        return 0, math.prod(shape[self.in_axes :])

    def fill(self, block: np.ndarray, start: int, rows: np.ndarray, first_row: int) -> None:
        matrix = self._matrix(block)
        begin = start * math.prod(block.shape[1 : self.in_axes])
        transpose_into(matrix[:, first_row : first_row + len(rows)], rows[:, begin : begin + len(matrix)])

    def invert(self, block: np.ndarray, start: int) -> tuple[np.ndarray, int, int]:
        matrix = self._matrix(block)
        out = np.empty(matrix.shape[::-1], block.dtype)
        transpose_into(out, matrix)
        return out, 0, start * math.prod(block.shape[1 : self.in_axes])

    def _matrix(self, block: np.ndarray) -> np.ndarray:
        return block.reshape(math.prod(block.shape[: self.in_axes]), -1)


@dataclass(frozen=True)
class Conv:
    """A patch embedding [D, C, h, w] -> [h, w, C, D], or one over frames: [D, C, T, h, w] -> [T, h, w, C, D].

    It is small, so always one block.
    """

    def source_shape(self, shape: Shape) -> Shape:
        *window, channels, out = shape
        return out, channels, *window

    def source_rows(self, shape: Shape, start: int, stop: int) -> tuple[int, int]:
        return 0, shape[-1]

    def fill(self, block: np.ndarray, start: int, rows: np.ndarray, first_row: int) -> None:
        within = rows[:, :, start : start + len(block)]
        block[..., first_row : first_row + len(rows)] = np.moveaxis(within, (1, 0), (-2, -1))

    def invert(self, block: np.ndarray, start: int) -> tuple[np.ndarray, int, int]:
        if start:
            raise ValueError("a patch embedding is exported in one block")
        tensor = np.moveaxis(block, (-2, -1), (1, 0))
        return np.ascontiguousarray(tensor).reshape(block.shape[-1], -1), 0, 0


@dataclass(frozen=True)
class Unsqueezed:
    """A tensor with `axes` axes of length 1 in front, which the model lacks: [1, ..., N, D] -> [N, D]."""

    axes: int = 1

    def source_shape(self, shape: Shape) -> Shape:
        return (1,) * self.axes + shape

    def source_rows(self, shape: Shape, start: int, stop: int) -> tuple[int, int]:
        return 0, 1

    def fill(self, block: np.ndarray, start: int, rows: np.ndarray, first_row: int) -> None:
        block[:] = rows.reshape(-1, *block.shape[1:])[start : start + len(block)]

    def invert(self, block: np.ndarray, start: int) -> tuple[np.ndarray, int, int]:
        return block.reshape(1, -1), 0, start * math.prod(block.shape[1:])


def transpose_into(target: np.ndarray, source: np.ndarray, tile: int = 128) -> None:
    """target[...] = source.T for matrices, with a cast if the dtypes differ.

    Works by tiles; numpy's own copy has strided access to one of the two and is five times as slow.
    """
    same = target.dtype == source.dtype
    if same and target.itemsize == 2:  # numpy copies its own integers faster than the bfloat16 of ml_dtypes
        target, source = target.view(np.uint16), source.view(np.uint16)
    for row in range(0, source.shape[0], tile):
        for column in range(0, source.shape[1], tile):
            part = source[row : row + tile, column : column + tile]
            target[column : column + tile, row : row + tile] = (part if same else part.astype(target.dtype)).T


@dataclass(frozen=True)
class Rule:
    """One leaf of the model and the tensor that holds it.

    Rules that name the same tensor share its rows in the order of the table: so fused projections are split.

    Attributes:
        leaf: '/'-joined path of the leaf.
        source: canonical name of the tensor, with `{layer}` for a leaf that stacks layers.
        op: the operation from tensor to leaf.
    """

    leaf: str
    source: str
    op: Op
