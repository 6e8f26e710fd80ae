"""Foreign checkpoints into model folders: plan first, then stream block by block."""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from converters.blocks import check_finite, described, equal_tensors, pieces, read_block
from converters.hf_config import read_config
from converters.hub import SMALL_FILES, Checkpoint, find_checkpoint
from converters.reader import ArraySource, Source, canonical_names, open_source
from converters.rules import Part, Plan, plan
from converters.safetensors_writer import SafetensorsWriter
from lsg_jax.checkpoint import BaseWriter, FolderLock, LeafSpec, write_manifest
from lsg_jax.checkpoint.files import sync_folder
from lsg_jax.checkpoint.tree import nest
from lsg_jax.config import ModelConfig, to_dict
from lsg_jax.errors import CheckpointError, ConfigError, InputError
from lsg_jax.progress import Progress, silent

logger = logging.getLogger(__name__)

CARRIED = "carried.safetensors"
DTYPES = ("bfloat16", "float32")
_OURS = {"base", "base.journal", "hf", "lock", "lsg_manifest.json"}  # what an interrupted conversion may leave


def convert(source: str | Path, model_dir: str | Path, *, dtype: str | None = None, progress: Progress = silent) -> None:
    """Converts a LLaVA checkpoint in Hugging Face format into a model folder.

    Memory stays bounded whatever the size of the model. Everything is written to `MODEL.tmp`, which becomes `MODEL` when
    complete; a conversion that was killed goes on where it stopped when it is run again, with the same bytes as a result.

    Args:
        source: local folder or Hub id.
        model_dir: the folder to make; must not exist, or be empty.
        dtype: bfloat16 or float32; None keeps that of the checkpoint.
        progress: counts bytes, after each block.

    Raises:
        InputError: the checkpoint is missing, damaged, does not fit its configuration or holds NaN; or MODEL is in the way.
        ConfigError: the architecture or one of its settings is not supported. BusyError: another process makes this folder.
        CheckpointError: a write failed, for instance on a full disk; run it again to go on.
    """
    target = Path(model_dir)
    if dtype not in (None, *DTYPES):
        raise ConfigError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    check_free(target)
    checkpoint = find_checkpoint(source)
    config = read_config(checkpoint.folder)
    weights = open_source(checkpoint.folder)
    try:
        names = in_folder(checkpoint.folder, canonical_names, weights.tensors)
        config, planned = in_folder(checkpoint.folder, _plan, config, weights, names, dtype)
        if dtype is None and planned.dtype == "float16":
            logger.warning("the weights stay float16, which TPUs do not compute in: --dtype bfloat16 is the dtype for them")
        _into_folder(target, checkpoint, weights, names, config, planned, dtype or planned.dtype, progress)
    finally:
        weights.close()


def tree_from_tensors(config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The parameters of a model from tensors in memory, by any of the three Hugging Face naming layouts. For small models.

    Args:
        config: of the model, as `hf_config.model_config` gives it.
        tensors: original name -> array, all of one float dtype.

    Returns:
        Nested dict of numpy arrays, as `nnx.merge` accepts it.

    Raises:
        InputError: the tensors do not fit the configuration, or hold NaN or infinity.
    """
    source = ArraySource(tensors)
    names = canonical_names(source.tensors)
    planned = plan(config, described(source, names))
    for name, original in planned.repeats.items():
        if not equal_tensors(source, names[name], names[original]):
            raise InputError(f"{names[name]} differs from {names[original]}, but the configuration ties them")
    leaves: dict[str, np.ndarray] = {}
    for part in planned.layout.parts:
        block = read_block(source, names[part.source], part, 0, part.shape[0], planned.dtype)
        if part.layer is None:
            leaves[part.leaf] = block
        else:
            leaf = leaves.setdefault(part.leaf, np.empty(planned.layout.leaves[part.leaf], block.dtype))
            leaf[part.layer] = block
    return nest(leaves)


def check_free(target: Path) -> None:
    """Raises InputError unless `target` can be made: it does not exist, or is an empty folder."""
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists() or target.is_symlink():
        raise InputError(f"{target}: exists already; choose another output or remove it")


def in_folder(folder: Path, call: Callable[..., Any], *arguments: Any) -> Any:
    """Calls, and puts the folder's name before an InputError that lacks it."""
    try:
        return call(*arguments)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None


def _plan(config: ModelConfig, weights: Source, names: dict[str, str], dtype: str | None) -> tuple[ModelConfig, Plan]:
    """The plan, and the configuration with its tie undone where the stored head differs, which is what transformers does."""
    planned = plan(config, described(weights, names), any_float=dtype is not None)
    if all(equal_tensors(weights, names[name], names[other]) for name, other in planned.repeats.items()):
        return config, planned
    logger.warning("config.json ties the output head to the embeddings, but the stored ones differ: both are kept")
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, tied_embeddings=False))
    return config, plan(config, described(weights, names), any_float=dtype is not None)


def _into_folder(
    target: Path,
    checkpoint: Checkpoint,
    weights: Source,
    names: dict[str, str],
    config: ModelConfig,
    planned: Plan,
    dtype: str,
    progress: Progress,
) -> None:
    work = target.with_name(f"{target.name}.tmp")
    if work.exists() and not (work.is_dir() and {p.name for p in work.iterdir()} <= _OURS):
        raise InputError(f"{work}: exists and is not an interrupted conversion; remove it")
    with FolderLock(work) as lock:
        try:
            written = _write_base(work / "base", weights, names, planned, dtype, progress)
            hf = _write_hf(work / "hf", checkpoint.folder, weights, names, planned)
            described_source = {
                "name": checkpoint.name,
                "revision": checkpoint.revision,
                "files": {file.name: file.stat().st_size for file in weights.files},
            }
            manifest = {
                "config": to_dict(config),
                **written,
                "hf": hf,
                "source": described_source,
                "names": {name: names[name] for name in sorted(names) if name not in planned.ignored},
                "dtypes": {name: weights.tensors[key].dtype.name for name, key in names.items()},
                "carried": list(planned.carried),
                "repeats": planned.repeats,
                "ignored": {names[name]: reason for name, reason in planned.ignored.items()},
            }
            write_manifest(work, manifest)
        except InputError:
            shutil.rmtree(work)  # nothing to go on with: the input is wrong
            raise
        try:
            lock.path.unlink()
            os.replace(work, target)
            sync_folder(target.absolute().parent)
        except OSError as error:
            raise CheckpointError(f"{target}: cannot be written: {error.strerror}") from None


def _write_base(
    folder: Path, weights: Source, names: dict[str, str], planned: Plan, dtype: str, progress: Progress
) -> dict[str, Any]:
    stacked = {part.leaf for part in planned.layout.parts if part.layer is not None}
    specs = {name: LeafSpec(shape, dtype, stacked=name in stacked) for name, shape in planned.layout.leaves.items()}
    writer = BaseWriter(folder, specs)
    total = sum(math.prod(spec.shape) * spec.numpy_dtype.itemsize for spec in specs.values())
    done = 0
    for part, start, stop in blocks(planned, specs):
        block = read_block(weights, names[part.source], part, start, stop, dtype)
        if part.layer is None:
            writer.put(part.leaf, start, block)
        else:
            writer.put(part.leaf, part.layer, block[None])
        done += block.nbytes
        logger.debug("%s: %d of %d MiB", part.source, done >> 20, total >> 20)
        progress(done, total, "bytes")
    return writer.finish()


def blocks(planned: Plan, specs: Mapping[str, LeafSpec]) -> Iterator[tuple[Part, int, int]]:
    """Every block that the writer expects, as rows `start : stop` of a part: a whole layer, or a range of another leaf."""
    for part in planned.layout.parts:
        spec = specs[part.leaf]
        step = part.shape[0] if part.layer is not None else spec.rows
        for start in range(0, part.shape[0], step):
            yield part, start, min(start + step, part.shape[0])


def _write_hf(folder: Path, origin: Path, weights: Source, names: dict[str, str], planned: Plan) -> dict[str, str]:
    """Copies the small files and the carried tensors. Returns file name -> sha256."""
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():  # of an interrupted conversion
        path.unlink()
    for path in sorted(origin.iterdir()):
        wanted = any(fnmatch.fnmatchcase(path.name, pattern) for pattern in SMALL_FILES)
        if wanted and path.is_file() and path.suffix not in (".py", ".safetensors", ".bin"):
            try:
                shutil.copyfile(path, folder / path.name)
            except OSError as error:
                raise CheckpointError(f"{path}: cannot be copied to {folder}: {error.strerror}") from None
    if planned.carried:
        tensors = described(weights, {name: names[name] for name in planned.carried})
        with SafetensorsWriter(folder / CARRIED, tensors) as out:
            for name in planned.carried:
                for row, values in pieces(weights, names[name]):
                    check_finite(names[name], values)
                    out.put(name, values.reshape(len(values), -1), row)
    return {path.name: sha256(path) for path in sorted(folder.iterdir())}


def sha256(path: Path) -> str:
    """Hex sha256 of a file of any size."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
