"""LLaVA records on disk -> a folder of validated rows (`lsg prepare`), and that folder opened again.

OUT/records_manifest.json     counts, rejects by reason, digests
OUT/rejects.jsonl             one line a rejected record: line, id, reason, message
OUT/llava_records/1.0.0/      array_record, one row a conversation, in the order of the source
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from lsg_jax.data.conversation import RecordError, Turn, examples, parse_record
from lsg_jax.data.prepared import Layout, PreparedRows, file_sha256, new_folder, write_manifest, write_rows
from lsg_jax.data.sources import ImageFolder, first_bracket, in_order, read_source, thread_count
from lsg_jax.errors import InputError
from lsg_jax.progress import Progress, silent

LAYOUT = Layout(manifest="records_manifest.json", dataset="llava_records", format=1)
REJECTS = "rejects.jsonl"


@dataclass
class Report:
    """What preparation did.

    Attributes:
        source: name of the source file. source_sha256: digest of its bytes.
        content_sha256: digest of all rows; identifies the data whatever the file layout.
        records: records looked at. rows: rows written. rejected: records rejected; `rejects` counts them by reason.
        notes: records mended by kind (`image_without_tag`, `leading_turn_dropped`, ...) and `duplicate_id`.
        without_image: rows of text only.
        answers: number of answers of each row, so also of training examples.
    """

    source: str
    source_sha256: str = ""
    content_sha256: str = ""
    records: int = 0
    rows: int = 0
    rejected: int = 0
    rejects: dict[str, int] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    without_image: int = 0
    answers: list[int] = field(default_factory=list)

    def summary(self) -> str:
        """What happened, in a line or a few."""
        counts = f"{sum(self.answers)} answers, {self.without_image} without image"
        lines = [f"{self.rows} of {self.records} records written, {counts}"]
        lines += [f"rejected: {count} x {reason}" for reason, count in sorted(self.rejects.items())]
        lines += [f"noted: {count} x {kind}" for kind, count in sorted(self.notes.items())]
        return "\n".join(lines)

    def rejects_by_reason(self) -> str:
        """Such as `5 missing_image, 1 bad_json`."""
        return ", ".join(f"{count} {reason}" for reason, count in self.rejects.items())


@dataclass(frozen=True)
class Checked:
    """A record that was looked at: either `row` or `error` is set. `record_id` is None where the record states none."""

    line: int
    record_id: Any
    row: dict[str, Any] | None = None
    error: RecordError | None = None
    notes: tuple[str, ...] = ()
    answers: int = 0


class Validation:
    """Proves records usable, in threads, and counts what came of them in the order of the records.

    `report` is filled as the records pass; `finish` completes it.
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
        """Looks at each (line, record) and counts it when it is yielded; records read ahead leave no trace."""
        for checked in in_order(self._check, records, self._threads):
            self.report.records += 1
            if checked.error is not None:
                self._count_reject(checked, checked.error)
            else:
                self._count_row(checked)
            yield checked

    def _check(self, item: tuple[int, Any]) -> Checked:
        line, record = item
        record_id = record.get("id") if isinstance(record, dict) else None
        try:
            if isinstance(record, RecordError):
                raise record
            conversation = parse_record(record, default_id=f"line {line}")
            image = b"" if conversation.image is None else self._images.read(conversation.image)
        except RecordError as error:
            return Checked(line, record_id, error=error)
        turns = json.dumps([[turn.role, turn.text] for turn in conversation.turns], ensure_ascii=False)
        row = {"record_id": conversation.record_id, "image": image, "turns": turns}
        return Checked(line, record_id, row, notes=conversation.notes, answers=len(examples(conversation.turns)))

    def _count_row(self, checked: Checked) -> None:
        report, row = self.report, checked.row
        assert row is not None
        report.rows += 1
        report.answers.append(checked.answers)
        report.without_image += not row["image"]
        self._notes.update(checked.notes)
        self._notes["duplicate_id"] += row["record_id"] in self._ids
        self._ids.add(row["record_id"])
        for part in (row["record_id"].encode(), row["image"], row["turns"].encode()):
            self._digest.update(len(part).to_bytes(8, "little") + part)

    def _count_reject(self, checked: Checked, error: RecordError) -> None:
        self.report.rejected += 1
        self.report.rejects[error.reason] = self.report.rejects.get(error.reason, 0) + 1
        self.first_reject = self.first_reject or f"line {checked.line}: {error.reason}: {error}"
        self.list_reject(checked.line, checked.record_id, error)

    def list_reject(self, line: int, record_id: Any, error: RecordError) -> None:
        """Writes a record that cannot be used to the list of rejects."""
        entry = {"line": line, "id": record_id, "reason": error.reason, "message": str(error)}
        self._rejects.write(json.dumps(entry) + "\n")

    def check_share(self, source: Path, max_bad_fraction: float) -> None:
        """InputError if too many of the records looked at so far are bad."""
        report = self.report
        if report.rejected > max_bad_fraction * report.records:
            raise InputError(
                f"{source}: {report.rejected} of {report.records} records are bad, more than the share of "
                f"{max_bad_fraction:g} allowed ({report.rejects_by_reason()}; first at {self.first_reject})"
            )

    def finish(self) -> None:
        """Completes the report once all records have passed."""
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
    progress: Progress = silent,
) -> Report:
    """Validates every record, decodes every image, and writes the rows that pass into the new folder `out`.

    Args:
        source: LLaVA records, a JSON array or JSONL.
        images: the root that the records' image paths are relative to.
        max_bad_fraction: share of records in [0, 1] that may be rejected.
        threads: threads that read and decode images; None takes one a core. The result does not depend on it.
        progress: counts the records that were read; their total is not known.

    Raises:
        InputError: `out` is not empty, the source cannot be read, no record is good, or more than `max_bad_fraction` of them
            are bad. `out` is then as it was.
    """
    source = Path(source)
    first_bracket(source)
    image_folder, threads, report = ImageFolder(Path(images)), thread_count(threads), Report(source.name)
    with new_folder(Path(out)) as folder, (folder / REJECTS).open("w", encoding="utf-8") as rejects:
        validation = Validation(report, image_folder, rejects, threads)

        def rows() -> Iterator[dict[str, Any]]:
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
        write_manifest(folder, LAYOUT, asdict(report))
    return report


def write_records(folder: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes rows of `record_id`, `image` and `turns` (JSON) into a new folder."""
    import tensorflow_datasets as tfds

    text = tfds.features.Text
    write_rows(folder, LAYOUT, {"record_id": text(), "image": tfds.features.Image(), "turns": text()}, rows)


class RandomAccess(PreparedRows):
    """Rows by index: `{"record_id": str, "image": encoded bytes, empty without one, "turns": [Turn, ...]}`."""

    layout = LAYOUT

    def _row(self, stored: dict[str, Any]) -> dict[str, Any]:
        turns = [Turn(role, text) for role, text in json.loads(stored["turns"])]
        return {"record_id": stored["record_id"].decode(), "image": bytes(stored["image"]), "turns": turns}


def open_records(path: str | Path) -> RandomAccess:
    """Opens a folder of training records, whatever `lsg prepare` made it from. See `PreparedRows` for errors."""
    return RandomAccess(path)
