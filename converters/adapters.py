"""Parts that were trained on a base model: LoRA adapters of PEFT, LLaVA's tensors beside them, and pretrained projectors."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.derived_source import Derived, LowRank
from converters.families.decoders import EMBEDDING, HEAD
from converters.families.values import shortened
from converters.hub import ADAPTER_CONFIG, ADAPTERS, OTHER_TRAINED, PROJECTOR
from converters.reader import BIN, BIN_INDEX, INDEX, SAFETENSORS, SafetensorsSource, Source, canonical_names
from lsg_jax.errors import ConfigError, InputError
from lsg_jax.json_files import read_object

_ONLY: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "alpha_pattern": ({}, None),
    "layer_replication": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "ensure_weight_tying": (False, None),
    # the others change the base's own weights
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}
"""Fields of adapter_config.json that change what is merged, and their values at which the merge is that of LoRA."""

_READ = {"r", "lora_alpha", "use_rslora"}

_NO_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "task_type", "peft_version", "target_modules",
    "exclude_modules", "bias", "modules_to_save", "lora_dropout", "rank_pattern", "layers_to_transform", "layers_pattern",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_config", "megatron_core", "runtime_config",
    "qalora_group_size",
}  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """What a folder holds of a model, under the names of its base.

    Attributes:
        updates: name of the base's tensor -> its low-rank update.
        replaced: name of the base's tensor, or of a new one -> (source, name there) of the tensor in its place.
        opened: all sources, to be closed.
    """

    updates: dict[str, LowRank]
    replaced: dict[str, tuple[Source, str]]
    opened: tuple[Source, ...]


def part_of_a_model(folder: Path, *, adapter_first: bool = False) -> str | None:
    """What a folder holds if that is only a part of a model, in words; None for a whole model or for no weights at all.

    Args:
        adapter_first: of a whole model and an adapter in one folder, the adapter counts.
    """
    adapter = f"an adapter ({ADAPTER_CONFIG})" if any((folder / name).exists() for name in ADAPTERS) else None
    if _is_whole(folder):
        return adapter if adapter_first else None
    if adapter:
        return adapter
    if (folder / OTHER_TRAINED).exists():
        return f"what was trained beside an adapter ({OTHER_TRAINED}), without the adapter"
    return f"a projector alone ({PROJECTOR})" if (folder / PROJECTOR).exists() else None


def adapter_beside_a_model(folder: Path) -> str | None:
    """The name of an adapter's file that lies beside a whole model, which would be converted without it. None for none."""
    found = (name for name in (*ADAPTERS, ADAPTER_CONFIG) if (folder / name).exists())
    return next(found, None) if _is_whole(folder) else None


def _is_whole(folder: Path) -> bool:
    return any((folder / name).exists() for name in (SAFETENSORS, INDEX, BIN, BIN_INDEX))


def base_named_by(folder: Path) -> str:
    """The base that a part of a model names, for the advice in an error; `FOLDER_OR_HUB_ID` where it names none."""
    for name, key in ((ADAPTER_CONFIG, "base_model_name_or_path"), ("config.json", "_name_or_path")):
        if (folder / name).is_file() and isinstance(named := read_object(folder / name).get(key), str) and named:
            return named
    return "FOLDER_OR_HUB_ID"


def read_trained(folder: Path) -> Trained:
    """Opens a part of a model.

    Raises:
        InputError: a file is damaged, or holds tensors that are no part of LoRA. ConfigError: an adapter of another kind.
    """
    opened: list[Source] = []
    updates: dict[str, LowRank] = {}
    replaced: dict[str, tuple[Source, str]] = {}
    try:
        for name in (PROJECTOR, OTHER_TRAINED):
            if (folder / name).exists():
                opened.append(_open(folder / name))
                replaced |= {_base_name(tensor): (opened[-1], tensor) for tensor in opened[-1].tensors}
        if adapter := next((folder / name for name in ADAPTERS if (folder / name).exists()), None):
            opened.append(_open(adapter))
            found, whole = _adapter(opened[-1], _lora(folder / ADAPTER_CONFIG), adapter)
            updates, replaced = found, replaced | whole
        elif (folder / OTHER_TRAINED).exists():
            raise InputError(f"{folder}: {OTHER_TRAINED} without an adapter: expected {' or '.join(ADAPTERS)} beside it")
    except BaseException:
        for source in opened:
            source.close()
        raise
    return Trained(updates, replaced, tuple(opened))


def _open(path: Path) -> Source:
    """Opens a file of trained tensors. Raises InputError for one that holds none."""
    source: Source
    if path.suffix == ".safetensors":
        source = SafetensorsSource([path])
    else:
        from converters.bin_reader import BinSource

        source = BinSource([path])
    if not source.tensors:
        source.close()
        raise InputError(f"{path}: holds no tensors, so there is nothing to merge; save what was trained again")
    return source


def _lora(path: Path) -> Mapping[str, Any]:
    """The settings of an adapter, if it is LoRA and nothing else."""
    config = read_object(path)
    wrong = {name: config[name] for name, values in _ONLY.items() if name in config and config[name] not in values}
    unset: tuple[Any, ...] = (None, False, {}, [], "")
    known = _ONLY.keys() | _READ | _NO_EFFECT
    wrong |= {name: value for name, value in config.items() if name not in known and value not in unset}
    if wrong:
        listed = ", ".join(f"{name} = {shortened(value)}" for name, value in wrong.items())
        raise ConfigError(
            f"{path}: this adapter cannot be merged: {listed}; merge it with PEFT's merge_and_unload() and convert that"
        )
    if not isinstance(config.get("lora_alpha"), (int, float)) or isinstance(config["lora_alpha"], bool):
        raise ConfigError(f"{path}: lora_alpha = {shortened(config.get('lora_alpha'))} is no number")
    return config


def _adapter(
    source: Source, config: Mapping[str, Any], where: Path
) -> tuple[dict[str, LowRank], dict[str, tuple[Source, str]]]:
    """The low-rank updates, and the whole tensors (`modules_to_save`, biases), by the names of the base."""
    updates: dict[str, LowRank] = {}
    whole: dict[str, tuple[Source, str]] = {}
    names = {re.sub(r"\.(lora_[AB])\.default\.weight$", r".\1.weight", name): name for name in source.tensors}
    for name, stored in names.items():
        match = re.fullmatch(r"(.+)\.lora_([AB])\.weight", name)
        if match is None:
            if "lora_" in name:
                raise InputError(f"{where}: {stored} is no part of LoRA on a matrix; merge it with PEFT's merge_and_unload()")
            whole[_base_name(re.sub(r"\.modules_to_save(\.default)?\.", ".", name))] = (source, stored)
            continue
        other = f"{match[1]}.lora_{'B' if match[2] == 'A' else 'A'}.weight"
        if other not in names:
            raise InputError(f"{where}: {stored} has no counterpart {other}; the adapter is incomplete")
        if match[2] == "B":
            down, up = source.tensors[names[other]], source.tensors[stored]
            if len(down.shape) != 2 or len(up.shape) != 2 or up.shape[1] != down.shape[0]:
                raise InputError(f"{where}: {stored} {list(up.shape)} and {other} {list(down.shape)} are no pair of matrices")
            rank = down.shape[0]
            scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
            updates[f"{_base_name(match[1])}.weight"] = LowRank(source, stored, names[other], scale)
    return updates, whole


def _base_name(name: str) -> str:
    """A name in the wrapped model -> in the base: PEFT prefixes `base_model.model.`, and its wrappers insert `base_layer`."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def derived_tensors(weights: Source, canonical: Callable[[str], str], folder: Path) -> dict[str, Derived]:
    """Canonical name -> the stored tensor, unchanged. Raises InputError if two tensors have one canonical name."""
    try:
        return {name: Derived(weights, stored) for name, stored in canonical_names(weights.tensors, canonical).items()}
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None


def with_replaced(tensors: dict[str, Derived], trained: Trained, canonical: Callable[[str], str]) -> dict[str, Derived]:
    """With the tensors that were trained whole, in the dtype of the base."""
    dtype = language_model_dtype(tensors)
    replaced = {canonical(name): Derived(source, stored, dtype) for name, (source, stored) in trained.replaced.items()}
    return tensors | replaced


def with_updates(
    tensors: dict[str, Derived], trained: Trained, canonical: Callable[[str], str], folder: Path
) -> dict[str, Derived]:
    """With the low-rank updates. Raises InputError for one that fits no tensor; `folder` names the adapter."""
    merged = dict(tensors)
    for name, update in trained.updates.items():
        found = merged.get(canonical(name))
        if found is None:
            raise InputError(f"{folder}: updates {name}, which its base does not have; is this the base of the adapter?")
        if found.tensor.shape != update.shape:
            raise InputError(
                f"{folder}: the update of {name} has shape {list(update.shape)}, the base's is "
                f"{list(found.tensor.shape)}; is this the base of the adapter?"
            )
        merged[canonical(name)] = dataclasses.replace(found, update=update)
    return merged


def language_model_dtype(tensors: dict[str, Derived]) -> Any:
    """The dtype of the language model; None if it has no embedding, which `rules.plan` reports."""
    found = tensors.get(EMBEDDING) or tensors.get(HEAD)
    return found.tensor.dtype if found else None
