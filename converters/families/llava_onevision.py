"""LLaVA-OneVision: LLaVA-NeXT with larger grids, whose rows are shrunk, and a square for each of several images."""

from __future__ import annotations

import dataclasses
import re

from converters.families import llava, llava_next
from converters.families.family import CheckpointFiles, Family, HFConfig
from lsg_jax.config import ModelConfig
from lsg_jax.errors import ConfigError


def _model_config(hf: HFConfig, files: CheckpointFiles) -> ModelConfig:
    stated = re.fullmatch(r"anyres_max_([1-9][0-9]*)", str(hf.vision_aspect_ratio))
    if not stated:
        raise ConfigError(f"{files.where}: vision_aspect_ratio = {hf.vision_aspect_ratio!r} is not anyres_max_N")
    config = llava.model_config(hf, files)
    image = dataclasses.replace(config.image, max_tiles=int(stated[1]))
    return dataclasses.replace(config, image=image, video_token_id=hf.video_token_index)


FAMILY: Family = dataclasses.replace(
    llava_next.FAMILY,
    model_type="llava_onevision",
    architecture="LlavaOnevisionForConditionalGeneration",
    fields=llava_next.FAMILY.fields | {"vision_aspect_ratio", "video_token_index", "video_token_id"},
    model_config=_model_config,
)
