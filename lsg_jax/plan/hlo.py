"""The work of a compiled program, counted from the optimised HLO of one chip, each loop times its trip count.

`compiled.cost_analysis()` counts the body of a loop once, which underestimates scanned layers by a factor of their number.

What is counted, of one chip:
    FLOPs          multiplications and additions of matrix products, convolutions and kernels, also inside fusions
    HBM bytes      operands and results in main memory of the top-level instructions: an estimate of the traffic, without
                   padding. A slice counts with the bytes that it reads, not with the whole operand
    host bytes     transfers between main memory and the host's memory
    collectives    their number by kind, and the bytes that the chip receives: in an all-gather the shards of the other chips,
                   in an all-reduce twice that (a reduce-scatter and an all-gather)
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from lsg_jax.plan.convolution import convolution_flops
from lsg_jax.plan.hlo_text import HBM, HOST, Array, Computation, Instruction, Module, trip_count
from lsg_jax.plan.kernels import Kernel, kernel_flops

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_NO_TRAFFIC = frozenset(
    {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "after-all", "iota"}
    | {"partition-id", "replica-id", "optimization-barrier", "async-update"}
)
_SLICES = ("dynamic-slice", "slice", "gather")


@dataclass(frozen=True)
class Work:
    """The work of one chip in one run of a program; see the module docstring. `received` is in bytes, by kind."""

    flops: float = 0.0
    hbm_bytes: float = 0.0
    host_bytes: float = 0.0
    received: Mapping[str, float] = field(default_factory=dict)
    collectives: Mapping[str, float] = field(default_factory=dict)

    @property
    def received_bytes(self) -> float:
        """Sum over all kinds."""
        return sum(self.received.values())

    def __add__(self, other: Work) -> Work:
        def both(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, float]:
            return {kind: a.get(kind, 0.0) + b.get(kind, 0.0) for kind in {**a, **b}}

        return Work(
            self.flops + other.flops,
            self.hbm_bytes + other.hbm_bytes,
            self.host_bytes + other.host_bytes,
            both(self.received, other.received),
            both(self.collectives, other.collectives),
        )

    def __mul__(self, times: float) -> Work:
        return Work(
            self.flops * times,
            self.hbm_bytes * times,
            self.host_bytes * times,
            {kind: count * times for kind, count in self.received.items()},
            {kind: count * times for kind, count in self.collectives.items()},
        )


def analyse(hlo: str, *, trips: Mapping[str, float] | None = None, kernels: Callable[[Kernel], float] = kernel_flops) -> Work:
    """Counts the work of an optimised module, `compiled.as_text()`.

    Args:
        trips: trip counts of loops whose length the program does not fix, by the name of the innermost source function that
            contains them (`decode_greedily`). A mean is right if the work is linear in it.
        kernels: FLOPs of a kernel; the HLO text shows only its shapes.

    Raises:
        ValueError: a loop of unknown length that `trips` does not name, or a kernel that `kernels` does not know.
    """
    return _Counter(Module(hlo), dict(trips or {}), kernels).executed()


class _Counter:
    def __init__(self, module: Module, trips: dict[str, float], kernels: Callable[[Kernel], float]):
        self.module, self.trips, self.kernels = module, trips, kernels
        # an asynchronous collective appears in every fusion that it spans; only the fusion that starts it counts
        self.started = {
            _channel(instruction)
            for computation in module.computations.values()
            if _starts_collective(computation)
            for instruction in computation
            if instruction.op in COLLECTIVES
        }

    def executed(self) -> Work:
        return self.sequence(self.module.entry)

    @functools.cache  # noqa: B019 - lives as long as one count
    def sequence(self, name: str) -> Work:
        """The work of a sequential computation: the entry, a loop body, a called computation."""
        total, computation = Work(), self.module.computations[name]
        for instruction in computation:
            if instruction.op == "while":
                body = self.sequence(instruction.attribute("body"))
                total += body * self.loop_trips(computation, instruction)
            elif instruction.op == "conditional":
                total += max((self.sequence(branch) for branch in instruction.calls), key=lambda work: work.flops)
            elif instruction.op in ("call", "async-start"):
                total += functools.reduce(Work.__add__, map(self.sequence, instruction.calls), Work())
            elif not instruction.op.endswith("-done"):
                total += self.products(instruction) + self.moved(computation, instruction)
        return total

    def loop_trips(self, within: Computation, loop: Instruction) -> float:
        if (known := trip_count(self.module, within, loop)) is not None:
            return known
        functions = self.module.functions(loop)
        for function in functions:
            name = function.rpartition(".")[2]
            if name in self.trips:
                return self.trips[name]
        where = re.search(r'op_name="([^"]*)"', loop.text)
        raise ValueError(
            f"a loop of unknown length in {', in '.join(f for f in functions[:4] if f) or (where[1] if where else loop.name)}: "
            "state how often it runs"
        )

    @functools.cache  # noqa: B019
    def fused(self, name: str) -> Work:
        """FLOPs and collectives of a fusion."""
        computation = self.module.computations[name]
        starts = _starts_collective(computation)
        total = Work()
        for instruction in computation:
            if instruction.op in COLLECTIVES and not starts and _channel(instruction) in self.started:
                continue
            total += self.products(instruction, reduce_scatter=name.startswith("all-reduce-scatter"))
        return total

    def products(self, instruction: Instruction, *, reduce_scatter: bool = False) -> Work:
        op = instruction.op
        if op == "fusion":
            return functools.reduce(Work.__add__, map(self.fused, instruction.calls), Work())
        kind = op.removesuffix("-start")
        if kind in COLLECTIVES:
            return self.collective("reduce-scatter" if reduce_scatter and kind == "all-reduce" else kind, instruction)
        return Work(flops=self.flops(instruction)) if op in ("dot", "convolution", "custom-call") else Work()

    def flops(self, instruction: Instruction) -> float:
        if instruction.op == "custom-call":
            if 'custom_call_target="tpu_custom_call"' not in instruction.text:
                return 0.0
            kernel = Kernel(instruction.name, _layouts(instruction), instruction.arrays, _metadata(instruction))
            return self.kernels(kernel)
        left, right = (self.shape_of(instruction, index) for index in (0, 1))
        if instruction.op == "dot":
            contracted = _numbers(instruction.attribute("lhs_contracting_dims"))
            return 2.0 * math.prod(instruction.shape) * math.prod(left[axis] for axis in contracted)
        return _convolution(left, right, instruction.shape, instruction.text)

    def shape_of(self, instruction: Instruction, index: int) -> tuple[int, ...]:
        return self.owner(instruction).instructions[instruction.operands[index]].shape

    @functools.cached_property
    def _owners(self) -> dict[int, Computation]:
        return {id(i): c for c in self.module.computations.values() for i in c}

    def owner(self, instruction: Instruction) -> Computation:
        return self._owners[id(instruction)]

    def collective(self, kind: str, instruction: Instruction) -> Work:
        arrays = instruction.arrays
        if instruction.op.endswith("-start") and kind != "all-reduce":
            # (operands, results, contexts): what is received has the shapes of the results
            arrays = arrays[len(instruction.operands) : 2 * len(instruction.operands)]
        size = self.group_size(instruction)
        result = sum(array.bytes for array in arrays)
        others = (size - 1) / size
        if kind == "all-reduce":
            received = 2 * result * others  # a reduce-scatter and an all-gather
        elif kind == "reduce-scatter":
            whole = instruction.op.removesuffix("-start") == "all-reduce"  # fused with the slice: its result is the whole
            received = result * others if whole else result * (size - 1)
        elif kind in ("collective-permute", "collective-broadcast"):
            received = result
        else:
            received = result * others
        return Work(received={kind: received}, collectives={kind: 1.0})

    def group_size(self, instruction: Instruction) -> int:
        """Number of chips in a collective's replica group."""
        text = instruction.text
        if named := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", text):
            sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
            parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", named[2])
            return math.prod(int(part or sizes[axis]) for axis, part in parts)
        if counted := re.search(r"replica_groups=\[([\d,]+)\]<=", text):
            return _numbers(counted[1])[-1]
        if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
            return len(_numbers(listed[1]))
        return self.module.devices

    def moved(self, computation: Computation, instruction: Instruction) -> Work:
        """Main-memory traffic of one top-level instruction."""
        if instruction.op in _NO_TRAFFIC:
            return Work()
        if instruction.op in ("copy-start", "slice-start", "dynamic-slice-start", "dynamic-update-slice-start"):
            return self.transfer(computation, instruction)
        reads = self.fusion_reads if instruction.op == "fusion" else self.reads
        return Work(hbm_bytes=reads(computation, instruction) + self.written(computation, instruction))

    def transfer(self, computation: Computation, instruction: Instruction) -> Work:
        """An asynchronous copy.

        Its result is (destination, source, context); that of a slice is (operands, destination, context).
        """
        source = computation.instructions[instruction.operands[0]].arrays[0]
        if instruction.op == "copy-start":
            destination, amount = instruction.arrays[0], instruction.arrays[0].bytes
        elif instruction.op == "dynamic-update-slice-start":
            update = computation.instructions[instruction.operands[1]].arrays[0]
            source, destination, amount = update, source, update.bytes
        else:
            destination = instruction.arrays[len(instruction.operands)]
            amount = destination.bytes
        spaces = (source.space, destination.space)
        return Work(hbm_bytes=amount * spaces.count(HBM), host_bytes=amount * (HOST in spaces))

    def written(self, computation: Computation, instruction: Instruction) -> float:
        """Bytes written to main memory; of an in-place update, those of the update."""
        root = instruction
        if instruction.op == "fusion":
            computation = self.module.computations[instruction.calls[0]]
            root = computation.root
        parts = [computation.instructions[name] for name in root.operands] if root.op == "tuple" else [root]
        arrays = instruction.arrays
        total = sum(array.bytes for array in arrays if array.space == HBM)
        for part, array in zip(parts, arrays, strict=False):
            while part.op == "bitcast" and part.operands:
                part = computation.instructions[part.operands[0]]
            if part.op == "dynamic-update-slice" and array.space == HBM:
                total += computation.instructions[part.operands[1]].arrays[0].bytes - array.bytes
        return total

    def reads(self, computation: Computation, instruction: Instruction) -> float:
        """Bytes that an instruction reads from main memory; not for fusions."""
        total = 0.0
        for index, name in enumerate(dict.fromkeys(instruction.operands)):
            arrays = computation.instructions[name].arrays
            if index == 0 and instruction.op == "dynamic-update-slice":
                continue
            if index == 0 and instruction.op in _SLICES:
                arrays = tuple(dataclasses.replace(a, space=arrays[0].space) for a in instruction.arrays)
            total += sum(a.bytes for a in arrays if a.space == HBM)
        return total

    def fusion_reads(self, computation: Computation, instruction: Instruction) -> float:
        """Bytes that a fusion reads from main memory."""
        (name,) = instruction.calls
        operands = [computation.instructions[operand].arrays for operand in instruction.operands]
        return sum(
            self.parameter_reads(name, index) for index, arrays in enumerate(operands) if arrays and arrays[0].space == HBM
        )

    @functools.cache  # noqa: B019
    def parameter_reads(self, name: str, index: int) -> float:
        """Bytes that a fusion reads of one parameter: all, unless it only slices it or updates it in place."""
        computation = self.module.computations[name]
        whole = sum(array.bytes for array in computation.parameters[index].arrays)
        taken, waiting = 0.0, [computation.parameters[index]]
        while waiting:
            value = waiting.pop()
            for user in computation.users.get(value.name, []):
                position = user.operands.index(value.name)
                if user.op == "bitcast" or f"output_to_operand_aliasing={{{{}}: ({position}, {{}})}}" in user.text:
                    waiting.append(user)  # in place, such as a fusion that names another tiling
                elif user.op in _SLICES and position == 0:
                    taken += sum(array.bytes for array in user.arrays)
                elif user.op == "fusion":
                    taken += self.parameter_reads(user.calls[0], position)
                elif user.op != "dynamic-update-slice" or position != 0:
                    return whole
        return min(taken, whole)


def _convolution(left: tuple[int, ...], right: tuple[int, ...], out: tuple[int, ...], text: str) -> float:
    """FLOPs from shapes and attributes: `window={...}, dim_labels=..., feature_group_count=...`."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", text)
    assert labels is not None, f"a convolution without dim_labels: {text[:200]}"
    window = re.search(r"window=\{([^}]*)\}", text)
    settings = dict(part.split("=") for part in window[1].split()) if window else {}
    count = sum(label.isdigit() for label in labels[1])
    get = lambda name, default: settings[name].split("x") if name in settings else [default] * count
    columns = [get("size", "1"), get("stride", "1"), get("pad", "0_0"), get("lhs_dilate", "1"), get("rhs_dilate", "1")]
    windows = [[int(setting.split("_")[0]) for setting in column] for column in columns]
    groups = re.search(r"batch_group_count=(\d+)", text)
    return convolution_flops(
        rows=left[labels[1].index("b")] // (int(groups[1]) if groups else 1),
        features=right[labels[2].index("i")],  # those of one feature group
        out_features=out[labels[3].index("f")],
        axes=[
            (left[labels[1].index(str(i))], out[labels[3].index(str(i))], size, stride, pad, base, dilation)
            for i, (size, stride, pad, base, dilation) in enumerate(zip(*windows, strict=True))
        ],
    )


def _starts_collective(computation: Computation) -> bool:
    return any('custom_call_target="AsyncCollectiveStart"' in i.text for i in computation if i.op == "custom-call")


def _channel(instruction: Instruction) -> str:
    return instruction.attribute("channel_id")


def _layouts(instruction: Instruction) -> tuple[Array, ...]:
    """The operands of a kernel."""
    found = re.search(r"operand_layout_constraints=\{(.*?\})\}", instruction.text, re.DOTALL)
    return Instruction("", "", found[1] if found else "", (), "").arrays


def _metadata(instruction: Instruction) -> dict[str, int]:
    """The parameters of a kernel, from its profiler metadata."""
    return {name: int(value) for name, value in re.findall(r'\\"(\w+)\\": (\d+)', instruction.text)}


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number)
