"""The connector: patches behind one token are merged, normed where the model says so, and mapped to its width; no residual."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lsg_jax.activations import ACTIVATIONS
from lsg_jax.config import ModelConfig
from lsg_jax.model.layers import LayerNorm, Linear, RMSNorm, stack_layers


class Projector(nnx.Module):
    """[B, N, features] -> [B, N / merge^2, D], one linear map or two."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: Any):
        self.config = config
        width_in, width = config.vision.hidden_size * len(config.feature_layers), config.text.hidden_size
        merged = width_in if config.merge_mean else width_in * config.merge**2
        self.norm = _norm(config, merged if config.projector_norm_merged else width_in, dtype=dtype)
        between = width if config.projector_layers == 1 else config.projector_width or width
        self.linear_1 = Linear((merged,), (between,), bias=config.projector_bias, rngs=rngs, dtype=dtype)
        if config.projector_layers == 2:
            self.linear_2 = Linear((between,), (width,), bias=config.projector_bias, rngs=rngs, dtype=dtype)
        if config.deepstack:
            own = dataclasses.replace(
                config, deepstack=(), feature_layers=config.feature_layers[:1], projector_norm_merged=True
            )
            make = lambda r: Projector(own, rngs=r, dtype=dtype)
            self.deepstack = stack_layers(make, rngs.params(), len(config.deepstack))

    def __call__(self, features: jax.Array) -> jax.Array:
        config = self.config
        if self.norm is not None and not config.projector_norm_merged:
            features = self.norm(features)
        if config.merge > 1:
            members = by_token(features, config)
            features = members.mean(2) if config.merge_mean else members.reshape(*members.shape[:2], -1)
        if self.norm is not None and config.projector_norm_merged:
            features = self.norm(features)
        x = self.linear_1(features)
        return x if config.projector_layers == 1 else self.linear_2(ACTIVATIONS[config.projector_hidden_act](x))

    def deepstack_tokens(self, states: tuple[jax.Array, ...]) -> list[jax.Array]:
        """Hidden states [B, N, Dv] of `config.deepstack` -> tokens [B, N / merge^2, D] of each, by its own projector.

        Their norms are over the merged patches.
        """
        graphdef, stacked = nnx.split(self.deepstack)
        own = [nnx.merge(graphdef, jax.tree.map(lambda leaf, i=i: leaf[i], stacked)) for i in range(len(states))]
        return [projector(state) for projector, state in zip(own, states, strict=True)]


def _norm(config: ModelConfig, width: int, *, dtype: Any) -> LayerNorm | RMSNorm | None:
    eps = config.projector_norm_eps
    if eps is None:
        return None
    if config.projector_norm == "layer":
        return LayerNorm(width, eps=eps, dtype=dtype)
    return RMSNorm(width, eps=eps, dtype=dtype, offset=config.projector_norm == "rms_offset")


def by_token(x: jax.Array, config: ModelConfig) -> jax.Array:
    """Groups patches by the token that they stand behind, row by row within its square.

    Args:
        x: [B, N, ...], by patch: squares row by row, native images in the order of their tokens.

    Returns:
        [B, N / merge^2, merge^2, ...].
    """
    merge, rest = config.merge, x.shape[2:]
    if merge == 1:
        return x[:, :, None]
    if not config.vision.native:
        side = config.vision.image_size // config.vision.patch_size // merge
        x = x.reshape(len(x), -1, side, merge, side, merge, *rest).swapaxes(3, 4)
    return x.reshape(len(x), -1, merge**2, *rest)


def any_member(mask: jax.Array, config: ModelConfig) -> jax.Array:
    """Patches -> tokens behind which any such patch stands: bool [B, N] -> bool [B, N / merge^2]."""
    return mask if config.merge == 1 else by_token(mask, config).any(-1)


def members(patches: int, config: ModelConfig) -> jax.Array:
    """The patches behind each token of a row: int32 [patches / merge^2, merge^2], for `patches` of all its images."""
    return by_token(jnp.arange(patches, dtype=jnp.int32)[None], config)[0]
