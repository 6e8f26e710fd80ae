"""DAMRO (Gong et al., arXiv 2410.04514): logits contrasted with those of the patches that the ViT's class token looks at.

With l the logits of the next token and l_few those of the model that sees, of each image, only the `patches` patches of most
class-token attention, which are often outliers of the background:

    l <- (1 + alpha) l - alpha l_few

Tokens less than `cutoff` times as probable under l as the best are not chosen.

As in the released code (coder-gx/DAMRO, its version for transformers): the attention is that of the layer whose output enters
the connector, softmax(q k^T / sqrt(D)) over the whole width D, all heads as one; and the patches follow each other by falling
attention, at the positions behind the text before the image. Of an image that is cut into tiles (LLaVA-NeXT) they are patches
of the whole image, the first tile, and one newline ends them. Several images of a prompt, which that code has no rule for,
have their own patches each.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated

import jax
import jax.numpy as jnp

from lsg_jax.config import ModelConfig
from lsg_jax.config.ranges import Range, Table
from lsg_jax.errors import ConfigError
from lsg_jax.methods.method import Method, check_one_square
from lsg_jax.methods.method_model import MethodModel
from lsg_jax.methods.pai import without_tokens
from lsg_jax.model.contrast import Contrasted, contrast
from lsg_jax.types import NEWLINE, NO_SOURCE, Batch, Sequence


@dataclass(frozen=True)
class DamroConfig(Table, name="damro"):
    """DAMRO (arXiv 2410.04514): logits contrasted with those of the patches of most class-token attention. Not trained.

    Attributes:
        alpha: weight of the contrast; 0 is the base model.
        patches: number of patches of most class-token attention, of each image.
        cutoff: least probability of a token, in units of the most probable one's.
    """

    alpha: Annotated[float, Range("[0, 100]")] = 2.0
    patches: Annotated[int, Range("[1, 1e6]")] = 10
    cutoff: Annotated[float, Range("[0, 1]")] = 0.1


@dataclass(frozen=True)
class Damro(Method):
    """DAMRO: few patches as a contrast."""

    settings: DamroConfig = field(default_factory=DamroConfig)

    Settings = DamroConfig

    def for_model(self, config: ModelConfig) -> Damro:
        """Refuses a model without a class token, or that shows no whole image with a token a patch."""
        if config.image.kind != "anyres" or config.image.max_tiles is not None:
            check_one_square(config, "damro")
        if not config.vision.has_class_token:
            raise ConfigError("damro reads the attention of the vision tower's class token, and this tower has none")
        if config.feature_select != "default":
            raise ConfigError("damro takes a token a patch, but this model sees the class token too")
        if not any(layer % (config.vision.num_layers + 1) for layer in config.feature_layers):
            raise ConfigError("damro reads attention of the vision tower, but this model sees its embeddings alone")
        if self.settings.patches > config.num_image_tokens:
            raise ConfigError(f"damro.patches is {self.settings.patches}: an image has {config.num_image_tokens}")
        return self

    @property
    def contrasts(self) -> bool:
        """Unless alpha is 0."""
        return self.settings.alpha > 0

    @property
    def reads_class_attention(self) -> bool:
        """Where it contrasts."""
        return self.contrasts

    def contrast(self, model: MethodModel, batch: Batch, sequence: Sequence) -> Sequence | None:
        """Each image's first tokens, in the place of which stand those of most attention."""
        if sequence.visual is None or not self.contrasts:
            return None
        ranked = jnp.argsort(-sequence.class_attention, axis=-1, stable=True)
        source, places = jnp.asarray(batch.source)[..., 0], jnp.arange(sequence.valid.shape[1])
        number = source % ranked.shape[-1]  # of a patch in its tile
        shown = jnp.take_along_axis(ranked.reshape(len(ranked), -1), jnp.maximum(source, 0), axis=1)
        whole = of_whole_images(source, ranked.shape[-1])
        take = jnp.where(whole, places - number + shown, places)
        kept = (source == NO_SOURCE) | (whole & (number < self.settings.patches)) | first_newlines(source, whole)
        few = without_tokens(sequence, kept)
        return dataclasses.replace(few, x=jnp.take_along_axis(sequence.x, take[..., None], axis=1))

    def contrasted(self, logits: jax.Array, others: jax.Array) -> Contrasted:
        """(1 + alpha) l - alpha l_few."""
        return contrast(logits, others, weight=self.settings.alpha, cutoff=self.settings.cutoff)


def of_whole_images(source: jax.Array, patches: int) -> jax.Array:
    """bool [B, T], the tokens that show all patches of a tile in a row: the whole image, which comes before its tiles.

    The tiles beside it lie side by side, row by row, with newlines between.

    Args:
        source: int32 [B, T], as `Batch.source` without its axis K.
        patches: of one tile.
    """
    number, places = source % patches, jnp.arange(source.shape[1])
    first, last = places - number, places - number + patches - 1
    at = lambda place: jnp.take_along_axis(source, jnp.clip(place, 0, source.shape[1] - 1), axis=1)
    return (source >= 0) & (at(first) == source - number) & (at(last) == source - number + patches - 1)


def first_newlines(source: jax.Array, whole: jax.Array) -> jax.Array:
    """bool [B, T], of each image the first newline behind the tokens `whole` bool [B, T]; none where there are no newlines."""
    newline = source == NEWLINE
    count = jnp.cumsum(newline, axis=1)
    before = jax.lax.cummax(jnp.where(whole, count, -1), axis=1)  # newlines in front of the image
    return newline & (count == before + 1)
