"""Test-time registers (Jiang et al., arXiv 2506.08010): the ViT is given a token that takes the outliers over from the patches.

A few neurons in the MLPs of the vision tower make the patches of large norm. At each of them the largest activation, with its
sign, over all positions goes to the appended tokens, and the patches get 0. The class token keeps its own. An appended token
starts as zeros beside the embedded patches, and reaches neither the connector nor a criterion of sinks, whatever
`feature_select` is.

Of the released code (nickjiang2378/test-time-registers) the rule for patches is `normal_values="zero"`, the scale 1. There one
maximum is taken over all register neurons of a layer; here each neuron moves its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from lsg_jax.config import ModelConfig
from lsg_jax.config.ranges import Range, Table
from lsg_jax.errors import ConfigError
from lsg_jax.methods.method import Method
from lsg_jax.model.vision_layers import Registers


@dataclass(frozen=True)
class RegistersConfig(Table, name="registers"):
    """Test-time registers (arXiv 2506.08010): activations of ViT neurons go to appended tokens. Not trained.

    `lsg calibrate MODEL --images DIR --registers N` proposes neurons.

    Attributes:
        neurons: pairs [layer, neuron], both from 0.
        count: appended tokens; 0 leaves the tower as it is.
    """

    neurons: tuple[tuple[Annotated[int, Range("[0, 1e7]")], ...], ...] = ()
    count: Annotated[int, Range("[0, 1000]")] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if bad := [list(pair) for pair in self.neurons if len(pair) != 2]:
            raise ConfigError(f"registers.neurons: {bad[0]} is no pair of layer and neuron")


@dataclass(frozen=True)
class RegisterTokens(Method):
    """Registers in the vision tower: of each image, or of each tile of it."""

    settings: RegistersConfig = field(default_factory=RegistersConfig)

    Settings = RegistersConfig

    def for_model(self, config: ModelConfig) -> RegisterTokens:
        """Refuses neurons that the vision tower does not run, and a tower of images of any size."""
        vision, neurons, depth = config.vision, self.settings.neurons, layers_run(config)
        if not neurons:
            raise ConfigError("registers.neurons is empty: `lsg calibrate MODEL --images DIR --registers 10` proposes some")
        for layer, neuron in neurons:
            if layer >= depth:
                raise ConfigError(f"registers.neurons: layer {layer} does not run, the features need layers 0 to {depth - 1}")
            if neuron >= vision.intermediate_size:
                last = vision.intermediate_size - 1
                raise ConfigError(f"registers.neurons: neuron {neuron} does not exist, a layer has neurons 0 to {last}")
        if len(set(neurons)) < len(neurons):
            raise ConfigError("registers.neurons names a neuron twice")
        return self

    @property
    def registers(self) -> Registers | None:
        """The tokens and neurons."""
        return Registers(self.settings.neurons, self.settings.count) if self.settings.count else None


def layers_run(config: ModelConfig) -> int:
    """The number of layers of the vision tower that the features need.

    Raises:
        ConfigError: the tower takes images of any size, so no token can be appended to its patches.
    """
    if config.vision.native:
        raise ConfigError("registers takes square images, but this model takes images of any size")
    return max(layer % (config.vision.num_layers + 1) for layer in (*config.feature_layers, *config.deepstack))
