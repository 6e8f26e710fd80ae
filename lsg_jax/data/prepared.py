"""Folders that `lsg prepare` writes: rows in array_record, readable as a TFDS data set, and a manifest that is written last.

    OUT/<manifest>.json           counts, settings, sizes and digests of the files below
    OUT/<data set>/1.0.0/         split `train`, rows in the order of the source

A folder appears whole or not at all. TensorFlow is not needed. tensorflow-datasets is imported where it is used, because the
import takes a second.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from lsg_jax.digest import file_sha256
from lsg_jax.errors import InputError
from lsg_jax.files import check_inside
from lsg_jax.json_files import read_sealed, write_sealed

logger = logging.getLogger(__name__)

VERSION = "1.0.0"
ROWS_PER_SHARD = 10_000


@dataclass(frozen=True)
class FolderLayout:
    """File names within a prepared folder, and its format: the one that is written and the oldest that is still read."""

    manifest: str
    dataset: str
    format: int
    oldest: int

    def rows(self, folder: Path) -> Path:
        """Folder of the array_record files."""
        return folder / self.dataset / VERSION


Row = TypeVar("Row")
Report = TypeVar("Report")


@dataclass(frozen=True)
class Manifest(Generic[Report]):
    """A prepared folder's manifest.

    Attributes:
        format: format of the folder.
        report: what preparation did.
        files: size of each file of rows, in bytes. sha256: their digests.
        digest: sha256 of the manifest's bytes; identifies the folder.
    """

    format: int
    report: Report
    files: dict[str, int]
    sha256: dict[str, str]
    digest: str


def write_rows(folder: Path, layout: FolderLayout, features: dict[str, Any], rows: Iterable[dict[str, Any]]) -> None:
    """Writes rows one by one, as a data set that `tfds.builder_from_directory` reads.

    `GeneratorBasedBuilder` is not used: it holds rows back to sort them by key. Ascending keys all fall into one of its
    buckets, so 60 GB of images would be in memory at once.

    Args:
        features: TFDS feature of each field of a row.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.dataset_info import DatasetIdentity

    path = layout.rows(folder)
    path.mkdir(parents=True)
    identity = DatasetIdentity(
        name=layout.dataset, version=tfds.core.Version(VERSION), data_dir=str(path), module_name=__name__
    )
    info = tfds.core.DatasetInfo(builder=identity, features=tfds.features.FeaturesDict(features))
    writer = tfds.core.SequentialWriter(info, max_examples_per_shard=ROWS_PER_SHARD, file_format="array_record")
    writer.initialize_splits(["train"])
    try:
        writer.add_examples({"train": rows})
        writer.close_all()
    except RuntimeError as error:  # what array_record raises when the disk is full
        raise OSError(str(error).splitlines()[0][:200]) from None


def write_manifest(folder: Path, layout: FolderLayout, report: Any) -> None:
    """Writes the manifest: the fields of the report, a dataclass, and size and sha256 of each file of rows."""
    paths = sorted(layout.rows(folder).iterdir())
    manifest = {
        "format": layout.format,
        **asdict(report),
        "files": {path.name: path.stat().st_size for path in paths},
        "sha256": {path.name: file_sha256(path) for path in paths},
    }
    write_sealed(folder / layout.manifest, manifest)


class PreparedRows(Generic[Row, Report]):
    """Random access to rows, in the order they were prepared. Subclasses define the row and the report.

    Args:
        check: compare all files with their sha256, which reads them once. Their sizes are always compared.

    Raises:
        InputError: the folder is missing, `lsg prepare` did not write it, or one of its files is missing or changed.
    """

    layout: FolderLayout
    manifest: Manifest[Report]

    def __init__(self, path: str | Path, *, check: bool = True):
        self._path = Path(path)
        self.manifest, rows = self._read_manifest()
        if check and (changed := self.changed_files()):
            more = f", nor do {len(changed) - 1} others" if len(changed) > 1 else ""
            raise InputError(f"{changed[0]} does not match its sha256{more}; run `lsg prepare` again")
        self._source = self._open()
        if len(self._source) != rows:
            raise InputError(f"{path}: {len(self._source)} rows, but the manifest says {rows}; run `lsg prepare` again")

    @property
    def digest(self) -> str:
        """Identifies the data."""
        return self.manifest.digest

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(index)
        try:
            return self._row(self._source[index])
        except Exception as error:  # array_record raises several types for damaged files
            raise InputError(f"{self._path}: row {index} is damaged: {str(error).splitlines()[0][:200]}") from None

    def _row(self, stored: dict[str, Any]) -> Row:
        """Decodes the stored fields. Those of older formats may lack some."""
        raise NotImplementedError

    def _report(self, content: dict[str, Any]) -> Report:
        """The report from its fields. TypeError or KeyError: they are not those of a report."""
        raise NotImplementedError

    def changed_files(self) -> list[str]:
        """Files of rows whose bytes no longer match their digest. Reads all of them."""
        size = sum(self.manifest.files.values())
        if size > 1 << 30:
            logger.info("%s: comparing %.1f GiB with their sha256", self._path, size / (1 << 30))
        paths = [self.layout.rows(self._path) / name for name in self.manifest.sha256]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            found = list(pool.map(file_sha256, paths))
        wanted = self.manifest.sha256.values()
        return [str(path) for path, now, then in zip(paths, found, wanted, strict=True) if now != then]

    def _read_manifest(self) -> tuple[Manifest[Report], int]:
        """The manifest and its number of rows. Checks the format, and that all files have their size."""
        path, layout = self._path, self.layout
        file = path / layout.manifest
        if not file.is_file():
            raise InputError(f"{path}: no prepared records here ({layout.manifest} is missing); run `lsg prepare`")
        try:
            content, digest = read_sealed(file), file_sha256(file)
            version, files, sha256, rows = content.pop("format"), content.pop("files"), content.pop("sha256"), content["rows"]
            if known := type(version) is int and layout.oldest <= version <= layout.format:
                report = self._report(content)
            if files.keys() != sha256.keys():
                raise ValueError("sizes and digests of other files")
            check_inside(files, file)
        except InputError as error:
            raise InputError(f"{error}; run `lsg prepare` again") from None
        except (ValueError, LookupError, TypeError, AttributeError):
            raise InputError(f"{file}: damaged; run `lsg prepare` again") from None
        if not known:
            raise InputError(
                f"{path}: records of format {version}; this version reads {layout.oldest} to {layout.format}; "
                "run `lsg prepare` again"
            )
        for name, size in files.items():
            file = layout.rows(path) / name
            if not file.is_file():
                raise InputError(f"{file}: missing; run `lsg prepare` again")
            if file.stat().st_size != size:
                raise InputError(
                    f"{file}: truncated or changed ({file.stat().st_size} bytes, not {size}); run `lsg prepare` again"
                )
        return Manifest(version, report, files, sha256, digest), rows

    def _open(self) -> Any:
        import tensorflow_datasets as tfds

        folder = self.layout.rows(self._path)
        try:
            builder = tfds.builder_from_directory(folder)
            encoded = {"image": tfds.decode.SkipDecoding()} if "image" in builder.info.features else None
            return builder.as_data_source("train", decoders=encoded)
        except Exception as error:  # TFDS and array_record raise several types for damaged files
            raise InputError(f"{folder}: cannot be opened: {str(error).splitlines()[0][:200]}") from None
