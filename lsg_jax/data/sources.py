"""Readers of users' files: records as JSON or JSONL, and folders of images, which are read ahead in threads."""

from __future__ import annotations

import json
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

from lsg_jax.data.images import open_image
from lsg_jax.data.layout import ImageSize
from lsg_jax.data.record_shapes import RecordError, has_turns
from lsg_jax.errors import ConfigError, InputError

BOM = b"\xef\xbb\xbf"
AHEAD = 4
"""Items in flight per thread. Bounds memory: an item holds an encoded image."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def read_source(path: Path) -> Iterator[tuple[int, Any]]:
    """Yields (line or 1-based position, record) of JSONL, of a JSON array, or of an object that holds one array of records.

    The file's name does not matter. A JSONL line that is not JSON yields a `RecordError` (`bad_json`) instead of the record.

    Raises:
        InputError: the file is missing, empty, not UTF-8, a Git LFS pointer, a broken JSON array (with the line), or an object
            that holds no records.
    """
    if first_bracket(path) == b"[":
        yield from enumerate(_read_whole(path), start=1)
    elif is_one_object(path):
        yield from enumerate(_records_in(_read_whole(path), path), start=1)
    else:
        with path.open("rb") as file:
            for number, line in numbered_lines(file):
                yield number, parse_line(number, line)


def first_bracket(path: Path) -> bytes:
    """First character of a file of records: `[` or `{`. Errors as in `read_source`."""
    if not path.is_file():
        raise InputError(f"{path}: no such file of records")
    try:
        with path.open("rb") as file:
            start = file.read(4096).removeprefix(BOM).lstrip()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    if not start:
        raise InputError(f"{path}: the file is empty")
    if start.startswith(b"version https://git-lfs"):
        raise InputError(f"{path}: a Git LFS pointer, not the records; run `git lfs pull`")
    if start[:1] not in b"[{":
        raise InputError(f"{path}: neither a JSON array nor JSONL (starts with {start[:20]!r})")
    return start[:1]


def is_one_object(path: Path) -> bool:
    """Whether a file that starts with `{` is one JSON object: spread over lines, or one line that holds an array of records."""
    with path.open("rb") as file:
        lines = numbered_lines(file)
        number, line = next(lines)
        line, following = line.rstrip(), next(lines, None)
    first = parse_line(number, line)
    if isinstance(first, dict):
        return following is None and not has_turns(first) and any(map(_holds_records, first.values()))
    if line.endswith(b"}"):  # a broken first line of JSONL
        return False
    # A cut first line of JSONL ends elsewhere, and the line after it is a record.
    return line.endswith((b"{", b"[")) or following is None or isinstance(parse_line(*following), RecordError)


def _holds_records(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(entry, dict) and has_turns(entry) for entry in value)


def _records_in(whole: Any, path: Path) -> list[Any]:
    """The one array of records in an object, or the object itself if it is a record."""
    if has_turns(whole):
        return [whole]
    lists = {key: value for key, value in whole.items() if _holds_records(value)}
    if len(lists) != 1:
        what, keys = "several arrays of records" if lists else "no records", ", ".join(lists or whole)[:120]
        raise InputError(f"{path}: one object with {what} ({keys}); write the records as a JSON array or as JSONL")
    return next(iter(lists.values()))


def _read_whole(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        what = "array" if first_bracket(path) == b"[" else "object"
        raise InputError(f"{path}: broken JSON {what} at line {error.lineno}, column {error.colno}: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise InputError(f"{path}: JSON nested too deeply") from None


def numbered_lines(lines: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """(1-based number, line) of the non-blank lines, without a byte order mark."""
    for number, line in enumerate(lines, start=1):
        if number == 1:
            line = line.removeprefix(BOM)
        if not line.isspace():
            yield number, line


def parse_line(number: int, line: bytes) -> Any:
    """The record of a line, or a `RecordError` (`bad_json`)."""
    try:
        return json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        return RecordError("bad_json", f"line {number} is not JSON: {str(error)[:120]}")


class ImageFolder:
    """Reads images below a root and suggests near matches for missing ones. Folder listings are cached."""

    def __init__(self, root: Path):
        if not root.is_dir():
            raise InputError(f"{root}: no such image folder")
        self._root = root
        self._prefixes = [os.path.join(folder, "") for folder in (os.path.abspath(root), os.path.realpath(root))]
        self._listings: dict[Path, list[str]] = {}

    def relative(self, path: str) -> str:
        """A record's path relative to the image folder, with `/`: given so, absolute, with backslashes, or as `file://`.

        Raises:
            RecordError: `image_outside`.
        """
        given = unquote(path[7:]) if path.startswith("file://") else path
        if "\\" in given and not os.path.exists(os.path.join(self._root, given)):
            given = given.replace("\\", "/")
        if re.match("[A-Za-z]:/", given) and os.name != "nt":
            raise RecordError("image_outside", f"{path}: on a Windows drive; make the path relative to the image folder")
        absolute = os.path.abspath(os.path.join(self._prefixes[0], given))
        for prefix in self._prefixes:
            if os.path.join(absolute, "").startswith(prefix):
                return absolute[len(prefix) :].replace(os.sep, "/")
        what = "an absolute path" if os.path.isabs(given) else "leads"
        raise RecordError("image_outside", f"{path}: {what} outside the image folder")

    def read(self, path: str) -> tuple[bytes, ImageSize]:
        """The bytes of an image file that decodes, and the image's size. Thread-safe.

        Raises:
            RecordError: `missing_image`, `image_outside` or `broken_image`.
        """
        parts = Path(self.relative(path)).parts
        try:
            data = self._root.joinpath(*parts).read_bytes()
        except (OSError, ValueError):
            near = self._near(parts)
            hint = f"; did you mean {near}?" if near else ""
            raise RecordError("missing_image", f"{path}: no such image{hint}") from None
        try:
            size = open_image(data).size
        except InputError as error:
            raise RecordError("broken_image", f"{path}: {str(error).removeprefix('image: ')}") from None
        return data, size

    def _near(self, parts: tuple[str, ...]) -> str | None:
        """An existing path that differs in case, or in the file's suffix."""
        found: list[str] = []
        for depth, part in enumerate(parts):
            names = self._list(self._root.joinpath(*found))
            same = [n for n in names if n == part] or [n for n in names if n.lower() == part.lower()]
            if not same and depth == len(parts) - 1:
                same = [n for n in names if Path(n).stem.lower() == Path(part).stem.lower()]
            if not same:
                return None
            found.append(same[0])
        return "/".join(found) or None

    def _list(self, folder: Path) -> list[str]:
        if folder not in self._listings:  # a race between threads only repeats the work
            self._listings[folder] = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
        return self._listings[folder]


def thread_count(threads: int | None) -> int:
    """The given number of threads, or one per core. ConfigError if it is below one."""
    if threads is not None and threads < 1:
        raise ConfigError(f"{threads} threads: must be at least 1")
    return threads or os.cpu_count() or 1


def in_order(call: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """`call(item)` for each item, computed in threads, yielded in order. At most `AHEAD` items per thread are in flight.

    Closing the iterator early stops the threads.
    """
    in_flight: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                in_flight.append(pool.submit(call, item))
                if len(in_flight) == AHEAD * threads:
                    yield in_flight.popleft().result()
            while in_flight:
                yield in_flight.popleft().result()
        finally:
            for future in in_flight:
                future.cancel()


def check_fraction(max_bad_fraction: float) -> None:
    """Raises InputError unless it lies in [0, 1]; NaN does not."""
    if not 0 <= max_bad_fraction <= 1:
        raise InputError(f"the largest share of bad records is {max_bad_fraction}: it must lie in [0, 1]")
