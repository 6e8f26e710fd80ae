"""How gates were made, as far as the run and the model folder tell. No path of this machine leaves it: folders by name."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from lsg_jax.checkpoint import MANIFEST, Manifest, RunRecord, read_manifest, read_run, read_step
from lsg_jax.hub import REPOSITORY

_TABLES = ("gate", "data", "train", "mesh")
_PLACES = ("model", "output")
_PRIVATE = frozenset({"wandb", "tensorboard", "profile"})


@dataclass(frozen=True)
class Made:
    """How gates were made.

    Attributes:
        base_model: Hub id of the model; None if unknown. base_revision: the commit that it was converted from.
        base_dtype: what `lsg convert --dtype` was; None where the weights are as the checkpoint stores them, or if unknown.
        run: None for gates that were read from a file.
        step: the step whose gates these are.
        config: the run's configuration, with the names of folders instead of their paths, and without other methods' tables.
    """

    base_model: str | None = None
    base_revision: str | None = None
    base_dtype: str | None = None
    run: RunRecord | None = None
    step: int | None = None
    config: dict[str, Any] = field(default_factory=dict)


def made_by(run: Path | None, *, base_model: str | None = None) -> Made:
    """What is known of the gates of a run folder; of a gate file (None) only what is given."""
    if run is None:
        return Made(base_model=base_model)
    record = read_run(run)
    model = _converted(Path(str(record.config["model"])), record.backbone)
    source = None if model is None else model.source
    if source is not None and not re.fullmatch(REPOSITORY, source.name):
        source = None  # a local folder
    name = None if source is None else source.name
    return Made(
        base_model=base_model or name,
        base_revision=source.revision if source is not None and base_model in (None, name) else None,
        base_dtype=None if model is None else _chosen_dtype(model),
        run=record,
        step=read_step(run)[0],
        config=_public(record.config),
    )


def _converted(model: Path, backbone: str) -> Manifest | None:
    """The manifest of the model folder, if it is there and holds the same weights."""
    if not (model / MANIFEST).is_file():
        return None
    manifest = read_manifest(model)
    return manifest if manifest.digest == backbone else None


def _chosen_dtype(model: Manifest) -> str | None:
    if model.config.text.weights == "int8":
        return "int8"
    stored, source = {leaf.dtype for leaf in model.leaves.values()}, set(model.dtypes.values())
    return stored.pop() if source and len(stored) == 1 and stored != source else None


def _public(config: dict[str, Any]) -> dict[str, Any]:
    tables: dict[str, Any] = {name: value for name, value in config.items() if not isinstance(value, dict)}
    tables |= {name: PurePath(str(tables[name])).name for name in _PLACES if name in tables}
    for name in _TABLES:
        table = config.get(name)
        if isinstance(table, dict):
            tables[name] = {key: value for key, value in table.items() if key not in _PRIVATE}
    if isinstance(data := tables.get("data"), dict) and data.get("records"):
        tables["data"] = {**data, "records": PurePath(str(data["records"])).name}
    return tables
