"""The two-layer MLP that maps image features into the language model's width, after a norm in ViP-LLaVA; no residual."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from lsg_jax.activations import ACTIVATIONS
from lsg_jax.config import ModelConfig
from lsg_jax.model.layers import LayerNorm, Linear


class Projector(nnx.Module):
    """[B, P, features] -> [B, P, D]."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: Any):
        width_in = config.vision.hidden_size * len(config.feature_layers)
        width = config.text.hidden_size
        eps = config.projector_norm_eps
        self.norm = None if eps is None else LayerNorm(width_in, eps=eps, dtype=dtype)
        self.activation = config.projector_hidden_act
        self.linear_1 = Linear((width_in,), (width,), bias=config.projector_bias, rngs=rngs, dtype=dtype)
        self.linear_2 = Linear((width,), (width,), bias=config.projector_bias, rngs=rngs, dtype=dtype)

    def __call__(self, features: jax.Array) -> jax.Array:
        if self.norm is not None:
            features = self.norm(features)
        return self.linear_2(ACTIVATIONS[self.activation](self.linear_1(features)))
