"""Reads the backbone, into shardings or block by block, and compares every byte with the manifest."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import ml_dtypes  # noqa: F401  (np.dtype("bfloat16") needs it)
import numpy as np
from jax.sharding import Sharding

from lsg_jax.checkpoint.manifest import Manifest, read_manifest
from lsg_jax.checkpoint.problem import Problem, first_line
from lsg_jax.checkpoint.processes import gather_texts, on_all
from lsg_jax.checkpoint.shares import shares_of
from lsg_jax.checkpoint.tree import differences, flatten, nest
from lsg_jax.checkpoint.writer import LeafSpec, chunk_problem, leaf_folder, open_store
from lsg_jax.config import is_scale
from lsg_jax.digest import array_sha256, file_sha256
from lsg_jax.errors import CheckpointError

_FOREIGN = "does not belong to the model"


def load_base(folder: str | Path, abstract: Any, *, dtype: Any = None, verify: bool = True) -> dict[str, Any]:
    """Loads the backbone of a model folder straight into its shardings; a collective of all processes.

    Several processes split the reading (`shares`). Each host may have its own copy of the folder.

    Args:
        folder: the model folder.
        abstract: nested dict of `jax.ShapeDtypeStruct`; a leaf without sharding goes to the first device.
        dtype: float leaves are cast to it after the check; None keeps the stored dtype. With a dtype, abstract float leaves
            may have that or the stored one. Integer leaves and their scales are never cast.
        verify: compare the sha256 of every block with the manifest. Without it, file sizes and the crc32c of each chunk are
            still checked.

    Returns:
        Nested dict of `jax.Array` with the names, shapes and shardings of `abstract`.

    Raises:
        InputError: no converted model at `folder`.
        CheckpointError: names, shapes or dtypes differ (all listed at once), or the stored data are damaged (names the leaf).
            An error of one process is raised on all.
    """
    folder = Path(folder)
    wanted = flatten(abstract)
    target = None if dtype is None else np.dtype(dtype)
    manifest, specs = on_all(lambda: _open_checked(folder, wanted, target))
    identity = f"{manifest.digest} {manifest.preparation}"
    for rank, digest in enumerate(gather_texts(identity)):
        if digest != identity:
            raise CheckpointError(f"{folder}: process {rank} has another model there; copy the same folder to all hosts")
    result = {}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for name, leaf in wanted.items():
            digests = manifest.leaves[name].sha256 if verify else None
            array = _load_leaf(folder, name, specs[name], digests, getattr(leaf, "sharding", None), pool)
            cast = target is not None and _is_float(array.dtype) and array.dtype != target and not is_scale(name)
            result[name] = array.astype(target) if cast else array
    return nest(result)


def _open_checked(folder: Path, wanted: dict[str, Any], target: np.dtype | None) -> tuple[Manifest, dict[str, LeafSpec]]:
    """Manifest and leaves of a folder, after every check that needs no block."""
    manifest = read_manifest(folder)
    specs = leaf_specs(manifest)
    if found := differences(
        _signature(specs), {n: (x.shape, _wanted_dtype(x, specs.get(n), target)) for n, x in wanted.items()}
    ):
        raise CheckpointError(f"{folder}: does not hold the expected model: {found}")
    small = hf_problems(folder, manifest, manifest.text_files)
    for problem in [*_file_problems(folder, manifest), *_chunk_problems(folder, specs), *small]:
        raise _damage(folder, str(problem))
    return manifest, specs


def iter_base(
    folder: str | Path, *, verify: bool = True, wanted: Callable[[str], bool] = lambda name: True
) -> Iterator[tuple[str, int, np.ndarray]]:
    """Yields the stored blocks one at a time: (leaf name, offset along axis 0, block).

    Args:
        wanted: whether a leaf of this name is read.

    Raises:
        InputError: no converted model at `folder`.
        CheckpointError: a block is damaged.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    for name, spec in leaf_specs(manifest).items():
        if not wanted(name):
            continue
        for offset, digest in zip(spec.offsets(), manifest.leaves[name].sha256, strict=True):
            block, what = _read_block(folder, name, spec, offset, digest if verify else None)
            if block is None:
                raise _damage(folder, f"leaf {name}: {what}")
            yield name, offset, block


def verify_base(folder: str | Path) -> list[Problem]:
    """Compares every file and every block of the backbone with the manifest, one block at a time.

    Returns:
        All problems: damaged or missing blocks, changed files, and files that do not belong there. Empty if there is none.

    Raises:
        InputError, CheckpointError: the manifest itself is missing or damaged.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    specs = leaf_specs(manifest)
    problems = _file_problems(folder, manifest)
    for name, spec in specs.items():
        for offset, digest in zip(spec.offsets(), manifest.leaves[name].sha256, strict=True):
            block, what = _read_block(folder, name, spec, offset, digest)
            if block is None:
                problems.append(Problem(f"leaf {name}", what))
    base = folder / "base"
    known = {leaf_folder(name) for name in specs} | set(manifest.files)
    present = [*base.glob("*"), *base.glob("state/*")] if base.is_dir() else []
    extra = {str(p.relative_to(base)) for p in present} - known - {"state"}
    problems += [Problem(f"base/{path}", _FOREIGN) for path in sorted(extra)]
    return problems + hf_problems(folder, manifest, manifest.hf)


def hf_problems(folder: Path, manifest: Manifest, files: Mapping[str, str]) -> list[Problem]:
    """Compares files below `MODEL/hf` with their digests, and finds those that were added; empty if all agree.

    Args:
        files: the entries of `manifest.hf` to compare.
    """
    problems = []
    for name, digest in files.items():
        path = folder / "hf" / name
        if not path.is_file():
            problems.append(Problem(f"hf/{name}", "is missing"))
        elif file_sha256(path) != digest:
            problems.append(Problem(f"hf/{name}", "does not match its sha256"))
    # an added file counts: a chat template, for example, comes before others
    there = (path.relative_to(folder / "hf") for path in sorted((folder / "hf").rglob("*")) if path.is_file())
    names = [path.as_posix() for path in there if not path.name.startswith(".")] if manifest.hf else []
    return problems + [Problem(f"hf/{name}", _FOREIGN) for name in names if name not in manifest.hf]


def leaf_specs(manifest: Manifest) -> dict[str, LeafSpec]:
    """Leaf name -> spec.

    Raises:
        CheckpointError: the blocks of an entry do not fit its shape.
    """
    specs = {}
    for name, entry in manifest.leaves.items():
        plain = LeafSpec(entry.shape, entry.dtype)
        spec = plain if plain.rows == entry.rows else LeafSpec(entry.shape, entry.dtype, stacked=True)
        if spec.rows != entry.rows or len(spec.offsets()) != len(entry.sha256):
            raise CheckpointError(f"leaf {name}: the manifest's blocks do not fit its shape; convert the model again")
        specs[name] = spec
    return specs


def _load_leaf(
    folder: Path, name: str, spec: LeafSpec, digests: Sequence[str] | None, sharding: Sharding | None, pool: ThreadPoolExecutor
) -> jax.Array:
    """One leaf on its devices. A process reads each block at most once and checks its digest before the transfer.

    `ocp.load` reads the same folder, but reads a chunk again for every device that holds a part of it, and cannot check sha256.
    """
    shares = shares_of(spec, sharding)
    offsets = spec.offsets() if shares is None else shares.offsets()
    length = spec.shape[:1] if shares is None else (shares.rows,)
    part = np.empty((*length, *spec.shape[1:]), spec.numpy_dtype)

    def read(offset: int) -> str:
        digest = None if digests is None else digests[offset // spec.rows]
        block, what = _read_block(folder, name, spec, offset, digest)
        if block is not None:
            start = offset - offsets.start
            part[(slice(start, start + len(block)),) if spec.shape else ()] = block
        return what

    def read_all() -> None:
        for what in pool.map(read, offsets):
            if what:
                raise _damage(folder, f"leaf {name}: {what}")

    on_all(read_all)
    if shares is not None:
        return shares.spread(part)
    if sharding is None:
        return jax.device_put(part, jax.local_devices()[0])
    return jax.make_array_from_callback(spec.shape, sharding, lambda index: part[index])


def _read_block(folder: Path, name: str, spec: LeafSpec, offset: int, digest: str | None) -> tuple[np.ndarray | None, str]:
    """One block, or None and what is wrong with it."""
    base = folder / "base"
    if what := chunk_problem(base, name, spec, offset):
        return None, what
    try:
        store = open_store(base, name, spec)
        block = (store[offset : offset + spec.block_shape(offset)[0]] if spec.shape else store).read().result()
    except (ValueError, OSError) as error:
        return None, f"block {offset} cannot be read: {first_line(error)}"
    block = np.asarray(block)
    if digest is not None and array_sha256(block) != digest:
        return None, f"block {offset} does not match its sha256"
    return block, ""


def _file_problems(folder: Path, manifest: Manifest) -> list[Problem]:
    problems = []
    for path, digest in manifest.files.items():
        full = folder / "base" / path
        if not full.is_file():
            problems.append(Problem(_leaf_or_file(path), f"base/{path} is missing"))
        elif file_sha256(full) != digest:
            problems.append(Problem(_leaf_or_file(path), f"base/{path} does not match its sha256"))
    return problems


def _leaf_or_file(path: str) -> str:
    _, _, rest = path.partition("/")
    return f"leaf {rest.removesuffix('/zarr.json').replace('.', '/')}" if path.endswith("/zarr.json") else f"base/{path}"


def _chunk_problems(folder: Path, specs: dict[str, LeafSpec]) -> Iterator[Problem]:
    for name, spec in specs.items():
        for offset in spec.offsets():
            if what := chunk_problem(folder / "base", name, spec, offset):
                yield Problem(f"leaf {name}", what)


def _damage(folder: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{folder}: damaged: {what}; run `lsg verify {folder}` for the whole list, then convert the model again"
    )


def _signature(specs: dict[str, LeafSpec]) -> dict[str, tuple[tuple[int, ...], str]]:
    return {name: (spec.shape, spec.dtype) for name, spec in specs.items()}


def _wanted_dtype(leaf: Any, spec: LeafSpec | None, target: np.dtype | None) -> str:
    """Name of the dtype that must be stored for this leaf; with a target dtype, any float dtype may be."""
    dtype = np.dtype(leaf.dtype)
    if target is not None and spec is not None and _is_float(dtype) and dtype == target and _is_float(spec.numpy_dtype):
        return spec.dtype
    return dtype.name


def _is_float(dtype: np.dtype) -> bool:
    return jax.dtypes.issubdtype(dtype, np.floating)
