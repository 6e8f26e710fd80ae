"""Writes run.json, and refuses to continue a run that computes something else."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

from lsg_jax.checkpoint import RunFolder, read_seeds
from lsg_jax.checkpoint.processes import on_primary
from lsg_jax.checkpoint.run_record import RUN, Computation, GitRevision, RunRecord, Start, read_run
from lsg_jax.config import to_dict
from lsg_jax.errors import ConfigError
from lsg_jax.files import check_only
from lsg_jax.methods.registry import METHODS
from lsg_jax.run_config import method_tables, run_config

MAY_CHANGE = frozenset(
    {"model", "output", "mesh", "eval", "data.records", "data.num_threads", "data.prefetch"}
    | {"train.log_every", "train.save_every", "train.keep", "train.max_skipped", "train.remat", "train.accumulate"}
    | {"train.tensorboard", "train.wandb", "train.profile"}
)
"""Settings that may change when a run continues: they do not affect the numbers. Model and data are compared by digest."""

LENGTHS = frozenset({"train.epochs", "train.max_steps"})
FIXED_LENGTH = " (a run cannot be made longer: its learning rate falls over the steps that it was started with)"

BESIDE_A_RUN = frozenset(
    {"checkpoints", "lock", "metrics.jsonl", "eval", "sweep", "stack", "each", "ablate", "baselines"}
    | {"tensorboard", "profile"}
)
"""What a folder may hold where no run has started: an interrupted start, and studies of the model without gates."""

_PACKAGES = ("lsg_jax", "jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain")


def check_same(run: RunFolder, computation: Computation) -> None:
    """Compares with the run in the folder, if there is one; a collective. Tables of other methods do not count.

    Raises:
        ConfigError: that run computes something else.
        InputError: the folder holds something else.
    """

    used = METHODS[str(computation.config["method"])].Settings
    unused = {name for name, settings in method_tables().items() if settings is not used}

    def compare() -> None:
        if read_seeds(run.path):
            raise ConfigError(f"{run.path}: holds runs of several seeds; choose another output, or set train.seeds as it was")
        if not (run.path / RUN).exists():
            check_only(run.path, BESIDE_A_RUN, "run folder")
            return
        record = read_run(run.path)
        # fields that the run was started without have their defaults
        before = replace(
            record,
            config=run_config(record.config, where=f"{run.path / RUN}: config").as_dict(),
            model_files=record.model_files or computation.model_files,
        )
        differ = _differences(before, computation)
        if changed := [name for name in differ if name not in MAY_CHANGE and name.split(".")[0] not in unused]:
            raise ConfigError(
                f"{run.path}: holds a run with another {', '.join(changed)}; choose another output, or undo the change"
                f"{FIXED_LENGTH if LENGTHS & set(changed) else ''}"
            )

    on_primary(compare)


def record_start(
    run: RunFolder, computation: Computation, *, mesh: jax.sharding.Mesh, step: int, dropped: dict[str, int]
) -> None:
    """Writes run.json for a new run, or adds this start to it where the run continues; a collective.

    Args:
        step: the step that the run starts from.
        dropped: reason -> examples that are not trained on.

    Raises:
        CheckpointError: it cannot be written.
    """

    def with_this_start() -> dict[str, Any]:
        start = _start(mesh, step)
        record = read_run(run.path) if (run.path / RUN).exists() else _new_record(computation, start, dropped)
        model_files = record.model_files or computation.model_files
        return replace(record, starts=(*record.starts, start), model_files=model_files).as_json()

    run.write_json(RUN, on_primary(with_this_start))


def _new_record(computation: Computation, start: Start, dropped: dict[str, int]) -> RunRecord:
    return RunRecord(
        **vars(computation),
        model_name=Path(str(computation.config["model"])).resolve().name,
        versions=start.versions,
        devices=f"{start.device_count} {start.device_kind}",
        starts=(),
        dropped=dropped,
    )


def _start(mesh: jax.sharding.Mesh, step: int) -> Start:
    return Start(
        time=datetime.now(UTC).isoformat(),
        from_step=step,
        process_count=jax.process_count(),
        device_count=jax.device_count(),
        device_kind=jax.devices()[0].device_kind,
        mesh=dict(mesh.shape),
        versions={"python": platform.python_version(), **_versions()},
        git=git_revision(Path(__file__).parent),
    )


def _versions() -> dict[str, str]:
    """Of the packages that are installed."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def git_revision(folder: Path) -> GitRevision | None:
    """Of the checkout that tracks a folder; None if none does."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), "--no-optional-locks", *arguments]
        quiet = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
        done = subprocess.run(
            command, env=quiet, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        if not git("ls-files", "."):  # a package that was installed below somebody else's checkout
            return None
        return GitRevision(git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no")))
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None


def _differences(before: Computation, after: Computation) -> list[str]:
    """Dotted names of what differs; settings of the configuration without the leading "config."."""

    def walk(a: Any, b: Any, name: str) -> Iterator[str]:
        if isinstance(a, dict) and isinstance(b, dict) and name not in MAY_CHANGE:
            for key in sorted({*a, *b}):
                yield from walk(a.get(key), b.get(key), f"{name}.{key}" if name else key)
        elif a != b:
            yield name

    old, new = to_dict(before), to_dict(after)
    return [name for key in new for name in walk(old[key], new[key], "" if key == "config" else key)]
