"""VAR, visual attention redistribution (Kang et al., arXiv 2503.03321): an untrained edit of attention weights.

A query after the image, in a head that looks at the image and not only at its sinks, takes attention from all sinks and gives
it to the other visual tokens. What is a sink is decided at each layer, on the residual stream that enters it, by `dim_rms`.

The published code (seilk/VisAttnSink) does otherwise than the paper says; `var.rules` chooses. The rules of the code, without
its faults (state that goes from one question to the next, NaN where all patches are sinks):

- `p` of 0.6 is what sinks keep, not what they give, and rho is 0.5 on every benchmark;
- tokens of the answer are never sinks;
- the last layer is edited too, and a layer without a visual sink is not;
- prompts have no BOS token.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import flax.struct
import jax
import jax.numpy as jnp

from lsg_jax.config import BenchmarkKind, ModelConfig
from lsg_jax.config.ranges import Range, Table
from lsg_jax.errors import ConfigError
from lsg_jax.methods.method import Method
from lsg_jax.methods.method_model import MethodModel
from lsg_jax.sinks.criteria import dim_rms
from lsg_jax.types import Batch, KVCache, LayerChange, Sequence

Rules = Literal["paper", "released"]

PAPER_RHO: dict[BenchmarkKind, float] = {"general": 0.8, "hallucination": 0.5, "vision_centric": 0.9}
RELEASED_RHO = 0.5
KEPT: dict[Rules, float] = {"paper": 0.4, "released": 0.6}


@dataclass(frozen=True)
class VarConfig(Table, name="var"):
    """VAR (arXiv 2503.03321): in image-centric heads, attention goes from sinks to the other visual tokens. Not trained.

    It edits the queries after the image, in all layers from `first_layer` on; by the paper not in the last.

    Attributes:
        rules: what the paper says, or what its published code does.
        tau: a token is a sink if |h[d]| / rms(h) reaches this for some d of sinks.llm_dims; it cannot exceed sqrt(D).
        rho: an image-centric head has at most this share of its visual attention on sinks; unset: 0.5 by the code; by the paper
            0.8, and in an evaluation 0.5 on hallucination, 0.9 on vision-centric benchmarks.
        min_visual: least share of the attention of an image-centric head that is on visual tokens.
        kept: share of their attention that sinks keep; 1 changes nothing; unset: 0.4 by the paper (its 1 - p), 0.6 by the code
            (its p).
        first_layer: first decoder layer that is edited, 0-based.
    """

    rules: Rules = "paper"
    tau: Annotated[float, Range("(0, 1e6]")] = 20.0
    rho: Annotated[float, Range("[0, 1]")] | None = None
    min_visual: Annotated[float, Range("[0, 1]")] = 0.2
    kept: Annotated[float, Range("[0, 1]")] | None = None
    first_layer: Annotated[int, Range("[0, 1e4]")] = 2

    @classmethod
    def renamed(cls, tree: dict[str, Any]) -> dict[str, Any]:
        """`p` of earlier versions, the share that sinks keep, became `kept`. Raises ConfigError if both are there."""
        if {"p", "kept"} <= tree.keys():
            raise ConfigError("var.p is the earlier name of var.kept: give one of them")
        return {"kept" if name == "p" else name: value for name, value in tree.items()}

    def filled(self, kind: BenchmarkKind = "general") -> VarConfig:
        """With the values of its rules where none are set."""
        rho = PAPER_RHO[kind] if self.rules == "paper" else RELEASED_RHO
        return replace(
            self, rho=rho if self.rho is None else self.rho, kept=KEPT[self.rules] if self.kept is None else self.kept
        )


def redistribute(
    weights: jax.Array, *, sinks: jax.Array, visual: jax.Array, queries: jax.Array, config: VarConfig
) -> jax.Array:
    """Moves attention from sinks to the other visual tokens, in image-centric heads.

    For each query and head: with m the attention on visual tokens and s the part of it on visual sinks, the head is
    image-centric if s <= rho m and m >= min_visual. There the attention on sinks, text sinks included, is multiplied by `kept`,
    and what this frees goes to the visual tokens that are no sinks, in proportion to their attention. A head that gives those
    tokens nothing stays as it is: the proportions are undefined.

    Args:
        weights: float32 [B, N, A, S], rows sum to 1.
        sinks: bool [B, S], keys that are sinks, of the image or of the text.
        visual: bool [B, S], keys that are image patches.
        queries: bool [B, A], queries that are edited.
        config: values that are not set are those of its rules (`VarConfig.filled`).

    Returns:
        float32 [B, N, A, S], rows sum to 1.
    """
    config = config.filled()
    assert config.rho is not None and config.kept is not None
    keys = lambda mask: mask[:, None, None]
    mass = lambda mask: jnp.where(keys(mask), weights, 0.0).sum(-1, keepdims=True)
    on_visual, on_receivers = mass(visual), mass(visual & ~sinks)
    image_centric = (mass(visual & sinks) <= config.rho * on_visual) & (on_visual >= config.min_visual)
    edited = image_centric & (on_receivers >= jnp.finfo(weights.dtype).tiny) & queries[:, None, :, None]
    if config.rules == "released":
        edited &= keys(sinks & visual).any(-1, keepdims=True)
    freed = (1.0 - config.kept) * mass(sinks)
    gained = weights / jnp.where(edited, on_receivers, 1.0) * freed
    moved = jnp.where(keys(sinks), config.kept * weights, jnp.where(keys(visual), weights + gained, weights))
    return jnp.where(edited, moved, weights)


@flax.struct.dataclass
class AttentionRedistribution:
    """VAR in the decoder layers, over a whole sequence, or for one token that attends to a cache.

    Attributes:
        visual: bool [B, S], keys that are image patches.
        queries: bool [B, T], queries that are edited.
        enabled: bool [L], layers that are edited.
        config: thresholds, static.
        dims: the model's sink dimensions (`sinks.llm_dims`), static.
        cached: bool [L, B, S], which keys of a cache are sinks; None where the tokens of the sequence are the keys.
        slot: int32 [], the cache slot of the one token.
        prompt: bool [B, T], tokens that may be sinks; None where all may.
    """

    visual: jax.Array
    queries: jax.Array
    enabled: jax.Array
    config: VarConfig = flax.struct.field(pytree_node=False)
    dims: tuple[int, ...] = flax.struct.field(pytree_node=False)
    cached: Any = None
    slot: Any = None
    prompt: Any = None

    @property
    def first_layer(self) -> int:
        return self.config.first_layer

    last_layer = None

    def per_layer(self, start: int, stop: int) -> Any:
        """Scan inputs of the layers from `start` to `stop`."""
        return jax.tree.map(lambda leaf: leaf[start:stop], (self.enabled, self.cached))

    def layer(self, inputs: Any, hidden: jax.Array) -> LayerChange:
        """The edit of the layer that `hidden` [B, T, D] enters, and its sinks bool [B, T]."""
        enabled, cached = inputs
        sinks = dim_rms(hidden, self.dims, self.config.tau)
        if self.prompt is not None:
            sinks &= self.prompt
        keys = sinks if cached is None else jax.lax.dynamic_update_slice_in_dim(cached, sinks, self.slot, axis=1)

        def edit(weights: jax.Array, queries: jax.Array | None) -> jax.Array:
            among = self.queries if queries is None else jnp.take_along_axis(self.queries, queries, axis=1)
            seen = weights.shape[-1]
            return redistribute(
                weights, sinks=keys[:, :seen], visual=self.visual[:, :seen], queries=among & enabled, config=self.config
            )

        return LayerChange(edit=edit, kept=sinks)

    def while_decoding(self, cache: KVCache, slot: jax.Array) -> AttentionRedistribution:
        """The same for the next token of each row, which goes into `slot` of the cache."""
        room = cache.valid.shape[1] - self.visual.shape[1]
        return self.replace(  # type: ignore[attr-defined, no-any-return]
            visual=jnp.pad(self.visual, ((0, 0), (0, room))),
            queries=self.visual.any(axis=1, keepdims=True),
            cached=cache.kept,
            slot=slot,
            prompt=None if self.config.rules == "paper" else jnp.zeros_like(self.visual[:, :1]),
        )


def attention_redistribution(
    config: VarConfig, *, visual: jax.Array, valid: jax.Array, dims: tuple[int, ...], num_layers: int
) -> AttentionRedistribution:
    """VAR for sequences whose image patches are at `visual` bool [B, T]; `valid` bool [B, T] are the unpadded tokens.

    The queries are the tokens after the last patch, none in a row without an image. Several images of a row count as one set of
    patches, since the paper has no rule for them. By the paper the last layer is left as it is.
    """
    after_image = jnp.cumsum(visual[:, ::-1], axis=1)[:, ::-1] == 0
    layers = jnp.arange(num_layers)
    return AttentionRedistribution(
        visual=visual,
        queries=valid & after_image & visual.any(axis=1, keepdims=True),
        enabled=(layers >= config.first_layer) & (layers < _layers_edited(config, num_layers)),
        config=config,
        dims=dims,
    )


def _layers_edited(config: VarConfig, num_layers: int) -> int:
    """Where the edited layers end."""
    return num_layers - (config.rules == "paper")


@dataclass(frozen=True)
class Var(Method):
    """VAR: attention goes from sinks to other visual tokens."""

    settings: VarConfig = field(default_factory=VarConfig)

    Settings = VarConfig

    def for_model(self, config: ModelConfig) -> Var:
        """Refuses a model without known sink dimensions, and a first layer that is not below the last."""
        edited = _layers_edited(self.settings, config.text.num_layers)
        if not config.sinks.llm_dims:
            raise ConfigError("VAR needs the sink dimensions of the language model, and none are known: set sinks.llm_dims")
        if not 0 <= self.settings.first_layer < edited:
            raise ConfigError(
                f'var.first_layer is {self.settings.first_layer}: with var.rules = "{self.settings.rules}" it must be one of '
                f"the layers 0 to {edited - 1}"
            )
        return self

    @property
    def without_bos(self) -> bool:
        """By the published code."""
        return bool(self.settings.rules == "released")

    def for_benchmark(self, kind: BenchmarkKind) -> Var:
        """With the rho that the paper has for such benchmarks, unless one is set."""
        return Var(self.settings.filled(kind))

    def intervention(self, model: MethodModel, batch: Batch, sequence: Sequence) -> AttentionRedistribution | None:
        """Edited attention; None for a batch without images."""
        if sequence.visual is None or self.settings.filled().kept == 1:
            return None
        dims, num_layers = model.config.sinks.llm_dims, model.config.text.num_layers
        found = attention_redistribution(
            self.settings, visual=sequence.visual.mask, valid=sequence.valid, dims=dims, num_layers=num_layers
        )
        if self.settings.rules == "paper":
            return found
        prompt = jnp.arange(sequence.valid.shape[1]) <= jnp.asarray(batch.gate_position)[:, None]
        return found.replace(prompt=prompt)  # type: ignore[attr-defined, no-any-return]
