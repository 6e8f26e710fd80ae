"""ViP-LLaVA: LLaVA-1.5 with the features of several layers, and a layer norm before the projector."""

from __future__ import annotations

import dataclasses

from converters.families import llava
from converters.families.family import Family

FAMILY: Family = dataclasses.replace(
    llava.FAMILY,
    model_type="vipllava",
    architecture="VipLlavaForConditionalGeneration",
    fields=llava.FIELDS - {"vision_feature_select_strategy", "multimodal_projector_bias"}
    | {"projector_layernorm_eps", "vision_feature_layers"},
)
