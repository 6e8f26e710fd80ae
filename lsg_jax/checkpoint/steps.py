"""One stored step: an Orbax checkpoint of numpy arrays, with the digest of every leaf in its metadata.

Arrays are stored as host arrays, so a step can be read without the run's tree and placed on any mesh.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lsg_jax.checkpoint.orbax import OrbaxError, call_orbax
from lsg_jax.checkpoint.problem import first_line
from lsg_jax.checkpoint.processes import host_array, is_primary, on_primary
from lsg_jax.checkpoint.tree import differences, flatten, nest, stored_name
from lsg_jax.config import from_dict
from lsg_jax.digest import array_sha256, canonical_json, json_sha256
from lsg_jax.errors import CheckpointError, ConfigError, InputError, NonFiniteError
from lsg_jax.files import sync_folder
from lsg_jax.json_files import read_json

_RECORD = "lsg_run"
FORMAT = "lsg-run-1"


class DamagedStep(Exception):
    """A step whose files are missing, truncated or changed. Callers use an earlier step or raise a CheckpointError."""


@dataclass(frozen=True)
class StoredLeaf:
    """A leaf in the form in which it is stored.

    Attributes:
        data: the values; uint32 key data where the leaf is a typed random key.
        dtype: name of the leaf's dtype; "key<...>" for a typed random key.
        key_impl: name of the random number generator of a typed key, else None.
    """

    data: np.ndarray
    dtype: str
    key_impl: str | None = None

    def entry(self) -> StepLeaf:
        return StepLeaf(self.data.shape, self.dtype, array_sha256(self.data), self.key_impl)


@dataclass(frozen=True)
class StepLeaf:
    """A leaf in the record of a step; the fields of `StoredLeaf`, and the shape and digest of its data."""

    shape: tuple[int, ...]
    dtype: str
    sha256: str
    key_impl: str | None = None


@dataclass(frozen=True)
class StepMeta:
    """What a run needs besides its state to continue; empty where the state says all.

    Attributes:
        data: position in the records (`TrainingData.get_state`).
        backbone: digest of the model.
    """

    data: dict[str, object] = field(default_factory=dict)
    backbone: str = ""

    def as_json(self) -> dict[str, Any]:
        """What was set."""
        return {name: value for name, value in vars(self).items() if value}


@dataclass(frozen=True)
class StepRecord:
    """What the metadata of a step say of it.

    Attributes:
        leaves: name on disk (`stored_name`) -> entry.
    """

    step: int
    leaves: dict[str, StepLeaf]
    meta: StepMeta


def stored_leaves(state: Any) -> dict[str, Any]:
    """Name on disk -> leaf, in tree order.

    Raises:
        CheckpointError: two leaves with one name, or a name that cannot be stored.
    """
    leaves = flatten(state)
    named = {stored_name(name): leaf for name, leaf in leaves.items()}
    if len(named) < len(leaves):
        raise CheckpointError("the state holds leaves under `trained` and under `gates`, which have one name on disk")
    return named


def to_stored(state: Any) -> dict[str, StoredLeaf]:
    """Name on disk -> host copy, checked to be storable and finite; a collective when leaves span processes.

    Raises:
        NonFiniteError: a float leaf holds NaN or infinity.
        CheckpointError: a leaf is no array, is empty, or has a dtype that JAX would not restore.
    """
    stored = {}
    for name, leaf in stored_leaves(state).items():
        if not isinstance(leaf, (jax.Array, np.ndarray, np.generic)):
            raise CheckpointError(f"leaf {name} is a {type(leaf).__name__}, not an array; put plain values into meta")
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            impl = str(jax.random.key_impl(leaf))
            stored[name] = StoredLeaf(host_array(jax.random.key_data(leaf)), str(leaf.dtype), impl)
            continue
        data = host_array(np.asarray(leaf) if isinstance(leaf, np.generic) else leaf)
        if data.size == 0 or jax.dtypes.canonicalize_dtype(data.dtype) != data.dtype:
            raise CheckpointError(
                f"leaf {name} is {data.dtype}{list(data.shape)}, which cannot be stored and come back the same"
            )
        if jnp.issubdtype(data.dtype, jnp.inexact) and not np.isfinite(data).all():
            raise NonFiniteError(f"leaf {name} holds NaN or infinity; the step was not saved and earlier steps are kept")
        stored[name] = StoredLeaf(data, data.dtype.name)
    if not stored:
        raise CheckpointError("the state has no leaves; nothing was saved")
    return stored


def write_step(folder: Path, step: int, stored: Mapping[str, StoredLeaf], meta: StepMeta) -> None:
    """Writes `folder/<step>` atomically and reads it back; a collective. A failed step is removed.

    Raises:
        CheckpointError: `meta` is no JSON, the write failed (disk full), or the step does not read back.
    """
    try:
        leaves = {name: vars(leaf.entry()) for name, leaf in stored.items()}
        record = canonical_json({"format": FORMAT, "step": step, "leaves": leaves, "meta": meta.as_json()})
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}: step {step} was not saved: meta is no JSON: {first_line(error)}") from None
    path = folder / str(step)
    custom = {_RECORD: {"record": record, "sha256": json_sha256(record)}}
    tree = nest({name: leaf.data for name, leaf in stored.items()})
    try:
        # Orbax 0.12 saves only with all processes, whatever `active_processes` says.
        call_orbax(lambda ocp: ocp.save(path.resolve(), tree, custom_metadata=custom))
    except OrbaxError as error:
        raise _lost(folder, step, error) from None

    def check() -> None:
        """Reads the step back, before an older one is deleted."""
        try:
            sync_folder(folder)
            read_stored(folder, step)
        except (DamagedStep, OSError) as error:
            raise _lost(folder, step, error) from None

    on_primary(check)


def _lost(folder: Path, step: int, error: Exception) -> CheckpointError:
    if is_primary():
        shutil.rmtree(folder / str(step), ignore_errors=True)
        remove_leftovers(folder)
    why = f"step {step} was not saved: {first_line(error)}"
    return CheckpointError(f"{folder}: {why}; earlier steps are kept: free space if the disk is full, and run it again")


def read_record(folder: Path, step: int) -> StepRecord:
    """The record of a step, checked against its own digest.

    Raises:
        DamagedStep: missing or changed.
        CheckpointError: of a format that this version does not know.
    """
    try:
        custom = read_json(folder / str(step) / "_CHECKPOINT_METADATA")["custom_metadata"]
        text, digest = custom[_RECORD]["record"], custom[_RECORD]["sha256"]
    except (InputError, KeyError, TypeError) as error:
        raise DamagedStep(f"its metadata cannot be read: {first_line(error)}") from None
    if json_sha256(text) != digest:
        raise DamagedStep("its metadata do not match their sha256")
    content = json.loads(text)
    where = str(folder / str(step))
    if (found := content.pop("format", None)) != FORMAT:
        raise CheckpointError(f"{where}: unknown format {found!r}, expected {FORMAT!r}")
    try:
        record = from_dict(StepRecord, content, where=where)
    except ConfigError as error:
        raise CheckpointError(f"{error}; not as this version of lsg writes it") from None
    if record.step != step:
        raise DamagedStep(f"it holds step {record.step}")
    return record


def read_stored(folder: Path, step: int) -> tuple[StepRecord, dict[str, StoredLeaf]]:
    """The record and the leaves of a step, every leaf compared with its digest.

    Raises:
        DamagedStep: anything is missing or changed.
        CheckpointError: unknown format.
    """
    record = read_record(folder, step)
    try:
        loaded = _read_arrays(folder / str(step), list(record.leaves))
    except (ValueError, OSError) as error:  # TensorStore reports all damage as a ValueError
        raise DamagedStep(f"its arrays cannot be read: {first_line(error)}") from None
    stored = {}
    for name, entry in record.leaves.items():
        leaf = StoredLeaf(np.asarray(loaded[name]), entry.dtype, entry.key_impl)
        if leaf.key_impl is None and leaf.data.dtype.name != entry.dtype:
            raise DamagedStep(f"leaf {name} is {leaf.data.dtype}, its metadata say {entry.dtype}")
        if leaf.entry() != entry:
            raise DamagedStep(f"leaf {name} does not match its sha256")
        stored[name] = leaf
    return record, stored


def _read_arrays(path: Path, names: list[str]) -> dict[str, np.ndarray]:
    """The arrays of a step, through TensorStore: calls to Orbax are matched between processes, and only one reads."""
    import tensorstore

    database = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{path.resolve()}/state/"}}
    specs = [{"driver": "zarr3", "kvstore": {**database, "path": name.replace("/", ".") + "/"}} for name in names]
    stores = [store.result() for store in [tensorstore.open(spec, open=True, read=True) for spec in specs]]
    reads = [store.read() for store in stores]
    return {name: np.asarray(read.result()) for name, read in zip(names, reads, strict=True)}


def check_fits(where: str, record: StepRecord, abstract: Any) -> None:
    """Compares the leaves of a record with an abstract tree.

    Raises:
        CheckpointError: names, shapes or dtypes differ; all are listed.
    """
    have = {}
    for name, entry in record.leaves.items():
        shape = entry.shape[:-1] if entry.key_impl else entry.shape  # key data have one axis more than keys
        have[name] = (shape, entry.dtype)
    want = {name: (tuple(x.shape), str(x.dtype)) for name, x in stored_leaves(abstract).items()}
    if found := differences(have, want):
        raise CheckpointError(f"{where}: does not fit this run: {found}")


def place(stored: StoredLeaf, abstract: Any) -> jax.Array:
    """The leaf as a `jax.Array`, with the sharding of its abstract leaf if that has one."""
    sharding = getattr(abstract, "sharding", None)
    if stored.key_impl is not None:
        keys = jax.random.wrap_key_data(jnp.asarray(stored.data), impl=stored.key_impl)
        return keys if sharding is None else jax.device_put(keys, sharding)
    if sharding is None:
        return jnp.asarray(stored.data)
    return jax.make_array_from_callback(stored.data.shape, sharding, lambda index: stored.data[index])


def remove_leftovers(folder: Path) -> None:
    """Removes what interrupted saves and deletions left: all that is not a step. Only under the lock."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if not is_step(path.name):
            shutil.rmtree(path, ignore_errors=True)


def is_step(name: str) -> bool:
    return name.isdecimal() and str(int(name)) == name
