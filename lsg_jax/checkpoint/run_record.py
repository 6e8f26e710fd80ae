"""`run.json`: what a run computes, and each start of it: when, on what and with which versions."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lsg_jax.checkpoint.seeds import read_seeds, seed_folder
from lsg_jax.config import SinkConfig, from_dict, to_dict
from lsg_jax.errors import CheckpointError, ConfigError, InputError
from lsg_jax.json_files import read_sealed

RUN = "run.json"
FORMAT = "lsg-run-1"


@dataclass(frozen=True)
class Computation:
    """All that decides which numbers a run computes.

    Attributes:
        config: the run's configuration as plain data, one entry a table or setting.
        sinks: the settings in force, from the configuration or the model folder.
        backbone: digest of the model.
        data: digest of the records.
        total_steps: the step at which the run is complete.
        model_files: `Manifest.preparation` of the model: configuration, tokenizer, processor, templates. Empty in runs of
            versions that did not record it.
    """

    config: dict[str, object]
    sinks: SinkConfig
    backbone: str
    data: str
    total_steps: int
    model_files: str = field(default="", kw_only=True)


@dataclass(frozen=True)
class GitRevision:
    """A commit, and whether tracked files were changed since."""

    revision: str
    dirty: bool


@dataclass(frozen=True)
class Start:
    """One start of a run.

    Attributes:
        time: ISO 8601, UTC.
        from_step: the step that it started from.
        mesh: axis -> size.
        versions: package -> version, and `python`.
        git: of the checkout that the code is in; None for an installed package.
    """

    time: str
    from_step: int
    process_count: int
    device_count: int
    device_kind: str
    mesh: dict[str, int]
    versions: dict[str, str]
    git: GitRevision | None = None


@dataclass(frozen=True)
class RunRecord(Computation):
    """What run.json holds.

    Attributes:
        model_name: name of the model folder.
        versions, devices: of the first start; `devices` such as `4 TPU v5 lite`.
        starts: the first one, and one each time the run went on.
        dropped: reason -> examples that are not trained on; empty in runs of before this was recorded.
    """

    model_name: str
    versions: dict[str, str]
    devices: str
    starts: tuple[Start, ...]
    dropped: dict[str, int] = field(default_factory=dict)

    @property
    def method(self) -> str:
        """The name of what is trained."""
        return str(self.config.get("method", "lsg"))

    def table(self, name: str) -> dict[str, Any]:
        """One table of the configuration.

        Raises:
            InputError: it has none of that name.
        """
        found = self.config.get(name)
        if not isinstance(found, dict):
            raise InputError(f"{RUN}: config has no table {name}")
        return found

    def as_json(self) -> dict[str, Any]:
        """The content of the file."""
        return {"format": FORMAT, **to_dict(self)}


BEFORE: dict[str, dict[str, Any]] = {"diysink": {"order": "image"}}
"""Table -> what runs did before a setting was added whose default is another."""


def read_run(path: str | Path, *, backbone: str | None = None) -> RunRecord:
    """Reads run.json of a run folder, strictly.

    Args:
        backbone: digest of the model that it is meant for; a run of another one is refused.

    Raises:
        InputError: no run folder, no JSON, or a file that was changed (its checksum).
        CheckpointError: a run of another backbone, or a file that this version did not write.
    """
    file = Path(path) / RUN
    if not file.is_file():
        if seeds := read_seeds(path):
            each, one = ", ".join(map(str, seeds)), seed_folder(path, seeds[0])
            raise InputError(f"{path}: holds the seeds {each}, each a run of its own: name one, as {one}")
        raise InputError(f"{path}: neither a run folder (no readable {RUN}) nor a gate file")
    content = read_sealed(file)
    found = content.pop("format", None)
    if found != FORMAT:
        raise CheckpointError(f"{file}: unknown format {found!r}, expected {FORMAT!r}")
    try:
        run = from_dict(RunRecord, content, where=str(file))
    except ConfigError as error:
        raise CheckpointError(f"{error}; not as this version of lsg writes it") from None
    for name, settings in BEFORE.items():
        if isinstance(table := run.config.get(name), dict):
            run.config[name] = {**settings, **table}
    if backbone is not None and run.backbone != backbone:
        raise CheckpointError(f"{path}: was trained on another backbone ({run.backbone[:12]}, not {backbone[:12]})")
    return run
