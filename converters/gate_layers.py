"""Which decoder layers the gates of a published file belong to.

Sources are the paths of tensors (`model.layers.10.self_attn.sink_gate.*`), `sink_cfg.json`, `--layers` and the folder's name
(`llava15_stack_L3_6_7_10_19_PEFT`). All that say something must agree. The place of a gate in a list is never a layer: the
gates `sink_gates.0` to `sink_gates.4` take the layers of another source, in its order.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from converters.gate_modules import FoundGate
from lsg_jax.errors import InputError

_IN_NAME = re.compile(r"(?:^|[_.\-])(?:L|[Ll]ayers?[_\-]?)(\d+(?:[_\-]\d+)*)(?=$|[_.\-])")


@dataclass(frozen=True)
class Layers:
    """Layers that a source states, 0-based. `ordered`: the i-th is that of the i-th gate of a list."""

    source: str
    layers: tuple[int, ...]
    ordered: bool = True

    def __str__(self) -> str:
        return f"{self.source}: {', '.join(map(str, self.layers))}"


def layers_of_name(name: str) -> list[Layers]:
    """What the name of a folder says: `llava15_L10_PEFT`, `stack_L3_6_7_10_19`. Several statements where it says several."""
    return [Layers(f"the folder's name {name}", tuple(map(int, re.split(r"[_\-]", text)))) for text in _IN_NAME.findall(name)]


def layers_of_paths(gates: Sequence[FoundGate]) -> Layers | None:
    """What the paths of the gates say; None where their numbers may be places in a list.

    A number is a layer if the gate lies within a numbered layer of a decoder. Other numbers (`gates.3`, `gates.7`) are keys and
    taken for layers, unless they count from 0, as places in a list do.
    """
    decoder = [gate.decoder_layer for gate in gates]
    if None not in decoder:
        return Layers("the decoder layer in the tensors' names", tuple(n for n in decoder if n is not None), ordered=False)
    numbers = [gate.numbers for gate in gates]
    columns = list(zip(*numbers, strict=True)) if len({len(n) for n in numbers}) == 1 else []
    if len(gates) > 1:
        columns = [column for column in columns if len(set(column)) == len(gates)]
    if len(columns) != 1 or sorted(columns[0]) == list(range(len(gates))):
        return None
    listed = f"the keys in the tensors' names (no places in a list, which would count 0 to {len(gates) - 1})"
    return Layers(
        listed if len(gates) > 1 else "the key in the tensors' names (the one place in a list would be 0)", columns[0], False
    )


def assign_layers(gates: Sequence[FoundGate], stated: Sequence[Layers], where: str) -> list[int]:
    """The layer of each gate.

    Args:
        stated: what all sources say, in any order.

    Raises:
        InputError: no source says anything, one does not fit the number of gates or names a layer twice, or two disagree.
    """
    if not stated:
        paths = ", ".join(gate.path or "(no name)" for gate in gates[:6])
        raise InputError(
            f"{where}: nothing says which layers its {_count(gates)} ({paths}) belong to: a place in a list is not a layer; "
            "give --layers, or the folder with its sink_cfg.json"
        )
    for each in stated:
        if len(each.layers) != len(gates):
            raise InputError(f"{where}: {each}, but the file holds {_count(gates)}; {_OVERRULE}")
        if len(set(each.layers)) < len(gates):
            raise InputError(f"{where}: {each}: a layer is named twice")
    by_path = next((each for each in stated if not each.ordered), None)
    first = by_path or stated[0]
    for other in stated:
        if set(other.layers) != set(first.layers):
            raise InputError(f"{where}: sources disagree about the layers ({first}; {other}); {_OVERRULE}")
        if by_path is None and other.layers != first.layers:
            raise InputError(f"{where}: sources name the layers of a list in different orders ({first}; {other}); {_OVERRULE}")
    return list(first.layers)


def _count(gates: Sequence[FoundGate]) -> str:
    return f"{len(gates)} gate{'s' * (len(gates) > 1)}"


_OVERRULE = "to go by --layers alone, import the file instead of its folder"
