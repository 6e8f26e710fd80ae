"""Every key of a configuration in words: its type, range and default from the dataclass, its meaning from the docstring."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from lsg_jax.config.loading import UNSET, to_dict
from lsg_jax.config.ranges import Range, field_types, other_values, range_of, without_none

REQUIRED = "required"
_NAMES = {bool: "bool", int: "int", float: "float", str: "text"}


@dataclass(frozen=True)
class Key:
    """One key, as `--set` takes it.

    Attributes:
        name: with its tables, such as `train.epochs`.
        type: in words; a table stands before its keys, if it may be left out as a whole.
        values: range of numbers, or the texts that are taken; empty: any.
        default: as in a file; `unset` for none, `required` for a key without one.
        meaning: one sentence.
    """

    name: str
    type: str
    values: str
    default: str
    meaning: str


def keys_of(cls: type, prefix: str = "") -> Iterator[Key]:
    """The keys of a dataclass and of the tables in it, in their order."""
    types, meanings = field_types(cls), attributes_of(cls)
    for field in dataclasses.fields(cls):
        name, hint = prefix + field.name, types[field.name]
        inner, optional = without_none(hint), type(None) in typing.get_args(hint)
        is_table = isinstance(inner, type) and dataclasses.is_dataclass(inner)
        if is_table and not optional:
            yield from keys_of(inner, f"{name}.")
            continue
        yield Key(name, _type(inner), _values(hint), _default(field), meanings.get(field.name, ""))
        if is_table:
            yield from keys_of(inner, f"{name}.")


def attributes_of(cls: type) -> dict[str, str]:
    """Field -> its line of the section `Attributes:` of the docstring, of the class or of one that it inherits from."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        section = inspect.cleandoc(base.__dict__.get("__doc__") or "").partition("\nAttributes:\n")[2]
        lines = re.split(r"^    (?=\w+: )", section.split("\n\n")[0], flags=re.MULTILINE)
        for line in lines[1:]:
            name, _, text = " ".join(line.split()).partition(": ")
            found[name] = text
    return found


def _type(inner: Any) -> str:
    origin, args = typing.get_origin(inner), typing.get_args(inner)
    if origin is Annotated:
        return _NAMES[args[0]]
    if origin is Literal:
        return "text"
    if origin is tuple:
        return f"list of {_type(args[0])}"
    if origin is dict:
        return f"table of {_type(args[1])}"
    return "table" if dataclasses.is_dataclass(inner) else _NAMES[inner]


def _values(hint: Any) -> str:
    """The interval of a number or of the numbers in a list, with what else is taken; or the texts to choose from."""
    inner, words = without_none(hint), [str(word) for word in other_values(hint) if word is not None]
    while typing.get_origin(inner) is tuple:
        inner = typing.get_args(inner)[0]
    if typing.get_origin(inner) is Literal:
        return ", ".join(map(str, typing.get_args(inner)))
    if typing.get_origin(inner) is not Annotated:
        return ""
    limits: Range = range_of(inner)[1]
    return " or ".join([limits.interval, *([] if limits.also is None else [str(limits.also)]), *words])


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    elif field.default is not dataclasses.MISSING:
        value = field.default
    else:
        return REQUIRED
    if value is None:
        return UNSET
    return _toml(to_dict(value) if dataclasses.is_dataclass(value) else value)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return str(value)
