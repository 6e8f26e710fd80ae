"""What preparing training records did: counts, rejects by reason, digests. A prepared folder's manifest holds these fields."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Report:
    """Report of any preparation of training records.

    Attributes:
        source: file name of the source. source_sha256: digest of its bytes.
        content_sha256: digest of ids, images and turns of all rows; identifies the data in any file layout.
        records: records read. rows: rows written. rejected: records rejected. rejects: their number by reason.
        notes: number of repaired records by kind (`image_without_tag`, `leading_turn_dropped`, ...), and of `duplicate_id`.
        without_image: text-only rows.
        answers: number of answers of each row, which is its number of training examples.
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
        """The report in a few lines."""
        counts = f"{sum(self.answers)} answers, {self.without_image} without image"
        lines = [f"{self.rows} of {self.records} records written, {counts}"]
        lines += [f"rejected: {count} x {reason}" for reason, count in sorted(self.rejects.items())]
        lines += [f"noted: {count} x {kind}" for kind, count in sorted(self.notes.items())]
        return "\n".join(lines)

    def rejects_by_reason(self) -> str:
        """Such as `5 missing_image, 1 bad_json`."""
        return ", ".join(f"{count} {reason}" for reason, count in self.rejects.items())


@dataclass
class CategoryCounts:
    """One category of a Cambrian sample.

    Attributes:
        available: records with an image. required: its share of the sample. drawn: records drawn, more than required.
        checked: drawn records that were validated. rows: rows written. sources: rows by source.
        rejected: line numbers of rejected records.
    """

    available: int
    required: int
    drawn: int
    checked: int = 0
    rows: int = 0
    sources: dict[str, int] = field(default_factory=dict)
    rejected: list[int] = field(default_factory=list)


@dataclass
class CambrianReport(Report):
    """Report of a Cambrian sample. `records` counts the drawn records that were validated.

    Attributes:
        seed, sample: the settings. source_map_sha256: digest of the table of sources. sample_sha256: that of `sample.jsonl`.
        lines: non-blank lines of the source. unreadable: lines that are not records, by reason.
        categories: counts of each category.
        available: records by source, for each category.
        text_only: records of text-only sources. imageless: records without an image in other sources; also left out.
        unmapped: `(source, folder, count)` of records with an image that the table does not cover, most frequent first.
    """

    seed: int = 0
    sample: int = 0
    source_map_sha256: str = ""
    sample_sha256: str = ""
    lines: int = 0
    unreadable: dict[str, int] = field(default_factory=dict)
    categories: dict[str, CategoryCounts] = field(default_factory=dict)
    available: dict[str, dict[str, int]] = field(default_factory=dict)
    text_only: dict[str, int] = field(default_factory=dict)
    imageless: dict[str, int] = field(default_factory=dict)
    unmapped: list[tuple[str, str, int]] = field(default_factory=list)

    def summary(self) -> str:
        """The report in some lines."""
        lines = [super().summary(), f"drawn with seed {self.seed} from {self.lines} lines"]
        for name, counts in self.categories.items():
            lines.append(f"{name}: {counts.rows} of {counts.available}")
        for what, left_out in (("text only", self.text_only), ("without image", self.imageless)):
            if left_out:
                lines.append(f"left out, {what}: {sum(left_out.values())}")
        lines += [f"unreadable: {count} x {reason}" for reason, count in self.unreadable.items()]
        lines += [f"unmapped: {count} x {source} in {folder}" for source, folder, count in self.unmapped]
        return "\n".join(lines)


@dataclass
class PaperReport(Report):
    """Report of the authors' own records.

    Attributes:
        categories: rows by category, then by source. sample_sha256: digest of `sample.jsonl`.
    """

    categories: dict[str, dict[str, int]] = field(default_factory=dict)
    sample_sha256: str = ""

    def summary(self) -> str:
        """The report in some lines."""
        lines = [super().summary()]
        for name, sources in sorted(self.categories.items()):
            lines.append(f"{name}: {sum(sources.values())} from {len(sources)} source{'s' * (len(sources) > 1)}")
        return "\n".join(lines)


def read_report(fields: dict[str, Any]) -> Report:
    """The report of a manifest's fields.

    Raises:
        TypeError: the fields are not those of a report.
    """
    if "seed" not in fields:
        return PaperReport(**fields) if "categories" in fields else Report(**fields)
    categories = {name: CategoryCounts(**counts) for name, counts in fields["categories"].items()}
    unmapped = [(source, folder, count) for source, folder, count in fields["unmapped"]]
    return CambrianReport(**{**fields, "categories": categories, "unmapped": unmapped})
