"""Gates of several layers trained in one run, each as if it were the only one.

Below its gate a model with one gate is the plain model. So vision tower, projector and plain decoder run once for all of them,
and each gate adds the layers from its own up, forward and backward:

    plain         0 - 1 - 2 - 3
                  |   |   |   |
    with a gate   0   1   2   3
                  1   2   3
                  2   3
                  3
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lsg_jax.config import GateConfig, ModelConfig
from lsg_jax.model.language_model import DecoderOutput, LanguageModel
from lsg_jax.model.llava import Llava, MergedSequence, assemble, initial_parameters
from lsg_jax.model.loss import answer_loss
from lsg_jax.types import Batch


def independent_gates(config: ModelConfig, gate: GateConfig, frozen: dict, key: jax.Array) -> dict:
    """Stacked gates before the first step: each as a run of its own starts from the same key."""
    alone = initial_parameters(config, _alone(gate, gate.layers[0]), None, frozen, key)
    return jax.tree.map(lambda leaf: jnp.repeat(leaf, len(gate.layers), axis=0), alone)


def losses_and_gradients(
    graphdef: Any, frozen: Any, gates: Any, batch: Batch, *, remat: str
) -> tuple[jax.Array, dict[str, Any], Any]:
    """What n runs of one gate compute for the same batch.

    Args:
        graphdef: graph definition of the model with all n gates.
        gates: leaves [n, ...].

    Returns:
        losses float32 [n]; a dict of `tokens` int32 [], `correct` int32 [n] and `ratios` float32 [n, G]; gradients as `gates`.
    """
    plain = assemble(graphdef, frozen, gates)
    merged = plain.merge(batch)
    hidden, below, found = merged.x, 0, []
    for slot, layer in enumerate(plain.gate_config.layers):  # type: ignore[union-attr]
        hidden, below = _advance(plain.language_model, hidden, merged.valid, below, layer), layer

        def loss_of(gate: Any, layer: int = layer, hidden: jax.Array = hidden) -> tuple[jax.Array, dict[str, Any]]:
            model = assemble(graphdef, frozen, gate)
            model.gate_config = _alone(model.gate_config, layer)  # type: ignore[arg-type]
            return answer_loss(_Suffix(model, merged, hidden, layer), batch, remat=remat)  # type: ignore[arg-type]

        own = jax.tree.map(lambda leaf, slot=slot: leaf[slot : slot + 1], gates)
        done = jax.value_and_grad(loss_of, has_aux=True)(own)
        # the next suffix waits for this one: without that, XLA runs all of them side by side, and memory has to hold them all
        hidden, done = jax.lax.optimization_barrier((hidden, done))
        found.append(done)
    losses, told = jax.tree.map(lambda *parts: jnp.stack(parts), *(result for result, _ in found))
    told |= {"tokens": told["tokens"][0], "ratios": told["ratios"][:, 0]}
    return losses, told, jax.tree.map(lambda *parts: jnp.concatenate(parts), *(gradients for _, gradients in found))


def _alone(gate: GateConfig, layer: int) -> GateConfig:
    return dataclasses.replace(gate, layers=(layer,), independent=False)


def _advance(decoder: LanguageModel, hidden: jax.Array, valid: jax.Array, start: int, stop: int) -> jax.Array:
    """The residual stream [B, T, D] that enters layer `stop`, from the one that enters layer `start`."""
    if start == stop:
        return hidden
    decoder.config = dataclasses.replace(decoder.config, num_layers=stop)  # a decoder that ends there
    return decoder(hidden, valid, start=start).hidden


class _Suffix:
    """A model from the layer of its one gate up, as `answer_loss` uses a model.

    Args:
        hidden: [B, T, D], the residual stream that enters `layer`.
    """

    def __init__(self, model: Llava, merged: MergedSequence, hidden: jax.Array, layer: int):
        self._model, self._merged, self._hidden, self._layer = model, merged, hidden, layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, batch: Batch, **options: Any) -> DecoderOutput:
        change = self._model.intervention(batch, self._merged)
        return self._model.language_model(self._hidden, self._merged.valid, change, start=self._layer, **options)
