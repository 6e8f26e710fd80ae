"""The vision transformer: CLIP (class token, norm before the layers) and SigLIP (neither)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from lsg_jax.activations import ACTIVATIONS
from lsg_jax.config import VisionConfig
from lsg_jax.model.attention import attend
from lsg_jax.model.layers import LayerNorm, Linear, layer_at, stack_layers
from lsg_jax.sharding import ROWS, constrain


class VisionAttention(nnx.Module):
    """Full self-attention with biases everywhere."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, dtype: Any):
        width, heads = config.hidden_size, (config.num_heads, config.head_dim)
        self.q_proj = Linear((width,), heads, bias=True, rngs=rngs, dtype=dtype)
        self.k_proj = Linear((width,), heads, bias=True, rngs=rngs, dtype=dtype)
        self.v_proj = Linear((width,), heads, bias=True, rngs=rngs, dtype=dtype)
        self.out_proj = Linear(heads, (width,), bias=True, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array, *, return_weights: bool = False) -> tuple[jax.Array, jax.Array | None]:
        key, value = self.k_proj(x).swapaxes(1, 2), self.v_proj(x).swapaxes(1, 2)
        out, weights = attend(self.q_proj(x), key, value, None, return_weights=return_weights)
        return self.out_proj(out), weights


class VisionLayer(nnx.Module):
    """Pre-norm encoder layer."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, dtype: Any):
        width, inner = config.hidden_size, config.intermediate_size
        self.activation = config.hidden_act
        self.layer_norm1 = LayerNorm(width, eps=config.layer_norm_eps, dtype=dtype)
        self.attention = VisionAttention(config, rngs=rngs, dtype=dtype)
        self.layer_norm2 = LayerNorm(width, eps=config.layer_norm_eps, dtype=dtype)
        self.fc1 = Linear((width,), (inner,), bias=True, rngs=rngs, dtype=dtype)
        self.fc2 = Linear((inner,), (width,), bias=True, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array, *, return_weights: bool = False) -> tuple[jax.Array, jax.Array | None]:
        out, weights = self.attention(self.layer_norm1(x), return_weights=return_weights)
        x = x + out
        return x + self.fc2(ACTIVATIONS[self.activation](self.fc1(self.layer_norm2(x)))), weights


class VisionTower(nnx.Module):
    """Images to hidden states of the layers asked for. Layers above the highest one asked for are not run."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, dtype: Any, mesh: Mesh | None = None):
        self.config = config
        self.mesh = mesh
        width, patch = config.hidden_size, config.patch_size
        self.patch_embedding = Linear(
            (patch, patch, config.num_channels), (width,), bias=not config.has_class_token, rngs=rngs, dtype=dtype
        )
        self.position_embedding = nnx.Param(0.02 * jax.random.normal(rngs.params(), (config.num_positions, width), dtype))
        if config.has_class_token:
            self.class_embedding = nnx.Param(0.02 * jax.random.normal(rngs.params(), (width,), dtype))
            self.pre_norm = LayerNorm(width, eps=config.layer_norm_eps, dtype=dtype)
        self.layers = stack_layers(lambda r: VisionLayer(config, rngs=r, dtype=dtype), rngs.params(), config.num_layers)

    def __call__(
        self, patches: jax.Array, feature_layers: tuple[int, ...], *, return_weights: bool = False
    ) -> tuple[list[jax.Array], jax.Array | None]:
        """Hidden states of the layers asked for.

        Args:
            patches: [B, P, h w C], normalised.
            feature_layers: indices as in HF `hidden_states`: 0 is the input of the first layer, -1 the output of the last.

        Returns:
            A list of [B, positions, D], the class token first where there is one; and with `return_weights` the attention
            weights float32 [B, N, T, S] of the highest layer that was run (None if that is the embedding).
        """
        total = self.config.num_layers + 1
        wanted = [layer % total if -total <= layer < total else _no_layer(layer, total) for layer in feature_layers]
        x = self.embed(self.by_images(patches))
        states = {0: x}
        done, weights = 0, None
        graphdef, stacked = nnx.split(self.layers)
        for stop in sorted(set(wanted) - {0}):
            last = stop - 1 if return_weights and stop == max(wanted) else stop

            def body(x: jax.Array, index: jax.Array) -> tuple[jax.Array, None]:
                return nnx.merge(graphdef, layer_at(stacked, index))(self.by_images(x))[0], None

            x, _ = jax.lax.scan(body, x, jnp.arange(done, last))
            if last < stop:
                x, weights = nnx.merge(graphdef, layer_at(stacked, jnp.array(last)))(x, return_weights=True)
            states[stop], done = x, stop
        return [states[layer] for layer in wanted], weights

    def by_images(self, x: jax.Array) -> jax.Array:
        """Shards images [B, ...] over all devices, so that weights are gathered and no activations are summed."""
        return constrain(x, self.mesh, (*ROWS, "tensor"))

    def embed(self, patches: jax.Array) -> jax.Array:
        """[B, P, h w C] -> [B, positions, D], the input of the first layer."""
        c = self.config
        batch, count, size = patches.shape
        if (count, size) != (c.num_patches, c.patch_size**2 * c.num_channels):
            raise ValueError(f"{count} patches of {size} values: not those of a square of {c.image_size} pixels")
        # a convolution whose stride is its width is one matrix product over patches
        patches = patches.reshape(batch, count, c.patch_size, c.patch_size, c.num_channels)
        x = self.patch_embedding(patches.astype(self.position_embedding[...].dtype))
        if c.has_class_token:
            x = jnp.concatenate([jnp.broadcast_to(self.class_embedding[...], (batch, 1, x.shape[-1])), x], axis=1)
        x = x + self.position_embedding[...]
        return self.pre_norm(x) if c.has_class_token else x


def _no_layer(layer: int, total: int) -> int:
    raise ValueError(f"vision feature layer {layer} does not exist, the tower has hidden states 0 to {total - 1}")
