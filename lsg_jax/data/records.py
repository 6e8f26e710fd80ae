"""Records of conversations on disk -> a folder of validated rows (`lsg prepare`), and a reader of that folder.

OUT/records_manifest.json     counts, rejects by reason, digests
OUT/rejects.jsonl             one line per rejected record: line, id, reason, message
OUT/llava_records/1.0.0/      array_record, one row per conversation, in the order of the source
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from lsg_jax.data.conversation import RecordError, Turn, examples, parse_record
from lsg_jax.data.decoding import MAX_FILE
from lsg_jax.data.images import image_size
from lsg_jax.data.layout import ImageSize
from lsg_jax.data.prepared import FolderLayout, PreparedRows, write_manifest, write_rows
from lsg_jax.data.reports import Report, read_report
from lsg_jax.data.sources import ImageFolder, check_fraction, first_bracket, in_order, read_source, thread_count
from lsg_jax.digest import file_sha256
from lsg_jax.errors import InputError
from lsg_jax.files import new_folder
from lsg_jax.progress import Progress, silent

LAYOUT = FolderLayout(manifest="records_manifest.json", dataset="llava_records", format=4, oldest=1)
REJECTS = "rejects.jsonl"
MAX_NAMED = 500
"""Characters of a record's id or of an error in lists of records."""


@dataclass(frozen=True)
class Record:
    """One conversation.

    Attributes:
        record_id: as the source states it; need not be unique.
        turns: human and gpt in turn, the last one an answer.
        images: bytes of each image file, in the order of the tags in the turns; () without an image.
        image_sizes: (width, height) in pixels of each image.
    """

    record_id: str
    turns: tuple[Turn, ...]
    images: tuple[bytes, ...] = ()
    image_sizes: tuple[ImageSize, ...] = ()


@dataclass(frozen=True)
class Checked:
    """Result of validating one record: either `row` or `error` is set. `record_id` is None if the record has none."""

    line: int
    record_id: Any
    row: Record | None = None
    error: RecordError | None = None
    notes: tuple[str, ...] = ()
    answers: int = 0


def listed_id(record_id: Any) -> Any:
    """A record's id as lists name it: an id that is no text or number, or a long one, by the start of its text."""
    if isinstance(record_id, (str, int, float)) and len(text := str(record_id)) <= MAX_NAMED:
        return record_id if not isinstance(record_id, float) or math.isfinite(record_id) else text
    return None if record_id is None else str(record_id)[:MAX_NAMED]


class Validation:
    """Validates records in threads, and counts the results in the order of the records.

    `check` fills `report`, `finish` completes it.
    """

    def __init__(self, report: Report, images: ImageFolder, rejects: TextIO, threads: int):
        self.report = report
        self.first_reject = ""
        self._images = images
        self._rejects = rejects
        self._threads = threads
        self._ids: set[str] = set()
        self._notes: Counter[str] = Counter()
        self._digest = hashlib.sha256()

    def check(self, records: Iterable[tuple[int, Any]]) -> Generator[Checked, None, None]:
        """Validates each (line, record). A record is counted when it is yielded, so records read ahead do not count."""
        size = lambda checked: sum(map(len, checked.row.images)) if checked.row else 0
        for checked in in_order(self._check, records, self._threads, held=size, pending=lambda: self._images.pending):
            self.report.records += 1
            if checked.row is not None:
                self._count_row(checked, checked.row)
            elif checked.error is not None:
                self._count_reject(checked, checked.error)
            yield checked

    def _check(self, item: tuple[int, Any]) -> Checked:
        line, record = item
        record_id = record.get("id") if isinstance(record, dict) else None
        try:
            if isinstance(record, RecordError):
                raise record
            conversation = parse_record(record, default_id=f"line {line}")
            row = Record(conversation.record_id, conversation.turns)
            if read := self._read_images(conversation.images):
                images, sizes = zip(*read, strict=True)
                row = replace(row, images=images, image_sizes=sizes)
        except RecordError as error:
            return Checked(line, record_id, error=error)
        return Checked(line, record_id, row, notes=conversation.notes, answers=len(examples(conversation.turns)))

    def _read_images(self, paths: Sequence[str]) -> list[tuple[bytes, ImageSize]]:
        read: list[tuple[bytes, ImageSize]] = []
        for path in paths:
            read.append(self._images.read(path))
            if sum(len(data) for data, _ in read) > MAX_FILE:
                raise RecordError(
                    "images_too_large", f"{path}: the record's images are larger than {MAX_FILE >> 20} MiB in all"
                )
        return read

    def _count_row(self, checked: Checked, row: Record) -> None:
        report = self.report
        report.rows += 1
        report.answers.append(checked.answers)
        report.without_image += not row.images
        self._notes.update(checked.notes)
        self._notes["duplicate_id"] += row.record_id in self._ids
        self._ids.add(row.record_id)
        for part in (row.record_id.encode(), *(row.images or (b"",)), _turns_to_json(row.turns).encode()):
            self._digest.update(len(part).to_bytes(8, "little") + part)

    def _count_reject(self, checked: Checked, error: RecordError) -> None:
        self.report.rejected += 1
        self.report.rejects[error.reason] = self.report.rejects.get(error.reason, 0) + 1
        self.first_reject = self.first_reject or f"line {checked.line}: {error.reason}: {str(error)[:MAX_NAMED]}"
        self.list_reject(checked.line, checked.record_id, error)

    def list_reject(self, line: int, record_id: Any, error: RecordError) -> None:
        """Appends a record to the list of rejects."""
        message = " ".join(str(error).split())[:MAX_NAMED]
        self._rejects.write(
            json.dumps({"line": line, "id": listed_id(record_id), "reason": error.reason, "message": message}) + "\n"
        )

    def check_share(self, source: Path, max_bad_fraction: float) -> None:
        """Raises InputError if too many of the records so far are bad."""
        report = self.report
        if report.rejected > max_bad_fraction * report.records:
            raise InputError(
                f"{source}: {report.rejected} of {report.records} records are bad, more than the share of "
                f"{max_bad_fraction:g} allowed ({report.rejects_by_reason()}; first at {self.first_reject})"
            )

    def finish(self) -> None:
        """Completes the report after the last record."""
        report = self.report
        report.content_sha256 = self._digest.hexdigest()
        report.rejects = dict(Counter(report.rejects).most_common())
        report.notes = {kind: count for kind, count in sorted(self._notes.items()) if count}


def prepare_llava(
    source: str | Path,
    images: str | Path,
    out: str | Path,
    *,
    max_bad_fraction: float = 0.01,
    threads: int | None = None,
    follow_links: bool = False,
    progress: Progress = silent,
) -> Report:
    """Validates every record, decodes every image, and writes the usable rows into the new folder `out`.

    Args:
        source: records of any shape that `record_shapes` reads, in a file that `sources.read_source` reads.
        images: root folder of the records' image paths.
        max_bad_fraction: share of records in [0, 1] that may be rejected.
        threads: threads that read and decode images; None: one per core. The result does not depend on it.
        follow_links: read images that links in the folder lead to elsewhere; otherwise they are rejected.
        progress: counts the validated records; their total is unknown.

    Raises:
        InputError: `out` is not empty, the source cannot be read, no record is usable, or more than `max_bad_fraction` of the
            records are bad. `out` is left unchanged.
    """
    source = Path(source)
    check_fraction(max_bad_fraction)
    first_bracket(source)
    image_folder = ImageFolder(Path(images), follow_links=follow_links)
    threads, report = thread_count(threads), Report(source.name)
    with new_folder(Path(out)) as folder, (folder / REJECTS).open("w", encoding="utf-8") as rejects:
        validation = Validation(report, image_folder, rejects, threads)

        def rows() -> Iterator[Record]:
            for checked in validation.check(read_source(source)):
                progress(report.records, None, "records")
                if checked.row is not None:
                    yield checked.row
            validation.finish()
            validation.check_share(source, max_bad_fraction)
            if not report.rows:
                raise InputError(f"{source}: no usable record ({report.rejects_by_reason() or 'the list is empty'})")

        write_records(folder, rows())
        rejects.flush()
        report.source_sha256 = file_sha256(source)
        write_manifest(folder, LAYOUT, report)
    return report


def write_records(folder: Path, rows: Iterable[Record]) -> None:
    """Writes records into a new folder, without a manifest."""
    import numpy as np
    import tensorflow_datasets as tfds

    features = {
        "record_id": tfds.features.Text(),
        # encoded files: TFDS cannot leave a sequence of images undecoded
        "images": tfds.features.Sequence(tfds.features.Text()),
        "image_sizes": tfds.features.Tensor(shape=(None, 2), dtype=np.int32),
        "turns": tfds.features.Text(),
    }

    def stored(row: Record) -> dict[str, Any]:
        sizes = np.array(row.image_sizes, np.int32).reshape(-1, 2)
        return {
            "record_id": row.record_id,
            "images": list(row.images),
            "image_sizes": sizes,
            "turns": _turns_to_json(row.turns),
        }

    write_rows(folder, LAYOUT, features, map(stored, rows))


def _turns_to_json(turns: Iterable[Turn]) -> str:
    return json.dumps([[turn.role, turn.text] for turn in turns], ensure_ascii=False)


class PreparedRecords(PreparedRows[Record, Report]):
    """Records by index.

    Folders of formats 1 and 2 hold at most one image a row, those of format 1 no sizes, which are then read from its header.
    """

    layout = LAYOUT

    @property
    def digest(self) -> str:
        """Identifies the rows, whatever files they are in; before format 4 the manifest, which runs of that time know."""
        return self.manifest.report.content_sha256 if self.manifest.format >= 4 else super().digest

    def _row(self, stored: dict[str, Any]) -> Record:
        single = [stored["image"]] if "image" in stored else []
        images = tuple(bytes(image) for image in stored.get("images", single) if image)
        if "image_sizes" in stored:
            sizes = tuple((int(width), int(height)) for width, height in stored["image_sizes"])
        else:
            sizes = tuple(map(image_size, images))
        turns = tuple(Turn(role, text) for role, text in json.loads(stored["turns"]))
        return Record(stored["record_id"].decode(), turns, images, sizes)

    def _report(self, content: dict[str, Any]) -> Report:
        return read_report(content)


def open_records(path: str | Path, *, check: bool = True) -> PreparedRecords:
    """Opens a folder of training records from any source that `lsg prepare` reads. Arguments, errors: `PreparedRows`."""
    return PreparedRecords(path, check=check)
