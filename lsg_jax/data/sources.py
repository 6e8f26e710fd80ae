"""Readers of users' files: records as JSON or JSONL, and folders of images, which are read ahead in threads."""

from __future__ import annotations

import json
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import unquote

from lsg_jax.data.decoding import MAX_FILE
from lsg_jax.data.images import check_image
from lsg_jax.data.layout import ImageSize
from lsg_jax.data.record_shapes import RecordError, has_turns
from lsg_jax.errors import ConfigError, InputError
from lsg_jax.files import open_regular, read_regular
from lsg_jax.json_files import FlawedJson, parse_tabular

BOM = b"\xef\xbb\xbf"
MAX_LINE = 64 << 20
JSON_SPACE = " \t\r\n"
_SPACE = re.compile(f"[{JSON_SPACE}]*")

AHEAD = 4
"""Items in flight per thread."""

HELD = 64 << 20
"""Bytes of encoded images that wait for the ones before them, beside one item a thread."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def read_source(path: Path) -> Iterator[tuple[int, Any]]:
    """Yields (line or 1-based position, record) of JSONL, of a JSON array, or of an object that holds one array of records.

    The file's name does not matter. A record that is not JSON, or that no reader can be sure of (a key that occurs twice, a
    number that is too large, more than 64 levels, a line of more than 64 MiB), is a `RecordError` (`bad_json`) instead.

    Raises:
        InputError: the file is missing, empty, no regular file, not UTF-8, a Git LFS pointer, a broken JSON array (with the
            line), or an object that holds no records.
    """
    if first_bracket(path) == b"[":
        text = _read_text(path)
        yield from enumerate(_elements(text, text.index("["), path), start=1)
    elif is_one_object(path):
        yield from enumerate(_records_in(_read_text(path), path), start=1)
    else:
        with open_regular(path) as file:
            for number, line in numbered_lines(file):
                yield number, parse_line(number, line)


def first_bracket(path: Path) -> bytes:
    """First character of a file of records: `[` or `{`. Errors as in `read_source`."""
    with open_regular(path) as file:
        start = file.read(4096).removeprefix(BOM).lstrip()
    if not start:
        raise InputError(f"{path}: the file is empty")
    if start.startswith(b"version https://git-lfs"):
        raise InputError(f"{path}: a Git LFS pointer, not the records; run `git lfs pull`")
    if start[:1] not in b"[{":
        raise InputError(f"{path}: neither a JSON array nor JSONL (starts with {start[:20]!r})")
    return start[:1]


def is_one_object(path: Path) -> bool:
    """Whether a file that starts with `{` is one JSON object: spread over lines, or one line that holds an array of records."""
    with open_regular(path) as file:
        lines = numbered_lines(file)
        number, line = next(lines)
        following = next(lines, None)
    if isinstance(line, RecordError):
        return False
    line = line.rstrip()
    first = parse_line(number, line)
    if isinstance(first, dict):
        return following is None and not has_turns(first) and any(map(_holds_records, first.values()))
    if line.endswith(b"}"):  # a broken first line of JSONL
        return False
    # A cut first line of JSONL ends elsewhere, and the line after it is a record.
    return line.endswith((b"{", b"[")) or following is None or isinstance(parse_line(*following), RecordError)


def _holds_records(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(entry, dict) and has_turns(entry) for entry in value)


def _records_in(text: str, path: Path) -> list[Any]:
    """The one array of records in an object, or the object itself if it is a record."""
    try:
        whole, end = parse_tabular(text, len(text) - len(text.lstrip()))
    except FlawedJson as flaw:
        raise InputError(f"{path}: {flaw}; write the records as JSONL, where one that is flawed is left out") from None
    except json.JSONDecodeError as error:
        raise _broken(error, "object", path) from None
    if text[end:].strip():
        raise _broken(json.JSONDecodeError("Extra data", text, end), "object", path)
    if has_turns(whole):
        return [whole]
    lists = {key: value for key, value in whole.items() if _holds_records(value)}
    if len(lists) != 1:
        what, keys = "several arrays of records" if lists else "no records", ", ".join(lists or whole)[:120]
        raise InputError(f"{path}: one object with {what} ({keys}); write the records as a JSON array or as JSONL")
    return next(iter(lists.values()))


def _elements(text: str, start: int, path: Path) -> Iterator[Any]:
    """The elements of a JSON array that opens at `start`, one by one; flawed ones as `RecordError`."""
    at = _SPACE.match(text, start + 1).end()  # type: ignore[union-attr]
    first = True
    try:
        while text[at : at + 1] != "]":
            if not first:
                if text[at : at + 1] != ",":
                    raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
                at = _SPACE.match(text, at + 1).end()  # type: ignore[union-attr]
            first = False
            try:
                element, at = parse_tabular(text, at)
            except FlawedJson as flaw:
                element, at = RecordError("bad_json", str(flaw)), flaw.end
            at = _SPACE.match(text, at).end()  # type: ignore[union-attr]
            yield element
        if text[at + 1 :].strip():
            raise json.JSONDecodeError("Extra data", text, at + 1)
    except json.JSONDecodeError as error:
        raise _broken(error, "array", path) from None


def _broken(error: json.JSONDecodeError, what: str, path: Path) -> InputError:
    return InputError(f"{path}: broken JSON {what} at line {error.lineno}, column {error.colno}: {error.msg}")


def _read_text(path: Path) -> str:
    with open_regular(path) as file:
        data = file.read()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}") from None


def numbered_lines(file: BinaryIO) -> Iterator[tuple[int, bytes | RecordError]]:
    """(1-based number, line) of the non-blank lines, without a byte order mark; a `RecordError` for one of over 64 MiB."""
    number = 0
    while line := file.readline(MAX_LINE):
        number += 1
        if number == 1:
            line = line.removeprefix(BOM)
        if len(line) >= MAX_LINE and not line.endswith(b"\n"):
            while (rest := file.readline(1 << 20)) and not rest.endswith(b"\n"):
                pass
            yield number, RecordError("bad_json", f"line {number} is longer than {MAX_LINE >> 20} MiB")
        elif not line.isspace():
            yield number, line


def parse_line(number: int, line: bytes | RecordError) -> Any:
    """The record of a line, or a `RecordError` (`bad_json`)."""
    if isinstance(line, RecordError):
        return line
    try:
        text = line.decode().strip(JSON_SPACE)
        record, end = parse_tabular(text)
        if end < len(text):
            raise json.JSONDecodeError("Extra data", text, end)
    except FlawedJson as flaw:
        return RecordError("bad_json", f"line {number}: {flaw}")
    except ValueError as error:
        return RecordError("bad_json", f"line {number} is not JSON: {str(error)[:120]}")
    return record


class ImageFolder:
    """Reads images below a root and suggests near matches for missing ones. Folder listings are cached.

    Args:
        follow_links: read images that a link in the folder leads to elsewhere.
    """

    def __init__(self, root: Path, *, follow_links: bool = False):
        if not root.is_dir():
            raise InputError(f"{root}: no such image folder")
        self._root = root
        self._follow_links = follow_links
        self._prefixes = [os.path.join(folder, "") for folder in (os.path.abspath(root), os.path.realpath(root))]
        self._listings: dict[Path, list[str]] = {}

    @property
    def pending(self) -> int:
        """Bytes of images that are held until they are read."""
        return 0

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
        file = self._root.joinpath(*parts)
        try:
            there = file.exists() and not file.is_dir()
            target = os.path.realpath(file)
        except (OSError, ValueError):  # a name that no file can have
            there = False
        if not there:
            near = self._near(parts)
            hint = f"; did you mean {near}?" if near else ""
            raise RecordError("missing_image", f"{path}: no such image{hint}")
        if not self._follow_links and not target.startswith(self._prefixes[1]):
            advice = "give --follow-links if that link is yours, or put the image there"
            raise RecordError("image_outside", f"{path}: a link that leads outside the image folder; {advice}")
        try:
            data = read_regular(Path(target), limit=MAX_FILE)
        except InputError as error:
            raise RecordError("broken_image", f"{path}: {str(error).removeprefix(f'{target}: ')}") from None
        return data, checked_size(data, path)

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


def checked_size(data: bytes, name: str) -> ImageSize:
    """(width, height) of an encoded image. Raises RecordError `broken_image`, which names it, unless it can be decoded."""
    try:
        return check_image(data)
    except InputError as error:
        raise RecordError("broken_image", f"{name}: {str(error).removeprefix('image: ')}") from None


def thread_count(threads: int | None) -> int:
    """The given number of threads, or one per core. ConfigError if it is below one."""
    if threads is not None and threads < 1:
        raise ConfigError(f"{threads} threads: must be at least 1")
    return threads or os.cpu_count() or 1


def in_order(
    call: Callable[[Item], Result],
    items: Iterable[Item],
    threads: int,
    *,
    held: Callable[[Result], int] = lambda result: 0,
    pending: Callable[[], int] = lambda: 0,
) -> Iterator[Result]:
    """`call(item)` for each item, computed in threads, yielded in order. At most `AHEAD` items per thread are in flight.

    Closing the iterator early stops the threads.

    Args:
        held, pending: bytes that a result, and the items in flight, hold; beyond `HELD` in all no further item is read.
    """
    in_flight: deque[Future[Result]] = deque()

    def full() -> bool:
        done = (future.result() for future in in_flight if future.done() and not future.exception())
        return len(in_flight) == AHEAD * threads or pending() + sum(map(held, done)) > HELD

    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                in_flight.append(pool.submit(call, item))
                while in_flight and full():
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
