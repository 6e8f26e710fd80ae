"""Coefficients of every layer as arrays, for studies by hand: other values run in the program that is already compiled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lsg_jax.config import GateConfig, ModelConfig
from lsg_jax.errors import InputError
from lsg_jax.gating.gate import GateParam, KeyScaling
from lsg_jax.methods.gates import check_gate
from lsg_jax.methods.method import Method
from lsg_jax.methods.method_model import MethodModel
from lsg_jax.types import Batch, Sequence

if TYPE_CHECKING:
    from numpy.typing import NDArray

GROUPS = 2
LARGEST = 1000.0  # coefficient, as of the method `fixed`


class LayerCoefficients(nnx.Module):
    """`by_layer` float32 [L, 2], the factors of the keys of V-sinks and of all other visual tokens."""

    def __init__(self, num_layers: int):
        self.by_layer = GateParam(jnp.ones((num_layers, GROUPS)))


@dataclass(frozen=True)
class Coefficients(Method):
    """As `Fixed`, with a pair of coefficients for each layer; they are parameters of the model, which nothing trains.

    `VLM.with_method(Coefficients(), {"by_layer": values})` takes values float32 [L, 2]. Values of 1 are the base model.
    """

    def for_model(self, config: ModelConfig) -> Coefficients:
        """Refuses a model whose V-sinks are not known."""
        check_gate(self._as_gate(config), config, name="coefficients")
        return self

    def module(self, config: ModelConfig, key: jax.Array) -> LayerCoefficients:
        """All 1, so that nothing is changed."""
        return LayerCoefficients(config.text.num_layers)

    def intervention(self, model: MethodModel, batch: Batch, sequence: Sequence) -> KeyScaling | None:
        """Key scales from the coefficients; None for a batch without images."""
        if sequence.visual is None:
            return None
        return KeyScaling.for_batch(
            batch,
            sequence.visual,
            self._as_gate(model.config),
            model.config.sinks,
            source=model.trained.by_layer[...],
            enabled=jnp.ones(model.config.text.num_layers, bool),
        )

    def _as_gate(self, config: ModelConfig) -> GateConfig:
        return GateConfig(layers=tuple(range(config.text.num_layers)), grouping="v_sink_rest")


def layer_coefficients(given: Any, config: ModelConfig) -> dict[str, NDArray[np.float32]]:
    """The parameters of `Coefficients` from what a request has: L pairs of numbers, of V-sinks and of the rest.

    Args:
        given: None for coefficients of 1.

    Raises:
        InputError: it is something else, or a number is too large.
    """
    shape = (config.text.num_layers, GROUPS)
    if given is None:
        return {"by_layer": np.ones(shape, np.float32)}
    try:
        values = np.array(given, np.float32)
    except (TypeError, ValueError, OverflowError):
        values = np.zeros(0, np.float32)
    if values.shape != shape or not (np.abs(values) <= LARGEST).all():
        raise InputError(f"coefficients: give {shape[0]} pairs of numbers from -{LARGEST:g} to {LARGEST:g}, one for each layer")
    return {"by_layer": values}
