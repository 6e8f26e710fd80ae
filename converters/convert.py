"""Checkpoints in Hugging Face format -> model folders: plan first, then stream block by block."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from converters.blocks import check_finite, described, equal_tensors, pieces, read_block
from converters.families import family_of
from converters.hf_config import ignored_fields, read_config
from converters.hub import Checkpoint, find_checkpoint
from converters.image_token import with_image_token
from converters.layouts.tokens import has_tokenizer
from converters.opening import Opened, copy_small_files, open_checkpoint
from converters.quantize import quantize, scale_of, scales
from converters.reader import ArraySource, Source, canonical_names
from converters.rules import Part, Plan, leaf_shapes, plan
from converters.safetensors_writer import SafetensorsWriter
from lsg_jax.checkpoint import BaseWriter, FolderLock, LeafEntry, LeafSpec, Manifest, ModelSource, write_manifest
from lsg_jax.checkpoint.tree import nest
from lsg_jax.config import ModelConfig
from lsg_jax.digest import file_sha256
from lsg_jax.errors import CheckpointError, ConfigError, InputError
from lsg_jax.files import sync_folder
from lsg_jax.json_files import read_object
from lsg_jax.progress import Progress, silent

logger = logging.getLogger(__name__)

CARRIED = "carried.safetensors"
DTYPES = ("bfloat16", "float32", "int8")
_WORK_FILES = {"base", "base.journal", "hf", "lock", "lsg_manifest.json"}  # of an interrupted conversion


@dataclass(frozen=True)
class _Conversion:
    """A checked conversion, ready to be written.

    Attributes:
        names: canonical -> original tensor name.
        dtype: of the parameters; with `config.text.weights` "int8" of those that are no 8-bit weights.
    """

    checkpoint: Checkpoint
    opened: Opened
    names: dict[str, str]
    config: ModelConfig
    planned: Plan
    dtype: str
    progress: Progress


def convert(
    source: str | Path,
    model_dir: str | Path,
    *,
    dtype: str | None = None,
    revision: str | None = None,
    base: str | Path | None = None,
    max_pixels: int | None = None,
    progress: Progress = silent,
) -> None:
    """Converts a checkpoint in Hugging Face format or an original layout into a model folder.

    Memory stays bounded, whatever the size of the model. Everything is written to `MODEL.tmp`, which is renamed to `MODEL` when
    complete. After a kill, the same call resumes; the result has the same bytes.

    Args:
        source: local folder or Hub id. An original layout (`converters/layouts`) becomes the same model as its Hugging Face
            twin. The embedding rows that the original lacks are the mean of the others.
        model_dir: the folder to make; must not exist, or be empty.
        dtype: bfloat16 or float32; None keeps that of the checkpoint. int8 rounds the linear maps of the decoder layers to 8
            bits (`quantize`) and keeps the rest in bfloat16: embeddings, norms, head, and the vision tower and connector, so
            that the same patches are V-sinks as in bfloat16.
        revision: branch, tag or commit of a Hub id.
        base: local folder or Hub id of the model that `source`, a LoRA adapter or a projector alone, was trained on.
        max_pixels: what larger images are shrunk to, for a model that takes images of any size; None: as the checkpoint says.
        progress: counts bytes, after each block.

    Raises:
        InputError: the checkpoint is missing, damaged, does not fit its configuration or holds NaN; or MODEL exists.
        ConfigError: the architecture or one of its settings is not supported. BusyError: another process writes this folder.
        CheckpointError: a write failed, for instance on a full disk; run it again to resume.
    """
    target = Path(model_dir)
    if dtype not in (None, *DTYPES):
        raise ConfigError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    check_free(target)
    checkpoint = find_checkpoint(source, revision=revision)
    below = None if base is None else find_checkpoint(base)
    with open_checkpoint(checkpoint, below, target) as opened:
        where = f"{checkpoint.folder}/config.json"
        config = read_config(opened.folder, name=checkpoint.name, where=where)
        names = in_folder(checkpoint.folder, canonical_names, opened.weights.tensors, family_of(config).canonical_name)
        config, planned = in_folder(checkpoint.folder, _plan, config, opened.weights, names, dtype)
        config = _with_tokenizer(checkpoint.folder, opened.folder, _limited(config, max_pixels))
        if dtype is None and planned.dtype == "float16":
            logger.warning("the weights stay float16, which TPUs do not compute in: --dtype bfloat16 is the dtype for them")
        if dtype == "int8":
            config = dataclasses.replace(config, text=dataclasses.replace(config.text, weights="int8"))
        chosen = "bfloat16" if dtype == "int8" else dtype or planned.dtype
        assert chosen is not None  # `plan` refuses several dtypes unless one was chosen
        if below is not None:
            checkpoint = dataclasses.replace(checkpoint, name=f"{checkpoint.name} on {below.name}")
        _into_folder(_Conversion(checkpoint, opened, names, config, planned, chosen, progress), target)


def _with_tokenizer(folder: Path, small: Path, config: ModelConfig) -> ModelConfig:
    """Opens the tokenizer and the chat template as `generate` will, before anything is written.

    Args:
        folder: names them in errors. small: where their files are.

    Returns:
        The configuration with the tokenizer's image token.
    """
    from lsg_jax.data.processor import Processor

    if not has_tokenizer(small):
        logger.warning("%s: no tokenizer, so the model will take token ids only", folder)
        return config
    try:
        config = with_image_token(config, small, folder)
        Processor.from_folder(small, config)
    except ConfigError as error:  # of the chat template; another one can be chosen
        logger.warning("%s: %s", folder, str(error).replace(str(small), str(folder)))
    except InputError as error:
        raise InputError(str(error).replace(str(small), str(folder))) from None
    return config


def _limited(config: ModelConfig, max_pixels: int | None) -> ModelConfig:
    """The configuration with another limit of the pixels of an image, if one is given."""
    if max_pixels is None:
        return config
    image = config.image
    least = max(image.min_pixels, (config.vision.patch_size * config.merge) ** 2)
    if image.kind != "native":
        raise ConfigError(f"--max-pixels: a model of the family {config.family} takes no images of any size; leave it out")
    if max_pixels < least:
        raise ConfigError(f"--max-pixels {max_pixels}: it must be at least {least}, the fewest of an image")
    return dataclasses.replace(config, image=dataclasses.replace(image, max_pixels=max_pixels))


def tree_from_tensors(config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The parameters of a small model from tensors in memory, named in any layout of Hugging Face.

    Args:
        config: of the model, as `hf_config.model_config` gives it.
        tensors: original name -> array, all of one float dtype.

    Returns:
        Nested dict of numpy arrays, as `nnx.merge` accepts it.

    Raises:
        InputError: the tensors do not fit the configuration, or hold NaN or infinity.
    """
    source = ArraySource(tensors)
    names = canonical_names(source.tensors, family_of(config).canonical_name)
    planned = plan(config, described(source, names))
    for name, original in planned.repeats.items():
        if not equal_tensors(source, names[name], names[original]):
            raise InputError(f"{names[name]} differs from {names[original]}, but the configuration ties them")
    assert planned.dtype is not None  # `plan` refuses several dtypes
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
    """Raises InputError unless `target` is the name of a folder that does not exist or is empty."""
    if target.name in ("", ".."):
        raise InputError(f"{target}: no name for a new folder; choose one, such as {target / 'model'}")
    if target.is_file():
        raise InputError(f"{target}: is a file; choose another output, which will be a folder")
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists() or target.is_symlink():
        raise InputError(f"{target}: exists already; choose another output or remove it")


def in_folder(folder: Path, call: Callable[..., Any], *arguments: Any) -> Any:
    """Calls; prefixes an InputError with the folder's name."""
    try:
        return call(*arguments)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None


def _plan(config: ModelConfig, weights: Source, names: dict[str, str], dtype: str | None) -> tuple[ModelConfig, Plan]:
    """The plan and the configuration, which is untied if the stored head differs from the embedding, as transformers does."""
    planned = plan(config, described(weights, names), any_float=dtype is not None)
    if all(equal_tensors(weights, names[name], names[other]) for name, other in planned.repeats.items()):
        return config, planned
    logger.warning("config.json ties the output head to the embeddings, but the stored ones differ: both are kept")
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, tied_embeddings=False))
    return config, plan(config, described(weights, names), any_float=dtype is not None)


def _into_folder(job: _Conversion, target: Path) -> None:
    """Writes the model folder next to `target` and moves it there when it is complete."""
    work = target.with_name(f"{target.name}.tmp")
    file = lambda name: name.removeprefix(".").removesuffix(".tmp")  # `write_atomic` writes NAME through .NAME.tmp
    if work.exists() and not (work.is_dir() and {file(path.name) for path in work.iterdir()} <= _WORK_FILES):
        raise InputError(f"{work}: exists and is not an interrupted conversion; remove it")
    with FolderLock(work) as lock:
        try:
            leaves, files = _write_base(job, work / "base")
            hf = _write_hf(job, work / "hf")
            write_manifest(work, _manifest(job, leaves, files, hf))
        except InputError:
            shutil.rmtree(work)  # the input is wrong, so there is nothing to resume
            raise
        try:
            lock.path.unlink()
            os.replace(work, target)
            sync_folder(target.absolute().parent)
        except OSError as error:
            raise CheckpointError(f"{target}: cannot be written: {error.strerror}") from None


def _manifest(job: _Conversion, leaves: dict[str, LeafEntry], files: dict[str, str], hf: dict[str, str]) -> Manifest:
    """The manifest, with where the model came from: an export needs that."""
    weights, names, planned = job.opened.weights, job.names, job.planned
    config_fields = ignored_fields(read_object(job.opened.folder / "config.json"))
    own = job.checkpoint.folder
    sizes = {(f.name if f.parent == own else f"{f.parent.name}/{f.name}"): f.stat().st_size for f in weights.files}
    return Manifest(
        job.config,
        leaves,
        files,
        source=ModelSource(job.checkpoint.name, job.checkpoint.revision, sizes),
        hf=hf,
        names={name: names[name] for name in sorted(names) if name not in planned.ignored},
        dtypes={name: weights.tensors[key].dtype.name for name, key in names.items()},
        carried=tuple(planned.carried),
        repeats=planned.repeats,
        ignored={names[name]: reason for name, reason in planned.ignored.items()}
        | {f"config.json: {name}": "transformers does not define it for this model" for name in config_fields}
        | job.opened.ignored,
    )


def _write_base(job: _Conversion, folder: Path) -> tuple[dict[str, LeafEntry], dict[str, str]]:
    """Writes the parameters; returns `leaves` and `files` of the manifest."""
    planned = job.planned
    stacked = {part.leaf for part in planned.layout.parts if part.layer is not None}
    scaled = scales(leaf_shapes(job.config))
    specs = {
        name: LeafSpec(shape, "int8" if name in scaled else job.dtype, stacked=name in stacked)
        for name, shape in planned.layout.leaves.items()
    } | {scale_of(name): LeafSpec(shape, "float32", stacked=True) for name, shape in scaled.items()}
    writer = BaseWriter(folder, specs)
    total = sum(math.prod(spec.shape) * spec.numpy_dtype.itemsize for spec in specs.values())
    done = 0
    for part, start, stop in blocks(planned, specs):
        dtype = "float32" if part.leaf in scaled else job.dtype
        block = read_block(job.opened.weights, job.names[part.source], part, start, stop, dtype)
        if part.leaf in scaled:
            assert part.layer is not None  # only kernels of decoder layers are rounded
            block, scale = quantize(block, block.ndim - (len(scaled[part.leaf]) - 1))
            writer.put(scale_of(part.leaf), part.layer, scale[None])
            done += scale.nbytes
        if part.layer is None:
            writer.put(part.leaf, start, block)
        else:
            writer.put(part.leaf, part.layer, block[None])
        done += block.nbytes
        logger.debug("%s: %d of %d MiB", part.source, done >> 20, total >> 20)
        job.progress(done >> 20, total >> 20, "MiB")
    return writer.finish()


def blocks(planned: Plan, specs: Mapping[str, LeafSpec]) -> Iterator[tuple[Part, int, int]]:
    """All blocks for the writer, as rows `start : stop` of a part: a whole layer, or a range of an unstacked leaf."""
    for part in planned.layout.parts:
        spec = specs[part.leaf]
        step = part.shape[0] if part.layer is not None else spec.rows
        for start in range(0, part.shape[0], step):
            yield part, start, min(start + step, part.shape[0])


def _write_hf(job: _Conversion, folder: Path) -> dict[str, str]:
    """Copies the small files and the carried tensors. Returns file below `folder` -> sha256."""
    if folder.exists():  # of an interrupted conversion
        shutil.rmtree(folder)
    folder.mkdir()
    copy_small_files(job.opened.folder, folder)
    if carried := job.planned.carried:
        tensors = described(job.opened.weights, {name: job.names[name] for name in carried})
        with SafetensorsWriter(folder / CARRIED, tensors) as out:
            for name in carried:
                for row, values in pieces(job.opened.weights, job.names[name]):
                    check_finite(job.names[name], values)
                    out.put(name, values.reshape(len(values), -1), row)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}
