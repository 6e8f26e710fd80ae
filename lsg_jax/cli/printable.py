"""What commands print for people, without what a terminal would obey: names and answers may hold any character."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
from collections.abc import Iterator
from typing import Any

# Control characters but newline and tab, and those that break lines or turn the direction of what follows.
_OBEYED = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """The text with each character that a terminal obeys written as \\x1b or \\u202e."""
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def say(text: str) -> None:
    """Writes to stderr. One that is closed, or whose reader has gone, ends no command."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(text)
        sys.stderr.flush()


class PrintableFormatter(logging.Formatter):
    """Messages of logs as `printable` writes them."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class _Terminal:
    """A text stream that writes `printable` text."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(printable(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def printable_stdout() -> Iterator[None]:
    """Within the block, what is printed on a terminal is printable. Files and pipes get it as it is."""
    stream = sys.stdout
    if not stream.isatty():
        yield
        return
    sys.stdout = _Terminal(stream)
    try:
        yield
    finally:
        sys.stdout = stream
