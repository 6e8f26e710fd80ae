"""Layer-wise Sink Gating (arXiv 2604.03316): the gate module, its input signal, and the key scales that it gives the decoder.

g_l: LayerNorm -> Linear D->64 -> activation -> Linear 64->G -> softmax = the ratios rho, which sum to 1.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx

from lsg_jax.activations import ACTIVATIONS, standardise
from lsg_jax.config import GateConfig, Signal, SinkConfig
from lsg_jax.gating.keys import GROUPS, group_members, key_scale
from lsg_jax.sinks.criteria import group_visual_tokens, sink_mask
from lsg_jax.types import Batch, KVCache, LayerChange, VisualTokens


class GateParam(nnx.Param[jax.Array]):
    """A parameter of a gate or of another trained method, in the subtree `trained`; the rest of the model is frozen."""


class SinkGate(nnx.Module):
    """One gate, in float32 for a backbone of any dtype. The last linear layer starts at zero, so the ratios start equal.

    Kernels are [in, out]. At D = 4096, width 64 and two groups: 262,144 + 64 + 128 + 2 + 8,192 parameters.
    """

    def __init__(self, width_in: int, config: GateConfig, *, rngs: nnx.Rngs):
        self.config = config
        groups = len(GROUPS[config.grouping])
        self.norm_scale = GateParam(jnp.ones((width_in,)))
        self.norm_bias = GateParam(jnp.zeros((width_in,)))
        self.fc1_kernel = GateParam(nnx.initializers.lecun_normal()(rngs.params(), (width_in, config.width)))
        self.fc1_bias = GateParam(jnp.zeros((config.width,)))
        self.fc2_kernel = GateParam(jnp.zeros((config.width, groups)))
        self.fc2_bias = GateParam(jnp.zeros((groups,)))

    def __call__(self, signal_BD: jax.Array) -> jax.Array:
        """Signal [B, D] -> ratios float32 [B, G]; each row sums to 1."""
        x = standardise(signal_BD, self.config.layer_norm_eps)
        x = x * self.norm_scale[...] + self.norm_bias[...]
        exact = functools.partial(jnp.dot, precision=jax.lax.Precision.HIGHEST)  # a TPU would round float32 to bfloat16
        x = exact(x, self.fc1_kernel[...])
        x = exact(ACTIVATIONS[self.config.activation](x + self._bias(self.fc1_bias)), self.fc2_kernel[...])
        return jax.nn.softmax(x + self._bias(self.fc2_bias), axis=-1)

    def _bias(self, parameter: GateParam) -> jax.Array | float:
        # biases that are switched off stay zero without a gradient: every gate file has the same tensors
        return parameter[...] if self.config.biases else 0.0


def gate_signal(
    hidden: jax.Array, signal: Signal, *, gate_position: jax.Array, valid: jax.Array, visual: jax.Array
) -> jax.Array:
    """The input of a gate, from the residual stream that enters its layer (config.Signal).

    No signal uses positions after `gate_position`, which hold the answer.

    Args:
        hidden: [B, T, D].
        gate_position: int32 [B].
        valid: bool [B, T], unpadded tokens.
        visual: bool [B, T].

    Returns:
        [B, D]; zeros for `mean_visual` in a row without an image.
    """
    if signal == "last":
        return jnp.take_along_axis(hidden, gate_position[:, None, None], axis=1)[:, 0]
    if signal not in ("mean_all", "mean_visual"):
        raise ValueError(f"unknown gate signal {signal}")
    prompt = valid & (jnp.arange(hidden.shape[1]) <= gate_position[:, None])
    weights = (prompt & visual if signal == "mean_visual" else prompt).astype(jnp.float32)
    total = jnp.einsum("BTD,BT->BD", hidden.astype(jnp.float32), weights)
    return total / jnp.maximum(weights.sum(-1, keepdims=True), 1.0)


@flax.struct.dataclass
class KeyScaling:
    """Makes the key scales [B, T] of the decoder layers: from trained gates, or from fixed coefficients (the oracle).

    Attributes:
        source: what differs by layer, stacked: gate parameters [L, ...] or coefficients float32 [L, G].
        enabled: bool [L], layers that are scaled at all.
        visual: the visual tokens of the merged sequence.
        gate_position: int32 [B].
        valid: bool [B, T].
        first_layer: the lowest enabled layer, static; no layer below it depends on the gates.
    """

    source: Any
    enabled: jax.Array
    visual: VisualTokens
    gate_position: jax.Array
    valid: jax.Array
    first_layer: int = flax.struct.field(pytree_node=False)
    config: GateConfig = flax.struct.field(pytree_node=False)
    sinks: SinkConfig = flax.struct.field(pytree_node=False)
    gate: Any = flax.struct.field(pytree_node=False, default=None)  # graphdef of one SinkGate; None: fixed coefficients

    last_layer = None

    @classmethod
    def for_batch(
        cls,
        batch: Batch,
        visual: VisualTokens,
        config: GateConfig,
        sinks: SinkConfig,
        *,
        source: Any,
        enabled: jax.Array,
        graphdef: Any = None,
    ) -> KeyScaling:
        """Key scales for the visual tokens of a batch; `graphdef` of one gate, None for fixed coefficients."""
        return cls(
            source=source,
            enabled=enabled,
            visual=visual,
            gate_position=jnp.asarray(batch.gate_position),
            valid=jnp.asarray(batch.attention_mask),
            first_layer=min(config.layers),
            config=config,
            sinks=sinks,
            gate=graphdef,
        )

    def per_layer(self, start: int, stop: int) -> tuple[Any, jax.Array]:
        """Scan inputs of the layers from `start` to `stop`."""
        inputs: tuple[Any, jax.Array] = jax.tree.map(lambda leaf: leaf[start:stop], (self.source, self.enabled))
        return inputs

    def while_decoding(self, cache: KVCache, slot: jax.Array) -> None:
        """Nothing: the scaled keys are in the cache."""

    def layer(self, inputs: tuple[Any, jax.Array], hidden: jax.Array) -> LayerChange:
        """Key scale and ratios of the layer that `hidden` [B, T, D] enters.

        Args:
            inputs: the layer's slice of `per_layer`.
        """
        source_l, enabled_l = inputs
        members = group_members(group_visual_tokens(self.visual, self._l_sinks(hidden)), self.config.grouping)
        if self.gate is None:
            ratios = jnp.broadcast_to(source_l, (hidden.shape[0], source_l.shape[-1]))
            coefficients = ratios
        else:
            signal = gate_signal(
                hidden, self.config.signal, gate_position=self.gate_position, valid=self.valid, visual=self.visual.mask
            )
            ratios = nnx.merge(self.gate, source_l)(signal)
            coefficients = ratios * self.config.key_scale
        return LayerChange(key_scale=jnp.where(enabled_l, key_scale(coefficients, members), 1.0), ratios=ratios)

    def _l_sinks(self, hidden: jax.Array) -> jax.Array:
        if self.config.grouping == "v_sink_rest":  # L-sinks and ordinary tokens share a coefficient
            return jnp.zeros_like(self.visual.mask)
        return sink_mask(
            self.sinks.llm_criterion,
            hidden,
            dims=self.sinks.llm_dims,
            tau=self.sinks.llm_tau,
            massive_ratio=self.sinks.massive_ratio,
            valid=self.valid,
        )


def expand_gates(gates: nnx.Module, config: GateConfig, num_layers: int) -> tuple[Any, jax.Array, Any]:
    """Scan inputs over all layers from the gates of the gated layers.

    Returns:
        parameters [L, ...] (a layer without a gate gets a copy that `enabled` switches off), enabled bool [L], graph definition
        of one gate.
    """
    slot = [config.layers.index(layer) if layer in config.layers else 0 for layer in range(num_layers)]
    enabled = jnp.array([layer in config.layers for layer in range(num_layers)])
    graphdef, state = nnx.split(gates)
    return jax.tree.map(lambda leaf: leaf[jnp.array(slot)], state), enabled, graphdef
