"""The whole stack: image -> vision tower -> connector -> sequence of text and visual tokens -> language model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from lsg_jax.config import GateConfig, ModelConfig, SinkConfig
from lsg_jax.model.language_model import DecoderOutput, LanguageModel, token_positions
from lsg_jax.model.projector import Projector
from lsg_jax.model.vision_tower import VisionTower
from lsg_jax.sinks.attention import received_attention
from lsg_jax.sinks.criteria import sink_mask
from lsg_jax.types import NEWLINE, Batch, Intervention, LayerView, Sequence, VisualInput, VisualTokens


@flax.struct.dataclass
class ConnectorTokens:
    """Visual tokens of each row, in the order that the language model sees them.

    Attributes:
        x: [B, N, D].
        v_sink: bool [B, N].
        kept: bool [B, N], tokens that stay in the sequence; None for all.
        order: int32 [B, N], the connector output that each token was; None where their order is unchanged.
    """

    x: jax.Array
    v_sink: jax.Array
    kept: jax.Array | None = None
    order: jax.Array | None = None


class VisionLanguageModel(nnx.Module):
    """A vision tower, a connector and a language model.

    It knows no method. What a method does enters through `connect` and `intervention`, which `methods.MethodModel` overrides.

    Args:
        mesh: the devices over which activations are sharded; None for one device.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32, mesh: Mesh | None = None):
        self.config = config
        self.mesh = mesh
        self.vision_tower = VisionTower(config.vision, rngs=rngs, dtype=dtype, mesh=mesh)
        self.projector = Projector(config, rngs=rngs, dtype=dtype)
        if config.image.canvases:
            self.image_newline = nnx.Param(0.02 * jax.random.normal(rngs.params(), (config.text.hidden_size,), dtype))
        self.language_model = LanguageModel(config.text, rngs=rngs, dtype=dtype, mesh=mesh)

    def image_features(self, images: VisualInput, *, sinks: SinkConfig | None = None) -> tuple[jax.Array, jax.Array]:
        """Features where they enter the connector, and the V-sinks among them.

        Args:
            sinks: the criterion of V-sinks; None takes the model's own.

        Returns:
            features [B, S P, Dv] (several feature layers are concatenated), V-sink mask bool [B, S P]. It is False
            everywhere where no V-sink dimensions are known.
        """
        sinks = sinks or self.config.sinks
        batch, tiles = images.patches.shape[:2]
        patches = self._normalised(images.patches.reshape(batch * tiles, *images.patches.shape[2:]))
        states, weights = self.vision_tower(patches, self.config.feature_layers, return_weights=sinks.criterion == "attention")
        if self.config.feature_select == "default":
            states = [state[:, 1:] for state in states]
        features = jnp.concatenate(states, axis=-1)
        by_row = lambda x: x.reshape(batch, tiles * x.shape[1], *x.shape[2:])
        if not sinks.knows_v_sinks:  # an ungated model must also run where no sink dimensions are known
            return by_row(features), jnp.zeros((batch, tiles * features.shape[1]), bool)
        received = None
        if weights is not None:
            received = received_attention(weights, jnp.ones(weights.shape[::2], bool))[:, -features.shape[1] :]
        elif sinks.criterion == "attention":
            raise ValueError("criterion attention needs a vision feature layer above the embeddings")
        mask = sink_mask(
            sinks.criterion,
            features,
            dims=sinks.vit_dims,
            tau=sinks.vit_tau,
            massive_ratio=sinks.massive_ratio,
            valid=jnp.ones(features.shape[:2], bool),
            received=received,
        )
        return by_row(features), by_row(mask)

    def _normalised(self, patches: jax.Array) -> jax.Array:
        """uint8 patches [..., h w C] -> float32, normalised by the processor's mean and std; float32 ones as they are."""
        if patches.dtype != jnp.uint8:
            return patches
        image = self.config.image
        of_pixels = lambda by_channel: jnp.tile(jnp.array(by_channel), patches.shape[-1] // len(by_channel))
        return (patches.astype(jnp.float32) / 255.0 - of_pixels(image.mean)) / of_pixels(image.std)

    def connect(self, features: jax.Array, v_sink: jax.Array, batch: Batch, text: jax.Array) -> ConnectorTokens:
        """Visual tokens from features.

        Args:
            features: [B, N, Dv].
            v_sink: bool [B, N].
            text: [B, T, D], embeddings of `batch.input_ids`.
        """
        return ConnectorTokens(self.projector(features), v_sink)

    def intervention(self, batch: Batch, sequence: Sequence) -> Intervention | None:
        """What is done in the decoder layers; None for nothing."""
        return None

    def sequence(self, batch: Batch) -> Sequence:
        """Text embeddings with the visual tokens gathered into their places (`batch.source`)."""
        x, valid = self.language_model.embed(batch.input_ids), jnp.asarray(batch.attention_mask)
        if batch.images is None:
            return Sequence(x=x, valid=valid, positions=token_positions(valid))
        tokens = self.connect(*self.image_features(batch.images), batch, x)
        is_visual = jnp.asarray(batch.source)[..., 0] >= 0
        x = jnp.where(is_visual[..., None], gather(tokens.x, batch.source, batch.weight).astype(x.dtype), x)
        if self.config.image.canvases:
            is_newline = jnp.asarray(batch.source)[..., :1] == NEWLINE
            x = jnp.where(is_newline, self.image_newline[...].astype(x.dtype), x)
        visual = is_visual
        if tokens.kept is not None:
            visual = is_visual & gather_any(tokens.kept, batch.source)
            valid = valid & (visual | ~is_visual)
        visual_tokens = VisualTokens(mask=visual, v_sink=visual & gather_any(tokens.v_sink, batch.source))
        return Sequence(x=x, valid=valid, positions=token_positions(valid), visual=visual_tokens)

    def __call__(
        self,
        batch: Batch,
        *,
        sequence: Sequence | None = None,
        rows: jax.Array | None = None,
        keep_kv: bool = False,
        room: int = 0,
        remat: str = "none",
        observe: Callable[[LayerView], Any] | None = None,
        observe_attention: bool = False,
    ) -> DecoderOutput:
        """Runs a batch through the stack; keywords as LanguageModel takes them.

        Args:
            sequence: what `sequence` returned for the same batch, to reuse it.
        """
        sequence = sequence or self.sequence(batch)
        return self.language_model(
            sequence,
            self.intervention(batch, sequence),
            differentiate=self.trains_inputs,
            rows=rows,
            keep_kv=keep_kv,
            room=room,
            remat=remat,
            observe=observe,
            observe_attention=observe_attention,
        )

    @property
    def gate(self) -> GateConfig | None:
        """The gates whose ratios are reported, if there are any."""
        return None

    @property
    def trains_inputs(self) -> bool:
        """Whether something is trained on which the decoder's inputs, or its weights, depend."""
        return False


def gather(tokens: jax.Array, source: Any, weight: Any) -> jax.Array:
    """Weighted sums of connector tokens, one for each position of the sequence.

    Args:
        tokens: [B, N, D].
        source: int32 [B, T, K], indices into the N tokens; a negative one counts as token 0, for positions of text.
        weight: float32 [B, T, K]; None for weights of 1.

    Returns:
        [B, T, D].
    """
    source = jnp.maximum(jnp.asarray(source), 0)
    parts = [jnp.take_along_axis(tokens, source[..., k, None], axis=1) for k in range(source.shape[-1])]
    if weight is not None:
        parts = [part * weight[..., k, None] for k, part in enumerate(parts)]
    return functools.reduce(jnp.add, parts)


def gather_any(mask: jax.Array, source: Any) -> jax.Array:
    """bool [B, T], True where the mask bool [B, N] holds for any source of the position; False for text."""
    source = jnp.asarray(source)
    found: list[jax.Array] = [
        (i >= 0) & jnp.take_along_axis(mask, jnp.maximum(i, 0), axis=1) for i in jnp.moveaxis(source, -1, 0)
    ]
    return functools.reduce(jnp.logical_or, found)
