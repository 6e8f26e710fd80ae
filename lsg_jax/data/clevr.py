"""A published CLEVR folder -> images with exact attributes, for linear probes; and a reader of the prepared folder.

Reads CLEVR_v1.0/images/<split>/CLEVR_<split>_000000.png and CLEVR_v1.0/scenes/CLEVR_<split>_scenes.json.

OUT/clevr_manifest.json       counts, rejects, the vocabulary of each attribute, digests
OUT/rejects.jsonl             one line per rejected scene: its position, image, reason, message
OUT/clevr/1.0.0/              array_record, one row per scene, in the order of the scenes file
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lsg_jax.config.ranges import Range
from lsg_jax.data.conversation import RecordError
from lsg_jax.data.images import image_size
from lsg_jax.data.layout import ImageSize
from lsg_jax.data.prepared import FolderLayout, PreparedRows, write_manifest, write_rows
from lsg_jax.data.records import REJECTS
from lsg_jax.data.sources import ImageFolder, check_fraction, in_order, thread_count
from lsg_jax.digest import file_sha256
from lsg_jax.errors import InputError
from lsg_jax.files import new_folder, read_regular
from lsg_jax.progress import Progress, silent

LAYOUT = FolderLayout(manifest="clevr_manifest.json", dataset="clevr", format=3, oldest=1)

COLOURS = ("gray", "red", "blue", "green", "brown", "purple", "cyan", "yellow")
SHAPES = ("cube", "sphere", "cylinder")
MATERIALS = ("rubber", "metal")

RADII = {"small": 0.35, "large": 0.7}
"""Radius of each size, in the units in which CLEVR was rendered."""

LARGEST_EDGES = (0.066, 0.073, 0.081)
"""Bin edges of the apparent size of the largest object. Each bin holds about a quarter of CLEVR's scenes."""

MAX_OBJECTS = 10
_SEVERAL = ("colours", "shapes", "materials")

ATTRIBUTES: dict[str, tuple[Any, ...]] = {
    "count": tuple(range(1, MAX_OBJECTS + 1)),
    "largest": tuple(f"{low} to {high}" for low, high in zip((0, *LARGEST_EDGES), (*LARGEST_EDGES, "more"), strict=True)),
    "colours": COLOURS,
    "shapes": SHAPES,
    "materials": MATERIALS,
}
"""Vocabulary of each attribute. `count` and `largest` have one label per scene, the others any number."""


def attributes(scene: dict[str, Any]) -> dict[str, Any]:
    """Exact labels of one entry of the scenes file, with the names of `shapes.attributes`; see ATTRIBUTES.

    The apparent size of an object is its radius over its depth, the distance from the camera along the line of sight
    (third of `pixel_coords`). CLEVR has only two sizes, and nearly every scene holds a large object, so the size itself would
    carry little information.

    Returns:
        `count`: number of objects. `apparent_size`: that of the largest object. `largest`: its bin.
        `colours`, `shapes`, `materials`: those present, in the order of the vocabulary.

    Raises:
        RecordError: `bad_scene`.
    """
    try:
        objects = scene["objects"]
        sizes = [RADII[item["size"]] / float(item["pixel_coords"][2]) for item in objects]
        present = {
            name: {item[key] for item in objects}
            for name, key in (("colours", "color"), ("shapes", "shape"), ("materials", "material"))
        }
    except (LookupError, TypeError, ValueError, ZeroDivisionError) as error:
        raise RecordError("bad_scene", f"an object lacks a field or has an odd one: {type(error).__name__}: {error}") from None
    if not 1 <= len(objects) <= MAX_OBJECTS:
        raise RecordError("bad_scene", f"{len(objects)} objects; CLEVR's scenes have 1 to {MAX_OBJECTS}")
    for name, found in present.items():
        if unknown := sorted(map(str, found - set(ATTRIBUTES[name]))):
            raise RecordError("bad_scene", f"{name} that CLEVR does not have: {', '.join(unknown)}")
    return {
        "count": len(objects),
        "largest": ATTRIBUTES["largest"][bisect.bisect_right(LARGEST_EDGES, max(sizes))],
        "apparent_size": max(sizes),
        **{name: tuple(label for label in ATTRIBUTES[name] if label in found) for name, found in present.items()},
    }


@dataclass(frozen=True)
class ClevrRow:
    """One scene.

    Attributes:
        name: file name of the image. image: its bytes. image_size: (width, height) in pixels.
        attributes: as the function `attributes` returns them.
    """

    name: str
    image: bytes
    image_size: ImageSize
    attributes: dict[str, Any]


@dataclass
class ClevrReport:
    """What preparing CLEVR did; the manifest holds these fields.

    Attributes:
        split: `train`, `val`, or one of CLEVR-CoGenT. scenes_sha256: digest of the scenes file.
        records: scenes read. rows: rows written. rejected: scenes rejected. rejects: their number by reason.
        attributes: vocabulary of each attribute. counts: rows by label, for each attribute.
    """

    split: str
    scenes_sha256: str
    records: int = 0
    rows: int = 0
    rejected: int = 0
    rejects: dict[str, int] = field(default_factory=dict)
    attributes: dict[str, Sequence[Any]] = field(default_factory=lambda: dict(ATTRIBUTES))
    counts: dict[str, dict[str, int]] = field(default_factory=dict)

    def summary(self) -> str:
        """The report in a few lines."""
        lines = [f"{self.rows} of {self.records} scenes written"]
        lines += [f"rejected: {count} x {reason}" for reason, count in sorted(self.rejects.items())]
        for name, counts in self.counts.items():
            lines.append(f"{name}: {', '.join(f'{label} {count}' for label, count in counts.items())}")
        return "\n".join(lines)


def prepare_clevr(
    source: str | Path,
    out: str | Path,
    *,
    split: str = "train",
    limit: int | None = None,
    max_bad_fraction: float = 0.01,
    threads: int | None = None,
    follow_links: bool = False,
    progress: Progress = silent,
) -> ClevrReport:
    """Writes the scenes of a split whose images decode into the new folder `out`.

    Args:
        source: the published folder, which holds `images` and `scenes`.
        limit: number of scenes to read, from the first (they are in no particular order).
        max_bad_fraction, threads, follow_links: as in `prepare_llava`.
        progress: counts scenes.

    Raises:
        InputError: `out` is not empty, the split has no scenes, their file is damaged, or more than `max_bad_fraction` of them
            are bad. `out` is left unchanged.
    """
    source = Path(source)
    if limit is not None:
        Range("[1, 1e9]").check(limit, "limit", int)
    check_fraction(max_bad_fraction)
    threads, path = thread_count(threads), _scenes_file(source, split)
    scenes, images = _read_scenes(path)[:limit], ImageFolder(source / "images" / split, follow_links=follow_links)
    report = ClevrReport(split, file_sha256(path))
    report.counts = {name: {str(label): 0 for label in labels} for name, labels in ATTRIBUTES.items()}
    with new_folder(Path(out)) as folder:
        rejects: list[dict[str, Any]] = []

        def rows() -> Iterator[dict[str, Any]]:
            size = lambda found: len(found[1].image) if isinstance(found[1], ClevrRow) else 0
            for name, row in in_order(lambda scene: _row(scene, images), scenes, threads, held=size):
                report.records += 1
                if isinstance(row, RecordError):
                    rejects.append({"line": report.records, "id": name, "reason": row.reason, "message": str(row)})
                    report.rejects[row.reason] = report.rejects.get(row.reason, 0) + 1
                else:
                    _count(report, row)
                    yield _stored(row)
                progress(report.records, len(scenes), "scenes")
            report.rejected = len(rejects)
            if report.rejected > max_bad_fraction * report.records or not report.rows:
                raise InputError(
                    f"{path}: {report.rejected} of {report.records} scenes are bad, more than the share of "
                    f"{max_bad_fraction:g} allowed (first: {rejects[0]['id']}: {rejects[0]['message']})"
                )

        write_rows(folder, LAYOUT, _features(), rows())
        (folder / REJECTS).write_text("".join(json.dumps(entry) + "\n" for entry in rejects), encoding="utf-8")
        write_manifest(folder, LAYOUT, report)
    return report


def _scenes_file(source: Path, split: str) -> Path:
    path = source / "scenes" / f"CLEVR_{split}_scenes.json"
    if path.is_file():
        return path
    if not (source / "scenes").is_dir():
        raise InputError(f"{source}: no folder of scenes in it; give the CLEVR_v1.0 folder, with images/ and scenes/")
    there = sorted(p.name.removeprefix("CLEVR_").removesuffix("_scenes.json") for p in path.parent.glob("CLEVR_*_scenes.json"))
    if split == "test":
        raise InputError(f"{path}: CLEVR's test split is published without scenes; use {' or '.join(there) or 'train or val'}")
    raise InputError(f"{path}: no such file; scenes are there for: {', '.join(there) or 'no split'}")


def _read_scenes(path: Path) -> list[Any]:
    try:
        scenes = json.loads(read_regular(path))["scenes"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: not CLEVR scenes, or damaged: {type(error).__name__}: {str(error)[:120]}") from None
    if not isinstance(scenes, list) or not scenes:
        raise InputError(f"{path}: holds no scenes")
    return scenes


def _row(scene: Any, images: ImageFolder) -> tuple[str, ClevrRow | RecordError]:
    name = str(scene.get("image_filename", "")) if isinstance(scene, dict) else ""
    try:
        if not name:
            raise RecordError("bad_scene", "the scene names no image")
        image, size = images.read(name)
        return name, ClevrRow(name, image, size, attributes(scene))
    except RecordError as error:
        return name, error


def _count(report: ClevrReport, row: ClevrRow) -> None:
    report.rows += 1
    for name, counts in report.counts.items():
        found = row.attributes[name]
        for label in found if isinstance(found, tuple) else (found,):
            counts[str(label)] += 1


# Labels are stored as numbers: `largest` as its index in the vocabulary, sets of labels as a 0/1 vector.


def _features() -> dict[str, Any]:
    import numpy as np
    import tensorflow_datasets as tfds

    several = {name: tfds.features.Tensor(shape=(len(ATTRIBUTES[name]),), dtype=np.uint8) for name in _SEVERAL}
    return {
        "name": tfds.features.Text(),
        "image": tfds.features.Image(),
        "image_size": tfds.features.Tensor(shape=(2,), dtype=np.int32),
        "count": np.int32,
        "largest": tfds.features.ClassLabel(names=list(ATTRIBUTES["largest"])),
        "apparent_size": np.float32,
        **several,
    }


def _stored(row: ClevrRow) -> dict[str, Any]:
    import numpy as np

    found = row.attributes
    several = {name: np.array([label in found[name] for label in ATTRIBUTES[name]], np.uint8) for name in _SEVERAL}
    size = np.array(row.image_size, np.int32)
    return {"name": row.name, "image": row.image, "image_size": size, **found, **several}


class ClevrRows(PreparedRows[ClevrRow, ClevrReport]):
    """Rows by index. Folders of format 1 hold no sizes; these are then read from the images' headers."""

    layout = LAYOUT

    def _row(self, stored: dict[str, Any]) -> ClevrRow:
        several = {
            name: tuple(label for label, there in zip(ATTRIBUTES[name], stored[name], strict=True) if there)
            for name in _SEVERAL
        }
        found = {
            "count": int(stored["count"]),
            "largest": ATTRIBUTES["largest"][stored["largest"]],
            "apparent_size": float(stored["apparent_size"]),
            **several,
        }
        image = bytes(stored["image"])
        width, height = map(int, stored["image_size"]) if "image_size" in stored else image_size(image)
        return ClevrRow(stored["name"].decode(), image, (width, height), found)

    def _report(self, content: dict[str, Any]) -> ClevrReport:
        return ClevrReport(**content)


def open_clevr(path: str | Path, *, check: bool = True) -> ClevrRows:
    """Opens a folder that `prepare_clevr` wrote. See `PreparedRows` for `check` and errors."""
    return ClevrRows(path, check=check)
