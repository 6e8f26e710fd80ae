"""Gated attention (Qiu et al., arXiv 2505.06708): the output of each attention head times a sigmoid of the layer's input.

Released models (qiuzh20/gated_attention) are trained with it from scratch, O sigmoid(W x). On a frozen model a gate must start
at 1, so here it is O 2 sigmoid(W x + b), with W and b zero at first. One factor a head, the `headwise` form of the released
code.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx

from lsg_jax.config import ModelConfig, TextConfig
from lsg_jax.config.ranges import Range, Table
from lsg_jax.errors import ConfigError
from lsg_jax.gating.gate import GateParam
from lsg_jax.methods.method import Method
from lsg_jax.methods.method_model import MethodModel
from lsg_jax.types import Batch, KVCache, LayerChange, Sequence


@dataclass(frozen=True)
class GatedOutputConfig(Table, name="gated_output"):
    """Gated attention (arXiv 2505.06708): a trained factor for each head's output, 131,104 parameters a layer at 7B.

    Attributes:
        layers: decoder layers with such factors, 0-based, ascending; empty: every layer, as in the paper.
    """

    layers: tuple[Annotated[int, Range("[0, 1e4]")], ...] = ()


class OutputGates(nnx.Module):
    """W [n, D, N] and b [n, N] of n layers, float32 whatever the backbone's dtype; zeros."""

    def __init__(self, config: TextConfig, layers: int):
        self.kernel = GateParam(jnp.zeros((layers, config.hidden_size, config.num_heads)))
        self.bias = GateParam(jnp.zeros((layers, config.num_heads)))


@dataclass(frozen=True)
class GatedOutput(Method):
    """A factor for the output of each head, in chosen decoder layers."""

    settings: GatedOutputConfig = field(default_factory=GatedOutputConfig)

    Settings = GatedOutputConfig
    trains = True

    def for_model(self, config: ModelConfig) -> GatedOutput:
        """With every layer named where none is. Refuses layers that the decoder does not have."""
        count, layers = config.text.num_layers, self.settings.layers or tuple(range(config.text.num_layers))
        if bad := [layer for layer in layers if not 0 <= layer < count]:
            raise ConfigError(f"gated_output.layers: layer {bad[0]} does not exist, the model has layers 0 to {count - 1}")
        if list(layers) != sorted(set(layers)):
            raise ConfigError(f"gated_output.layers must ascend and name no layer twice: {list(layers)}")
        return GatedOutput(GatedOutputConfig(layers))

    def module(self, config: ModelConfig, key: jax.Array) -> OutputGates:
        """Gates of factor 1."""
        return OutputGates(config.text, len(self.settings.layers))

    def intervention(self, model: MethodModel, batch: Batch, sequence: Sequence) -> HeadFactors:
        """The factors at their layers, also for rows without an image."""
        layers, trained = self.settings.layers, model.trained
        slots = [layers.index(layer) if layer in layers else len(layers) for layer in range(model.config.text.num_layers)]
        # a layer without gates takes zeros, that is factors of exactly 1
        of_all = lambda leaf: jnp.pad(leaf, [(0, 1)] + [(0, 0)] * (leaf.ndim - 1))[jnp.array(slots)]
        return HeadFactors(of_all(trained.kernel[...]), of_all(trained.bias[...]), first_layer=layers[0])


@flax.struct.dataclass
class HeadFactors:
    """Multiplies the outputs of attention heads, for all tokens.

    Attributes:
        kernel: float32 [L, D, N].
        bias: float32 [L, N].
        first_layer: the lowest layer with gates, static.
    """

    kernel: jax.Array
    bias: jax.Array
    first_layer: int = flax.struct.field(pytree_node=False)

    last_layer = None

    def per_layer(self, start: int, stop: int) -> tuple[jax.Array, jax.Array]:
        """Scan inputs of the layers from `start` to `stop`."""
        return self.kernel[start:stop], self.bias[start:stop]

    def layer(self, inputs: tuple[jax.Array, jax.Array], hidden: jax.Array) -> LayerChange:
        """The factors of one layer; `inputs` is its slice of `per_layer`."""
        return LayerChange(head_gate=lambda x: head_factors(x, *inputs))

    def while_decoding(self, cache: KVCache, slot: jax.Array) -> HeadFactors:
        """The same factors."""
        return self


def head_factors(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """2 sigmoid(x W + b), the factor of each head.

    Args:
        x: [B, T, D], the layer's input after its norm.
        kernel: float32 [D, N].
        bias: float32 [N].

    Returns:
        float32 [B, T, N].
    """
    # a TPU would round float32 to bfloat16
    score = jnp.einsum("BTD,DN->BTN", x.astype(jnp.float32), kernel, precision=jax.lax.Precision.HIGHEST)
    return 2.0 * jax.nn.sigmoid(score + bias)
