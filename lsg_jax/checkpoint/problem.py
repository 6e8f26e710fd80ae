"""What a check found wrong."""

from __future__ import annotations

from dataclasses import dataclass


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


def first_line(error: BaseException) -> str:
    """An error of a library as one short line, for a message that adds what to do."""
    lines = str(error).strip().splitlines()
    line = lines[0] if lines else type(error).__name__
    return line.partition(" [tensorstore_spec")[0][:300]
