"""Fixed coefficients instead of gates, the oracle of the paper: one for each token group, at given layers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import jax.numpy as jnp

from lsg_jax.config import GateConfig, Grouping, ModelConfig
from lsg_jax.config.ranges import Range, Table
from lsg_jax.errors import ConfigError
from lsg_jax.gating.gate import KeyScaling
from lsg_jax.gating.keys import GROUPS
from lsg_jax.methods.gates import check_gate
from lsg_jax.methods.method import Method
from lsg_jax.methods.method_model import MethodModel
from lsg_jax.types import Batch, Sequence


@dataclass(frozen=True)
class FixedConfig(Table, name="fixed"):
    """Fixed coefficients instead of gates, the oracle of the paper: one for each group of `grouping`, at `layers`.

    Attributes:
        layers: decoder layers whose keys are scaled, 0-based.
        coefficients: a factor for each group, the same in all layers.
        grouping: tokens that share a coefficient: V-sinks or L-sinks against the rest, or both kinds and the rest.
    """

    layers: tuple[Annotated[int, Range("[0, 1e4]")], ...] = ()
    coefficients: tuple[Annotated[float, Range("[-1000, 1000]")], ...] = ()
    grouping: Grouping = "v_sink_rest"


@dataclass(frozen=True)
class Fixed(Method):
    """The same coefficients for every image and question."""

    settings: FixedConfig = field(default_factory=FixedConfig)

    Settings = FixedConfig

    def for_model(self, config: ModelConfig) -> Fixed:
        """Refuses layers that the model lacks, and another number of coefficients than of groups."""
        grouping, given = self.settings.grouping, len(self.settings.coefficients)
        check_gate(self._as_gate(), config, name="fixed")
        if given != (groups := len(GROUPS[grouping])):
            raise ConfigError(f"fixed.coefficients: {given} given, grouping {grouping} has {groups} groups")
        return self

    def intervention(self, model: MethodModel, batch: Batch, sequence: Sequence) -> KeyScaling | None:
        """Key scales from the coefficients; None for a batch without images."""
        if sequence.visual is None:
            return None
        layers, coefficients = jnp.arange(model.config.text.num_layers), jnp.array(self.settings.coefficients, jnp.float32)
        return KeyScaling.for_batch(
            batch,
            sequence.visual,
            self._as_gate(),
            model.config.sinks,
            source=jnp.broadcast_to(coefficients, (len(layers), len(coefficients))),
            enabled=jnp.isin(layers, jnp.array(self.settings.layers)),
        )

    def _as_gate(self) -> GateConfig:
        return GateConfig(layers=self.settings.layers, grouping=self.settings.grouping)
