"""Images with exact attributes for linear probes: drawn scenes, or CLEVR as prepared by `lsg prepare`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lsg_jax.analysis.linear_probe import MIN_TEST, MIN_TRAIN
from lsg_jax.data import clevr, shapes
from lsg_jax.data.drawing import MAX_SIDE, MIN_SIDE, draw
from lsg_jax.data.scene_questions import probe_scene
from lsg_jax.errors import InputError

IMAGES = 5000
HELD_OUT_PART = 5
"""One image in so many is held out."""


@dataclass(frozen=True)
class ProbeData:
    """Images with exact attributes: `train` for training, then `test` held out.

    Attributes:
        read: index -> (the image or its bytes, {attribute: value}); thread-safe.
    """

    name: str
    vocabularies: dict[str, tuple[Any, ...]]
    train: int
    test: int
    read: Callable[[int], tuple[Any, dict[str, Any]]]


def scene_data(images: int | None, *, side: int, seed: int) -> ProbeData:
    """Drawn scenes of `side` pixels (clipped to what can be drawn): split `train` for training, split `test` held out."""
    train, test = _divide(IMAGES if images is None else images)
    side = min(max(side, MIN_SIDE), MAX_SIDE)

    def read(index: int) -> tuple[Image.Image, dict[str, Any]]:
        split, own = ("train", index) if index < train else ("test", index - train)
        scene = probe_scene(split, own, seed=seed)  # type: ignore[arg-type]
        return Image.fromarray(draw(scene, side)), shapes.attributes(scene)

    return ProbeData("scenes", shapes.ATTRIBUTES, train, test, read)


def clevr_data(folder: Path, test_folder: Path | None, images: int | None, *, seed: int) -> ProbeData:
    """A random choice of images from folders of `lsg prepare --format clevr`; without `test_folder` all are from `folder`.

    Raises:
        InputError: a folder does not exist, has fewer images than wanted, or both hold the same scenes.
    """
    sources = [_open_clevr(path) for path in (folder, test_folder) if path is not None]
    if test_folder is not None and len({source.manifest.report.scenes_sha256 for source in sources}) == 1:
        raise InputError(f"{test_folder}: the same scenes as {folder}; the held-out images must be others")
    rng = np.random.default_rng(seed)
    orders = [[(source, int(i)) for i in rng.permutation(len(source))] for source in sources]
    if test_folder is None:
        train, test = _divide(min(IMAGES, len(sources[0])) if images is None else images)
        orders = [orders[0], orders[0][train:]]
    elif images is None:
        train, test = (min(most, len(order)) for most, order in zip(_divide(IMAGES), orders, strict=True))
    else:
        train, test = _divide(images)
    for path, order, wanted in zip((folder, test_folder or folder), orders, (train, test), strict=True):
        if len(order) < wanted:
            raise InputError(f"{path}: {len(order)} images, but {wanted} are wanted; lower --images or prepare more")
    chosen = orders[0][:train] + orders[1][:test]

    def read(index: int) -> tuple[bytes, dict[str, Any]]:
        source, row = chosen[index]
        found = source[row]
        return found.image, {"name": found.name, **found.attributes}

    name = str(folder) if test_folder is None else f"{folder}, {test_folder}"
    return ProbeData(name, clevr.ATTRIBUTES, train, test, read)


def _open_clevr(folder: Path) -> clevr.ClevrRows:
    if (folder / "scenes").is_dir() and not (folder / clevr.LAYOUT.manifest).exists():
        raise InputError(f"{folder}: looks like CLEVR as published; run `lsg prepare {folder} OUT --format clevr` first")
    return clevr.open_clevr(folder)


def _divide(images: int) -> tuple[int, int]:
    """Splits a number of images into (training, held out). Raises InputError if there are too few for a probe."""
    test = images // HELD_OUT_PART
    if test < MIN_TEST or images - test < MIN_TRAIN:
        raise InputError(f"{images} images are too few: {HELD_OUT_PART * MIN_TEST} at least, and thousands for a result")
    return images - test, test
