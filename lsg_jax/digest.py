"""sha256 of bytes, texts, files, arrays and JSON values, as hex."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np


def bytes_sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def text_sha256(text: str) -> str:
    """sha256 of the text, encoded as UTF-8."""
    return bytes_sha256(text.encode())


def file_sha256(path: Path) -> str:
    """sha256 of a file of any size.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def array_sha256(array: np.ndarray) -> str:
    """sha256 of the C-contiguous bytes of `array` (little endian on every supported machine), without its shape."""
    # A view as bytes: bfloat16 and its kin have no buffer protocol.
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()


def arrays_sha256(arrays: Iterable[tuple[str, np.ndarray]]) -> str:
    """sha256 of names, shapes and bytes, in the order given."""
    digest = hashlib.sha256()
    for name, array in arrays:
        digest.update(f"{name}{array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


def canonical_json(value: Any) -> str:
    """The one JSON text of a value: sorted keys, no spaces, no NaN.

    Raises:
        ValueError: NaN or infinity. TypeError: a value that JSON does not know.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def json_sha256(value: Any) -> str:
    """sha256 of `canonical_json(value)`."""
    return text_sha256(canonical_json(value))
