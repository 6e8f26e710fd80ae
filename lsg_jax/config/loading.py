"""Reads configurations: strict TOML, dotted overrides, plain data."""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
import typing
from typing import Annotated, Any, Literal, TypeVar

from lsg_jax.config.ranges import Table, check_kind, field_types, other_values, range_of, shown, without_none
from lsg_jax.errors import ConfigError

T = TypeVar("T")

UNSET = "unset"
"""Default of a field that may be left out, and the value that leaves it out: TOML has no null. As a text it needs quotes."""


def apply_override(tree: dict[str, Any], override: str, *, where: str) -> None:
    """Sets a field of plain data from text such as `a.b=1e-4`; `a.b=unset` takes it out. `where` starts every error."""
    name, equals, text = override.partition("=")
    if not equals or not name.strip():
        raise ConfigError(f"{where} {override}: write it as a.b=value")
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except (ValueError, RecursionError):
        value = text.strip()
    *parents, leaf = name.strip().split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{where} {override}: {parent} is not a table")
    if text.strip() == UNSET:
        tree.pop(leaf, None)
    else:
        tree[leaf] = value


def from_dict(cls: type[T], tree: Any, *, where: str) -> T:
    """Builds a dataclass, such as a table of the configuration, from plain data, strictly.

    Args:
        where: the source, which starts every error.

    Raises:
        ConfigError: a field is unknown, missing, of another type or out of range, or fields contradict each other.
    """
    try:
        return _build(cls, tree, "")
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _build(cls: type[T], tree: Any, table: str) -> T:
    """`from_dict` of the table of this dotted name, "" for the outermost."""
    start = f"{table}: " if table else ""
    if not isinstance(tree, dict):
        raise ConfigError(f"{start}expected a table, got {shown(tree)}")
    if issubclass(cls, Table):
        tree = cls.renamed(tree)
    types = field_types(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in tree:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known fields: {', '.join(fields)}"
            raise ConfigError(f"{start}unknown field {name}; {hint}")
    required = [n for n, f in fields.items() if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
    if missing := [n for n in required if n not in tree]:
        raise ConfigError(f"{start}missing field {', '.join(missing)}")
    prefix = f"{table}." if table else ""
    return cls(**{name: _coerce(types[name], value, prefix + name) for name, value in tree.items()})


def _coerce(hint: Any, value: Any, name: str) -> Any:
    """Checks the value of a field against its type and range. Integers pass as floats, lists as tuples."""
    inner, others = without_none(hint), other_values(hint)
    if (value is None or isinstance(value, str)) and value in others:
        return value
    origin, args = typing.get_origin(inner), typing.get_args(inner)
    if origin is Annotated:
        kind, limits = range_of(inner)
        limits.check(value, name, kind, others)  # before the conversion: a huge integer has no float
        return kind(value)
    if inner in (int, float):
        check_kind(value, name, inner)
        return inner(value)
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{name}: {shown(value)} is not one of {', '.join(map(str, args))}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{name}: expected a list, got {shown(value)}")
        return tuple(_coerce(args[0], entry, f"{name}[{i}]") for i, entry in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{name}: expected a table, got {shown(value)}")
        return {key: _coerce(args[1], entry, f"{name}.{key}") for key, entry in value.items()}
    if isinstance(inner, type) and dataclasses.is_dataclass(inner):
        return _build(inner, value, name)
    if not isinstance(value, inner):
        raise ConfigError(f"{name}: expected {inner.__name__}, got {shown(value)}")
    return value


def to_dict(config: Any) -> dict[str, Any]:
    """Plain data of a configuration, fit for JSON: tuples as lists, None kept."""
    tree: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return tree
