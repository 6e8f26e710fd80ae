"""VAF, visual amplification fusion (Yin et al., ClearSight, arXiv 2503.13107): larger visual scores in the middle layers.

The attention scores of queries after the image, before the softmax, are multiplied: those on visual tokens by `visual`, those
on tokens before the image (the system prompt) by `system`. The same holds for each token of the answer.

As in the released code (ustc-hyin/ClearSight), whose layers are numbered from 0 and taken as they are at any depth, and which
edits every head. It counts 35 system and 576 visual tokens whatever the prompt; ours are those of the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import jax.numpy as jnp

from lsg_jax.config import ModelConfig
from lsg_jax.config.ranges import Range, Table
from lsg_jax.methods.method import Method, layer_range
from lsg_jax.methods.method_model import MethodModel
from lsg_jax.methods.scores import ScoreEdit
from lsg_jax.types import Batch, Sequence


@dataclass(frozen=True)
class VafConfig(Table, name="vaf"):
    """VAF (arXiv 2503.13107): attention scores on visual tokens and on the system prompt are multiplied. Not trained.

    With several images the system prompt ends at the first, and queries are edited behind the last. Factors of 1 are the base
    model.

    Attributes:
        visual: factor of the attention scores on visual tokens.
        system: factor of the attention scores on the system prompt.
        first_layer: first decoder layer that is edited, 0-based.
        last_layer: last decoder layer that is edited.
    """

    visual: Annotated[float, Range("[0, 100]")] = 1.15
    system: Annotated[float, Range("[0, 100]")] = 0.95
    first_layer: Annotated[int, Range("[0, 1e4]")] = 9
    last_layer: Annotated[int, Range("[0, 1e4]")] = 14


@dataclass(frozen=True)
class Vaf(Method):
    """VAF: visual scores up, those of the system prompt down."""

    settings: VafConfig = field(default_factory=VafConfig)

    Settings = VafConfig

    def for_model(self, config: ModelConfig) -> Vaf:
        """Refuses layers that the model lacks."""
        self._layers(config)
        return self

    def intervention(self, model: MethodModel, batch: Batch, sequence: Sequence) -> ScoreEdit | None:
        """Multiplied scores; None for a batch without images."""
        if sequence.visual is None or self.settings.visual == self.settings.system == 1:
            return None
        visual = sequence.visual.mask
        begun = jnp.cumsum(visual, axis=1) > 0
        ended = jnp.cumsum(visual[:, ::-1], axis=1)[:, ::-1] == 0
        has_image = visual.any(axis=1, keepdims=True)
        on_system = jnp.where(has_image & ~begun, self.settings.system - 1, 0.0)
        return ScoreEdit(
            change=jnp.where(visual, self.settings.visual - 1, on_system),
            queries=sequence.valid & ended & has_image,
            layers=self._layers(model.config),
            num_layers=model.config.text.num_layers,
        )

    def _layers(self, config: ModelConfig) -> tuple[int, int]:
        return layer_range(self.settings.first_layer, self.settings.last_layer, config, "vaf")
