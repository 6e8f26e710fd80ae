"""Gates of several layers trained in one run, each as if it were the only one.

Below its gate a model with one gate equals the plain model. So vision tower, connector and plain decoder run once for all
gates, and each gate adds the layers from its own up, forward and backward:

    plain         0 - 1 - 2 - 3
                  |   |   |   |
    with a gate   0   1   2   3
                  1   2   3
                  2   3
                  3

A loop over the gates runs these suffixes one after the other. Their lengths are traced values, so one program serves all gates,
and memory holds one suffix at a time. JAX does not differentiate a loop of traced length, so the backward pass is written out
here, layer by layer. The gate acts in the lowest layer of its suffix only; the layers above are unchanged ones.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from lsg_jax.config import ModelConfig
from lsg_jax.gating.keys import GROUPS
from lsg_jax.methods.method import Method
from lsg_jax.methods.method_model import MethodModel, assemble
from lsg_jax.model.layers import layer_at
from lsg_jax.model.loss import count_sinks, mean_over_images, score_answers
from lsg_jax.sharding import ROWS, constrain
from lsg_jax.types import Batch, LayerChange


def independent_gates(config: ModelConfig, params: dict, key: jax.Array, *, method: Method) -> dict:
    """Stacked gates before the first step: each as a run of its own starts from the same key."""
    gate = method.settings
    one = dataclasses.replace(method, settings=dataclasses.replace(gate, layers=gate.layers[:1], independent=False))
    alone = one.initial(config, params, key)
    return jax.tree.map(lambda leaf: jnp.repeat(leaf, len(gate.layers), axis=0), alone)


def losses_and_gradients(graphdef: Any, frozen: Any, gates: Any, batch: Batch) -> tuple[jax.Array, dict[str, Any], Any]:
    """What n runs of one gate compute for the same batch.

    Args:
        graphdef: graph definition of the model with all n gates.
        gates: leaves [n, ...].

    Returns:
        losses float32 [n]; a dict of `tokens`, `visual_tokens` and `v_sinks` int32 [], `correct` int32 [n] and `ratios` float32
        [n, G]; gradients as `gates`.
    """
    suffixes = _Suffixes(assemble(graphdef, frozen, gates), batch)
    layers = suffixes.gate.layers
    looped = len(layers) - (
        layers[-1] == suffixes.last
    )  # a gate at the last layer has an empty suffix and is compiled separately

    def step(kept: Any, slot_and_layer: tuple[jax.Array, jax.Array]) -> tuple[Any, tuple]:
        slot, layer = slot_and_layer
        found, kept = suffixes.of_gate(layer_at(gates, slot), layer, kept)
        return kept, found

    parts = []
    if looped:
        xs = jnp.arange(looped), jnp.array(layers[:looped])
        parts.append(jax.lax.scan(step, suffixes.room(), xs)[1])
    if looped < len(layers):
        found = suffixes.of_last_gate(layer_at(gates, jnp.int32(looped)))
        parts.append(jax.tree.map(lambda leaf: leaf[None], found))
    losses, metrics, ratios, gradients = jax.tree.map(lambda *part: jnp.concatenate(part), *parts)
    metrics |= {"tokens": metrics["tokens"][0], "ratios": mean_over_images(batch, ratios)} | suffixes.counts
    return losses, metrics, gradients


class _Suffixes:
    """The ungated pass over a batch, and from it the layers from any gate up.

    Attributes:
        entering: [L', B, T, D], the residual stream that enters each layer up to the highest gated one.
        counts: of `count_sinks`.
    """

    def __init__(self, model: MethodModel, batch: Batch):
        assert model.gate is not None
        self.model, self.batch, self.gate = model, batch, model.gate
        decoder, sequence = model.language_model, model.sequence(batch)
        self.counts = count_sinks(sequence)
        self.runner = decoder.runner(sequence, model.intervention(batch, sequence))
        self.last = decoder.config.num_layers - 1
        self.entering = decoder(sequence, stop=self.gate.layers[-1] + 1, observe=lambda view: view.hidden).observed

    def room(self) -> tuple[jax.Array, jax.Array]:
        """Buffers for the residuals of a suffix: the inputs of both halves of each layer, [L - 1, B, T, D]."""
        like = self.entering
        empty = lambda: constrain(jnp.zeros((self.last, *like.shape[1:]), like.dtype), self.model.mesh, None, ROWS, "tensor")
        return empty(), empty()

    def of_gate(self, gate: Any, layer: jax.Array, kept: Any) -> tuple[tuple, Any]:
        """Loss, metrics of `score_answers`, ratios [B, G] and gradient of a gate below the last layer.

        Args:
            gate: parameters of one gate.
            layer: int32 [].
            kept: the buffers of `room`, returned for the next gate.
        """
        hidden, of_gate, ratios = jax.vjp(lambda gate: self._gated(gate, layer), gate, has_aux=True)

        put = functools.partial(jax.lax.dynamic_update_index_in_dim, axis=0)
        take = functools.partial(jax.lax.dynamic_index_in_dim, keepdims=False)

        def up(index: jax.Array, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
            hidden, (entering, between) = carry
            middle = self._attended(hidden, index)
            return self._fed(middle, index), (put(entering, hidden, index), put(between, middle, index))

        def down(count: jax.Array, gradient: jax.Array) -> jax.Array:
            index = self.last - 1 - count
            entering, between = (take(of_all, index) for of_all in kept)
            (gradient,) = jax.vjp(lambda middle: self._fed(middle, index), between)[1](gradient)
            return jax.vjp(lambda hidden: self._attended(hidden, index), entering)[1](gradient)[0]

        hidden, kept = jax.lax.fori_loop(layer + 1, self.last, up, (hidden, kept))
        loss, of_loss, (metrics, _) = jax.vjp(self._scored, hidden, has_aux=True)
        gradient = jax.lax.fori_loop(0, self.last - 1 - layer, down, of_loss(jnp.ones_like(loss))[0])
        return (loss, metrics, ratios, of_gate(gradient)[0]), kept

    def of_last_gate(self, gate: Any) -> tuple:
        """The same of a gate at the last layer."""
        scored = lambda gate: self._scored(self.entering[self.last], gate)
        (loss, (metrics, ratios)), gradient = jax.value_and_grad(scored, has_aux=True)(gate)
        return loss, metrics, ratios, gradient

    def _gated(self, gate: Any, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
        hidden = jax.lax.dynamic_index_in_dim(self.entering, layer, keepdims=False)
        out = self.runner(layer, hidden, inputs=_scan_inputs(gate))
        return out.x, self._ratios(out.change)

    def _attended(self, hidden: jax.Array, layer: jax.Array) -> jax.Array:
        return self.model.language_model.by_rows(self.runner.attend(layer, hidden))

    def _fed(self, hidden: jax.Array, layer: jax.Array) -> jax.Array:
        return self.model.language_model.by_rows(self.runner.feed(layer, hidden))

    def _scored(self, hidden: jax.Array, gate: Any = None) -> tuple[jax.Array, tuple[dict[str, jax.Array], jax.Array]]:
        """The last layer, gated or not, and the loss."""
        rows = jnp.asarray(self.batch.answer_index)
        inputs = None if gate is None else _scan_inputs(gate)
        out = self.runner(jnp.int32(self.last), hidden, inputs=inputs, rows=rows)
        loss, metrics = score_answers(self.model, self.batch, out.x)
        return loss, (metrics, self._ratios(out.change))

    def _ratios(self, change: LayerChange) -> jax.Array:
        rows = self.batch.input_ids.shape[0]
        return jnp.zeros((rows, len(GROUPS[self.gate.grouping]))) if change.ratios is None else change.ratios


def _scan_inputs(gate: Any) -> tuple[Any, jax.Array]:
    """What KeyScaling takes for a gated layer."""
    return gate, jnp.array(True)
