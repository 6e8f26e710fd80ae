"""The interface of a family: what `converters/families/<name>.py` provides."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from converters.ops import Rule
from lsg_jax.config import ModelConfig

HFConfig: TypeAlias = Any
"""A configuration object of transformers. Its attributes differ by model_type, so they are not typed."""


@dataclass(frozen=True)
class CheckpointFiles:
    """The JSON files of a checkpoint in Hugging Face format, parsed.

    Attributes:
        config: `config.json`.
        generation: `generation_config.json`, if there is one.
        preprocessor: `preprocessor_config.json` or `processor_config.json`, if there is one.
        where: how errors name config.json.
        name: Hub id or name of the folder; empty if unknown.
    """

    config: Mapping[str, Any]
    generation: Mapping[str, Any] | None
    preprocessor: Mapping[str, Any] | None
    where: str
    name: str = ""


@dataclass(frozen=True)
class Part:
    """A nested configuration such as `text_config`.

    Attributes:
        default: its model_type where config.json states none.
        fields: supported model_type -> fields that the family handles.
    """

    default: str
    fields: Mapping[str, frozenset[str]]


@dataclass(frozen=True)
class Family:
    """Everything that the converters know about one `model_type`.

    Attributes:
        model_type: of config.json. architecture: the class in transformers, for messages.
        fields: top-level fields of config.json that the family handles.
        parts: field of a nested configuration -> what it may be.
        model_config: the configuration object of transformers, all defaults filled in, and the files -> ModelConfig. Raises
            ConfigError for a value that is not supported.
        rules: the rule table of a model. It may hold rules for leaves that the model lacks (biases, an untied head): those are
            not used. Rules that name the same tensor share its rows in the order of the table.
        canonical_name: the name of a tensor in a checkpoint -> its one name in the rules, whichever layout the file has. All
            families call the parts `vision_tower`, `multi_modal_projector`, `language_model.model`, `language_model.lm_head`.
        carried: patterns of tensors that the model does not use and an export gives back.
        ignored: (pattern, reason) of tensors that are dropped.
        restated: config.json as an older form of it states the model -> as the installed transformers saves it.
    """

    model_type: str
    architecture: str
    fields: frozenset[str]
    parts: Mapping[str, Part]
    model_config: Callable[[HFConfig, CheckpointFiles], ModelConfig]
    rules: Callable[[ModelConfig], tuple[Rule, ...]]
    canonical_name: Callable[[str], str]
    carried: tuple[str, ...]
    ignored: tuple[tuple[str, str], ...]
    restated: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda config: config


def prefixed(leaf_prefix: str, source_prefix: str, table: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """The rules of a part, below its paths."""
    return tuple(Rule(leaf_prefix + rule.leaf, source_prefix + rule.source, rule.op) for rule in table)
