"""Tensors made of those of other checkpoints: renamed, cast, with rows added, with a low-rank update merged.

Rows are made when they are read, so that memory does not grow with the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from converters.reader import Source, Tensor

MEAN_ROWS = 4096  # read at once for a mean


@dataclass(frozen=True)
class LowRank:
    """The update of LoRA (arXiv 2106.09685): `scale * up @ down`.

    Attributes:
        source: holds both matrices.
        up: name of `lora_B` [rows, r]. down: name of `lora_A` [r, columns].
        scale: alpha / r, or alpha / sqrt(r).
    """

    source: Source
    up: str
    down: str
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the update."""
        return self.source.tensors[self.up].shape[0], self.source.tensors[self.down].shape[1]

    def rows(self, start: int, stop: int) -> np.ndarray:
        """float32 [stop - start, columns]."""
        down = self.source.rows(self.down, 0, self.source.tensors[self.down].shape[0])
        up = self.source.rows(self.up, start, stop)
        return np.float32(self.scale) * (up.astype(np.float32) @ down.astype(np.float32))


@dataclass(frozen=True)
class Derived:
    """How a tensor is made.

    Attributes:
        source, name: of the stored tensor.
        dtype: to cast to; None keeps that of the stored tensor.
        added_rows: rows after the stored ones. Each is the mean of the stored rows.
        update: added in float32 before the cast.
    """

    source: Source
    name: str
    dtype: np.dtype | None = None
    added_rows: int = 0
    update: LowRank | None = None

    @property
    def tensor(self) -> Tensor:
        """Its metadata."""
        stored = self.source.tensors[self.name]
        shape = (stored.shape[0] + self.added_rows, *stored.shape[1:]) if self.added_rows else stored.shape
        return Tensor(shape, self.dtype or stored.dtype, stored.file)


class DerivedSource:
    """A `Source` of derived tensors.

    Args:
        tensors: name -> how it is made.
        opened: the sources behind them, which `close` closes. files: those that hold weights.
    """

    def __init__(self, tensors: Mapping[str, Derived], opened: Iterable[Source]):
        self._derived = dict(tensors)
        self._opened = tuple(opened)
        self._means: dict[str, np.ndarray] = {}
        self.tensors: dict[str, Tensor] = {name: derived.tensor for name, derived in tensors.items()}
        self.files: tuple[Path, ...] = tuple(file for source in self._opened for file in source.files)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        derived = self._derived[name]
        stored = derived.source.tensors[derived.name]
        length = stored.shape[0] if stored.shape else 1
        values = derived.source.rows(derived.name, min(start, length), min(stop, length))
        if derived.update is not None:
            values = values.astype(np.float32) + derived.update.rows(start, min(stop, length))
        with np.errstate(over="ignore"):  # whoever reads the rows refuses infinity and names the tensor
            values = values.astype(derived.dtype or stored.dtype, copy=False)
        if stop <= length:
            return values
        mean = np.broadcast_to(self._mean(name, derived).astype(values.dtype), (stop - max(start, length), *stored.shape[1:]))
        return np.concatenate([values, mean])

    def close(self) -> None:
        for source in self._opened:
            source.close()

    def _mean(self, name: str, derived: Derived) -> np.ndarray:
        """The mean of the stored rows, in float64."""
        if name not in self._means:
            stored = derived.source.tensors[derived.name]
            total = np.zeros(stored.shape[1:], np.float64)
            for start in range(0, stored.shape[0], MEAN_ROWS):
                rows = derived.source.rows(derived.name, start, min(start + MEAN_ROWS, stored.shape[0]))
                total += rows.astype(np.float64).sum(0)
            self._means[name] = total / stored.shape[0]
        return self._means[name]
