"""Cambrian-7M -> training records: a sample with equal shares of six categories, in one pass over a JSONL file of any size.

A record's category follows from its `source` and the first folder of its image path (the first two below `hfdata/`), by the
table in `cambrian_sources` and the user's TOML. Records that the table does not cover are never drawn.

Sampling: a record's rank is a hash of (seed, line number). Each category keeps its records of lowest rank, 1.2 times as many
as it needs, and validates them in the order of rank until it has its share. So the result depends only on the file, the table
and the seed.
"""

from __future__ import annotations

import hashlib
import heapq
import io
import json
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, TextIO

from lsg_jax.data.cambrian_sources import CATEGORIES, TEXT_ONLY, SourceMap, first_folder, source_name
from lsg_jax.data.prepared import write_manifest
from lsg_jax.data.record_shapes import RecordError, image_fields
from lsg_jax.data.records import LAYOUT, REJECTS, Record, Validation, listed_id, write_records
from lsg_jax.data.reports import CambrianReport, CategoryCounts
from lsg_jax.data.sources import (
    ImageFolder,
    check_fraction,
    first_bracket,
    is_one_object,
    numbered_lines,
    parse_line,
    thread_count,
)
from lsg_jax.digest import file_sha256
from lsg_jax.errors import ConfigError, InputError
from lsg_jax.files import new_folder
from lsg_jax.progress import Progress, silent

SAMPLE_FILE = "sample.jsonl"
OVERSAMPLING = 1.2

# ------------------------------------------------------------------------------------------------------------------ the pass


class _Pass:
    """One pass over the source. Counts all records and keeps those of lowest rank in each category."""

    def __init__(self, table: SourceMap, images: ImageFolder, quotas: dict[str, int], seed: int):
        self.lines = 0
        self.unreadable: Counter[str] = Counter()
        self.available: dict[str, Counter[str]] = {category: Counter() for category in CATEGORIES}
        self.text_only: Counter[str] = Counter()
        self.imageless: Counter[str] = Counter()
        self.unmapped: Counter[tuple[str, str]] = Counter()
        self._table = table
        self._images = images
        self._seed = seed
        self._sizes = {category: math.ceil(OVERSAMPLING * quota) for category, quota in quotas.items()}
        self._kept: dict[str, list[tuple[int, int, str, bytes]]] = {category: [] for category in CATEGORIES}

    def read(self, source: Path, validation: Validation, progress: Progress) -> str:
        """Reads all lines, lists those that are not records as rejects, and returns the sha256 of the file."""
        with source.open("rb", buffering=0) as raw:
            hashed = _HashedFile(raw)
            for number, line in numbered_lines(io.BufferedReader(hashed, 1 << 20)):
                self.lines += 1
                record = parse_line(number, line)
                if isinstance(record, dict) and isinstance(line, bytes):
                    self._add(number, line, record)
                else:
                    if not isinstance(record, RecordError):
                        record = RecordError("not_a_record", f"line {number} is not an object")
                    self.unreadable[record.reason] += 1
                    validation.list_reject(number, None, record)
                if self.lines % 10_000 == 0:
                    progress(self.lines, None, "lines read")
            return hashed.digest.hexdigest()

    def _add(self, number: int, line: bytes, record: dict[str, Any]) -> None:
        source = record.get("source")
        name = source_name(source) if isinstance(source, str) else "(no source)"
        try:
            images = image_fields(record)
            folder = first_folder(self._images.relative(images[0])) if images else ""  # of several, the first decides
        except RecordError:  # not a path, or one that leads elsewhere: validation reports it
            images, folder = ["?"], "?"
        category = self._table.category(name, folder)
        if category == TEXT_ONLY:
            self.text_only[name] += 1
        elif not images and self._table.knows(name):
            self.imageless[name] += 1
        elif category is None or not images:
            self.unmapped[name, folder or "(root)" if images else "(no image)"] += 1
        else:
            self.available[category][name] += 1
            self._keep(category, number, name, line)

    def _keep(self, category: str, number: int, name: str, line: bytes) -> None:
        kept, entry = self._kept[category], (-rank(self._seed, number), number, name, line)
        if len(kept) < self._sizes[category]:
            heapq.heappush(kept, entry)
        elif entry > kept[0]:  # ranks are negated: the first is the highest that is kept
            heapq.heapreplace(kept, entry)

    def drawn(self, category: str) -> dict[int, tuple[str, bytes]]:
        """{line number: (source, line)} of the records kept, in the order of rank."""
        return {number: (name, line) for _, number, name, line in sorted(self._kept[category], reverse=True)}


def rank(seed: int, number: int) -> int:
    """Rank of a line in the sample: 16 bytes of BLAKE2b of `seed:number`, as an integer."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{number}".encode(), digest_size=16).digest(), "big")


class _HashedFile(io.RawIOBase):
    """A file that is hashed while it is read."""

    def __init__(self, file: io.FileIO):
        self.digest = hashlib.sha256()
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer)
        self.digest.update(memoryview(buffer)[:count])
        return count


# ------------------------------------------------------------------------------------------------------------------ sampling


def prepare_cambrian(
    source: str | Path,
    images: str | Path,
    out: str | Path,
    *,
    sample: int = 10_000,
    seed: int = 0,
    source_map: str | Path | None = None,
    max_bad_fraction: float = 0.01,
    threads: int | None = None,
    follow_links: bool = False,
    progress: Progress = silent,
) -> CambrianReport:
    """Draws `sample` records in equal shares of the six categories and writes them as `prepare_llava` does.

    Rows are written category by category, in the order of rank. `sample.jsonl` lists each record that was validated, with its
    row, or null for a reject.

    Args:
        source: Cambrian as JSONL. images: root folder of its image paths.
        sample: rows in all. If six does not divide it, the first categories get one more.
        source_map: TOML that adds to the table of sources; see `SourceMap.extended`.
        max_bad_fraction: largest share of drawn records that are rejected, and of lines that are unreadable.
        threads, follow_links: as in `prepare_llava`.
        progress: counts lines, then rows.

    Raises:
        InputError: as in `prepare_llava`, or a category has fewer usable records than its share.
        ConfigError: `sample` is below six, or the source map cannot be used.
    """
    source = Path(source)
    check_fraction(max_bad_fraction)
    quotas = shares(sample)
    table = SourceMap.built_in() if source_map is None else SourceMap.built_in().extended(Path(source_map))
    if first_bracket(source) == b"[" or is_one_object(source):
        raise InputError(f"{source}: one JSON array or object, which cannot be read line by line; use JSONL, one record a line")
    image_folder, threads = ImageFolder(Path(images), follow_links=follow_links), thread_count(threads)
    report = CambrianReport(source.name, seed=seed, sample=sample, source_map_sha256=table.sha256)
    with new_folder(Path(out)) as folder, (folder / REJECTS).open("w", encoding="utf-8") as rejects:
        validation = Validation(report, image_folder, rejects, threads)
        found = _Pass(table, image_folder, quotas, seed)
        report.source_sha256 = found.read(source, validation, progress)
        _record_counts(report, found, quotas)
        _check_source(source, report, max_bad_fraction)
        with (folder / SAMPLE_FILE).open("w", encoding="utf-8") as listing:
            write_records(folder, _draw(report, found, validation, listing, progress))
        validation.finish()
        validation.check_share(source, max_bad_fraction)
        _check_shares(source, report, "rows")
        report.sample_sha256 = file_sha256(folder / SAMPLE_FILE)
        rejects.flush()
        write_manifest(folder, LAYOUT, report)
    return report


def shares(sample: int) -> dict[str, int]:
    """Rows of each category. The first ones get the remainder: 10,000 = 4 x 1667 + 2 x 1666."""
    if sample < len(CATEGORIES):
        raise ConfigError(f"a sample of {sample}: at least one record for each of the {len(CATEGORIES)} categories is needed")
    share, left = divmod(sample, len(CATEGORIES))
    return {category: share + (place < left) for place, category in enumerate(CATEGORIES)}


def _record_counts(report: CambrianReport, found: _Pass, quotas: dict[str, int]) -> None:
    report.lines = found.lines
    report.unreadable = dict(found.unreadable.most_common())
    report.text_only = dict(found.text_only.most_common())
    report.imageless = dict(found.imageless.most_common())
    report.unmapped = [(*pair, count) for pair, count in found.unmapped.most_common()]
    for category in CATEGORIES:
        by_source = found.available[category]
        report.available[category] = dict(by_source.most_common())
        report.categories[category] = CategoryCounts(by_source.total(), quotas[category], len(found.drawn(category)))


def _check_source(source: Path, report: CambrianReport, max_bad_fraction: float) -> None:
    unreadable = sum(report.unreadable.values())
    if unreadable > max_bad_fraction * report.lines:
        reasons = ", ".join(f"{count} {reason}" for reason, count in report.unreadable.items())
        raise InputError(
            f"{source}: {unreadable} of {report.lines} lines are not records, more than the share of {max_bad_fraction:g} "
            f"allowed ({reasons})"
        )
    _check_shares(source, report, "available")


def _check_shares(source: Path, report: CambrianReport, what: Literal["available", "rows"]) -> None:
    """Raises an InputError that names each category with fewer records than it needs."""
    found = [(name, getattr(counts, what), counts.required) for name, counts in report.categories.items()]
    short = [f"{name} {count} / {required}" for name, count, required in found if count < required]
    if not short:
        return
    kind, hint = "available", ""
    if what == "rows":
        kind, hint = "usable", f"; of {report.records} drawn, {report.rejected} are bad ({report.rejects_by_reason()})"
    elif report.unmapped:
        name, folder, count = report.unmapped[0]
        total = sum(count for *_, count in report.unmapped)
        hint = f"; no category lists {total} more, most of them {name} in {folder} ({count}): add them with --source-map"
    raise InputError(f"{source}: too few records for a sample of {report.sample} ({kind} / required): {', '.join(short)}{hint}")


def _draw(
    report: CambrianReport, found: _Pass, validation: Validation, listing: TextIO, progress: Progress
) -> Iterator[Record]:
    """Usable records in the order of rank, until each category has its share."""
    for category, counts in report.categories.items():
        drawn = found.drawn(category)
        records = ((number, parse_line(number, line)) for number, (_, line) in drawn.items())
        with closing(validation.check(records)) as checks:
            for checked in checks:
                name, _ = drawn[checked.line]
                counts.checked += 1
                row = None if checked.row is None else report.rows - 1
                entry = {
                    "line": checked.line,
                    "id": listed_id(checked.record_id),
                    "category": category,
                    "source": name,
                    "row": row,
                }
                listing.write(json.dumps(entry) + "\n")
                if checked.row is None:
                    counts.rejected.append(checked.line)
                    continue
                counts.rows += 1
                counts.sources[name] = counts.sources.get(name, 0) + 1
                progress(report.rows, report.sample, "rows written")
                yield checked.row
                if counts.rows == counts.required:
                    break
