"""Readers of users' files: records as JSON or JSONL, and folders of images, which are read ahead in threads."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from lsg_jax.data.conversation import RecordError
from lsg_jax.data.images import open_image
from lsg_jax.data.layout import ImageSize
from lsg_jax.errors import ConfigError, InputError

BOM = b"\xef\xbb\xbf"
AHEAD = 4
"""Items in flight per thread. Bounds memory: an item holds an encoded image."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def read_source(path: Path) -> Iterator[tuple[int, Any]]:
    """Yields (line or 1-based position, record) of a JSON array or of JSONL, whatever the file's name.

    A JSONL line that is not JSON yields a `RecordError` (`bad_json`) instead of the record.

    Raises:
        InputError: the file is missing, empty, not UTF-8, a Git LFS pointer, or a broken JSON array (with the line).
    """
    if first_bracket(path) == b"[":
        yield from _read_array(path)
        return
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


def _read_array(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        records = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: broken JSON array at line {error.lineno}, column {error.colno}: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise InputError(f"{path}: JSON nested too deeply") from None
    yield from enumerate(records, start=1)


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
        self._listings: dict[Path, list[str]] = {}

    def read(self, relative: str) -> tuple[bytes, ImageSize]:
        """The bytes of an image file that decodes, and the image's size. Thread-safe.

        Raises:
            RecordError: `missing_image`, `image_outside` or `broken_image`.
        """
        parts = Path(relative).parts
        if Path(relative).is_absolute() or ".." in parts:
            raise RecordError("image_outside", f"{relative}: points outside the image folder")
        try:
            data = self._root.joinpath(*parts).read_bytes()
        except (OSError, ValueError):
            near = self._near(parts)
            hint = f"; did you mean {near}?" if near else ""
            raise RecordError("missing_image", f"{relative}: no such image{hint}") from None
        try:
            size = open_image(data).size
        except InputError as error:
            raise RecordError("broken_image", f"{relative}: {str(error).removeprefix('image: ')}") from None
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
