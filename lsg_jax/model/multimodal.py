"""The whole stack: image -> vision tower -> connector -> sequence of text and visual tokens -> language model."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from lsg_jax.config import GateConfig, ModelConfig, SinkConfig
from lsg_jax.model.attention import take_rows
from lsg_jax.model.contrast import Contrasted, contrasted_positions
from lsg_jax.model.language_model import DecoderOutput, LanguageModel
from lsg_jax.model.projector import Projector, any_member
from lsg_jax.model.rotary import token_positions
from lsg_jax.model.vision_layers import Registers
from lsg_jax.model.vision_tower import VisionTower
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
        keeps_positions: whether a moved token keeps the rotary position of where it was. Static.
    """

    x: jax.Array
    v_sink: jax.Array
    kept: jax.Array | None = None
    order: jax.Array | None = None
    keeps_positions: bool = flax.struct.field(pytree_node=False, default=False)


@flax.struct.dataclass
class ImageFeatures:
    """What the vision tower makes of the images of each row, tile by tile or image by image.

    Attributes:
        features: [B, S P, Dv], where they enter the connector; several feature layers are concatenated.
        v_sink: bool [B, S P], the V-sinks among them; False for patches that are not used.
        deepstack: hidden states [B, S P, Dv] of the layers `ModelConfig.deepstack`.
        class_attention: float32 [B, S, P], as Sequence has it.
    """

    features: jax.Array
    v_sink: jax.Array
    deepstack: tuple[jax.Array, ...] = ()
    class_attention: jax.Array | None = None


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
        """`ImageFeatures.features` [B, S P, Dv] and `ImageFeatures.v_sink` bool [B, S P]; see `encode_images`."""
        encoded = self.encode_images(images, sinks=sinks)
        return encoded.features, encoded.v_sink

    def encode_images(self, images: VisualInput, *, sinks: SinkConfig | None = None) -> ImageFeatures:
        """Runs the vision tower, and judges patches where they enter the connector.

        Args:
            sinks: the criterion of V-sinks; None takes the model's own.

        Returns:
            The features. No patch is a V-sink where no V-sink dimensions are known.
        """
        sinks = sinks or self.config.sinks
        batch, tiles = images.patches.shape[:2]
        by_tile = self.by_tile(images)
        layers = (*self.config.feature_layers, *self.config.deepstack)
        receive = sinks.criterion == "attention_share" or self.reads_class_attention
        states, seen = self.vision_tower(by_tile, layers, receive=receive, registers=self.registers)
        if self.config.feature_select == "default":
            states = [state[:, 1:] for state in states]
        count = len(self.config.feature_layers)
        features = jnp.concatenate(states[:count], axis=-1)
        by_row = lambda x: x.reshape(batch, tiles * x.shape[1], *x.shape[2:])
        of_patches = lambda received: None if received is None else received[:, -features.shape[1] :]
        received, of_class = (None, None) if seen is None else (of_patches(seen.mean), of_patches(seen.of_class))
        found = ImageFeatures(
            by_row(features),
            jnp.zeros((batch, tiles * features.shape[1]), bool),
            tuple(by_row(state) for state in states[count:]),
            class_attention=of_class.reshape(batch, tiles, -1) if self.reads_class_attention and of_class is not None else None,
        )
        if not sinks.knows_v_sinks:  # an ungated model must also run where no sink dimensions are known
            return found
        if received is None and sinks.criterion == "attention_share":
            raise ValueError("criterion attention_share needs a vision feature layer above the embeddings")
        used = jnp.ones(features.shape[:2], bool) if by_tile.used is None else by_tile.used
        mask = sink_mask(
            sinks.criterion,
            features,
            dims=sinks.vit_dims,
            tau=sinks.vit_tau,
            massive_ratio=sinks.massive_ratio,
            valid=used,
            received=received,
        )
        return dataclasses.replace(found, v_sink=by_row(mask if by_tile.used is None else mask & used))

    def by_tile(self, images: VisualInput) -> VisualInput:
        """The images as the vision tower takes them: without the axis S, normalised."""
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), images)
        return flat.replace(patches=self._normalised(flat.patches))  # type: ignore[no-any-return]

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
        return ConnectorTokens(self.projector(features), any_member(v_sink, self.config))

    def intervention(self, batch: Batch, sequence: Sequence) -> Intervention | None:
        """What is done in the decoder layers; None for nothing."""
        return None

    def contrast(self, batch: Batch, sequence: Sequence) -> Sequence | None:
        """What the unchanged model reads besides, for logits that are contrasted with its own; None for nothing."""
        return None

    def contrasted(self, logits: jax.Array, others: jax.Array) -> Contrasted:
        """The logits of a token [..., V] from those of `sequence` and of `contrast`."""
        raise TypeError(f"{type(self).__name__} contrasts no logits")

    def logits(self, batch: Batch, *, rows: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """float32 [B, T, V], contrasted where there is a `contrast`, and the hidden states [B, T, D] before the final norm.

        Args:
            rows: int32 [B, A], positions whose logits are wanted, [B, A, V]; None for all.
        """
        sequence = self.sequence(batch)
        hidden = self(batch, sequence=sequence, rows=rows).hidden
        logits = self.language_model.logits(hidden)
        if (other := self.contrast(batch, sequence)) is not None:
            where, places = contrasted_positions(sequence, other, batch.gate_position)
            if rows is None:
                beside = take_rows(self.language_model(other).hidden, places)
            else:
                where, places = take_rows(where, rows), take_rows(places, rows)
                beside = self.language_model(other, rows=places).hidden
            others = self.language_model.logits(beside)
            logits = self.contrasted(logits, others).where(where, logits).logits
        return logits, hidden

    def sequence(self, batch: Batch, encoded: ImageFeatures | None = None) -> Sequence:
        """Text embeddings with the visual tokens gathered into their places (`batch.source`).

        Args:
            encoded: what `encode_images` returned for the same images, to reuse it.
        """
        x, valid = self.language_model.embed(batch.input_ids), jnp.asarray(batch.attention_mask)
        if batch.images is None:
            return Sequence(x=x, valid=valid, positions=_positions(batch, valid))
        encoded = encoded or self.encode_images(batch.images)
        tokens = self.connect(encoded.features, encoded.v_sink, batch, x)
        is_visual = jnp.asarray(batch.source)[..., 0] >= 0
        place = lambda made, text: jnp.where(
            is_visual[..., None], gather(made, batch.source, batch.weight).astype(x.dtype), text
        )
        x = place(tokens.x, x)
        if self.config.image.canvases:
            is_newline = jnp.asarray(batch.source)[..., :1] == NEWLINE
            x = jnp.where(is_newline, self.image_newline[...].astype(x.dtype), x)
        visual = is_visual
        if tokens.kept is not None:
            visual = is_visual & gather_any(tokens.kept, batch.source)
            valid = valid & (visual | ~is_visual)
        positions = _positions(batch, valid)
        if tokens.order is not None and tokens.keeps_positions:
            positions = _moved_along(positions, tokens.order, jnp.asarray(batch.source)[..., 0])
        added = None
        if encoded.deepstack:
            added = jnp.stack([place(made, 0) for made in self.projector.deepstack_tokens(encoded.deepstack)])
        return Sequence(
            x=x,
            valid=valid,
            positions=positions,
            visual=VisualTokens(mask=visual, v_sink=visual & gather_any(tokens.v_sink, batch.source)),
            block=batch.block if self.config.text.images_see_themselves else None,
            added=added,
            gaps=tokens.kept is not None,
            class_attention=encoded.class_attention,
        )

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
        observe_attention: bool | jax.Array = False,
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
    def registers(self) -> Registers | None:
        """Tokens that the vision tower is given besides the patches; None for none."""
        return None

    @property
    def gate(self) -> GateConfig | None:
        """The gates whose ratios are reported, if there are any."""
        return None

    @property
    def reads_class_attention(self) -> bool:
        """Whether `Sequence.class_attention` is wanted."""
        return False

    @property
    def trains_inputs(self) -> bool:
        """Whether something is trained on which the decoder's inputs, or its weights, depend."""
        return False


def _positions(batch: Batch, valid: jax.Array) -> jax.Array:
    return token_positions(valid) if batch.positions is None else jnp.asarray(batch.positions)


def _moved_along(positions: jax.Array, order: jax.Array, source: jax.Array) -> jax.Array:
    """The positions int32 [B, T] where each visual token has that of the place which it was moved from.

    Args:
        order: int32 [B, N], `ConnectorTokens.order`.
        source: int32 [B, T], the connector output that stood at each position, negative for text.
    """
    row = jnp.arange(len(order))[:, None]
    place = jnp.where(source >= 0, source, order.shape[1])  # text is dropped
    before = jnp.zeros(order.shape, positions.dtype).at[row, place].set(positions, mode="drop")
    return jnp.where(source >= 0, before[row, order[row, jnp.maximum(source, 0)]], positions)


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
