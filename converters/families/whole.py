"""What the configurations of all families have in common: a tower, a decoder, end and padding tokens, sinks."""

from __future__ import annotations

from typing import Any

from converters.families import decoders, towers
from converters.families.family import CheckpointFiles, HFConfig
from converters.families.known_sinks import sinks_of
from converters.families.values import token_ids
from converters.ops import Rule
from lsg_jax.config import ModelConfig


def common_fields(hf: HFConfig, files: CheckpointFiles) -> dict[str, Any]:
    """Fields of a ModelConfig that are read alike in every family.

    Raises:
        ConfigError: a value is not supported.
    """
    where = files.where
    vision = towers.vision_config(hf.vision_config, f"{where}: vision_config")
    text = decoders.text_config(hf.text_config, tied=bool(hf.tie_word_embeddings), where=f"{where}: text_config")
    eos = token_ids(hf, files, "eos_token_id", from_generation=True)
    pad = token_ids(hf, files, "pad_token_id", from_generation=False) or eos or (0,)
    sinks, sink_sources = sinks_of(vision, text, hf, files)
    return {
        "vision": vision,
        "text": text,
        "image_token_id": hf.image_token_id,
        "eos_token_ids": eos,
        "pad_token_id": pad[0],
        "sinks": sinks,
        "sink_sources": sink_sources,
        "family": hf.model_type,
    }


LAST_LAYER: dict[str, Any] = {"feature_layers": (-1,), "feature_select": "full"}
"""Of families whose features are the output of the tower."""


def part_rules(config: ModelConfig, projector: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """The rules of a tower, a projector and a decoder."""
    return (*towers.TOWER_RULES[config.vision.family], *projector, *decoders.RULES[config.text.family])
