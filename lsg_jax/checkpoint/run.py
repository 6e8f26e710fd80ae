"""The run folder: saved steps, JSON files, a lock and a quarantine.

    RUN/lock                  held while a run writes
    RUN/run.json              see run_record.py
    RUN/checkpoints/<step>/   parameters and optimiser state, see steps.py
    RUN/quarantine/<step>/    damaged steps, kept for inspection

Several processes must call the same methods in the same order with the same path. Process 0 reads, locks and writes JSON, and
sends the results to the others. Orbax saves with all processes, so the folder must be shared between hosts.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lsg_jax.checkpoint import steps
from lsg_jax.checkpoint.lock import FolderLock
from lsg_jax.checkpoint.problem import Problem, first_line
from lsg_jax.checkpoint.processes import is_primary, on_primary, share_bytes
from lsg_jax.checkpoint.steps import DamagedStep, StepLeaf, StepMeta, StepRecord, StoredLeaf
from lsg_jax.checkpoint.tree import loaded_name, nest
from lsg_jax.config import from_dict, to_dict
from lsg_jax.config.ranges import Range
from lsg_jax.errors import CheckpointError, InputError
from lsg_jax.files import write_atomic
from lsg_jax.json_files import read_sealed, write_sealed

logger = logging.getLogger(__name__)

_NO_META = StepMeta()


@dataclass(frozen=True)
class Restored:
    """A restored step.

    Attributes:
        step: its number.
        state: pytree with the structure and shardings of the abstract tree.
        meta: what was saved with it; tuples have become lists.
    """

    step: int
    state: Any
    meta: StepMeta


class RunFolder:
    """A run's output folder.

    Args:
        path: the folder; made by `lock`.
        keep: how many steps to keep, at least 1; with 2 or more a damaged one can be replaced by an earlier one.
    """

    def __init__(self, path: str | Path, *, keep: int = 3):
        Range("[1, 1e6]").check(keep, "keep", int)
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.quarantine = self.path / "quarantine"
        self.keep = keep
        self._lock: FolderLock | None = None

    @contextlib.contextmanager
    def lock(self, *, take_over: bool = False) -> Iterator[RunFolder]:
        """Makes the folder, checks that it can be written, and holds its lock inside the block.

        Args:
            take_over: also take the lock of another machine that is known to be gone (a deleted spot slice).

        Raises:
            BusyError: another run holds it.
            InputError: it cannot be written.
        """
        lock = FolderLock(self.path, take_over=take_over)
        on_primary(lambda: self._acquire(lock))
        self._lock = lock
        try:
            yield self
        finally:
            self._lock = None
            lock.release()

    def save(self, step: int, state: Any, *, meta: StepMeta = _NO_META) -> None:
        """Saves a step, reads it back, and only then deletes steps beyond `keep`. Needs the lock.

        Args:
            step: above the latest step.
            state: pytree of arrays (dicts, lists, tuples, optax states, flax dataclasses); typed random keys are allowed.
                Leaves under `trained` are stored under `gates` (`tree.stored_name`).
            meta: JSON values.

        Raises:
            NonFiniteError: a float leaf holds NaN or infinity.
            CheckpointError: the step was not saved, for the reason given.
                Earlier steps are intact in either case.
        """
        self.write(step, state, meta=meta)
        self.delete_old()

    def write(self, step: int, state: Any, *, meta: StepMeta = _NO_META) -> None:
        """`save` without deleting anything."""
        if self._lock is None:
            raise RuntimeError("save() needs `with run.lock():`")
        stored = steps.to_stored(state)
        on_primary(lambda: self._check_order(step))
        steps.write_step(self.checkpoints, step, stored, meta)

    def delete_old(self) -> None:
        """Deletes steps beyond `keep`."""
        on_primary(lambda: self._delete(self.steps()[: -self.keep]))

    def delete_after(self, step: int) -> None:
        """Deletes steps later than `step`, which are to be computed again. Needs the lock."""
        on_primary(lambda: self._delete([later for later in self.steps() if later > step]))

    def latest(self, abstract: Any, *, up_to: int | None = None) -> Restored | None:
        """Restores the newest undamaged step; None if there are no steps.

        Damaged newer steps are skipped with a warning and, under the lock, moved to `quarantine/`.

        Args:
            abstract: pytree of arrays or `jax.ShapeDtypeStruct`; its shardings are used where present. Leaves under `trained`
                are restored from `gates`, as `save` stored them.
            up_to: passes over later steps; None for none.

        Raises:
            CheckpointError: names, shapes or dtypes differ from `abstract` (never cast), or every step is damaged.
        """
        found = on_primary(lambda: self._find(abstract, up_to))
        header = share_bytes(json.dumps(to_dict(found[0]) if found else None).encode())
        if header == b"null":
            return None
        record = from_dict(StepRecord, json.loads(header), where=str(self.checkpoints))
        leaves = [
            steps.place(_share_leaf(record.leaves[name], found[1][name] if found else None), wanted)
            for name, wanted in steps.stored_leaves(abstract).items()
        ]
        state = jax.tree.unflatten(jax.tree.structure(abstract), leaves)
        return Restored(record.step, state, record.meta)

    def steps(self) -> list[int]:
        """The stored steps, ascending, damaged ones included. Reads the folder: call it on process 0."""
        if not self.checkpoints.is_dir():
            return []
        return sorted(int(path.name) for path in self.checkpoints.iterdir() if steps.is_step(path.name))

    def verify(self) -> list[Problem]:
        """Reads every step and every JSON file of the run; returns what is wrong. Call it on process 0."""
        problems = []
        for step in self.steps():
            try:
                steps.read_stored(self.checkpoints, step)
            except (DamagedStep, CheckpointError) as error:
                problems.append(Problem(f"step {step}", str(error)))
        for path in sorted(self.path.glob("*.json")):
            try:
                read_sealed(path)
            except InputError as error:
                problems.append(Problem(path.name, str(error)))
        return problems

    def write_json(self, name: str, value: Any) -> None:
        """Writes an object to `RUN/<name>` with its checksum, atomically, on process 0.

        Raises:
            CheckpointError: it cannot be written.
        """

        def write() -> None:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                write_sealed(self.path / name, value, sort_keys=True)
            except OSError as error:
                raise CheckpointError(f"{self.path / name}: cannot be written: {error.strerror}") from None

        on_primary(write)

    def read_json(self, name: str) -> Any:
        """Reads `RUN/<name>` strictly. Call it on process 0.

        Raises:
            InputError: missing, no valid JSON, or changed.
        """
        return read_sealed(self.path / name)

    def _acquire(self, lock: FolderLock) -> None:
        lock.acquire()
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            write_atomic(self.checkpoints / ".probe", b"x" * 4096)
            steps.remove_leftovers(self.checkpoints)
            (self.checkpoints / ".probe").unlink()
        except OSError as error:
            lock.release()
            raise InputError(f"{self.path}: cannot be written: {error.strerror}; choose another output") from None

    def _check_order(self, step: int) -> None:
        present = self.steps()
        if step < 0 or (present and step <= present[-1]):
            newest = present[-1] if present else "none"
            raise CheckpointError(
                f"{self.path}: step {step} was not saved: the latest step is {newest}; resume from it instead"
            )

    def _delete(self, found: list[int]) -> None:
        for old in found:
            # Renamed first, so that an interrupted deletion leaves no partial step.
            doomed = self.checkpoints / f"{old}.deleted"
            try:
                os.rename(self.checkpoints / str(old), doomed)
                shutil.rmtree(doomed)
            except OSError as error:
                logger.warning("%s: step %d could not be deleted: %s", self.path, old, error.strerror)

    def _find(self, abstract: Any, up_to: int | None = None) -> tuple[StepRecord, dict[str, StoredLeaf]] | None:
        """The newest undamaged step; once there is one, the damaged newer ones are moved away."""
        damaged: list[tuple[int, DamagedStep]] = []
        for step in reversed([step for step in self.steps() if up_to is None or step <= up_to]):
            try:
                record, stored = steps.read_stored(self.checkpoints, step)
            except DamagedStep as error:
                damaged.append((step, error))
                continue
            if abstract is not None:
                steps.check_fits(str(self.checkpoints / str(step)), record, abstract)
            for bad, reason in damaged:
                self._set_aside(bad, reason, step)
            return record, stored
        if damaged:
            # They are not moved: with an empty folder the next start would silently begin at step 0.
            listed = "; ".join(f"step {step}: {first_line(reason)}" for step, reason in damaged)
            raise CheckpointError(
                f"{self.checkpoints}: every step is damaged ({listed}); run `lsg verify {self.path}` or choose another output"
            )
        return None

    def _set_aside(self, step: int, reason: DamagedStep, instead: int) -> None:
        if self._lock is None:
            logger.warning("%s: step %d is damaged (%s); using step %d", self.path, step, first_line(reason), instead)
            return
        target, count = self.quarantine / str(step), 1
        while target.exists():
            count += 1
            target = self.quarantine / f"{step}-{count}"
        try:
            self.quarantine.mkdir(exist_ok=True)
            os.rename(self.checkpoints / str(step), target)
        except OSError as error:
            raise CheckpointError(f"{self.path}: damaged step {step} cannot be moved to {target}: {error.strerror}") from None
        logger.warning(
            "%s: step %d is damaged (%s); moved to %s, using step %d", self.path, step, first_line(reason), target, instead
        )


def read_step(path: str | Path, step: int | None = None) -> tuple[int, dict[str, Any], StepMeta]:
    """Reads a step without an abstract tree, on one process; changes nothing in the folder.

    Args:
        path: the run folder.
        step: which step; None for the newest undamaged one.

    Returns:
        (step, nested dict of numpy arrays, meta). The parameters are under `trained`. Positions in tuples are the keys "0",
        "1", ...; typed random keys are uint32 key data.

    Raises:
        InputError: no run folder, no steps, or no such step.
        CheckpointError: the step, or every step, is damaged.
    """
    run = RunFolder(path)
    present = run.steps()
    if not present:
        raise InputError(f"{run.path}: no run folder with saved steps")
    if step is None:
        found = run._find(None)
        assert found is not None
        record, stored = found
    else:
        if step not in present:
            raise InputError(f"{run.path}: no step {step}; there are {', '.join(map(str, present))}")
        try:
            record, stored = steps.read_stored(run.checkpoints, step)
        except DamagedStep as error:
            raise CheckpointError(
                f"{run.checkpoints / str(step)}: damaged: {first_line(error)}; run `lsg verify {path}`"
            ) from error
    return record.step, nest({loaded_name(name): leaf.data for name, leaf in stored.items()}), record.meta


def _share_leaf(entry: StepLeaf, leaf: StoredLeaf | None) -> StoredLeaf:
    """A leaf that process 0 has read, on all processes."""
    if jax.process_count() == 1:
        assert leaf is not None
        return leaf
    data = share_bytes(leaf.data.tobytes() if leaf is not None and is_primary() else b"")
    dtype = np.dtype(np.uint32 if entry.key_impl else entry.dtype)
    return StoredLeaf(np.frombuffer(data, dtype).reshape(entry.shape), entry.dtype, entry.key_impl)
