"""Model families, one file each. `FAMILIES` is the only place that lists them.

A new family is one file with a `Family` and a row here. `decoders.py` and `towers.py` hold what several families share.
"""

from __future__ import annotations

from converters.families import llava, llava_next, llava_onevision, vipllava
from converters.families.family import Family
from converters.ops import Rule
from lsg_jax.config import ModelConfig

_MODULES = (llava, llava_next, llava_onevision, vipllava)

FAMILIES: dict[str, Family] = {module.FAMILY.model_type: module.FAMILY for module in _MODULES}
"""`model_type` of config.json -> the family."""


def family_of(config: ModelConfig) -> Family:
    """The family that a converted model came from."""
    return FAMILIES[config.family]


def rules_of(config: ModelConfig) -> tuple[Rule, ...]:
    """The rules for a model of this configuration."""
    return family_of(config).rules(config)
