"""Layer-wise Sink Gating as a method: gates, trained, that scale the keys of visual tokens (paper.md)."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax

from lsg_jax.config import GateConfig, ModelConfig
from lsg_jax.errors import ConfigError
from lsg_jax.gating.gate import KeyScaling, SinkGate, expand_gates
from lsg_jax.methods.method import Method
from lsg_jax.methods.method_model import MethodModel
from lsg_jax.model.layers import stack_layers
from lsg_jax.types import Batch, Sequence


@dataclass(frozen=True)
class Gates(Method):
    """Gates at the layers of `settings.layers`, stacked in their order."""

    settings: GateConfig = field(default_factory=GateConfig)

    Settings = GateConfig
    trains = True

    @property
    def gate(self) -> GateConfig:
        """Its settings."""
        return self.settings

    @property
    def independent(self) -> bool:
        """Its setting."""
        return self.settings.independent

    def for_model(self, config: ModelConfig) -> Gates:
        """With every layer named where independent gates name none."""
        gate = self.settings.for_depth(config.text.num_layers)
        check_gate(gate, config)
        return Gates(gate)

    def module(self, config: ModelConfig, key: jax.Array) -> SinkGate:
        """Fresh gates, stacked."""
        gate = self.settings
        return stack_layers(lambda r: SinkGate(config.text.hidden_size, gate, rngs=r), key, len(gate.layers))

    def intervention(self, model: MethodModel, batch: Batch, sequence: Sequence) -> KeyScaling | None:
        """Key scales from the gates; None for a batch without images."""
        if sequence.visual is None:
            return None
        source, enabled, graphdef = expand_gates(model.trained, self.settings, model.config.text.num_layers)
        return KeyScaling.for_batch(
            batch, sequence.visual, self.settings, model.config.sinks, source=source, enabled=enabled, graphdef=graphdef
        )


def check_gate(gate: GateConfig, config: ModelConfig, *, name: str = "gate") -> None:
    """Raises ConfigError for a gate configuration that the model cannot carry; `name` is the table that holds it."""
    layers, sinks = config.text.num_layers, config.sinks
    if not gate.layers:
        raise ConfigError(f"{name}.layers is empty: name the decoder layers, for example [10]")
    if bad := [layer for layer in gate.layers if not 0 <= layer < layers]:
        raise ConfigError(f"{name}.layers: layer {bad[0]} does not exist, the model has layers 0 to {layers - 1}")
    if list(gate.layers) != sorted(set(gate.layers)):
        raise ConfigError(f"{name}.layers must ascend and name no layer twice: {list(gate.layers)}")
    if gate.grouping != "l_sink_rest" and not sinks.knows_v_sinks:
        raise ConfigError(
            "no V-sink dimensions are known for this model: set sinks.vit_dims, or another sinks.criterion; a table [sinks] "
            "replaces all sink settings of the model folder"
        )
    if gate.grouping != "v_sink_rest":
        if sinks.llm_criterion == "attention_share":
            raise ConfigError("sinks.llm_criterion attention_share is only known after the keys are scaled: choose another")
        if not sinks.knows_l_sinks:
            raise ConfigError(
                "no L-sink dimensions are known for this model: set sinks.llm_dims, or another sinks.llm_criterion"
            )
