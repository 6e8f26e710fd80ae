"""Sink-to-the-front (Luo et al., arXiv 2510.08510): the visual tokens that the ViT made sinks go before the others."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import jax
import jax.numpy as jnp

from lsg_jax.config import ModelConfig
from lsg_jax.config.ranges import Range, Table
from lsg_jax.methods.method import Method, check_one_square
from lsg_jax.methods.method_model import MethodModel
from lsg_jax.model.multimodal import ConnectorTokens
from lsg_jax.sinks.criteria import norm
from lsg_jax.types import Batch


@dataclass(frozen=True)
class SinkFrontConfig(Table, name="sink_front"):
    """Sink-to-the-front (arXiv 2510.08510): visual tokens of large ViT norm come first among the visual tokens. Not trained.

    `VLM.v_sinks` still lists the patches in the order of the image.

    Attributes:
        tau: norm of the features before the projector from which a token is moved to the front.
        positions: rotary positions of moved tokens: those of their place in the image, as the authors have it, or of their new
            place.
    """

    tau: Annotated[float, Range("(0, 1e9]")] = 100.0
    positions: Literal["kept", "new"] = "kept"


def sinks_first(features: jax.Array, tau: float) -> jax.Array:
    """The order of the patches of each image: those whose norm reaches `tau`, then the others, each group in its old order.

    Args:
        features: [B, P, Dv], before the projector; concatenated feature layers count as one vector.

    Returns:
        int32 [B, P], patch indices.
    """
    return jnp.argsort(~norm(features, tau), axis=1, stable=True)


def order_in_rows(features: jax.Array, tau: float, each: int) -> jax.Array:
    """`sinks_first` for rows of images of `each` patches: [B, N, Dv] -> int32 [B, N]. Patches stay within their image."""
    count = features.shape[1] // each
    order = sinks_first(features.reshape(-1, each, features.shape[-1]), tau).reshape(-1, count, each)
    return (order + each * jnp.arange(count)[:, None]).reshape(features.shape[:2])


@dataclass(frozen=True)
class SinkFront(Method):
    """ViT sinks before the other visual tokens of their image."""

    settings: SinkFrontConfig = field(default_factory=SinkFrontConfig)

    Settings = SinkFrontConfig

    def for_model(self, config: ModelConfig) -> SinkFront:
        """Refuses a model that cuts images into tiles."""
        check_one_square(config, "sink_front")
        return self

    def connect(
        self, model: MethodModel, features: jax.Array, v_sink: jax.Array, batch: Batch, text: jax.Array
    ) -> ConnectorTokens:
        """The model's own tokens, reordered."""
        order = order_in_rows(features, self.settings.tau, model.config.num_image_tokens)
        moved, v_sink = jnp.take_along_axis(features, order[..., None], axis=1), jnp.take_along_axis(v_sink, order, axis=1)
        keeps = self.settings.positions == "kept"
        return ConnectorTokens(model.projector(moved), v_sink, order=order, keeps_positions=keeps)
