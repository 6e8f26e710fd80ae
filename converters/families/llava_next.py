"""LLaVA-NeXT (LLaVA-1.6): LLaVA with tiles of a canvas beside the whole image, and a newline after each row of patches."""

from __future__ import annotations

import dataclasses

from converters.families import llava
from converters.families.family import Family
from converters.ops import Copy, Rule
from lsg_jax.config import ModelConfig


def _rules(config: ModelConfig) -> tuple[Rule, ...]:
    return (*llava.rules(config), Rule("image_newline", "image_newline", Copy()))


FAMILY: Family = dataclasses.replace(
    llava.FAMILY,
    model_type="llava_next",
    architecture="LlavaNextForConditionalGeneration",
    fields=llava.FIELDS | {"image_grid_pinpoints"},
    rules=_rules,
)
