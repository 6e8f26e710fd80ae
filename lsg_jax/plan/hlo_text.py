"""Parses an optimised HLO module as XLA prints it: computations, instructions, shapes, loops."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "s64": 8, "u64": 8}
BYTES |= {"bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16}
HBM, HOST = 0, 5
"""Memory spaces in TPU layouts: S(5) is host memory; S(1) and others are on-chip memory."""

_INSTRUCTION = re.compile(r"(ROOT )?%(\S+) = (.*?) ([a-z][a-z0-9-]*)\((.*)", re.DOTALL)
_ARRAY = re.compile(r"([a-z]+\d*\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%(\S+) \(.*\{$", re.MULTILINE)
_CALLS = re.compile(r"(?:calls|to_apply|body)=%([\w.-]+)")


@dataclass(frozen=True)
class Array:
    """One array of a value's type. `space`: its memory space, 0 for main memory."""

    dtype: str
    shape: tuple[int, ...]
    space: int = HBM

    @property
    def bytes(self) -> float:
        """Size without the padding of the layout."""
        width = BYTES.get(self.dtype, 1 if self.dtype.startswith("f8") else 0)
        return math.prod(self.shape) * width


@dataclass(eq=False)
class Instruction:
    """One line of HLO. `text` is everything after the operands: attributes, metadata, backend_config."""

    name: str
    op: str
    type: str
    operands: tuple[str, ...]
    text: str
    root: bool = False

    @functools.cached_property
    def arrays(self) -> tuple[Array, ...]:
        """The arrays of the result; a tuple is flattened."""
        found = []
        for dtype, shape, layout in _ARRAY.findall(self.type):
            space = re.search(r"S\((\d+)\)", layout or "")
            found.append(Array(dtype, tuple(map(int, filter(None, shape.split(",")))), int(space[1]) if space else HBM))
        return tuple(found)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.arrays[0].shape

    @property
    def calls(self) -> tuple[str, ...]:
        """Computations that it runs: a fusion, a call, the body of a loop, or the branches of a conditional."""
        branches = re.search(r"branch_computations=\{([^}]*)\}", self.text)
        either = re.findall(r"(?:true|false)_computation=%([\w.-]+)", self.text)
        return tuple(re.findall(r"%([\w.-]+)", branches[1]) if branches else either or _CALLS.findall(self.text))

    def attribute(self, name: str, default: str = "") -> str:
        """Value of `name={...}` or `name=value`, without braces or the % of a computation."""
        found = re.search(rf"\b{name}=(?:\{{([^}}]*)\}}|%?([\w.\-]+))", self.text)
        return default if found is None else found[1] if found[1] is not None else found[2]


@dataclass(eq=False)
class Computation:
    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    @functools.cached_property
    def root(self) -> Instruction:
        return next(i for i in self if i.root)

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        return {int(i.text.split(")")[0]): i for i in self if i.op == "parameter"}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        found: dict[str, list[Instruction]] = {}
        for instruction in self:
            for operand in dict.fromkeys(instruction.operands):
                found.setdefault(operand, []).append(instruction)
        return found


class Module:
    """A parsed HLO module: `computations` by name, `entry`, and the number of devices."""

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        text = f"{text}\n"
        header = text.partition("\n")[0]
        counts = (re.search(rf"{name}=(\d+)", header) for name in ("replica_count", "num_partitions"))
        self.devices = math.prod(int(found[1]) for found in counts if found)
        self._frames = _stack_frames(text)
        for found in _HEADER.finditer(text):
            body = text[found.end() : text.find("\n}\n", found.end())]  # "}}" may begin a line of an attribute
            self.computations[found[2]] = self._computation(found[2], body)
            self.entry = found[2] if found[1] else self.entry

    @staticmethod
    def _computation(name: str, body: str) -> Computation:
        computation = Computation(name)
        for line in re.split(r"\n  (?=(?:ROOT )?%)", body):
            if not (found := _INSTRUCTION.match(line.strip())):
                continue
            inside, _, rest = found[5].partition(")")
            text = found[5] if found[4] in ("parameter", "constant") else rest
            made = Instruction(found[2], found[4], found[3], tuple(re.findall(r"%([\w.-]+)", inside)), text, bool(found[1]))
            computation.instructions[made.name] = made
        return computation

    def functions(self, instruction: Instruction) -> list[str]:
        """Names of the source functions that contain an operation, innermost first."""
        found = re.search(r"stack_frame_id=(\d+)", instruction.text)
        return self._frames(int(found[1])) if found else []


def _stack_frames(text: str) -> Callable[[int], list[str]]:
    """Look-up in the stack frame tables of a module: id -> function names, innermost first."""
    names = dict(re.findall(r'^(\d+) "([^"]*)"$', _table(text, "FunctionNames"), re.MULTILINE))
    places = dict(re.findall(r"^(\d+) \{.*?function_name_id=(\d+)", _table(text, "FileLocations"), re.MULTILINE))
    frames = {
        int(frame): (place, int(parent))
        for frame, place, parent in re.findall(
            r"^(\d+) \{file_location_id=(\d+)(?: parent_frame_id=(\d+))?\}", _table(text, "StackFrames"), re.MULTILINE
        )
        if parent
    }

    def look_up(frame: int) -> list[str]:
        found: list[str] = []
        while frame in frames and len(found) < 200:
            place, parent = frames[frame]
            found.append(names.get(places.get(place, ""), ""))
            if parent == frame:
                break
            frame = parent
        return found

    return look_up


def _table(text: str, name: str) -> str:
    start = text.find(f"\n{name}\n")
    return "" if start < 0 else text[start + len(name) + 2 : text.find("\n\n", start)]


def trip_count(module: Module, within: Computation, loop: Instruction) -> int | None:
    """Trip count of a `while`: from XLA's annotation, or from a counter with constant start, step and limit; else None."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.text):
        return int(known[1])
    condition = module.computations[loop.attribute("condition")]
    body = module.computations[loop.attribute("body")]
    compare = condition.root
    if compare.op != "compare" or compare.attribute("direction") not in ("LT", "GT"):
        return None
    compared = [_source(condition, condition.instructions[name]) for name in compare.operands]
    limit, counter = _pair(compared)
    if limit is None or counter is None:
        return None
    index = int(counter.attribute("index"))
    start = _tuple_entry(within, within.instructions[loop.operands[0]], index)
    grown = _tuple_entry(body, body.root, index)
    if start is None or grown is None or start.op != "constant" or grown.op != "add":
        return None
    step, before = _pair([_source(body, body.instructions[name]) for name in grown.operands])
    if step is None or before is None or int(before.attribute("index")) != index:
        return None
    return max(0, math.ceil((_integer(limit) - _integer(start)) / _integer(step)))


def _pair(operands: list[Instruction]) -> tuple[Instruction | None, Instruction | None]:
    """The constant and the carried value among two operands."""
    find = lambda op: next((i for i in operands if i.op == op), None)
    return find("constant"), find("get-tuple-element")


def _integer(constant: Instruction) -> int:
    return int(constant.text.split(")")[0])


def _source(computation: Computation, instruction: Instruction) -> Instruction:
    """Follows copies and bitcasts to their source."""
    while instruction.op in ("copy", "bitcast", "copy-done", "copy-start") and instruction.operands:
        instruction = computation.instructions[instruction.operands[0]]
    return instruction


def _tuple_entry(computation: Computation, value: Instruction, index: int) -> Instruction | None:
    value = _source(computation, value)
    if value.op != "tuple":
        return None
    return _source(computation, computation.instructions[value.operands[index]])
