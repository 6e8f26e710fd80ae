"""Writes the backbone block by block, so that a model larger than memory can be converted.

The result is an Orbax v1 checkpoint (zarr3, one folder a leaf, no OCDBT) that `ocp.load` reads. It differs from what Orbax
itself writes in two ways: each chunk has a crc32c, so that a flipped byte is an error, and a chunk is one block.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (np.dtype("bfloat16") needs it)
import numpy as np

from lsg_jax.checkpoint.manifest import JOURNAL, LeafEntry
from lsg_jax.checkpoint.problem import first_line
from lsg_jax.checkpoint.tree import check_name, nest
from lsg_jax.digest import array_sha256, file_sha256, json_sha256
from lsg_jax.errors import CheckpointError, InputError
from lsg_jax.files import write_atomic
from lsg_jax.json_files import sealed_line, sealed_lines

logger = logging.getLogger(__name__)

BLOCK_BYTES = 64 << 20
STATE = "state"  # the name under which Orbax v1 stores a tree
_HANDLER = "orbax.checkpoint.experimental.v1._src.handlers.pytree_handler.PyTreeHandler"
_CRC_BYTES = 4
_STORE = "zarr.json"  # of each leaf


@dataclass(frozen=True)
class LeafSpec:
    """Shape and dtype of one leaf, and how it is split into blocks along axis 0.

    Attributes:
        shape: of the whole leaf, [L, ...] when stacked.
        dtype: name of the stored dtype, such as "bfloat16".
        stacked: one block is one layer. Otherwise a block is as many rows as fit in 64 MiB.
    """

    shape: tuple[int, ...]
    dtype: str
    stacked: bool = False

    @property
    def numpy_dtype(self) -> np.dtype:
        return np.dtype(self.dtype)

    @property
    def rows(self) -> int:
        """Length of a block along axis 0; the last one may be shorter. A leaf without axes is one block."""
        if self.stacked or not self.shape:
            return 1
        row_bytes = math.prod(self.shape[1:]) * self.numpy_dtype.itemsize
        return min(self.shape[0], max(1, BLOCK_BYTES // row_bytes))

    @property
    def block_bytes(self) -> int:
        return self.rows * math.prod(self.shape[1:]) * self.numpy_dtype.itemsize

    def offsets(self) -> range:
        """Where the blocks start along axis 0."""
        return range(0, self.shape[0], self.rows) if self.shape else range(1)

    def block_shape(self, offset: int) -> tuple[int, ...]:
        return (min(self.rows, self.shape[0] - offset), *self.shape[1:]) if self.shape else ()


class BaseWriter:
    """Streams a parameter tree into `folder` (`MODEL.tmp/base`), holding one block at a time.

    A second writer on the same folder resumes an interrupted one: it skips blocks whose file is there and whose digest is in
    the journal (`MODEL.tmp/base.journal`, removed by `write_manifest`). Not safe for two processes.

    Args:
        folder: where to write. Content of another set of leaves is removed.
        leaves: '/'-joined leaf name -> LeafSpec, for the whole tree.

    Raises:
        InputError: the folder cannot be written.
        CheckpointError: a leaf cannot be stored (name, shape or dtype).
    """

    def __init__(self, folder: str | Path, leaves: Mapping[str, LeafSpec]):
        self.folder = Path(folder)
        self.leaves = dict(leaves)
        self._journal = self.folder.parent / JOURNAL
        self._digests: dict[tuple[str, int], str] = {}
        self._open: tuple[str, Any] | None = None  # one store at a time: memory must not grow with the leaves
        for name, spec in self.leaves.items():
            _check_leaf(name, spec)
        nest(self.leaves)
        try:
            self._start()
        except OSError as error:
            raise InputError(f"{self.folder}: cannot be written: {error.strerror}") from None

    def put(self, name: str, offset: int, block: np.ndarray) -> bool:
        """Writes rows `offset : offset + len(block)` of a leaf: one or more whole blocks.

        Args:
            name: the leaf.
            offset: index along axis 0, a multiple of `leaves[name].rows`; the layer when stacked; 0 for a leaf without axes.
            block: [n, ...] in the leaf's dtype, n a multiple of `rows` or up to the end; one layer is [1, ...].

        Returns:
            Whether anything was written; False if all of it was there already.

        Raises:
            ValueError: unknown leaf, wrong shape, dtype or alignment.
            CheckpointError: the write failed (disk full).
        """
        if name not in self.leaves:
            raise ValueError(f"unknown leaf {name}")
        spec = self.leaves[name]
        rows = spec.rows
        end = offset + len(block) if spec.shape else 1
        fits = block.shape == spec.shape if not spec.shape else block.shape[1:] == spec.shape[1:] and len(block) > 0
        if not fits or block.dtype != spec.numpy_dtype:
            raise ValueError(f"{name}: got {block.dtype}{list(block.shape)}, the leaf is {spec.dtype}{list(spec.shape)}")
        length = spec.shape[0] if spec.shape else 1
        if offset < 0 or offset % rows or end > length or (end % rows and end != length):
            raise ValueError(f"{name}: rows {offset}:{end} are not whole blocks of {rows} within {length}")
        wrote = False
        for start in range(offset, end, rows):
            part = block[start - offset : start - offset + rows] if spec.shape else block
            wrote |= self._put_block(name, spec, start, part)
        return wrote

    def finish(self) -> tuple[dict[str, LeafEntry], dict[str, str]]:
        """Writes Orbax's own files.

        Returns:
            `leaves` and `files` of the manifest.

        Raises:
            CheckpointError: blocks that were never put, or a failed write.
        """
        self._open = None
        absent = [f"{n}[{o}]" for n, s in self.leaves.items() for o in s.offsets() if not self._is_done(n, s, o)]
        if absent:
            more = f" and {len(absent) - 8} more" if len(absent) > 8 else ""
            raise CheckpointError(f"{self.folder}: blocks were not written: {', '.join(absent[:8])}{more}")
        files = orbax_files(self.leaves)
        try:
            for name, spec in self.leaves.items():
                if not (self.folder / leaf_folder(name) / _STORE).exists():
                    self._store(name, spec)
            for path, data in files.items():
                write_atomic(self.folder / path, data)
        except OSError as error:
            raise CheckpointError(f"{self.folder}: cannot be written: {error.strerror}") from None
        except ValueError as error:  # TensorStore's
            raise CheckpointError(f"{self.folder}: cannot be written: {first_line(error)}") from None
        stores = [f"{leaf_folder(name)}/{_STORE}" for name in self.leaves]
        leaves = {
            name: LeafEntry(spec.shape, spec.dtype, spec.rows, tuple(self._digests[name, offset] for offset in spec.offsets()))
            for name, spec in self.leaves.items()
        }
        return leaves, {path: file_sha256(self.folder / path) for path in [*files, *stores]}

    def _start(self) -> None:
        """Reads the journal of an interrupted writer of the same leaves, or starts with an empty folder."""
        header = {"leaves": json_sha256({n: [s.shape, s.dtype, s.rows] for n, s in self.leaves.items()})}
        records = sealed_lines(self._journal, JOURNAL)[0] if self._journal.exists() else []
        if records[:1] == [header]:
            self._digests = {(r["leaf"], r["offset"]): r["sha256"] for r in records[1:]}
            for name in self.leaves:  # small and without a digest: written again
                (self.folder / leaf_folder(name) / _STORE).unlink(missing_ok=True)
            logger.info("%s: going on with %d blocks already written", self.folder, len(self._digests))
        elif self.folder.exists():
            shutil.rmtree(self.folder)
        (self.folder / STATE).mkdir(parents=True, exist_ok=True)
        # Rewritten, not appended to: a line truncated by a crash would spoil the next one.
        kept = [header] + [{"leaf": n, "offset": o, "sha256": d} for (n, o), d in self._digests.items()]
        write_atomic(self._journal, "".join(sealed_line(record, JOURNAL) for record in kept).encode())

    def _put_block(self, name: str, spec: LeafSpec, offset: int, block: np.ndarray) -> bool:
        digest = array_sha256(block)
        if self._digests.get((name, offset)) == digest and self._is_done(name, spec, offset):
            return False
        try:
            store = self._store(name, spec)
            (store[offset : offset + len(block)] if spec.shape else store).write(block).result()
            # Last: the journal must never list data that are not on disk (TensorStore syncs a file before it returns).
            with open(self._journal, "a", encoding="utf-8") as journal:
                journal.write(sealed_line({"leaf": name, "offset": offset, "sha256": digest}, JOURNAL))
        except (OSError, ValueError) as error:  # TensorStore reports a full disk as a ValueError
            what = f"leaf {name}, block {offset} was not written: {first_line(error)}"
            raise CheckpointError(f"{self.folder}: {what}") from None
        self._digests[name, offset] = digest
        return True

    def _is_done(self, name: str, spec: LeafSpec, offset: int) -> bool:
        return (name, offset) in self._digests and chunk_problem(self.folder, name, spec, offset) is None

    def _store(self, name: str, spec: LeafSpec) -> Any:
        if self._open is None or self._open[0] != name:
            self._open = (name, open_store(self.folder, name, spec, create=True))
        return self._open[1]


def leaf_folder(name: str) -> str:
    """Where Orbax keeps a leaf, relative to the checkpoint."""
    return f"{STATE}/{name.replace('/', '.')}"


def chunk_problem(folder: Path, name: str, spec: LeafSpec, offset: int) -> str | None:
    """What is wrong with the file of one block, judged by its size; None if nothing.

    TensorStore reads a missing chunk as zeros, hence this check. Chunks are stored uncompressed, edge chunks padded to full
    size.
    """
    index = [str(offset // spec.rows)] + ["0"] * (len(spec.shape) - 1) if spec.shape else []
    path = folder.joinpath(leaf_folder(name), "c", *index)
    try:
        size = path.stat().st_size
    except OSError:
        return f"{path.relative_to(folder)} is missing"
    expected = spec.block_bytes + _CRC_BYTES
    return None if size == expected else f"{path.relative_to(folder)} has {size} bytes, expected {expected}"


def open_store(folder: Path, name: str, spec: LeafSpec, *, create: bool = False) -> Any:
    """The TensorStore of one leaf, created if `create`. Raises ValueError if the stored array has other metadata."""
    import tensorstore

    return tensorstore.open(
        {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": f"{(folder / leaf_folder(name)).resolve()}/"},
            "metadata": {
                "shape": list(spec.shape),
                "data_type": spec.dtype,
                "chunk_grid": {
                    "name": "regular",
                    "configuration": {"chunk_shape": [spec.rows, *spec.shape[1:]] if spec.shape else []},
                },
                "chunk_key_encoding": {"name": "default"},
                "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
            },
            # Otherwise a block of zeros has no file and looks like a lost one.
            "store_data_equal_to_fill_value": True,
        },
        create=create,
        open=True,
        read=True,
        write=create,
    ).result()


def orbax_files(leaves: Mapping[str, LeafSpec]) -> dict[str, bytes]:
    """The files besides the arrays that Orbax 0.12 v1 needs to load the tree, without time stamps: the same every time.

    Its `_sharding` and `array_metadatas` are left out: shardings come from the abstract tree.
    """
    tree = {}
    for name, spec in leaves.items():
        keys = name.split("/")
        tree[str(tuple(keys))] = {
            "key_metadata": [{"key": key, "key_type": 2} for key in keys],  # 2: a dict key
            "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False, "write_shape": list(spec.shape)},
        }
    metadata = {
        "tree_metadata": tree,
        "use_ocdbt": False,
        "use_zarr3": True,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    step = {
        "item_handlers": {STATE: _HANDLER},
        "metrics": {},
        "performance_metrics": {},
        "init_timestamp_nsecs": 0,
        "commit_timestamp_nsecs": 0,
        "custom_metadata": {},
    }
    return {
        f"{STATE}/_METADATA": json.dumps(metadata).encode(),
        "_CHECKPOINT_METADATA": json.dumps(step).encode(),
        "orbax.checkpoint": b"",
        "commit_success.txt": b"Checkpoint commit was successful\n",
    }


def _check_leaf(name: str, spec: LeafSpec) -> None:
    check_name(name)
    if spec.stacked and not spec.shape:
        raise CheckpointError(f"leaf {name}: stacked, but without axes")
    if math.prod(spec.shape) == 0:
        raise CheckpointError(f"leaf {name}: has no elements, shape {list(spec.shape)}")
    try:
        known = spec.numpy_dtype.name == spec.dtype
    except TypeError:
        known = False
    if not known:
        raise CheckpointError(f"leaf {name}: unknown dtype {spec.dtype!r}; give its canonical name, such as 'bfloat16'")
