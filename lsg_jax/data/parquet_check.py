"""Reads Parquet files once in a process of its own, because pyarrow ends the process on some damaged files.

Run as a script with the files on stdin, each ended by NUL: it prints the number of each before it reads it. It imports pyarrow
only.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

OPTIONS = {"page_checksum_verification": True}
"""Of every `pyarrow.parquet.ParquetFile`: pages that have a checksum are compared with it."""


_FATAL = {signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGKILL}
"""Signals that damaged data cause; SIGKILL comes from the kernel when memory runs out."""


def fatal_file(paths: Sequence[Path]) -> Path | None:
    """The first file on which pyarrow ends its process; None if there is none. Other errors are not looked for."""
    lines = "".join(f"{path.absolute()!s}\0" for path in paths).encode(errors="surrogateescape")
    command = [sys.executable, "-P", __file__]
    done = subprocess.run(command, input=lines, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
    if -done.returncode not in _FATAL or not done.stdout.strip():
        return None
    return paths[int(done.stdout.split()[-1])]


def _read_all() -> None:
    import contextlib

    import pyarrow.parquet

    names = sys.stdin.buffer.read().split(b"\0")[:-1]
    for number, name in enumerate(names):
        print(number, flush=True)
        with contextlib.suppress(Exception):
            _read(pyarrow.parquet.ParquetFile(name.decode(errors="surrogateescape"), **OPTIONS))


def _read(file: object) -> None:
    """Every column and its statistics of every row group, as `ParquetFile` of parquet.py reads them."""
    import contextlib

    for group in range(file.num_row_groups):  # type: ignore[attr-defined]
        described = file.metadata.row_group(group)  # type: ignore[attr-defined]
        for number in range(described.num_columns):
            with contextlib.suppress(Exception):
                known = described.column(number).statistics
                _ = known and known.has_null_count and known.null_count
    for name in file.schema_arrow.names:  # type: ignore[attr-defined]
        for group in range(file.num_row_groups):  # type: ignore[attr-defined]
            with contextlib.suppress(Exception):
                table = file.read_row_group(group, columns=[name])  # type: ignore[attr-defined]
                table.validate(full=True)


if __name__ == "__main__":
    _read_all()
