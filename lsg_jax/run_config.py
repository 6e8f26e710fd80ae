"""`RunConfig`: a training or evaluation run as a TOML file describes it, with a table for every registered method."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from lsg_jax.config import (
    DataConfig,
    EvalConfig,
    GateConfig,
    MeshConfig,
    SinkConfig,
    TrainConfig,
    apply_override,
    from_dict,
    to_dict,
)
from lsg_jax.config.ranges import Range, Table
from lsg_jax.errors import ConfigError, InputError
from lsg_jax.files import read_toml
from lsg_jax.methods.method import Method
from lsg_jax.methods.registry import METHODS

LAST_SEED = 2**32 - 1


def method_tables() -> dict[str, type[Table]]:
    """The settings of each method that has any, by the name of their table."""
    return {kind.Settings.table: kind.Settings for kind in METHODS.values() if kind.Settings is not None}


@dataclass(frozen=True)
class RunSettings(Table):
    """What a run states besides its methods. Relative paths are taken from the current folder, as on the command line.

    Attributes:
        model: model folder, as `lsg convert` writes it.
        output: folder of the run.
        seed: decides the initial values and the order of the records.
        dtype: type of the weights; unset: as stored. `int8` demands a model folder of 8-bit weights.
        sinks: what counts as a sink, instead of all settings of the model folder.
        method: what is trained and evaluated.
        data: training examples.
        train: optimisation.
        eval: evaluation.
        mesh: devices of training.
    """

    model: str
    output: str
    seed: Annotated[int, Range("[0, 4294967295]")] = 0  # jax.random.key keeps 32 bits
    dtype: Literal["bfloat16", "float32", "int8"] | None = None
    sinks: SinkConfig | None = None
    method: str = "lsg"
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)


@dataclass(frozen=True)
class RunConfig(RunSettings):
    """One run.

    Attributes:
        tables: settings of the methods by the name of their table. The constructor adds the defaults of those left out.
    """

    tables: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in METHODS:
            raise ConfigError(f"method: {self.method!r} is not one of {', '.join(METHODS)}")
        defaults = {name: kind() for name, kind in method_tables().items()}
        if unknown := sorted(self.tables.keys() - defaults.keys()):
            raise ConfigError(f"unknown table {unknown[0]}; known tables of methods: {', '.join(defaults)}")
        object.__setattr__(self, "tables", {**defaults, **self.tables})
        method = self.get_method()
        if method.independent and self.train.remat not in ("full", "auto"):
            raise ConfigError(f'train.remat is "{self.train.remat}": independent gates recompute every layer, choose "full"')
        if method.gate is not None and self.data.conversations == "whole":
            raise ConfigError('data.conversations = "whole" has no one place for a gate to read at: choose "split"')
        if (last := self.seed + self.train.seeds - 1) > LAST_SEED:
            raise ConfigError(f"train.seeds: {self.train.seeds} seeds from {self.seed} on end at {last}, above {LAST_SEED}")

    @property
    def gate(self) -> GateConfig:
        """The table `gate`."""
        return self.tables[GateConfig.table]

    @property
    def order_seed(self) -> int:
        """The seed of the order of the records."""
        order = self.data.order
        return self.seed if order is None or order < 0 else order

    def get_method(self, name: str | None = None) -> Method:
        """The method of this name with its settings; None for the one that `method` names."""
        kind = METHODS[name or self.method]
        return kind(self.tables[kind.Settings.table]) if kind.Settings is not None else kind()

    def with_settings(self, settings: Table) -> RunConfig:
        """The same with the settings of a method in its table."""
        return dataclasses.replace(self, tables={**self.tables, settings.table: settings})

    def as_dict(self) -> dict[str, Any]:
        """Plain data as in a TOML file, fit for JSON."""
        tree = to_dict(self)
        tables = tree.pop("tables")
        return tree | tables


def load_run_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a TOML file and applies `a.b=value` overrides.

    Values are in TOML syntax; a bare word is a string, and `a.b=unset` takes a key out.

    Raises:
        ConfigError: the file is missing or no TOML, or a field is unknown, missing, of another type or out of range.
    """
    try:
        tree = read_toml(Path(path))
    except InputError as error:
        raise ConfigError(str(error)) from None
    for override in overrides:
        apply_override(tree, override, where="--set")
    return run_config(tree, where=str(path))


def run_config(tree: dict[str, Any], *, where: str) -> RunConfig:
    """Builds a run's configuration from plain data, strictly; errors as `load_run_config`. `where` starts every error."""
    read = from_dict(schema(), _spell_out_each(tree, where=where), where=where)
    values = {f.name: getattr(read, f.name) for f in dataclasses.fields(read)}
    tables = {name: values.pop(name) for name in method_tables()}
    for name in ("model", "output"):
        if not values[name]:
            raise ConfigError(f"{where}: {name} is empty: it is the path of a folder")
    try:
        return RunConfig(**values, tables=tables)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def schema() -> type[RunSettings]:
    """A dataclass of everything that a configuration file may hold, each method's table a field."""
    tables = [(name, kind, field(default_factory=kind)) for name, kind in method_tables().items()]
    return dataclasses.make_dataclass("RunTables", tables, bases=(RunSettings,), frozen=True)


def _spell_out_each(tree: dict[str, Any], *, where: str) -> dict[str, Any]:
    """Replaces `gate.layers = "each"` by the fields of GateConfig that it stands for."""
    gate = tree.get("gate")
    if not isinstance(gate, dict) or gate.get("layers") != "each":
        return tree
    if gate.get("independent", True) is not True:
        raise ConfigError(f'{where}: gate: layers = "each" trains independent gates: name the layers, or drop independent')
    return {**tree, "gate": {**gate, "layers": [], "independent": True}}
