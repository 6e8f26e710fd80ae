"""A folder that `lsg prepare` makes: rows in array_record, readable as a TFDS data set, and a manifest that is written last.

    OUT/<manifest>.json           counts, settings, sizes and digests of the files below
    OUT/<data set>/1.0.0/         split `train`, rows in the order they came

The folder appears whole or not at all. TensorFlow is not needed; tensorflow-datasets is imported where it is used, since that
takes a second.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lsg_jax.errors import InputError

VERSION = "1.0.0"
ROWS_PER_SHARD = 10_000


@dataclass(frozen=True)
class Layout:
    """Names within a prepared folder. `format` is raised when older folders can no longer be read."""

    manifest: str
    dataset: str
    format: int

    def rows(self, folder: Path) -> Path:
        """Where the array_record files are."""
        return folder / self.dataset / VERSION


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `out` when the block ends well, and vanishes when it does not.

    Raises:
        InputError: `out` is not empty, or cannot be written, also where the block raises OSError.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: exists and is not empty; choose a new folder")
    temporary = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
        yield temporary
        temporary.chmod(0o755)  # mkdtemp makes it private
        temporary.replace(out)  # an empty folder in the way is replaced
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error.strerror or error}") from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def write_rows(folder: Path, layout: Layout, features: dict[str, Any], rows: Iterable[dict[str, Any]]) -> None:
    """Writes rows one by one, as a data set that `tfds.builder_from_directory` reads.

    Not by `GeneratorBasedBuilder`: it holds back all rows and sorts them by key at the end. Keys that count up fall into
    a single one of its buckets, so 60 GB of images would be in memory at once.

    Args:
        features: TFDS feature of each field.
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
    except RuntimeError as error:  # array_record's way to say that the disk is full
        raise OSError(str(error).splitlines()[0][:200]) from None


def write_manifest(folder: Path, layout: Layout, content: dict[str, Any]) -> None:
    """Writes the manifest, with size and sha256 of each file of rows."""
    paths = sorted(layout.rows(folder).iterdir())
    manifest = {
        "format": layout.format,
        **content,
        "files": {path.name: path.stat().st_size for path in paths},
        "sha256": {path.name: file_sha256(path) for path in paths},
    }
    (folder / layout.manifest).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file of any size."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class PreparedRows:
    """Rows by index, in the order they were prepared. Subclasses say what a row is.

    Attributes:
        manifest: contents of the manifest. digest: sha256 of the manifest's bytes, which identifies the data.

    Raises:
        InputError: the folder is missing, was not written by `lsg prepare`, or a file of it is missing or truncated.
    """

    layout: Layout

    def __init__(self, path: str | Path):
        self._path = Path(path)
        self.manifest, self.digest = self._read_manifest()
        self._source = self._open()
        if len(self._source) != self.manifest["rows"]:
            raise InputError(
                f"{path}: {len(self._source)} rows, but the manifest says {self.manifest['rows']}; run `lsg prepare` again"
            )

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        try:
            return self._row(self._source[index])
        except Exception as error:  # array_record reports damage by several kinds
            raise InputError(f"{self._path}: row {index} is damaged: {str(error).splitlines()[0][:200]}") from None

    def _row(self, stored: dict[str, Any]) -> dict[str, Any]:
        raise NotImplementedError

    def changed_files(self) -> list[str]:
        """Files whose bytes are no longer those that were written; reads all of them."""
        folder, digests = self.layout.rows(self._path), self.manifest["sha256"]
        return [str(folder / name) for name, digest in digests.items() if file_sha256(folder / name) != digest]

    def _read_manifest(self) -> tuple[dict[str, Any], str]:
        path, layout = self._path, self.layout
        try:
            text = (path / layout.manifest).read_bytes()
            manifest = json.loads(text)
            files, version, _, _ = manifest["files"], manifest["format"], manifest["rows"], manifest["sha256"]
        except OSError:
            raise InputError(f"{path}: no prepared records here ({layout.manifest} is missing); run `lsg prepare`") from None
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path / layout.manifest}: damaged; run `lsg prepare` again") from None
        if version != layout.format:
            raise InputError(
                f"{path}: records of format {version}; this version reads {layout.format}; run `lsg prepare` again"
            )
        for name, size in files.items():
            file = layout.rows(path) / name
            if not file.is_file():
                raise InputError(f"{file}: missing; run `lsg prepare` again")
            if file.stat().st_size != size:
                raise InputError(
                    f"{file}: truncated or changed ({file.stat().st_size} bytes, not {size}); run `lsg prepare` again"
                )
        return manifest, hashlib.sha256(text).hexdigest()

    def _open(self) -> Any:
        import tensorflow_datasets as tfds

        folder = self.layout.rows(self._path)
        try:
            builder = tfds.builder_from_directory(folder)
            return builder.as_data_source("train", decoders={"image": tfds.decode.SkipDecoding()})
        except Exception as error:  # TFDS and array_record raise many kinds for damaged files
            raise InputError(f"{folder}: cannot be opened: {str(error).splitlines()[0][:200]}") from None
