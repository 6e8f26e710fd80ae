"""Reads Parquet files: one file, a folder or a glob. Columns are checked first, images read on demand."""

from __future__ import annotations

import base64
import binascii
import contextlib
import glob
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from lsg_jax.data.parquet_check import OPTIONS, fatal_file
from lsg_jax.errors import InputError


@dataclass(frozen=True)
class ImageCell:
    """An image in a row of a Parquet file."""

    file: ParquetFile
    row: int
    column: str

    @property
    def where(self) -> str:
        """`file: row n`, for error messages."""
        return f"{self.file.path}: row {self.row}"

    def read(self) -> bytes:
        """The encoded image. Raises InputError that names the file and row."""
        where = self.where
        value: Any = self.file.cell(self.row, self.column)
        if isinstance(value, list):
            if len(value) != 1:
                raise InputError(f"{where}: {self.column} holds {len(value)} images, expected one")
            value = value[0]
        if isinstance(value, dict):
            value, name = value.get("bytes"), value.get("path")
            if value is None and name:
                raise InputError(f"{where}: {self.column} holds a path ({name}) and no image; use the file with images in it")
        if isinstance(value, str):
            value = from_base64(value, f"{where}: {self.column}")
        if not isinstance(value, bytes) or not value:
            raise InputError(f"{where}: {self.column} holds no image")
        return value


def no_image(where: str, column: str) -> NoReturn:
    """Raises InputError for the empty cell of a question that would be asked without its image."""
    raise InputError(f"{where}: {column} is empty, but every question here has an image; is the file whole? Download it again")


def from_base64(text: str, where: str) -> bytes:
    """The encoded image of a cell of text, also of a data URI. Raises InputError, which starts with `where`, if it is none."""
    if text.startswith("data:image/"):
        text = text.partition(";base64,")[2] or text
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        what = f"{text[:80]!r}, but no base64 image"
        raise InputError(f"{where} is text, {what}; paths and addresses are not followed, use the file with images") from None


@contextlib.contextmanager
def _named(where: str) -> Iterator[None]:
    """Whatever pyarrow raises on damaged data, as an InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # OSError, ArrowException, UnicodeDecodeError, OverflowError, KeyError, ...
        what = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise InputError(f"{where}: cannot be read: {what}; is the file whole? Download it again") from None


class ParquetFile:
    """One file; make it with `open_files`. The row group that was read last is kept, since neighbouring rows usually follow.

    Raises:
        InputError: no Parquet file, or a damaged one. So do all methods; a damaged cell is named with its row and column.
    """

    def __init__(self, path: Path):
        import pyarrow.parquet

        self.path = path
        self._starts = [0]
        with _named(str(path)):
            self._file = pyarrow.parquet.ParquetFile(path, **OPTIONS)
            self.columns: list[str] = self._file.schema_arrow.names
            self.num_rows: int = self._file.metadata.num_rows
            for group in range(self._file.num_row_groups):
                self._starts.append(self._starts[-1] + self._file.metadata.row_group(group).num_rows)
            if self._starts[-1] != self.num_rows:
                raise ValueError(f"row groups of {self._starts[-1]} rows in all, but {self.num_rows} are stated")
        self._held: tuple[int, str, Any] | None = None
        self._nulls: dict[str, Any] = {}
        self._lock = threading.Lock()

    def rows(self, columns: Iterable[str]) -> list[dict[str, Any]]:
        """All rows of the given columns as plain data."""
        names = list(columns)
        with _named(f"{self.path}: column {', '.join(names)}"):
            table = self._file.read(columns=names)
            table.validate(full=True)
            rows: list[dict[str, Any]] = table.to_pylist()
            if len(rows) != self.num_rows:
                raise ValueError(f"{len(rows)} rows, but {self.num_rows} are stated")
            return rows

    def cell(self, row: int, column: str) -> Any:
        """One value as plain data."""
        import bisect

        group = bisect.bisect_right(self._starts, row) - 1
        with self._lock, _named(f"{self.path}: row {row}: column {column}"):
            if self._held is None or self._held[:2] != (group, column):
                table = self._file.read_row_group(group, columns=[column])
                table.validate(full=True)
                self._held = (group, column, table.column(0))
            return self._held[2][row - self._starts[group]].as_py()

    def is_null(self, row: int, column: str) -> bool:
        """Whether a cell is null. Does not read the images of a column of `{bytes, path}`."""
        import pyarrow

        with _named(f"{self.path}: row {row}: column {column}"):
            if column not in self._nulls:
                kind = self._file.schema_arrow.field(column).type
                part = f"{column}.path" if pyarrow.types.is_struct(kind) and kind.get_field_index("path") >= 0 else column
                none = self._has_no_nulls(column)
                self._nulls[column] = None if none else self._file.read(columns=[part]).column(0).is_null().to_pylist()
            nulls = self._nulls[column]
            return nulls is not None and nulls[row]

    def _has_no_nulls(self, column: str) -> bool:
        """Whether the file's statistics rule out nulls: if a cell is null, so is each of its parts."""
        counts: dict[str, int] = {}
        for group in range(self._file.num_row_groups):
            described = self._file.metadata.row_group(group)
            for chunk in map(described.column, range(described.num_columns)):
                part, known = chunk.path_in_schema, chunk.statistics
                if part.split(".")[0] == column:
                    counts[part] = counts.get(part, 0) + (known.null_count if known and known.has_null_count else 1)
        return 0 in counts.values()


def open_files(paths: Sequence[Path]) -> list[ParquetFile]:
    """Opens files after they were read once in another process, since damaged ones can end the process that reads them.

    Raises:
        InputError: a file is no Parquet, or damaged.
    """
    for path in paths:
        if problem := _not_parquet(path):
            raise InputError(f"{path}: {problem}")
    if fatal := fatal_file(paths):
        raise InputError(f"{fatal}: damaged: reading it ends the process; download it again")
    return [ParquetFile(path) for path in paths]


def _not_parquet(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    if not start:
        return "the file is empty"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the data; run `git lfs pull`"
    for packed, kind in ((b"\x1f\x8b", "gzip"), (b"PK\x03\x04", "zip")):
        if start.startswith(packed):
            return f"compressed with {kind}; unpack it, and name what was in it"
    return None if start.startswith(b"PAR1") else "not a Parquet file"


@dataclass(frozen=True)
class Row:
    """One row: `row["column"]` for the requested columns, `images()` for its image."""

    file: ParquetFile
    number: int  # within the file, from 0
    values: dict[str, Any]

    def __getitem__(self, column: str) -> Any:
        return self.values[column]

    def get(self, column: str, default: Any = None) -> Any:
        return self.values.get(column, default)

    def text(self, column: str) -> str:
        """The text of a requested column. Raises InputError for any other cell, such as an empty one."""
        return _text(self.values[column], self.where, column)

    def label(self, column: str) -> str:
        """A text or number of a column that a file may lack, as text; see `as_label`."""
        return as_label(self.values.get(column), self.where, column)

    def texts(self, column: str) -> tuple[str, ...]:
        """The texts of a requested column of lists; () for an empty cell. Raises InputError for any other."""
        value = self.values[column]
        if value is None or isinstance(value, list):
            return tuple(_text(each, self.where, column) for each in value or ())
        raise InputError(f"{self.where}: {column} is {str(value)[:80]!r}, no list of texts")

    def images(self, column: str = "image", *, required: bool = True) -> tuple[ImageCell, ...]:
        """The image of a column; () if the cell is empty and need not hold one. Raises InputError for another empty cell."""
        if self.file.is_null(self.number, column):
            return no_image(self.where, column) if required else ()
        return (ImageCell(self.file, self.number, column),)

    @property
    def where(self) -> str:
        """`file: row n`, for error messages."""
        return f"{self.file.path}: row {self.number}"


def as_label(value: Any, where: str, column: str) -> str:
    """A text or number as text; "" for an empty cell. Raises InputError for any other value, such as a list."""
    if value is None or value != value:  # NaN: how some writers make an empty cell
        return ""
    if not isinstance(value, str | int | float):
        raise InputError(f"{where}: {column} is {str(value)[:80]}, neither a text nor a number")
    return str(value)


def _text(value: Any, where: str, column: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{where}: {column} is {'empty' if value is None else str(value)[:80]}, no text")
    return value


def read_rows(path: str, *, needs: Iterable[str], images: Iterable[str] = (), optional: Iterable[str] = ()) -> list[Row]:
    """Rows of the Parquet files of `path` that have all columns `needs` and `images`, files sorted by name.

    Only `needs` and the existing `optional` columns are read. A folder or glob may hold other tables too (GQA has one for its
    images); a file that lacks a column is skipped if another file has all of them.

    Args:
        path: a file, a folder (searched with its subfolders), or a glob.

    Raises:
        InputError: no file, no Parquet, or a missing column; the message lists the missing and the existing columns.
    """
    needs, images, optional = list(needs), list(images), list(optional)
    opened = open_files(parquet_files(path))
    required = {*needs, *images}
    fitting = [file for file in opened if required <= set(file.columns)]
    if not fitting:
        nearest = max(opened, key=lambda file: len(required & set(file.columns)))
        missing = ", ".join(sorted(required - set(nearest.columns)))
        raise InputError(f"{nearest.path}: no column {missing}; there are {', '.join(nearest.columns)}")
    rows: list[Row] = []
    for file in fitting:
        columns = needs + [name for name in optional if name in file.columns]
        rows += [Row(file, number, values) for number, values in enumerate(file.rows(columns))]
    if not rows:
        raise InputError(f"{path}: no rows in it")
    return rows


def parquet_files(path: str) -> list[Path]:
    """The Parquet files that a file, a folder or a glob names, sorted."""
    given = Path(path)
    if given.is_file():
        return [given]
    if given.is_dir():
        found = sorted(p for p in given.rglob("*.parquet") if p.is_file())
    else:
        found = sorted(Path(p) for p in glob.glob(path, recursive=True) if Path(p).is_file())
    if not found:
        raise InputError(f"{path}: no Parquet file there")
    return found


def named_files(path: str) -> list[Path]:
    """The file that `path` names, of any kind, or the Parquet files; see `parquet_files`."""
    return [Path(path)] if Path(path).is_file() else parquet_files(path)
