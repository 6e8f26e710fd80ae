"""Model families, one file each. `FAMILIES` is the only place that lists them.

A new family is one file with a `Family` and a row here. `decoders.py` and `towers.py` hold what several families share.
"""

from __future__ import annotations

from converters.families import gemma3, internvl, llava, llava_next, llava_onevision, qwen2_vl, smolvlm, vipllava
from converters.families.family import Family
from converters.ops import Rule
from lsg_jax.config import ModelConfig

_FAMILIES = (
    llava.FAMILY,
    llava_next.FAMILY,
    llava_onevision.FAMILY,
    vipllava.FAMILY,
    qwen2_vl.QWEN2_VL,
    qwen2_vl.QWEN2_5_VL,
    qwen2_vl.QWEN3_VL,
    internvl.FAMILY,
    gemma3.FAMILY,
    smolvlm.FAMILY,
)

FAMILIES: dict[str, Family] = {family.model_type: family for family in _FAMILIES}
"""`model_type` of config.json -> the family."""


def family_of(config: ModelConfig) -> Family:
    """The family that a converted model came from."""
    return FAMILIES[config.family]


def rules_of(config: ModelConfig) -> tuple[Rule, ...]:
    """The rules for a model of this configuration."""
    return family_of(config).rules(config)
