"""Small files: written atomically; JSON is read strictly, JSONL line by line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from lsg_jax.errors import InputError

MAX_JSON_BYTES = 64 << 20


def check_output(path: Path, *, folder: bool) -> None:
    """Refuses an output folder or file that cannot be written, before any work is done for it.

    Raises:
        InputError: it, or a folder above it, is of the other kind or not writable.
    """
    if path.exists() and path.is_dir() != folder:
        found, needed = ("a file", "a folder") if folder else ("a folder", "a file")
        raise InputError(f"{path}: is {found}, and {needed} is written; choose another output")
    above = next(each for each in (path, *path.absolute().parents) if each.exists())
    if above != path and not above.is_dir():
        raise InputError(f"{path}: cannot be written: {above} is a file; choose another output")
    if not os.access(above, os.W_OK):
        raise InputError(f"{path}: cannot be written: Permission denied; choose another output")


def check_only(folder: Path, known: frozenset[str], what: str) -> None:
    """Refuses an output folder that holds something else than `known` names, settings and logs.

    Args:
        what: what the folder is to be, for the error.

    Raises:
        InputError: it does.
    """
    notes = lambda name: name.startswith(".") or name.endswith((".toml", ".log", ".txt"))
    names = sorted(each.name for each in folder.iterdir()) if folder.is_dir() else []
    others = [name for name in names if name not in known and not notes(name)]
    if others:
        listed = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        raise InputError(f"{folder}: holds {listed} and is no {what}; choose another output")


def write_atomic(path: Path, data: bytes) -> None:
    """Writes a file through a temporary one: a crash leaves the old content or the new, never a part.

    Raises:
        OSError: the old content is kept.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes renames inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any, *, sort_keys: bool = True) -> None:
    """Writes indented JSON atomically. With `sort_keys`, equal values give equal bytes.

    Raises:
        OSError: the file cannot be written.
        ValueError, TypeError: `value` is no JSON.
    """
    write_atomic(path, (json.dumps(value, indent=1, sort_keys=sort_keys, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Reads a JSON file, refusing NaN, duplicate keys and more than 64 MiB.

    Raises:
        InputError: the file is missing, unreadable or not such JSON.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise InputError(f"{path}: larger than {MAX_JSON_BYTES >> 20} MiB, not a file that lsg wrote")
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # also UnicodeDecodeError and JSONDecodeError
        raise InputError(f"{path}: not valid JSON: {error}") from None


def json_lines(path: Path) -> list[tuple[int, str]]:
    """(1-based number, line) of the non-blank lines of a JSONL file, with or without a byte order mark.

    A line ends at a newline only: other characters at which `str.splitlines` and text files break, such as U+2028, U+0085 and
    a carriage return, may stand inside a JSON line.

    Raises:
        OSError, UnicodeDecodeError: the file cannot be read, or is not UTF-8.
    """
    lines = path.read_bytes().decode("utf-8-sig").split("\n")
    return [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("duplicate keys")
    return result


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a JSON number")
