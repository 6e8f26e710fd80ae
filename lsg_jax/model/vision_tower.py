"""The vision transformer, of squares (CLIP, SigLIP, InternViT) or of images of any size (Qwen-VL)."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from lsg_jax.config import VisionConfig
from lsg_jax.model.layers import LayerNorm, Linear, layer_at, stack_layers
from lsg_jax.model.vision_layers import Received, Registers, Surroundings, VisionLayer, axial_rope
from lsg_jax.sharding import ROWS, constrain
from lsg_jax.types import VisualInput


class VisionTower(nnx.Module):
    """Images to hidden states of the layers asked for. Layers above the highest one asked for are not run."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, dtype: Any, mesh: Mesh | None = None):
        self.config = config
        self.mesh = mesh
        width, table = config.hidden_size, config.num_table_entries
        bias = not config.has_class_token if config.patch_bias is None else config.patch_bias
        self.patch_embedding = Linear(config.patch_shape, (width,), bias=bias, rngs=rngs, dtype=dtype)
        if table:
            self.position_embedding = nnx.Param(0.02 * jax.random.normal(rngs.params(), (table, width), dtype))
        if config.has_class_token:
            self.class_embedding = nnx.Param(0.02 * jax.random.normal(rngs.params(), (width,), dtype))
        if config.has_pre_norm:
            self.pre_norm = LayerNorm(width, eps=config.layer_norm_eps, dtype=dtype)
        self.layers = stack_layers(lambda r: VisionLayer(config, rngs=r, dtype=dtype), rngs.params(), config.num_layers)
        if config.final_norm:
            self.final_norm = LayerNorm(width, eps=config.layer_norm_eps, dtype=dtype)

    def __call__(
        self,
        images: VisualInput,
        feature_layers: tuple[int, ...],
        *,
        receive: bool = False,
        registers: Registers | None = None,
    ) -> tuple[list[jax.Array], Received | None]:
        """Hidden states of the layers asked for.

        Args:
            images: one image each, without the axis S: patches [B, P, values], normalised; a native tower also takes `used`,
                `place` and, with a table, `table` and `table_weight`.
            feature_layers: indices as in HF `hidden_states`: 0 is the input of the first layer, -1 the output of the last,
                after the final norm where there is one.
            registers: tokens that every image is given besides; what is returned leaves them out.

        Returns:
            A list of [B, positions, D], the class token first where there is one; and with `receive` the attention that
            each position receives in the highest layer that was run (None if that is the embedding).
        """
        total = self.config.num_layers + 1
        wanted = [layer % total if -total <= layer < total else _no_layer(layer, total) for layer in feature_layers]
        images = jax.tree.map(self.by_images, images)
        around = self.surroundings(images, registers)
        x = self.embed(images, registers=around.registers)
        states, positions = {0: x}, x.shape[1] - around.registers
        done, received = 0, None
        graphdef, stacked = nnx.split(self.layers)
        for stop in sorted(set(wanted) - {0}):
            last = stop - 1 if receive and stop == max(wanted) else stop
            x = self._run(graphdef, stacked, x, around, range(done, last))
            if last < stop:
                layer = nnx.merge(graphdef, layer_at(stacked, jnp.array(last)))
                x, received = layer(x, around.of_layer(last), windowed=self.config.is_windowed(last), receive=True)
            states[stop], done = x, stop
        if self.config.final_norm and total - 1 in states:
            states[total - 1] = self.final_norm(states[total - 1])
        of_patches = lambda made: jax.tree.map(lambda leaf: leaf[:, :positions], made)
        return [of_patches(states[layer]) for layer in wanted], of_patches(received)

    def watch(self, images: VisualInput, depth: int, see: Callable[[jax.Array, jax.Array], Any]) -> Any:
        """What `see` makes of the first `depth` layers of a tower of squares, stacked over them.

        Args:
            see: called with the activations of the MLP's neurons [B, T, F] and the output of the layer [B, T, D].
        """
        images = jax.tree.map(self.by_images, images)
        around, (graphdef, stacked) = self.surroundings(images), nnx.split(self.layers)

        def body(x: jax.Array, index: jax.Array) -> tuple[jax.Array, Any]:
            layer = nnx.merge(graphdef, layer_at(stacked, index))
            x, _ = layer.attend(self.by_images(x), around)
            neurons = layer.neurons(x)
            x = layer.feed(x, neurons)
            return x, see(neurons, x)

        return jax.lax.scan(body, self.embed(images), jnp.arange(depth))[1]

    def _run(self, graphdef: Any, stacked: Any, x: jax.Array, around: Surroundings, layers: range) -> jax.Array:
        """Runs consecutive layers. Where layers with windows and without take turns, each kind is compiled once."""

        def run(x: jax.Array, start: Any, windowed: bool, count: int) -> jax.Array:
            def body(x: jax.Array, index: jax.Array) -> tuple[jax.Array, None]:
                layer = nnx.merge(graphdef, layer_at(stacked, index))
                return layer(self.by_images(x), around.of_layer(index), windowed=windowed)[0], None

            return jax.lax.scan(body, x, start + jnp.arange(count))[0]

        def turn(x: jax.Array, start: Any) -> tuple[jax.Array, None]:
            for windowed, count in pair:
                x = run(x, start, windowed, count)
                start += count
            return x, None

        runs = [(windowed, len(list(group))) for windowed, group in itertools.groupby(layers, key=self.config.is_windowed)]
        pair, turns = runs[:2], 0
        while len(pair) == 2 and runs[2 * turns : 2 * turns + 2] == pair:
            turns += 1
        period = sum(count for _, count in pair)
        if turns > 1:
            x = jax.lax.scan(turn, x, layers.start + period * jnp.arange(turns))[0]
        else:
            turns = 0
        start = layers.start + turns * period
        for windowed, count in runs[2 * turns :]:
            x = run(x, start, windowed, count)
            start += count
        return x

    def by_images(self, x: jax.Array) -> jax.Array:
        """Shards images [B, ...] over all devices, so that weights are gathered and no activations are summed."""
        return constrain(x, self.mesh, (*ROWS, "tensor"))

    def surroundings(self, images: VisualInput, registers: Registers | None = None) -> Surroundings:
        """Which patches may be attended to, and their rotary angles; of a tower of squares its registers alone."""
        c = self.config
        if not c.native:
            if registers is None:
                return Surroundings()
            moved = np.zeros((c.num_layers, c.intermediate_size), bool)
            moved[tuple(np.array(registers.neurons).T)] = True
            return Surroundings(moved=jnp.asarray(moved), registers=registers.count)
        return Surroundings(jnp.asarray(images.used), axial_rope(jnp.asarray(images.place), c.rotary_theta or 0.0, c.head_dim))

    def embed(self, images: VisualInput, *, registers: int = 0) -> jax.Array:
        """Patches [B, P, values] -> [B, positions + registers, D], the input of the first layer."""
        c, patches = self.config, jnp.asarray(images.patches)
        batch, count, size = patches.shape
        fits = count % (c.window_patches or 1) == 0 if c.native else count == c.num_patches
        if not fits or size != c.patch_values:
            expected = "whole windows of an image" if c.native else f"those of a square of {c.image_size} pixels"
            raise ValueError(f"{count} patches of {size} values: not {expected}")
        # a convolution whose stride is its width is one matrix product over patches
        patches = patches.reshape(batch, count, *c.patch_shape)
        x = self.patch_embedding(patches.astype(self.patch_embedding.kernel[...].dtype))
        if c.has_class_token:
            x = jnp.concatenate([jnp.broadcast_to(self.class_embedding[...], (batch, 1, x.shape[-1])), x], axis=1)
        if c.num_table_entries:
            x = x + (self.interpolated(images).astype(x.dtype) if c.native else self.position_embedding[...])
        if registers:  # they have neither content nor position
            x = jnp.pad(x, ((0, 0), (0, registers), (0, 0)))
        return self.pre_norm(x) if c.has_pre_norm else x

    def interpolated(self, images: VisualInput) -> jax.Array:
        """The positions of patches between entries of the table: float32 [B, P, D]."""
        entries, weight = jnp.asarray(images.table), jnp.asarray(images.table_weight)
        table = self.position_embedding[...]
        return sum(table[entries[..., k]] * weight[..., k, None] for k in range(entries.shape[-1]))  # type: ignore[return-value]


def _no_layer(layer: int, total: int) -> int:
    raise ValueError(f"vision feature layer {layer} does not exist, the tower has hidden states 0 to {total - 1}")
