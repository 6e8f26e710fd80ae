"""One stored step: an Orbax checkpoint of numpy arrays whose metadata carry the digest of every leaf.

Arrays are stored as host arrays, so a step knows nothing of devices: it can be read without the run's tree and placed on any
mesh.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lsg_jax.checkpoint.orbax import OrbaxError, call_orbax
from lsg_jax.checkpoint.problem import first_line
from lsg_jax.checkpoint.processes import host_array, is_primary, on_primary
from lsg_jax.checkpoint.tree import differences, flatten, nest
from lsg_jax.digest import array_sha256, canonical_json, json_sha256
from lsg_jax.errors import CheckpointError, InputError, NonFiniteError
from lsg_jax.files import read_json, sync_folder

_RECORD = "lsg_run"
FORMAT = "lsg-run-1"


class DamagedStep(Exception):
    """A step whose files are missing, cut off or changed. Callers fall back or turn it into a CheckpointError."""


@dataclass(frozen=True)
class StoredLeaf:
    """A leaf as it is stored.

    Attributes:
        data: the values; uint32 key data where the leaf is a typed random key.
        dtype: name of the leaf's dtype; "key<...>" for a typed random key.
        key_impl: name of the random number generator of a typed key, else None.
    """

    data: np.ndarray
    dtype: str
    key_impl: str | None = None

    def entry(self) -> dict[str, Any]:
        shape = list(self.data.shape)
        return {"shape": shape, "dtype": self.dtype, "key_impl": self.key_impl, "sha256": array_sha256(self.data)}


def to_stored(state: Any) -> dict[str, StoredLeaf]:
    """Leaf name -> host copy, checked to be storable and finite; a collective when leaves span processes.

    Raises:
        NonFiniteError: a float leaf holds NaN or infinity. CheckpointError: a leaf is no array, empty, or of a dtype that JAX
            would change on the way back.
    """
    stored = {}
    for name, leaf in flatten(state).items():
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


def write_step(folder: Path, step: int, stored: Mapping[str, StoredLeaf], meta: dict[str, Any]) -> None:
    """Writes `folder/<step>` atomically and reads it back; all processes together. On failure nothing is left of the step.

    Raises:
        CheckpointError: `meta` is no JSON, the write failed (disk full), or what was written does not read back.
    """
    try:
        leaves = {name: leaf.entry() for name, leaf in stored.items()}
        record = canonical_json({"format": FORMAT, "step": step, "leaves": leaves, "meta": meta})
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}: step {step} was not saved: meta is no JSON: {first_line(error)}") from None
    path = folder / str(step)
    custom = {_RECORD: {"record": record, "sha256": json_sha256(record)}}
    tree = nest({name: leaf.data for name, leaf in stored.items()})
    try:
        # Orbax 0.12 saves only with all processes, whatever `active_processes` says.
        call_orbax(lambda ocp: ocp.save(path.absolute(), tree, custom_metadata=custom))
    except OrbaxError as error:
        raise _lost(folder, step, error) from None

    def check() -> None:
        """Before anyone deletes an older step for this one."""
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
    return CheckpointError(f"{folder}: step {step} was not saved: {first_line(error)}; earlier steps are kept")


def read_record(folder: Path, step: int) -> dict[str, Any]:
    """The record of a step: {"step", "leaves": {name: entry}, "meta"}, checked against its own digest.

    Raises:
        DamagedStep: missing or changed. CheckpointError: of a format that this version does not know.
    """
    try:
        custom = read_json(folder / str(step) / "_CHECKPOINT_METADATA")["custom_metadata"]
        text, digest = custom[_RECORD]["record"], custom[_RECORD]["sha256"]
    except (InputError, KeyError, TypeError) as error:
        raise DamagedStep(f"its metadata cannot be read: {first_line(error)}") from None
    if json_sha256(text) != digest:
        raise DamagedStep("its metadata do not match their sha256")
    record = json.loads(text)
    if record["format"] != FORMAT:
        raise CheckpointError(f"{folder / str(step)}: unknown format {record['format']!r}, expected {FORMAT!r}")
    if record["step"] != step:
        raise DamagedStep(f"it holds step {record['step']}")
    return record


def read_stored(folder: Path, step: int) -> tuple[dict[str, Any], dict[str, StoredLeaf]]:
    """The record and the leaves of a step, every leaf compared with its digest.

    Raises:
        DamagedStep: anything is missing or changed. CheckpointError: unknown format.
    """
    record = read_record(folder, step)
    try:
        loaded = _read_arrays(folder / str(step), list(record["leaves"]))
    except (ValueError, OSError) as error:  # TensorStore reports all damage as a ValueError
        raise DamagedStep(f"its arrays cannot be read: {first_line(error)}") from None
    stored = {}
    for name, entry in record["leaves"].items():
        leaf = StoredLeaf(np.asarray(loaded[name]), entry["dtype"], entry["key_impl"])
        if leaf.key_impl is None and leaf.data.dtype.name != entry["dtype"]:
            raise DamagedStep(f"leaf {name} is {leaf.data.dtype}, its metadata say {entry['dtype']}")
        if leaf.entry() != entry:
            raise DamagedStep(f"leaf {name} does not match its sha256")
        stored[name] = leaf
    return record, stored


def _read_arrays(path: Path, names: list[str]) -> dict[str, np.ndarray]:
    """The arrays of a step through TensorStore: Orbax counts its calls, and one process alone would leave the others behind."""
    import tensorstore

    database = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{path.absolute()}/state/"}}
    specs = [{"driver": "zarr3", "kvstore": {**database, "path": name.replace("/", ".") + "/"}} for name in names]
    stores = [store.result() for store in [tensorstore.open(spec, open=True, read=True) for spec in specs]]
    reads = [store.read() for store in stores]
    return {name: np.asarray(read.result()) for name, read in zip(names, reads, strict=True)}


def check_fits(where: str, record: dict[str, Any], abstract: Any) -> None:
    """Compares the leaves of a record with an abstract tree.

    Raises:
        CheckpointError: names, shapes or dtypes differ; all are listed.
    """
    have = {}
    for name, entry in record["leaves"].items():
        shape = entry["shape"][:-1] if entry["key_impl"] else entry["shape"]  # key data have one axis more than keys
        have[name] = (tuple(shape), entry["dtype"])
    want = {name: (tuple(x.shape), str(x.dtype)) for name, x in flatten(abstract).items()}
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
    """Removes what killed saves and deletions left: everything that is not a step. Only for the owner of the lock."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if not is_step(path.name):
            shutil.rmtree(path, ignore_errors=True)


def is_step(name: str) -> bool:
    return name.isdecimal() and str(int(name)) == name
