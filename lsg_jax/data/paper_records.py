"""The records that the paper's authors trained on (data set `JH-C-k/lsg_public` on the Hub) -> training records.

A row has `id`, `image`, `conversations` (a question and an answer), `category` (one of the paper's six), `source`, and columns
that training does not use (`UNUSED`). Rows come as JSON, JSONL or Parquet. An image is a path, or an object `{bytes, path}` as
Hub data sets store them.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from lsg_jax.data.cambrian import SAMPLE_FILE
from lsg_jax.data.cambrian_sources import CATEGORIES
from lsg_jax.data.conversation import RecordError
from lsg_jax.data.layout import ImageSize
from lsg_jax.data.parquet import parquet_files, read_rows
from lsg_jax.data.prepared import write_manifest
from lsg_jax.data.records import LAYOUT, REJECTS, Record, Validation, listed_id, write_records
from lsg_jax.data.reports import PaperReport
from lsg_jax.data.sources import ImageFolder, check_fraction, checked_size, read_source, thread_count
from lsg_jax.digest import file_sha256, json_sha256
from lsg_jax.errors import InputError
from lsg_jax.files import new_folder
from lsg_jax.progress import Progress, silent

UNUSED = ("model", "original_caption", "url", "type", "qtype", "task", "token_count")
NONE = "(none)"


def prepare_paper(
    source: str | Path,
    images: str | Path,
    out: str | Path,
    *,
    max_bad_fraction: float = 0.01,
    threads: int | None = None,
    follow_links: bool = False,
    progress: Progress = silent,
) -> PaperReport:
    """Validates all rows and writes the usable ones in their order, as `prepare_llava` does.

    `sample.jsonl` lists line, id, category, source and row (null for a reject) of each, as for a Cambrian sample.

    Args:
        source: a JSON, JSONL or Parquet file, or a folder with Parquet files or with one of the others.
        images: root folder of image paths; images that come with their rows need none.
        max_bad_fraction, threads, follow_links, progress: as in `prepare_llava`.

    Raises:
        InputError: as in `prepare_llava`, or the folder leaves open which file to read.
    """
    source = Path(source)
    check_fraction(max_bad_fraction)
    files = _record_files(source)
    threads = thread_count(threads)
    held = RowImages(Path(images), follow_links=follow_links)
    report = PaperReport(source.name)
    with new_folder(Path(out)) as folder, (folder / REJECTS).open("w", encoding="utf-8") as rejects:
        validation = Validation(report, held, rejects, threads)
        with (folder / SAMPLE_FILE).open("w", encoding="utf-8") as listing:
            write_records(folder, _rows(files, held, validation, listing, progress))
        validation.finish()
        validation.check_share(source, max_bad_fraction)
        if not report.rows:
            raise InputError(f"{source}: no usable record ({report.rejects_by_reason() or 'the list is empty'})")
        digests = [file_sha256(file) for file in files]
        report.source_sha256 = digests[0] if len(files) == 1 else json_sha256(digests)
        report.sample_sha256 = file_sha256(folder / SAMPLE_FILE)
        rejects.flush()
        write_manifest(folder, LAYOUT, report)
    return report


class RowImages(ImageFolder):
    """Images that come with their rows, each of which is read once, beside those of a folder."""

    def __init__(self, root: Path, *, follow_links: bool = False):
        super().__init__(root, follow_links=follow_links)
        self._held: dict[str, bytes] = {}

    @property
    def pending(self) -> int:
        """Bytes of the images that are held."""
        return sum(map(len, tuple(self._held.values())))

    def hold(self, number: int, data: bytes) -> str:
        """Keeps the image of a row until it is read or dropped; returns its name for `read`."""
        self._held[name := _name(number)] = data
        return name

    def drop(self, number: int) -> None:
        """Forgets the image of a row, if it was not read."""
        self._held.pop(_name(number), None)

    def read(self, path: str) -> tuple[bytes, ImageSize]:
        """As `ImageFolder.read`, for a name that is held or a path."""
        data = self._held.pop(path, None)
        return super().read(path) if data is None else (data, checked_size(data, path))


def _name(number: int) -> str:
    return f"image of row {number}"


def _record_files(source: Path) -> list[Path]:
    """The files of a source: itself, all Parquet files of a folder, or the one JSON or JSONL file in it."""
    if not source.is_dir():
        if not source.is_file():
            raise InputError(f"{source}: no such file or folder of records")
        return [source]
    if any(source.rglob("*.parquet")):
        return parquet_files(str(source))
    found = sorted(path for path in source.iterdir() if path.suffix in (".json", ".jsonl") and path.is_file())
    if len(found) != 1:
        names = ", ".join(path.name for path in found[:8]) or "none"
        raise InputError(f"{source}: no Parquet file in it, and not just one JSON or JSONL file ({names}): give the file")
    return found


def _rows(files: list[Path], held: RowImages, validation: Validation, listing: TextIO, progress: Progress) -> Iterator[Record]:
    """Usable rows in order. Lists each row that was validated."""
    report: PaperReport = validation.report  # type: ignore[assignment]
    labels: dict[int, tuple[str, str]] = {}

    def records() -> Iterator[tuple[int, Any]]:
        for number, row in _read(files):
            labels[number] = _labels(row)
            yield number, _plain(row, number, held)

    for checked in validation.check(records()):
        held.drop(checked.line)
        category, name = labels.pop(checked.line)
        row = None if checked.row is None else report.rows - 1
        entry = {"line": checked.line, "id": listed_id(checked.record_id), "category": category, "source": name, "row": row}
        listing.write(json.dumps(entry) + "\n")
        progress(report.records, None, "records")
        if checked.row is not None:
            counts = report.categories.setdefault(category, {})
            counts[name] = counts.get(name, 0) + 1
            yield checked.row


def _read(files: list[Path]) -> Iterator[tuple[int, Any]]:
    """(line or 1-based position, row) of all files. A line that is no JSON yields a RecordError instead of the row."""
    if files[0].suffix != ".parquet":
        yield from read_source(files[0])
        return
    number = 0
    for file in files:
        for row in read_rows(str(file), needs=["conversations"], images=["image"], optional=["id", "source", "category"]):
            number += 1
            yield number, row.values | {"image": row.file.cell(row.number, "image")}


def _labels(row: Any) -> tuple[str, str]:
    """Category and source of a row. `General VQA` is `general`; a category that is none of the six keeps its name."""
    if not isinstance(row, dict):
        return NONE, NONE
    category, source = (str(row.get(name) or NONE).strip() for name in ("category", "source"))
    first = category.lower().replace("_", " ").replace("-", " ").split(" ")[0]
    return first if first in CATEGORIES else category[:80], source[:80]


def _plain(row: Any, number: int, held: RowImages) -> Any:
    """The row as a LLaVA record whose image is a path, or the name of a held image."""
    if not isinstance(row, dict):
        return row
    try:
        image = _image(row.get("image"))
        if isinstance(image, bytes):
            image = held.hold(number, image)
        kept = {name: value for name, value in row.items() if name not in UNUSED}
        return kept | {"image": image, "conversations": _turns(row)}
    except RecordError as error:
        return error


def _image(value: Any) -> Any:
    """The bytes of an object `{bytes, path}`, else its path; everything else as it is."""
    if not isinstance(value, dict):
        return value
    data = value.get("bytes")
    if isinstance(data, str):
        try:
            data = base64.b64decode(data, validate=True)
        except (binascii.Error, ValueError):
            raise RecordError("bad_image_field", "the bytes of the image are text, but no base64") from None
    return data if isinstance(data, bytes) and data else value.get("path")


def _turns(row: dict[str, Any]) -> Any:
    """`conversations` as a list of turns: from a list, a list as JSON text, or columns `{from: [...], value: [...]}`."""
    turns = row.get("conversations")
    if isinstance(turns, str):
        try:
            turns = json.loads(turns)
        except (ValueError, RecursionError):
            raise RecordError("no_turns", "conversations is text, but no JSON") from None
    if isinstance(turns, dict) and turns and all(isinstance(column, list) for column in turns.values()):
        if len({len(column) for column in turns.values()}) > 1:
            raise RecordError("bad_turn", "the columns of conversations differ in length")
        return [dict(zip(turns, values, strict=True)) for values in zip(*turns.values(), strict=True)]
    return turns
