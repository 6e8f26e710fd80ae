"""The range of every number of the configuration, and the base class that checks it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import numbers
import os
import re
import types
import typing
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from lsg_jax.errors import ConfigError

_INTERVAL = re.compile(r"([\[(])(\S+), (\S+)([\])])")


@dataclass(frozen=True)
class Range:
    """The values that a number may take, as in `epochs: Annotated[int, Range("[1, 1e6]")] = 2`.

    Upper bounds of sizes only catch slips: they lie far above any real run. NaN and infinity lie in no range.

    Attributes:
        interval: in mathematical notation; "(0, 1]" excludes 0 and includes 1. Both ends are finite.
        also: one value outside the interval with a meaning of its own.
    """

    interval: str
    also: int | None = None

    @functools.cached_property
    def ends(self) -> tuple[float, float]:
        match = _INTERVAL.fullmatch(self.interval)
        if not match:
            raise ValueError(f"not an interval: {self.interval}")
        return float(match[2]), float(match[3])

    def __contains__(self, value: float) -> bool:
        low, high = self.ends
        above = value > low if self.interval[0] == "(" else value >= low
        below = value < high if self.interval[-1] == ")" else value <= high
        return (above and below) or value == self.also

    def check(self, value: Any, name: str, kind: type = float, words: tuple[Any, ...] = ()) -> None:
        """Raises ConfigError, which begins with `name`, for a value that is no number of this kind or outside the range.

        Args:
            words: that may stand in its place, for the error.
        """
        check_kind(value, name, kind, words)
        if value not in self:
            also = "".join(f", or be {other}" for other in (self.also, *words) if other is not None)
            raise ConfigError(f"{name} is {shown(value)}: it must lie in {self.interval}{also}")


class Table:
    """Base class of the dataclasses of a configuration: construction checks every number against its range.

    A subclass names its TOML table, which starts the names of its fields in errors: `class TrainConfig(Table, name="train")`.
    A subclass with a `__post_init__` of its own calls this one first.
    """

    table: ClassVar[str] = ""

    def __init_subclass__(cls, name: str = "") -> None:
        cls.table = name

    @classmethod
    def renamed(cls, tree: dict[str, Any]) -> dict[str, Any]:
        """The plain data of a file of any version, with what this version calls otherwise under its new name."""
        return tree

    def __post_init__(self) -> None:
        prefix = f"{self.table}." if self.table else ""
        for name, hint in field_types(type(self)).items():
            _check(hint, getattr(self, name), prefix + name)


_type_hints = functools.cache(functools.partial(typing.get_type_hints, include_extras=True))


def field_types(cls: type) -> dict[str, Any]:
    """The type of each field of a dataclass, `Annotated` kept."""
    hints = _type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def without_none(hint: Any) -> Any:
    """`X` of the type `X | None`, and of `X | Literal[...]` for another X than words; every other type as it is."""
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return hint
    given = [arg for arg in typing.get_args(hint) if arg is not type(None)]
    (inner,) = [arg for arg in given if typing.get_origin(arg) is not Literal] or given
    return inner


def other_values(hint: Any) -> tuple[Any, ...]:
    """What a type takes besides `without_none(hint)`: None, words, or nothing."""
    inner = without_none(hint)
    if inner is hint:
        return ()
    words = (typing.get_args(arg) for arg in typing.get_args(hint) if arg is not inner and typing.get_origin(arg) is Literal)
    return (*itertools.chain(*words), *([None] if type(None) in typing.get_args(hint) else []))


def range_of(hint: Any) -> tuple[type, Range]:
    """Type and range of `Annotated[int, Range(...)]`."""
    kind, limits = typing.get_args(hint)
    return kind, limits


def _check(hint: Any, value: Any, name: str) -> None:
    """Checks numbers, alone and in tuples, against their ranges. Every text must be one that a path can hold."""
    inner, others = without_none(hint), other_values(hint)
    if (value is None or isinstance(value, str)) and value in others:
        return
    if typing.get_origin(inner) is Annotated:
        kind, limits = range_of(inner)
        limits.check(value, name, kind, others)
    elif isinstance(value, (tuple, list)):
        for index, entry in enumerate(value):
            _check(typing.get_args(inner)[0], entry, f"{name}[{index}]")
    elif isinstance(value, dict):
        for key, entry in value.items():
            _check(str, key, name)
            _check(str, entry, f"{name}.{key}")
    elif isinstance(value, str):
        try:
            problem = "a NUL byte" if b"\0" in os.fsencode(value) else ""
        except UnicodeEncodeError:
            problem = "half of a surrogate pair"
        if problem:
            raise ConfigError(f"{name} is {shown(value)}: it must not hold {problem}")


def check_kind(value: Any, name: str, kind: type, words: tuple[Any, ...] = ()) -> None:
    """Raises ConfigError for a value that is no number of this kind. Integers pass as floats, truth values as neither."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral if kind is int else numbers.Real):
        also = "".join(f" or {word}" for word in words if word is not None)
        raise ConfigError(f"{name}: expected {kind.__name__}{also}, got {shown(value)}")


def shown(value: Any) -> str:
    """A value for a message, in at most 60 characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, or lists nested so deeply
        return f"a {type(value).__name__} too large to print"
    return text if len(text) <= 60 else f"{text[:57]}..."
