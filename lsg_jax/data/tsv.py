"""Reads tables of tab-separated values with base64 images, as VLMEvalKit and the owners of MMBench publish them."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lsg_jax.data.parquet import from_base64, no_image
from lsg_jax.errors import InputError
from lsg_jax.files import is_file

MAX_INDEX = 64
"""Characters of an image cell that names the row whose image it shares; no image is as short in base64."""


@dataclass(frozen=True)
class TsvImage:
    """A base64 image in a table."""

    text: str
    where: str

    def read(self) -> bytes:
        """The encoded image. Raises InputError that names the file and row."""
        return from_base64(self.text, f"{self.where}: image")


@dataclass(frozen=True)
class TsvRow:
    """One row, used as `parquet.Row`: `row["column"]` is a text, empty for an empty cell."""

    where: str
    values: Mapping[str, str]
    shared: Mapping[str, str]  # index -> base64 image

    def __getitem__(self, column: str) -> str:
        return self.values[column]

    def get(self, column: str, default: Any = None) -> Any:
        return self.values.get(column, default)

    def text(self, column: str) -> str:
        """The text of a cell. Raises InputError for an empty one."""
        if not self.values[column]:
            raise InputError(f"{self.where}: {column} is empty, no text")
        return self.values[column]

    def images(self) -> tuple[TsvImage, ...]:
        """The image of the row, or of the row whose index its cell holds. Raises InputError if there is none."""
        text = self.values["image"] or no_image(self.where, "image")
        if len(text) <= MAX_INDEX:
            if text not in self.shared:
                raise InputError(f"{self.where}: image {text} is the index of no row with an image")
            text = self.shared[text]
        return (TsvImage(text, self.where),)


def read_tsv(path: str, *, needs: Iterable[str], optional: Iterable[str] = ()) -> list[TsvRow]:
    """The rows of a table with a header, whose columns `index` and `image` are among `needs`.

    Raises:
        InputError: no such file, no such table, or a missing column; the message lists the missing and the existing columns.
    """
    import pyarrow
    import pyarrow.csv

    needs = list(needs)
    if not is_file(Path(path)):
        raise InputError(f"{path}: no such file")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            header = next(csv.reader(file, delimiter="\t"), [])
        if not header:
            raise InputError(f"{path}: the file is empty")
        if missing := sorted(set(needs) - set(header)):
            raise InputError(f"{path}: no column {', '.join(missing)}; there are {', '.join(header)[:200]}")
        columns = [name for name in header if name in {*needs, *optional}]
        table = pyarrow.csv.read_csv(
            path,
            read_options=pyarrow.csv.ReadOptions(block_size=min(Path(path).stat().st_size, 2**31 - 1)),
            parse_options=pyarrow.csv.ParseOptions(delimiter="\t", newlines_in_values=True),
            convert_options=pyarrow.csv.ConvertOptions(
                column_types=dict.fromkeys(columns, pyarrow.string()), include_columns=columns
            ),
        )
    except (OSError, UnicodeDecodeError, csv.Error, pyarrow.ArrowException) as error:
        raise InputError(f"{path}: cannot be read as tab-separated values: {str(error).splitlines()[0][:200]}") from None
    rows = table.to_pylist()
    shared = {row["index"]: row["image"] for row in rows if len(row["image"]) > MAX_INDEX}
    return [TsvRow(f"{path}: row {number}", row, shared) for number, row in enumerate(rows)]
