"""Matches the tensors of a checkpoint with the leaves of the model.

A `Rule` names the source tensor of a leaf and the operation between them (`ops.py`); the tables are in `families/`. `plan`
checks a checkpoint against the rules. It reads names, shapes and dtypes only, so that real sizes are checked at once, and it
reports all problems together.

Names of source tensors are canonical here (`Family.canonical_name`), whichever layout a file uses.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import jax.numpy as jnp
from flax import nnx

from converters.families import family_of
from converters.families.decoders import EMBEDDING, HEAD
from converters.ops import Op, Rule, Shape
from lsg_jax.checkpoint.tree import flatten
from lsg_jax.config import ModelConfig, is_scale
from lsg_jax.errors import InputError
from lsg_jax.model.multimodal import VisionLanguageModel

FLOATS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Part:
    """The source of one slice of a leaf.

    Attributes:
        leaf: name of the leaf. layer: its layer, None for a leaf without a layer axis.
        shape: of the slice, without the layer axis.
        source: canonical name of the tensor. first_row: where the slice's rows start in it (not 0 in fused tensors).
        op: the operation between tensor and slice.
    """

    leaf: str
    layer: int | None
    shape: Shape
    source: str
    first_row: int
    op: Op


@dataclass(frozen=True)
class Layout:
    """The leaves of a model and the tensors they come from; a function of its configuration.

    Attributes:
        leaves: leaf name -> shape of the whole leaf.
        parts: one for each slice of each leaf, leaf by leaf.
        tensors: canonical name -> shape of every tensor that the model is made of.
    """

    leaves: dict[str, Shape]
    parts: tuple[Part, ...]
    tensors: dict[str, Shape]


@dataclass(frozen=True)
class Plan:
    """A checkpoint that fits its configuration. All keys are canonical names.

    Attributes:
        layout: leaves and tensors of the model.
        dtype: the one dtype of the model's tensors, None where they differ.
        carried: tensors that the model does not use and that an export gives back.
        ignored: tensors that are dropped -> the reason.
        repeats: tensors that must equal another one of the model -> that one (the output head of a tied model).
    """

    layout: Layout
    dtype: str | None
    carried: tuple[str, ...]
    ignored: dict[str, str]
    repeats: dict[str, str]


@functools.cache  # a conversion asks twice, and tracing a model takes a moment
def leaf_shapes(config: ModelConfig) -> Mapping[str, Shape]:
    """Leaf name -> shape of the whole model, without making any array."""
    model = nnx.eval_shape(lambda: VisionLanguageModel(config, rngs=nnx.Rngs(0), dtype=jnp.float32))
    shapes = {name: tuple(leaf.shape) for name, leaf in flatten(nnx.to_pure_dict(nnx.state(model))).items()}
    return MappingProxyType(shapes)


def layout(config: ModelConfig, rules: Sequence[Rule]) -> Layout:
    """Matches the leaves of a model with rules.

    Raises:
        ValueError: a leaf has no rule, or two: the rule table and the model disagree (no input can cause this).
    """
    leaves = {name: shape for name, shape in leaf_shapes(config).items() if not is_scale(name)}  # made from the kernels
    found: dict[str, Rule] = {}
    for rule in rules:
        if rule.leaf in found:
            raise ValueError(f"{rule.leaf} has two rules")
        if rule.leaf in leaves:
            found[rule.leaf] = rule
    if unruled := sorted(leaves.keys() - found.keys()):
        raise ValueError(f"no rule for {', '.join(unruled)}")
    parts: list[Part] = []
    tensors: dict[str, Shape] = {}
    for rule in found.values():  # in the order of the table, which is the order of rows in fused tensors
        stacked = "{layer}" in rule.source
        shape = leaves[rule.leaf][1:] if stacked else leaves[rule.leaf]
        wanted = rule.op.source_shape(shape)
        for layer in range(leaves[rule.leaf][0]) if stacked else [None]:
            name = rule.source.format(layer=layer)
            first_row = tensors[name][0] if name in tensors else 0
            parts.append(Part(rule.leaf, layer, shape, name, first_row, rule.op))
            tensors[name] = (first_row + wanted[0], *wanted[1:])
    return Layout(leaves, tuple(parts), tensors)


def plan(config: ModelConfig, source: Mapping[str, tuple[Shape, str]], *, any_float: bool = False) -> Plan:
    """Checks a checkpoint against a configuration; reads no tensor.

    Args:
        config: of the model.
        source: canonical tensor name -> shape and numpy dtype name.
        any_float: accept different float dtypes, which will be cast to one.

    Raises:
        InputError: names all tensors that are missing, unknown, or of a wrong shape or dtype.
    """
    wanted, family = layout_of(config, source), family_of(config)
    tensors = wanted.tensors
    carried: list[str] = []
    ignored: dict[str, str] = {}
    repeats: dict[str, str] = {}
    extra: list[str] = []
    for name in source:
        if name in tensors:
            continue
        reason = next((reason for pattern, reason in family.ignored if re.fullmatch(pattern, name)), None)
        if name == HEAD and config.text.tied_embeddings:
            repeats[name] = EMBEDDING
        elif reason is not None:
            ignored[name] = reason
        elif any(re.fullmatch(pattern, name) for pattern in family.carried):
            carried.append(name)
        else:
            extra.append(name)
    problems = _listing("missing", [name for name in tensors if name not in source])
    problems += _listing("not understood", extra)
    expected = {name: tensors[repeats.get(name, name)] for name in [*tensors, *repeats] if name in source}
    for name, shape in expected.items():
        if source[name][0] != shape:
            problems.append(f"{name} has shape {list(source[name][0])}, expected {list(shape)}")
    problems += _dtype_problems({name: source[name][1] for name in expected}, any_float)
    if problems:
        raise InputError(f"the checkpoint does not fit its config.json: {'; '.join(problems)}")
    dtypes = {source[name][1] for name in tensors}
    return Plan(wanted, dtypes.pop() if len(dtypes) == 1 else None, tuple(carried), ignored, repeats)


def layout_of(config: ModelConfig, names: Container[str]) -> Layout:
    """The layout for tensors of these canonical names. A tied model may store its output head instead of the embedding."""
    wanted = layout(config, family_of(config).rules(config))
    if not (config.text.tied_embeddings and HEAD in names and EMBEDDING not in names):
        return wanted
    swap = lambda name: HEAD if name == EMBEDDING else name
    parts = tuple(Part(p.leaf, p.layer, p.shape, swap(p.source), p.first_row, p.op) for p in wanted.parts)
    return Layout(wanted.leaves, parts, {swap(name): shape for name, shape in wanted.tensors.items()})


def _dtype_problems(dtypes: Mapping[str, str], any_float: bool) -> list[str]:
    problems = []
    for dtype in sorted(set(dtypes.values()) - set(FLOATS)):
        problems += _listing(
            f"of dtype {dtype}, expected one of {', '.join(FLOATS)}", [n for n in dtypes if dtypes[n] == dtype]
        )
    floats = sorted(set(dtypes.values()) & set(FLOATS), key=lambda d: -sum(v == d for v in dtypes.values()))
    if len(floats) > 1 and not any_float:
        for dtype in floats[1:]:
            names = [name for name in dtypes if dtypes[name] == dtype]
            problems += _listing(f"of dtype {dtype} among {floats[0]} (choose one with --dtype)", names)
    return problems


def _listing(what: str, names: Sequence[str]) -> list[str]:
    """All names in one phrase. A name that occurs in several layers is written once, with their numbers."""
    layers: dict[str, list[int]] = {}
    for name in names:
        match = re.search(r"\.(layers?|blocks|deepstack_merger_list)\.(\d{1,9})\.", name)
        key = name if match is None else f"{name[: match.start()]}.{match[1]}.{{}}.{name[match.end() :]}"
        layers.setdefault(key, []).extend([] if match is None else [int(match[2])])
    shown = [name.replace("{}", _ranges(numbers)) if numbers else name for name, numbers in layers.items()]
    return [f"{what}: {', '.join(shown)}"] if shown else []


def _ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> '[0-2,5]'; a single number stays itself."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return text if text.isdigit() else f"[{text}]"
