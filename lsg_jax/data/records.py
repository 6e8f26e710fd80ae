"""LLaVA records on disk -> a folder of validated rows (`lsg prepare`), and that folder opened again.

    OUT/records_manifest.json     counts, rejects by reason, digests; written last
    OUT/rejects.jsonl             one line a rejected record: line, id, reason, message
    OUT/llava_records/1.0.0/      TFDS data set in array_record format, one row a conversation, in the order of the source

TensorFlow is not needed. tensorflow-datasets is imported where it is used, since that takes a second.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lsg_jax.data.conversation import Conversation, RecordError, Turn, examples, parse_record
from lsg_jax.data.images import open_image
from lsg_jax.errors import InputError

MANIFEST = "records_manifest.json"
REJECTS = "rejects.jsonl"
FORMAT = 1
_TFDS_FOLDER = "llava_records/1.0.0"


@dataclass
class Report:
    """What preparation did.

    Attributes:
        source: name of the source file. source_sha256: digest of its bytes.
        content_sha256: digest of all rows; identifies the data whatever the file layout.
        records: records read. rows: rows written. rejected: records rejected; `rejects` counts them by reason.
        notes: records mended by kind (`image_without_tag`, `leading_turn_dropped`, ...) and `duplicate_id`.
        without_image: rows of text only.
        answers: number of answers of each row, so also of training examples.
    """

    source: str
    source_sha256: str
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


# ------------------------------------------------------------------------------------------------------------------- reading


def read_source(path: Path) -> Iterator[tuple[int, Any]]:
    """Yields (line or 1-based position, record) of a JSON array or of JSONL, whatever the file is called.

    A line of JSONL that is no JSON yields a `RecordError` (`bad_json`) in place of the record.

    Raises:
        InputError: the file is missing, empty, not UTF-8, a Git LFS pointer, or a broken JSON array (with the line).
    """
    try:
        with path.open("rb") as file:
            start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    if not start:
        raise InputError(f"{path}: the file is empty")
    if start.startswith(b"version https://git-lfs"):
        raise InputError(f"{path}: a Git LFS pointer, not the records; run `git lfs pull`")
    if start[:1] not in b"[{":
        raise InputError(f"{path}: neither a JSON array nor JSONL (starts with {start[:20]!r})")
    yield from _read_array(path) if start[:1] == b"[" else _read_lines(path)


def _read_array(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        records = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: broken JSON array at line {error.lineno}, column {error.colno}: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise InputError(f"{path}: JSON nested too deeply") from None
    yield from enumerate(records, start=1)


def _read_lines(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                yield number, RecordError("bad_json", f"line {number} is not JSON: {str(error)[:120]}")


class ImageFolder:
    """Finds images below a root and suggests near matches. Folder listings are kept, so a miss costs no walk."""

    def __init__(self, root: Path):
        if not root.is_dir():
            raise InputError(f"{root}: no such image folder")
        self._root = root
        self._listings: dict[Path, list[str]] = {}

    def read(self, relative: str) -> bytes:
        """The image's bytes, proven to decode.

        Raises:
            RecordError: `missing_image`, `image_outside` or `broken_image`.
        """
        parts = Path(relative).parts
        if Path(relative).is_absolute() or ".." in parts:
            raise RecordError("image_outside", f"{relative}: leads out of the image folder")
        try:
            data = self._root.joinpath(*parts).read_bytes()
        except (OSError, ValueError):
            near = self._near(parts)
            hint = f"; did you mean {near}?" if near else ""
            raise RecordError("missing_image", f"{relative}: no such image{hint}") from None
        try:
            open_image(data)
        except InputError as error:
            raise RecordError("broken_image", f"{relative}: {str(error).removeprefix('image: ')}") from None
        return data

    def _near(self, parts: tuple[str, ...]) -> str | None:
        """A path that differs in case, or in the suffix of the file."""
        found: list[str] = []
        for depth, part in enumerate(parts):
            names = self._list(self._root.joinpath(*found))
            same = [n for n in names if n == part] or [n for n in names if n.lower() == part.lower()]
            if not same and depth == len(parts) - 1:
                same = [n for n in names if Path(n).stem.lower() == Path(part).stem.lower()]
            if not same:
                return None
            found.append(same[0])
        return "/".join(found) or None

    def _list(self, folder: Path) -> list[str]:
        if folder not in self._listings:
            self._listings[folder] = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
        return self._listings[folder]


# ------------------------------------------------------------------------------------------------------------------- writing


class _Preparation:
    """Counts while rows stream through."""

    def __init__(
        self, source: Path, images: Path, rejects: Path, max_bad_fraction: float, progress: Callable[[int], None] | None
    ):
        self.source = source
        self.images = ImageFolder(images)
        self.rejects_path = rejects
        self.max_bad_fraction = max_bad_fraction
        self.progress = progress
        self.report = Report(source.name, "")
        self.first_reject = ""
        self._ids: Counter[str] = Counter()
        self._rejects: Counter[str] = Counter()
        self._notes: Counter[str] = Counter()

    def rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """(key, row) for TFDS; rejects go to their file on the way. Too many of them are an error at the end."""
        report, digest = self.report, hashlib.sha256()
        with self.rejects_path.open("w", encoding="utf-8") as rejects:
            for line, record in read_source(self.source):
                report.records += 1
                if self.progress is not None:
                    self.progress(report.records)
                try:
                    row = self._row(record, line)
                except RecordError as error:
                    self._reject(rejects, line, record, error)
                    continue
                for part in (row["record_id"].encode(), row["image"], row["turns"].encode()):
                    digest.update(len(part).to_bytes(8, "little") + part)
                yield report.rows, row
                report.rows += 1
        report.content_sha256 = digest.hexdigest()
        report.rejected = self._rejects.total()
        report.rejects = dict(self._rejects.most_common())
        if duplicates := sum(count - 1 for count in self._ids.values()):
            self._notes["duplicate_id"] = duplicates
        report.notes = dict(sorted(self._notes.items()))
        self._check_share()

    def _check_share(self) -> None:
        report = self.report
        reasons = ", ".join(f"{count} {reason}" for reason, count in report.rejects.items())
        if report.rejected > self.max_bad_fraction * report.records:
            raise InputError(
                f"{self.source}: {report.rejected} of {report.records} records are bad, more than the share of "
                f"{self.max_bad_fraction:g} allowed ({reasons}; first at {self.first_reject})"
            )
        if not report.rows:
            raise InputError(f"{self.source}: no usable record ({reasons or 'the list is empty'})")

    def _row(self, record: Any, line: int) -> dict[str, Any]:
        if isinstance(record, RecordError):
            raise record
        conversation: Conversation = parse_record(record, default_id=f"line {line}")
        image = b"" if conversation.image is None else self.images.read(conversation.image)
        self._ids[conversation.record_id] += 1
        self._notes.update(conversation.notes)
        self.report.without_image += not image
        self.report.answers.append(len(examples(conversation.turns)))
        turns = json.dumps([[turn.role, turn.text] for turn in conversation.turns], ensure_ascii=False)
        return {"record_id": conversation.record_id, "image": image, "turns": turns}

    def _reject(self, file: io.TextIOBase | Any, line: int, record: Any, error: RecordError) -> None:
        self._rejects[error.reason] += 1
        record_id = record.get("id") if isinstance(record, dict) else None
        self.first_reject = self.first_reject or f"line {line}: {error.reason}: {error}"
        entry = {"line": line, "id": record_id, "reason": error.reason, "message": str(error)}
        file.write(json.dumps(entry) + "\n")


def prepare_llava(
    source: str | Path,
    images: str | Path,
    out: str | Path,
    *,
    max_bad_fraction: float = 0.01,
    progress: Callable[[int], None] | None = None,
) -> Report:
    """Validates every record, decodes every image, and writes the rows that pass into the new folder `out`.

    Args:
        source: LLaVA records, a JSON array or JSONL.
        images: the root that the records' image paths are relative to.
        max_bad_fraction: share of records in [0, 1] that may be rejected.
        progress: called with the number of records read so far.

    Raises:
        InputError: `out` is not empty, the source cannot be read, no record is good, or more than `max_bad_fraction` of them
            are bad. `out` is then as it was.
    """
    source, images, out = Path(source), Path(images), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: exists and is not empty; choose a new folder")
    if not source.is_file():
        raise InputError(f"{source}: no such file of records")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error.strerror or error}") from None
    try:
        preparation = _Preparation(source, images, temporary / REJECTS, max_bad_fraction, progress)
        _write_tfds(temporary, preparation.rows)
        report = preparation.report
        report.source_sha256 = _sha256(source)
        files = {p.name: p.stat().st_size for p in sorted((temporary / _TFDS_FOLDER).iterdir())}
        manifest = {"format": FORMAT, **asdict(report), "files": files}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        temporary.chmod(0o755)  # mkdtemp makes it private
        temporary.replace(out)  # an empty folder in the way is replaced
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return report


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_tfds(folder: Path, rows: Callable[[], Iterator[tuple[int, dict[str, Any]]]]) -> None:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.utils import tqdm_utils

    class LlavaRecords(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        VERSION = tfds.core.Version("1.0.0")
        # Set, as TFDS would look for checksum files and metadata next to the builder's source.
        pkg_dir_path = folder
        code_path = None
        url_infos: dict[str, Any] = {}  # noqa: RUF012

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(
                builder=self,
                disable_shuffling=True,  # rows keep the order of the source
                features=tfds.features.FeaturesDict(
                    {"record_id": tfds.features.Text(), "image": tfds.features.Image(), "turns": tfds.features.Text()}
                ),
            )

        def _split_generators(self, manager: Any) -> Any:
            return {"train": rows()}

        def _generate_examples(self) -> Any:
            raise NotImplementedError  # abstract in TFDS; `_split_generators` hands over the rows itself

    shows = tqdm_utils._active
    tqdm_utils.display_progress_bar(False)
    try:
        # TFDS announces a download on stdout. stderr stays as it is, for the caller's own progress.
        with contextlib.redirect_stdout(io.StringIO()):
            builder = LlavaRecords(data_dir=folder, file_format="array_record")
            builder.download_and_prepare(file_format="array_record")
        shutil.rmtree(folder / "downloads", ignore_errors=True)  # TFDS makes it though nothing is downloaded
    finally:
        tqdm_utils.display_progress_bar(shows)


# ------------------------------------------------------------------------------------------------------------------- opening


class RandomAccess:
    """Rows by index: `{"record_id": str, "image": encoded bytes, empty without one, "turns": [Turn, ...]}`.

    Attributes:
        manifest: contents of `records_manifest.json`. digest: its sha256, which identifies the data.
    """

    def __init__(self, path: Path, source: Any, manifest: dict[str, Any], digest: str):
        self._path = path
        self._source = source
        self.manifest = manifest
        self.digest = digest

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        try:
            row = self._source[index]
            turns = [Turn(role, text) for role, text in json.loads(row["turns"])]
            return {"record_id": row["record_id"].decode(), "image": bytes(row["image"]), "turns": turns}
        except Exception as error:  # array_record reports damage by several kinds
            raise InputError(f"{self._path}: row {index} is damaged: {str(error).splitlines()[0][:200]}") from None


def open_records(path: str | Path) -> RandomAccess:
    """Opens a folder that `prepare_llava` wrote.

    Raises:
        InputError: the folder is missing, was not written by `lsg prepare`, or a file of it is missing or truncated.
    """
    path = Path(path)
    try:
        text = (path / MANIFEST).read_bytes()
        manifest = json.loads(text)
        files, rows, version = manifest["files"], manifest["rows"], manifest["format"]
    except OSError:
        raise InputError(f"{path}: no prepared records here ({MANIFEST} is missing); run `lsg prepare`") from None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path / MANIFEST}: damaged; run `lsg prepare` again") from None
    if version != FORMAT:
        raise InputError(f"{path}: records of format {version}; this version reads {FORMAT}; run `lsg prepare` again")
    for name, size in files.items():
        file = path / _TFDS_FOLDER / name
        if not file.is_file():
            raise InputError(f"{file}: missing; run `lsg prepare` again")
        if file.stat().st_size != size:
            raise InputError(f"{file}: truncated or changed ({file.stat().st_size} bytes, not {size}); run `lsg prepare` again")
    source = _tfds_source(path / _TFDS_FOLDER)
    if len(source) != rows:
        raise InputError(f"{path}: {len(source)} rows, but the manifest says {rows}; run `lsg prepare` again")
    return RandomAccess(path, source, manifest, hashlib.sha256(text).hexdigest())


def _tfds_source(folder: Path) -> Any:
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(folder)
        return builder.as_data_source("train", decoders={"image": tfds.decode.SkipDecoding()})
    except Exception as error:  # TFDS and array_record raise many kinds for damaged files
        raise InputError(f"{folder}: cannot be opened: {str(error).splitlines()[0][:200]}") from None
