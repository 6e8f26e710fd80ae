"""`run.json`: what a run computes, and each start of it: when, on what and with which versions."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

from lsg_jax.checkpoint import RunFolder
from lsg_jax.checkpoint.processes import on_primary
from lsg_jax.errors import ConfigError

RUN = "run.json"
FORMAT = "lsg-run-1"

MAY_CHANGE = frozenset(
    {"model", "output", "mesh", "eval", "data.records", "data.num_threads", "data.prefetch"}
    | {"train.log_every", "train.save_every", "train.keep", "train.max_skipped", "train.remat", "train.accumulate"}
    | {"train.tensorboard", "train.wandb", "train.profile"}
)
"""Settings that a continued run may have otherwise: they do not change what is computed. Model and data count by digest."""

_PACKAGES = ("lsg_jax", "jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain")


def check_meaning(run: RunFolder, meaning: dict[str, Any]) -> None:
    """Compares with the run that is in the folder, if there is one; a collective.

    Args:
        meaning: `config` and all else that says what is computed.

    Raises:
        ConfigError: that run computes something else.
    """

    def compare() -> None:
        if not (run.path / RUN).exists():
            return
        if changed := [name for name in _differences(run.read_json(RUN), meaning) if name not in MAY_CHANGE]:
            raise ConfigError(
                f"{run.path}: holds a run with another {', '.join(changed)}; choose another output, or undo the change"
            )

    on_primary(compare)


def record_start(run: RunFolder, meaning: dict[str, Any], *, mesh: jax.sharding.Mesh, step: int) -> None:
    """Writes run.json for a new run, or adds this start to that of a run which goes on; a collective.

    Args:
        step: the step that the run starts from.

    Raises:
        CheckpointError: it cannot be written.
    """

    def with_this_start() -> dict[str, Any]:
        start = _start(mesh, step)
        record = run.read_json(RUN) if (run.path / RUN).exists() else _new_record(meaning, start)
        return {**record, "starts": [*record.get("starts", []), start]}

    run.write_json(RUN, on_primary(with_this_start))


def _new_record(meaning: dict[str, Any], start: dict[str, Any]) -> dict[str, Any]:
    devices = f"{start['device_count']} {start['device_kind']}"
    model_name = Path(meaning["config"]["model"]).resolve().name
    return {"format": FORMAT, **meaning, "model_name": model_name, "versions": start["versions"], "devices": devices}


def _start(mesh: jax.sharding.Mesh, step: int) -> dict[str, Any]:
    return {
        "time": datetime.now(UTC).isoformat(),
        "from_step": step,
        "process_count": jax.process_count(),
        "device_count": jax.device_count(),
        "device_kind": jax.devices()[0].device_kind,
        "mesh": dict(mesh.shape),
        "versions": {"python": platform.python_version(), **_versions()},
        "git": git_revision(Path(__file__).parent),
    }


def _versions() -> dict[str, str]:
    """Of those packages that are there."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def git_revision(folder: Path) -> dict[str, Any] | None:
    """`revision`, and whether tracked files are changed (`dirty`), of the checkout that tracks a folder; None if none does."""

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
        return {"revision": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None


def _differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Dotted names of what is in `after` and differs; settings of the configuration without the leading "config."."""

    def walk(a: Any, b: Any, name: str) -> Iterator[str]:
        if isinstance(a, dict) and isinstance(b, dict) and name not in MAY_CHANGE:
            for key in sorted({*a, *b}):
                yield from walk(a.get(key), b.get(key), f"{name}.{key}" if name else key)
        elif a != b:
            yield name

    return [name for key in after for name in walk(before.get(key), after[key], "" if key == "config" else key)]
