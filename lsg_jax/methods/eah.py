"""EAH, enhancing attention heads (Zhang et al., arXiv 2411.09968): in an early layer all heads take one head's attention.

The attention that a visual token receives in a head is the mean over the later queries of the prompt. The head in which most
visual tokens receive more than `threshold` gives its attention weights to all heads, for every query of the prompt; the first
of several. If no visual token receives that much, nothing is changed. Tokens of the answer are not edited.

The layer is the second, as in the paper's first title and the released code's documents (itsqyh/Shallow-Focus-Deep-Fixes),
and 0.0008 the value in its code, which documents also 0.002. As released the code edits every layer, does nothing where the
chosen head is head 0, and divides by a number of later queries that is right for prompts of about 647 tokens only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import flax.struct
import jax
import jax.numpy as jnp

from lsg_jax.config import ModelConfig
from lsg_jax.config.ranges import Range, Table
from lsg_jax.methods.method import Method, check_layer
from lsg_jax.methods.method_model import MethodModel
from lsg_jax.methods.scores import chosen_queries
from lsg_jax.types import Batch, KVCache, LayerChange, Sequence


@dataclass(frozen=True)
class EahConfig(Table, name="eah"):
    """EAH (arXiv 2411.09968): the head that attends to most visual tokens gives its attention to all heads. Not trained.

    No token receives more than 1, so a threshold of 1 is the base model.

    Attributes:
        threshold: mean attention weight above which a visual token counts for a head.
        layer: decoder layer whose heads are edited, 0-based.
    """

    threshold: Annotated[float, Range("[0, 1]")] = 0.0008
    layer: Annotated[int, Range("[0, 1e4]")] = 1


@flax.struct.dataclass
class HeadBroadcast:
    """EAH in one decoder layer, over whole sequences.

    Attributes:
        visual: bool [B, T], visual tokens.
        prompt: bool [B, T], tokens of the prompt.
        config: layer and threshold, static.
        num_layers: of the model, static.
    """

    visual: jax.Array
    prompt: jax.Array
    config: EahConfig = flax.struct.field(pytree_node=False)
    num_layers: int = flax.struct.field(pytree_node=False)

    @property
    def first_layer(self) -> int:
        return self.config.layer

    @property
    def last_layer(self) -> int:
        return self.config.layer

    def per_layer(self, start: int, stop: int) -> jax.Array:
        """bool [stop - start], the layer that is edited."""
        return jnp.arange(self.num_layers)[start:stop] == self.config.layer

    def layer(self, inputs: jax.Array, hidden: jax.Array) -> LayerChange:
        """The edit of one layer; `inputs` is its slice of `per_layer`."""
        prompt = self.prompt & inputs

        def edit(weights: jax.Array, queries: jax.Array | None, received: jax.Array) -> jax.Array:
            behind = prompt.sum(1, keepdims=True) - jnp.cumsum(prompt, axis=1)
            mean = received / jnp.maximum(behind, 1)[:, None]
            count = ((mean > self.config.threshold) & self.visual[:, None]).sum(-1)
            giver = jnp.take_along_axis(weights, count.argmax(-1)[:, None, None, None], axis=1)
            edited = chosen_queries(prompt, queries) & (count.max(-1, keepdims=True) > 0)
            return jnp.where(edited[:, None, :, None], giver, weights)

        return LayerChange(edit=edit, watched=prompt)

    def while_decoding(self, cache: KVCache, slot: jax.Array) -> None:
        """Nothing."""
        return None


@dataclass(frozen=True)
class Eah(Method):
    """EAH: one head's attention for all heads of a layer."""

    settings: EahConfig = field(default_factory=EahConfig)

    Settings = EahConfig

    def for_model(self, config: ModelConfig) -> Eah:
        """Refuses a layer that the model lacks."""
        check_layer(self.settings.layer, config, "eah.layer")
        return self

    def intervention(self, model: MethodModel, batch: Batch, sequence: Sequence) -> HeadBroadcast | None:
        """The edit; None for a batch without images."""
        if sequence.visual is None or self.settings.threshold == 1:
            return None
        places = jnp.arange(sequence.valid.shape[1])
        return HeadBroadcast(
            visual=sequence.visual.mask,
            prompt=sequence.valid & (places <= jnp.asarray(batch.gate_position)[:, None]),
            config=self.settings,
            num_layers=model.config.text.num_layers,
        )
