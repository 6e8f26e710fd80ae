"""PAI, Paying More Attention to Image (Liu et al., arXiv 2407.21771): visual scores are raised, and text alone is contrasted.

With S the attention scores of a query on visual tokens, before the softmax, and l the logits of the next token:

    S <- S + alpha |S|
    l <- gamma l - (gamma - 1) l_text

l_text are the logits of the unchanged model without the visual tokens. Tokens less than `cutoff` times as probable under l as
the best are not chosen.

From the released code (LALBJ/PAI) we take that queries are edited from the last token of the prompt on, the layers, and the
cut-off. It differs in three ways. It subtracts log softmax instead of logits, which adds a constant. With both parts in use it
leaves the prompt's last token unedited, so that alpha acts from the second token of the answer on; ours acts from the first, as
in the paper. And it also takes tokens around the image (`<Img>`) from the text, where its models have some; ours takes visual
tokens and newlines, and leaves such text.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated

import jax
import jax.numpy as jnp

from lsg_jax.config import ModelConfig
from lsg_jax.config.ranges import Range, Table
from lsg_jax.methods.method import Method, layer_range
from lsg_jax.methods.method_model import MethodModel
from lsg_jax.methods.scores import ScoreEdit
from lsg_jax.model.contrast import Contrasted, contrast
from lsg_jax.model.rotary import token_positions
from lsg_jax.types import NO_SOURCE, Batch, Sequence


@dataclass(frozen=True)
class PaiConfig(Table, name="pai"):
    """PAI (arXiv 2407.21771): more attention on visual tokens, and logits contrasted with those of the text alone.

    With `alpha = 0` and `gamma = 1` it is the base model. Not trained.

    Attributes:
        alpha: how much attention on visual tokens grows; 0 edits none.
        gamma: weight of the contrast with the text alone; 1 contrasts nothing.
        cutoff: least probability of a token, in units of the most probable one's.
        first_layer: first decoder layer that is edited, 0-based.
        last_layer: last decoder layer that is edited; unset: the model's last.
    """

    alpha: Annotated[float, Range("[0, 100]")] = 0.2
    gamma: Annotated[float, Range("[1, 100]")] = 1.1
    cutoff: Annotated[float, Range("[0, 1]")] = 0.1
    first_layer: Annotated[int, Range("[0, 1e4]")] = 2
    last_layer: Annotated[int, Range("[0, 1e4]")] | None = None


@dataclass(frozen=True)
class Pai(Method):
    """PAI: raised visual scores, and the text alone as a contrast."""

    settings: PaiConfig = field(default_factory=PaiConfig)

    Settings = PaiConfig

    def for_model(self, config: ModelConfig) -> Pai:
        """Refuses layers that the model lacks."""
        self._layers(config)
        return self

    def intervention(self, model: MethodModel, batch: Batch, sequence: Sequence) -> ScoreEdit | None:
        """Raised scores; None for a batch without images."""
        if sequence.visual is None or not self.settings.alpha:
            return None
        places = jnp.arange(sequence.valid.shape[1])
        return ScoreEdit(
            change=jnp.where(sequence.visual.mask, self.settings.alpha, 0.0),
            queries=sequence.valid & (places >= jnp.asarray(batch.gate_position)[:, None]),
            layers=self._layers(model.config),
            num_layers=model.config.text.num_layers,
            absolute=True,
        )

    @property
    def contrasts(self) -> bool:
        """Unless gamma is 1."""
        return self.settings.gamma != 1

    def contrast(self, model: MethodModel, batch: Batch, sequence: Sequence) -> Sequence | None:
        """The text alone."""
        if sequence.visual is None or not self.contrasts:
            return None
        is_text = jnp.asarray(batch.source)[..., 0] == NO_SOURCE
        return dataclasses.replace(without_tokens(sequence, is_text), block=None, added=None)

    def contrasted(self, logits: jax.Array, others: jax.Array) -> Contrasted:
        """gamma l - (gamma - 1) l_text."""
        return contrast(logits, others, weight=self.settings.gamma - 1, cutoff=self.settings.cutoff)

    def _layers(self, config: ModelConfig) -> tuple[int, int]:
        return layer_range(self.settings.first_layer, self.settings.last_layer, config, "pai")


def without_tokens(sequence: Sequence, kept: jax.Array) -> Sequence:
    """The sequence without the tokens outside `kept` bool [B, T], for an unchanged model; positions count those that stay."""
    valid = sequence.valid & kept
    positions = token_positions(valid)
    if sequence.positions.ndim == 3:  # text has the same position as frame, row and column
        positions = jnp.broadcast_to(positions[..., None], sequence.positions.shape)
    return dataclasses.replace(sequence, valid=valid, positions=positions, visual=None, gaps=True)
