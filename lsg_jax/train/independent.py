"""Gates of several layers trained in one run, each as if it were the only one.

Below its gate a model with one gate is the plain model. So vision tower, projector and plain decoder run once for all of them,
and each gate adds the layers from its own up, forward and backward:

    plain         0 - 1 - 2 - 3
                  |   |   |   |
    with a gate   0   1   2   3
                  1   2   3
                  2   3
                  3

A loop over the gates runs these suffixes one after the other. How long they are is data, not program: so one program serves all
of them, and memory holds one at a time. JAX differentiates no loop of unknown length, hence the backward pass is written out
here, layer by layer; the gate acts in the lowest layer alone, so nothing above it knows of gates.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from lsg_jax.config import GateConfig, ModelConfig
from lsg_jax.model.layers import layer_at
from lsg_jax.model.llava import Llava, assemble, initial_parameters
from lsg_jax.model.loss import mean_over_images, score_answers
from lsg_jax.sharding import ROWS, constrain
from lsg_jax.types import UNCHANGED, Batch, LayerChange


def independent_gates(config: ModelConfig, gate: GateConfig, frozen: dict, key: jax.Array) -> dict:
    """Stacked gates before the first step: each as a run of its own starts from the same key."""
    one = dataclasses.replace(gate, layers=gate.layers[:1], independent=False)
    alone = initial_parameters(config, one, None, frozen, key)
    return jax.tree.map(lambda leaf: jnp.repeat(leaf, len(gate.layers), axis=0), alone)


def losses_and_gradients(graphdef: Any, frozen: Any, gates: Any, batch: Batch) -> tuple[jax.Array, dict[str, Any], Any]:
    """What n runs of one gate compute for the same batch.

    Args:
        graphdef: graph definition of the model with all n gates.
        gates: leaves [n, ...].

    Returns:
        losses float32 [n]; a dict of `tokens` int32 [], `correct` int32 [n] and `ratios` float32 [n, G]; gradients as `gates`.
    """
    suffixes = _Suffixes(assemble(graphdef, frozen, gates), batch)
    layers = suffixes.gate.layers
    looped = len(layers) - (layers[-1] == suffixes.last)  # the last layer is the end of every suffix, and a program of its own

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
    losses, told, ratios, gradients = jax.tree.map(lambda *part: jnp.concatenate(part), *parts)
    told |= {"tokens": told["tokens"][0], "ratios": mean_over_images(suffixes.model, batch, ratios)}
    return losses, told, gradients


class _Suffixes:
    """The plain pass over a batch, and from it the layers from any gate up.

    Attributes:
        entering: [L', B, T, D], the residual stream that enters each layer up to the highest gated one.
    """

    def __init__(self, model: Llava, batch: Batch):
        assert model.gate_config is not None
        self.model, self.batch, self.gate = model, batch, model.gate_config
        decoder, merged = model.language_model, model.merge(batch)
        self.run_layer, self.attend = decoder.over(merged.valid), decoder.over(merged.valid, "attend")
        self.scaling = model.intervention(batch, merged)  # None without images
        self.last = decoder.config.num_layers - 1
        whole = decoder.config
        decoder.config = dataclasses.replace(whole, num_layers=self.gate.layers[-1] + 1)  # a decoder that ends there
        self.entering = decoder(merged.x, merged.valid, observe=lambda view: view.hidden).observed
        decoder.config = whole

    def room(self) -> tuple[jax.Array, jax.Array]:
        """For what the backward pass starts the halves of each layer from: residual streams [L - 1, B, T, D] of a suffix."""
        like = self.entering
        empty = lambda: constrain(jnp.zeros((self.last, *like.shape[1:]), like.dtype), self.model.mesh, None, ROWS, "tensor")
        return empty(), empty()

    def of_gate(self, gate: Any, layer: jax.Array, kept: Any) -> tuple[tuple, Any]:
        """Loss, what `score_answers` tells, ratios [B, G] and gradient of a gate below the last layer.

        Args:
            gate: parameters of one gate.
            layer: int32 [].
            kept: what `room` gave, returned for the next gate.
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
        loss, of_loss, told = jax.vjp(lambda hidden: self._scored(hidden, UNCHANGED), hidden, has_aux=True)
        gradient = jax.lax.fori_loop(0, self.last - 1 - layer, down, of_loss(jnp.ones_like(loss))[0])
        return (loss, told, ratios, of_gate(gradient)[0]), kept

    def of_last_gate(self, gate: Any) -> tuple:
        """The same of a gate at the last layer."""

        def scored(gate: Any) -> tuple[jax.Array, tuple]:
            hidden = self.entering[self.last]
            change = self._change(gate, hidden)
            loss, told = self._scored(hidden, change)
            return loss, (told, self._ratios(change))

        (loss, (told, ratios)), gradient = jax.value_and_grad(scored, has_aux=True)(gate)
        return loss, told, ratios, gradient

    def _gated(self, gate: Any, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
        hidden = jax.lax.dynamic_index_in_dim(self.entering, layer, keepdims=False)
        change = self._change(gate, hidden)
        return self.run_layer(hidden, layer, change=change)[0], self._ratios(change)

    def _attended(self, hidden: jax.Array, layer: jax.Array) -> jax.Array:
        return self.model.language_model.by_rows(self.attend(hidden, layer)[0])

    def _fed(self, hidden: jax.Array, layer: jax.Array) -> jax.Array:
        decoder = self.model.language_model
        return decoder.by_rows(decoder.layer(layer).feed(hidden))

    def _scored(self, hidden: jax.Array, change: LayerChange) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The last layer and the loss."""
        rows = jnp.asarray(self.batch.answer_index)
        hidden, *_ = self.run_layer(hidden, jnp.int32(self.last), change=change, rows=rows)
        return score_answers(self.model, self.batch, hidden)

    def _change(self, gate: Any, hidden: jax.Array) -> LayerChange:
        return UNCHANGED if self.scaling is None else self.scaling.layer((gate, jnp.array(True)), hidden)

    def _ratios(self, change: LayerChange) -> jax.Array:
        rows = self.batch.input_ids.shape[0]
        return jnp.zeros((rows, self.gate.num_groups)) if change.ratios is None else change.ratios
