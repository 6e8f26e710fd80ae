"""Sink-to-the-front (Luo et al., arXiv 2510.08510): the visual tokens that the ViT made sinks go before the others."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from lsg_jax.config import SinkFrontConfig
from lsg_jax.sinks.criteria import norm


def sinks_to_front(features: jax.Array, v_sink: jax.Array, config: SinkFrontConfig) -> tuple[jax.Array, jax.Array]:
    """Reorders the patches of each image: those whose norm reaches `tau`, then the others, each group in its old order.

    Position follows the order of the sequence, so a moved patch has the position of its new place.

    Args:
        features: [B, P, Dv], before the projector; feature layers that lie side by side count as one vector.
        v_sink: bool [B, P], the model's own V-sinks, which need not be the same.

    Returns:
        Both, reordered.
    """
    order = jnp.argsort(~norm(features, config.tau), axis=1, stable=True)
    return jnp.take_along_axis(features, order[..., None], axis=1), jnp.take_along_axis(v_sink, order, axis=1)


def check_sink_front(config: SinkFrontConfig) -> None:
    """Raises ValueError for a threshold that is no norm."""
    if not (math.isfinite(config.tau) and config.tau > 0):
        raise ValueError(f"sink_front.tau is {config.tau}: it must be a number above 0")
