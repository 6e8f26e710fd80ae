"""Schema of gates, and the names that several methods share."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal

from lsg_jax.config.model import Activation
from lsg_jax.config.ranges import Range, Table

Signal = Literal["last", "mean_all", "mean_visual"]
Grouping = Literal["v_sink_rest", "l_sink_rest", "three"]
Part = Literal["vision_tower", "projector", "language_model"]


@dataclass(frozen=True)
class GateConfig(Table, name="gate"):
    """Layer-wise Sink Gating. The activation, the biases and `key_scale` are open in the paper; these are our defaults.

    Attributes:
        layers: gated decoder layers, 0-based; in a configuration, "each": every decoder layer, with `independent`.
        independent: train each gate as if it were alone, all in one run; without `layers`, one at every decoder layer.
        width: hidden units of a gate.
        activation: between the two linear layers of a gate.
        biases: whether the two linear layers of a gate have biases; without, those stay zero.
        layer_norm_eps: added to the variance in the norm of a gate's input.
        key_scale: multiplies the ratios: 1.0 starts every visual key at 0.5, and 2.0 makes the initial gate the identity.
        signal: what a gate reads: the last token of the prompt, or the mean of all or of the visual tokens.
        grouping: tokens that share a ratio: V-sinks or L-sinks against the rest, or both kinds and the rest.
    """

    layers: tuple[Annotated[int, Range("[0, 1e4]")], ...] = ()
    independent: bool = False
    width: Annotated[int, Range("[1, 1e6]")] = 64
    activation: Activation = "gelu"
    biases: bool = True
    layer_norm_eps: Annotated[float, Range("[0, 1]")] = 1e-5
    key_scale: Annotated[float, Range("(0, 1000]")] = 1.0
    signal: Signal = "last"
    grouping: Grouping = "v_sink_rest"

    def for_depth(self, num_layers: int) -> GateConfig:
        """The same with all layers of a decoder listed where `independent` gates list none."""
        every = self.independent and not self.layers
        return dataclasses.replace(self, layers=tuple(range(num_layers))) if every else self
