"""Digests of arrays and of JSON values, and the one record of what a check found."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Problem:
    """One finding of a check.

    Attributes:
        where: the leaf or file, as the user can find it.
        what: what is wrong with it.
    """

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


def array_sha256(array: np.ndarray) -> str:
    """Hex sha256 of the C-contiguous bytes of `array` (little endian on every supported machine); the shape is not hashed."""
    # A view as bytes: bfloat16 and its kin have no buffer protocol.
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()


def file_sha256(path: Path) -> str:
    """Hex sha256 of a small file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def canonical_json(value: Any) -> str:
    """The one JSON text of a value: sorted keys, no spaces, no NaN.

    Raises:
        ValueError: NaN or infinity. TypeError: a value that JSON does not know.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def json_sha256(value: Any) -> str:
    """Hex sha256 of `canonical_json(value)`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def first_line(error: BaseException) -> str:
    """An error of a library as one short line, for a message that adds what to do."""
    lines = str(error).strip().splitlines()
    line = lines[0] if lines else type(error).__name__
    return line.partition(" [tensorstore_spec")[0][:300]
