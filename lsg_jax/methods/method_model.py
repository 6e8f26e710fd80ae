"""The model with a method applied, and functions that split and join its parameters."""

from __future__ import annotations

import functools
from typing import Any, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from lsg_jax.config import GateConfig, ModelConfig, Part
from lsg_jax.methods.method import BASE, Method
from lsg_jax.model.contrast import Contrasted
from lsg_jax.model.multimodal import ConnectorTokens, VisionLanguageModel
from lsg_jax.model.vision_layers import Registers
from lsg_jax.types import Batch, Intervention, Sequence

TRAINED = "trained"
"""Key of the method's parameters in the model's parameter tree; all else in it is frozen, except `Method.parts`."""


class MethodModel(VisionLanguageModel):
    """A vision-language model under a method. The parameters that the method trains beside the model are in `trained`."""

    def __init__(
        self, config: ModelConfig, method: Method, *, rngs: nnx.Rngs, dtype: Any = jnp.float32, mesh: Mesh | None = None
    ):
        super().__init__(config, rngs=rngs, dtype=dtype, mesh=mesh)
        self.method = method
        self.trained: Any
        if (module := method.module(config, rngs.trained())) is not None:
            self.trained = module

    def connect(self, features: jax.Array, v_sink: jax.Array, batch: Batch, text: jax.Array) -> ConnectorTokens:
        """`Method.connect`."""
        return self.method.connect(self, features, v_sink, batch, text)

    def intervention(self, batch: Batch, sequence: Sequence) -> Intervention | None:
        """`Method.intervention`."""
        return self.method.intervention(self, batch, sequence)

    def contrast(self, batch: Batch, sequence: Sequence) -> Sequence | None:
        """`Method.contrast`."""
        return self.method.contrast(self, batch, sequence)

    def contrasted(self, logits: jax.Array, others: jax.Array) -> Contrasted:
        """`Method.contrasted`."""
        return self.method.contrasted(logits, others)

    @property
    def registers(self) -> Registers | None:
        """`Method.registers`."""
        return self.method.registers

    @property
    def gate(self) -> GateConfig | None:
        """`Method.gate`."""
        return self.method.gate

    @property
    def reads_class_attention(self) -> bool:
        """`Method.reads_class_attention`."""
        return self.method.reads_class_attention

    @property
    def trains_inputs(self) -> bool:
        """`Method.trains_inputs`."""
        return self.method.trains_inputs


def abstract_model(
    config: ModelConfig, method: Method = BASE, *, dtype: Any = jnp.float32, mesh: Mesh | None = None
) -> tuple[nnx.GraphDef[MethodModel], dict[str, Any]]:
    """The model's graph definition and its parameters as a nested dict of ShapeDtypeStruct; allocates nothing."""
    graphdef, state = _traced(config, method, jnp.dtype(dtype), mesh)
    return graphdef, nnx.to_pure_dict(state)


@functools.cache  # tracing takes a good part of a second, and a study opens the same model under many methods
def _traced(config: ModelConfig, method: Method, dtype: Any, mesh: Mesh | None) -> tuple[nnx.GraphDef[MethodModel], Any]:
    return nnx.split(nnx.eval_shape(lambda: MethodModel(config, method, rngs=nnx.Rngs(0), dtype=dtype, mesh=mesh)))


def assemble(graphdef: nnx.GraphDef[MethodModel], frozen: dict[str, Any], trained: dict[str, Any] | None = None) -> MethodModel:
    """The model around given parameters; `trained` as in `join_trained`."""
    model: MethodModel = nnx.merge(graphdef, join_trained(frozen, trained))
    return model


def join_trained(frozen: Any, trained: Any) -> dict[str, Any]:
    """The model's tree of parameters, or of what there is for each of them.

    Args:
        trained: parameters of a method, or whole parts of the model (`Method.parts`), which then replace those in `frozen`;
            None for a model that is not trained.
    """
    if trained is None:
        return frozen  # type: ignore[no-any-return]
    return {**frozen, **(trained if trained.keys() <= set(get_args(Part)) else {TRAINED: trained})}
