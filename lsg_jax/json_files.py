"""JSON of files: read strictly, of bounded size and depth. What lsg writes and reads again carries a checksum."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lsg_jax.digest import json_sha256, text_sha256
from lsg_jax.errors import InputError
from lsg_jax.files import read_regular, write_atomic

MAX_BYTES = 64 << 20
MAX_DEPTH = 64
MAX_DIGITS = 4300
"""Of an integer; Python's own limit, which the time that it takes grows beyond."""

_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)
"""A text, whose brackets do not count, or a bracket."""


FILE_CHECK = "self_sha256"
"""Key of a file's checksum: sha256 of the canonical JSON of the rest."""

LINE_CHECK = "check"
"""Key of a line's checksum: the first 16 hex digits of the sha256 of the log's name and the canonical JSON of the rest."""


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. Duplicate keys, NaN, numbers beyond float64, and more than 64 levels are refused.

    Raises:
        ValueError: not such JSON.
    """
    try:
        value = json.loads(
            text.decode("utf-8") if isinstance(text, bytes) else text,
            object_pairs_hook=_no_duplicates,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels") from None
    if _too_deep(value):
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
    return value


def _too_deep(value: Any) -> bool:
    level, depth = [value], 0
    while level := [node for node in level if isinstance(node, (dict, list))]:
        depth += 1
        if depth > MAX_DEPTH:
            return True
        level = [child for node in level for child in (node.values() if isinstance(node, dict) else node)]
    return False


def parse_tabular(text: str, start: int = 0) -> tuple[Any, int]:
    """The value of JSON that starts at `start`, as tables are saved: NaN and Infinity may stand in empty cells; and its end.

    Raises:
        json.JSONDecodeError: not JSON.
        FlawedJson: JSON that no reader can be sure of, see `parse_json`.
    """
    flaws: list[str] = []

    def of_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            flaws.append("a key occurs twice in one object")
        return made

    def of_integer(digits: str) -> int:
        if len(digits) > MAX_DIGITS:
            flaws.append(f"an integer of {len(digits):,} digits")
            return 0
        return int(digits)

    def of_float(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            flaws.append(f"{digits[:40]} is beyond float64")
        return value

    decoder = json.JSONDecoder(object_pairs_hook=of_pairs, parse_int=of_integer, parse_float=of_float)
    try:
        value, end = decoder.raw_decode(text, start)
    except RecursionError:
        end = _end_of(text, start)
        raise FlawedJson(f"nested deeper than {MAX_DEPTH} levels", end) from None
    brackets = text.count("[", start, end) + text.count("{", start, end)
    if brackets > MAX_DEPTH and _too_deep(value):
        flaws.append(f"nested deeper than {MAX_DEPTH} levels")
    if flaws:
        raise FlawedJson(flaws[0], end)
    return value, end


class FlawedJson(ValueError):
    """A JSON value that would be read as something else than it says, or not at all. It ends before the character `end`."""

    def __init__(self, flaw: str, end: int):
        super().__init__(flaw)
        self.end = end


def _end_of(text: str, start: int) -> int:
    """Where the object or array that starts at `start` ends, by its brackets alone."""
    depth = 0
    for token in _BRACKETS.finditer(text, start):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token[0], 0)
        if depth <= 0:
            return token.end()
    return len(text)


def read_json(path: Path, *, max_bytes: int = MAX_BYTES) -> Any:
    """Reads a JSON file as `parse_json` does.

    Raises:
        InputError: the file is missing, unreadable, too large or not such JSON.
    """
    data = read_regular(path, limit=max_bytes)
    if data.startswith(b"version https://git-lfs"):
        raise InputError(f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull` in its folder")
    return _parsed(data, str(path))


def read_object(path: Path, *, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Reads a JSON file that holds one object. Raises InputError as `read_json` does."""
    return _object(read_json(path, max_bytes=max_bytes), str(path))


def parse_object(data: bytes, *, where: str) -> dict[str, Any]:
    """Parses one JSON object; `where` names it in errors. Raises InputError."""
    return _object(_parsed(data, where), where)


def write_json(path: Path, value: Any, *, sort_keys: bool = True) -> None:
    """Writes indented JSON atomically. With `sort_keys`, equal values give equal bytes.

    Raises:
        OSError: the file cannot be written.
        ValueError, TypeError: `value` is no JSON.
    """
    write_atomic(path, (json.dumps(value, indent=1, sort_keys=sort_keys, allow_nan=False) + "\n").encode())


def write_sealed(path: Path, content: Mapping[str, Any], *, sort_keys: bool = False) -> None:
    """Writes an object with its checksum under `self_sha256`, for `read_sealed`. Raises as `write_json` does."""
    write_json(path, {**content, FILE_CHECK: json_sha256(_plain(content))}, sort_keys=sort_keys)


def read_sealed(path: Path) -> dict[str, Any]:
    """The content of a file of `write_sealed`. Files of versions that wrote no checksum, at no depth, are read as they are.

    Raises:
        InputError: as of `read_object`, or the content does not fit its checksum.
    """
    content = read_object(path)
    check = content.pop(FILE_CHECK, None)
    if damaged_name(content, FILE_CHECK) or (FILE_CHECK in _names(content) if check is None else check != json_sha256(content)):
        raise InputError(f"{path}: was changed after it was written, or is damaged: its content does not fit its checksum")
    return content


def _names(content: Any) -> Iterator[str]:
    """All names in it, at any depth."""
    left = [content]
    while left:
        inner = left.pop()
        if isinstance(inner, dict):
            yield from inner
            left += inner.values()
        elif isinstance(inner, list):
            left += inner


def damaged_name(names: Iterable[str], name: str) -> bool:
    """Whether one of the names differs from `name` in one or two letters: the checksum is there, but flipped bits hide it."""
    near = lambda other: len(other) == len(name) and sum(map(str.__ne__, other, name)) <= 2
    return any(near(other) for other in names if other != name)


def sealed_line(entry: Mapping[str, Any], log: str) -> str:
    """A line of a log with its checksum, newline included.

    Args:
        log: what the log is of; a line of another log does not fit its checksum here.
    """
    return json.dumps({**entry, LINE_CHECK: _line_check(_plain(entry), log)}, allow_nan=False) + "\n"


def sealed_lines(path: Path, log: str) -> tuple[list[dict[str, Any]], int]:
    """The sound lines of a log in order, and the number of those that are damaged.

    Damaged is a line that a kill cut short, one of another log, or one in which a bit has changed.

    Raises:
        InputError: the file cannot be read.
    """
    found, damaged = [], 0
    for line in read_regular(path).split(b"\n"):
        if not line.strip():
            continue
        try:
            entry = parse_json(line)
            if entry.pop(LINE_CHECK) != _line_check(entry, log):
                raise ValueError("another checksum")
        except (ValueError, AttributeError, KeyError, TypeError):
            damaged += 1
            continue
        found.append(entry)
    return found, damaged


def json_lines(path: Path) -> list[tuple[int, str]]:
    """(1-based number, line) of the non-blank lines of a JSONL file, with or without a byte order mark.

    A line ends at a newline only: other characters at which `str.splitlines` and text files break, such as U+2028, U+0085 and
    a carriage return, may stand inside a JSON line.

    Raises:
        InputError: the file cannot be read, or is not UTF-8.
    """
    try:
        lines = read_regular(path).decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text at byte {error.start}") from None
    return [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def _parsed(data: bytes, where: str) -> Any:
    try:
        return parse_json(data)
    except ValueError as error:  # also UnicodeDecodeError and JSONDecodeError
        raise InputError(f"{where}: not valid JSON: {error}") from None


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        kinds = {list: "an array", str: "a text", bool: "a truth value", type(None): "null"}
        raise InputError(f"{where}: expected a JSON object, got {kinds.get(type(value), 'a number')}")
    return value


def _line_check(entry: Mapping[str, Any], log: str) -> str:
    return text_sha256(f"{log}\n{json_sha256(entry)}")[:16]


def _plain(value: Any) -> Any:
    """What reading it back gives: tuples as lists, keys as texts."""
    return json.loads(json.dumps(value, allow_nan=False))


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice in one object")
    return result


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is beyond float64")
    return value
