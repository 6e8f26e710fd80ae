"""Reads untrusted JSON: size and depth are limited, duplicate keys and NaN are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lsg_jax.errors import InputError

MAX_DEPTH = 32


def read_object(path: Path, *, max_bytes: int = 16 << 20) -> dict[str, Any]:
    """Reads a file that holds one JSON object.

    Raises:
        InputError: the file is missing, too large, no JSON, nested too deeply, or holds NaN or a key twice.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(max_bytes + 1)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    if len(data) > max_bytes:
        raise InputError(f"{path}: larger than {max_bytes >> 20} MiB, not the JSON file it should be")
    if data.startswith(b"version https://git-lfs"):
        raise InputError(f"{path}: a Git LFS pointer, not the file itself: run `git lfs pull` in its folder")
    return parse_object(data, where=str(path))


def parse_object(data: bytes, *, where: str) -> dict[str, Any]:
    """Parses one JSON object; `where` names it in errors. Raises InputError as `read_object` does."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except RecursionError:
        raise InputError(f"{where}: JSON nested deeper than {MAX_DEPTH} levels") from None
    except ValueError as error:  # also UnicodeDecodeError and JSONDecodeError
        raise InputError(f"{where}: not valid JSON: {error}") from None
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise InputError(f"{where}: JSON nested deeper than {MAX_DEPTH} levels")
        containers = [node for node in level if isinstance(node, (dict, list))]
        level = [child for node in containers for child in (node.values() if isinstance(node, dict) else node)]
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected a JSON object, got {type(value).__name__}")
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice in one object")
    return result


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a JSON number")
