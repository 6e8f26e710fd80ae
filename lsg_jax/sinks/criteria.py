"""Sink criteria: one pure function for each criterion of the literature, and the grouping of visual tokens.

Every criterion takes features [..., D] and returns bool [...], True where the token is a sink. Sources: `dim_abs` arXiv
2604.03316; `dim_rms` Kang et al., arXiv 2503.03321; `norm` Luo et al., arXiv 2510.08510; `massive` Sun et al., arXiv
2402.17762; `attention_share` after Gu et al., arXiv 2410.10781, whose own criterion is `sink_heads`.

Others judge heads, whole models or images, and choose no sinks of a gate; `lsg sinks` reports them beside the criteria:
`has_massive_activations` Owen et al., arXiv 2503.22329; `low_sink_scores` LoT (aimagelab/LoT), arXiv 2604.01280. Of SToP, arXiv
2604.20937, there is the score alone (`persistence_adjusted`): it needs the frames of a video.
"""

from __future__ import annotations

import typing
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from lsg_jax.config import Criterion, SinkConfig
from lsg_jax.types import SinkMasks, VisualTokens

PUBLISHED_TAU = {"dim_rms": 20.0, "norm": 100.0, "massive": 100.0, "attention_share": 0.3}
"""Thresholds of the sources above; arXiv 2604.03316 states none for `dim_abs`. That of `norm` applies to ViT features."""


PROMINENT = 20.0
"""A sink dimension stands out if in some token it reaches this multiple of the token's median |h|.

A dimension that is like the others reaches about 7 in 10^5 tokens (normally distributed), a massive activation hundreds.
"""


@dataclass(frozen=True)
class Reading:
    """One criterion with its settings, for a comparison of several.

    Attributes:
        tau, massive_ratio: as in SinkConfig; only `massive` uses `massive_ratio`.
        in_force: whether SinkConfig chooses this criterion.
        unknown: why it cannot be applied; None if it can.
    """

    criterion: Criterion
    tau: float
    massive_ratio: float
    dims: tuple[int, ...]
    in_force: bool
    unknown: str | None = None

    def mask(self, features: jax.Array, valid: jax.Array, received: jax.Array | None) -> jax.Array:
        """`sink_mask` of this criterion, bool [B, T]; all False if it cannot be applied."""
        if self.unknown:
            return jnp.zeros(features.shape[:2], bool)
        return sink_mask(
            self.criterion,
            features,
            dims=self.dims,
            tau=self.tau,
            massive_ratio=self.massive_ratio,
            valid=valid,
            received=received,
        )


def side_by_side(sinks: SinkConfig, stage: typing.Literal["vit", "llm"]) -> tuple[Reading, ...]:
    """Every criterion: the one in force with the settings of `sinks`, the others with their published thresholds."""
    if stage == "vit":
        chosen, tau, dims, default = sinks.criterion, sinks.vit_tau, sinks.vit_dims, SinkConfig.vit_tau
    else:
        chosen, tau, dims, default = sinks.llm_criterion, sinks.llm_tau, sinks.llm_dims, SinkConfig.llm_tau
    return tuple(
        Reading(
            criterion=name,
            tau=tau if name == chosen else PUBLISHED_TAU.get(name, default),
            massive_ratio=sinks.massive_ratio if name == chosen else SinkConfig.massive_ratio,
            dims=dims,
            in_force=name == chosen,
            unknown=f"no sink dimensions are known: set sinks.{stage}_dims"
            if name in ("dim_abs", "dim_rms") and not dims
            else None,
        )
        for name in typing.get_args(Criterion)
    )


def dim_abs(features: jax.Array, dims: tuple[int, ...], tau: float) -> jax.Array:
    """Max over `dims` of |features[d]| >= tau. features [..., D] -> bool [...]."""
    return jnp.abs(_take(features, dims)).max(-1) >= tau


def dim_rms(features: jax.Array, dims: tuple[int, ...], tau: float) -> jax.Array:
    """Max over `dims` of |features[d]| / rms(features) >= tau (20 in VAR). The ratio cannot exceed sqrt(D)."""
    rms = jnp.sqrt(jnp.mean(jnp.square(features.astype(jnp.float32)), -1))
    # a product instead of a quotient: a token of zeros would give 0 / 0
    peak = jnp.abs(_take(features, dims)).max(-1)
    return (peak >= tau * rms) & (rms > 0)


def norm(features: jax.Array, tau: float) -> jax.Array:
    """Euclidean norm >= tau (100 for the ViT features of CLIP in Luo et al.). features [..., D] -> bool [...]."""
    return jnp.greater_equal(jnp.linalg.norm(features.astype(jnp.float32), axis=-1), tau)


def massive(features: jax.Array, tau: float, ratio: float, valid: jax.Array | None = None) -> jax.Array:
    """Max |h| >= tau and >= ratio * the median |h| of the layer (100 and 1000 in Sun et al.).

    Args:
        features: [B, T, D].
        valid: bool [B, T], tokens of the median, which is over all tokens and dimensions of a row; None for all.

    Returns:
        bool [B, T].
    """
    magnitude = jnp.abs(features.astype(jnp.float32))
    counted = magnitude if valid is None else jnp.where(valid[..., None], magnitude, jnp.nan)
    median = jnp.nanmedian(counted, axis=(-2, -1))[:, None]
    peak = magnitude.max(-1)
    return (peak >= tau) & (peak >= ratio * median)


def prominence(features: jax.Array, dims: tuple[int, ...]) -> jax.Array:
    """|h[d]| of each of `dims` as a multiple of the token's median |h|. features [..., D] -> float32 [..., len(dims)].

    Other dimensions of the same token are the measure, since norms grow from layer to layer. 0 for a token of zeros.
    """
    magnitude = jnp.abs(features.astype(jnp.float32))
    typical = jnp.median(magnitude, axis=-1, keepdims=True)
    return magnitude[..., jnp.array(dims, int)] / jnp.maximum(typical, 1e-30)  # no 0 / 0


def attention_share(received: jax.Array, among: jax.Array, tau: float) -> jax.Array:
    """A token's share of the attention that the tokens `among` receive, mean over heads, >= tau.

    Another quantity than that of Gu et al. (`sink_heads`), whose threshold of 0.3 it borrows.

    Args:
        received: float32 [B, T], attention that each token receives, averaged over heads and queries.
        among: bool [B, T], for example the visual tokens.

    Returns:
        bool [B, T], False outside `among`, and in a row where those tokens receive nothing.
    """
    received = jnp.where(among, received, 0.0)
    total = received.sum(-1, keepdims=True)
    return (received >= tau * total) & among & (total > 0)


def sink_heads(weights: jax.Array, valid: jax.Array, tau: float = 0.3) -> jax.Array:
    """The heads in which each token is a sink by Gu et al.: bool [B, N, T]. A token of which one is true is a sink.

    Token k is a sink of a head if the mean of A[i, k] over the queries i >= k, its own among them, is > tau. It competes with
    all tokens, text included. Attention of earlier queries, where images see themselves in both directions, does not count.

    Args:
        weights: float32 [B, N, T, T], attention weights.
        valid: bool [B, T]; the others are neither queries nor sinks.
    """
    queries = jnp.cumsum(valid[:, ::-1], axis=1)[:, ::-1]  # of each token, those that see it
    counted = jnp.tril(valid[:, None, :, None] & jnp.ones(weights.shape[-2:], bool))
    received = jnp.where(counted, weights, 0.0).sum(-2) / jnp.maximum(queries, 1)[:, None]
    return (received > tau) & valid[:, None]


def has_massive_activations(largest: jax.Array, median: jax.Array, tau: float = 100.0, ratio: float = 1000.0) -> jax.Array:
    """Whether the largest |h| of a layer is >= tau and >= ratio times the median |h|: [...], [...] -> bool [...]."""
    return (largest >= tau) & (largest >= ratio * median)


def low_sink_scores(values: jax.Array, percentile: float = 25.0) -> tuple[jax.Array, jax.Array]:
    """The tokens that LoT keeps, since they are least like sinks. Their score is the mean over layers.

    The authors keep those below the percentile; a token at it is kept here as well, so that one is kept where all are equal.

    Args:
        values: float32 [L, P], `sink_value` of `dim_rms` at the visual tokens, of outputs of decoder layers.

    Returns:
        The scores float32 [P], and the tokens kept bool [P].
    """
    score = values.mean(0)
    return score, score <= jnp.percentile(score, percentile)


def persistence_adjusted(attention: jax.Array, mu: float, power: float = 1.1) -> jax.Array:
    """SToP's score of visual tokens: attention less what the same place draws in all frames. A - mu minmax(mean(A) ** power).

    Args:
        attention: float32 [F, P], attention that the patches of each of F frames receive in the vision tower.

    Returns:
        float32 [F, P]; where all places draw the same, the attention itself.
    """
    persistent = attention.mean(0) ** power
    low, high = persistent.min(), persistent.max()
    return attention - mu * (persistent - low) / jnp.maximum(high - low, 1e-30)  # no 0 / 0


def sink_mask(
    criterion: Criterion,
    features: jax.Array,
    *,
    dims: tuple[int, ...],
    tau: float,
    massive_ratio: float,
    valid: jax.Array,
    received: jax.Array | None = None,
) -> jax.Array:
    """Tokens that are sinks by the criterion of this name.

    Args:
        features: [B, T, D].
        dims: sink dimensions, for `dim_abs` and `dim_rms`.
        valid: bool [B, T].
        received: float32 [B, T], attention that each token receives, for `attention_share`.

    Returns:
        bool [B, T], False outside `valid`.

    Raises:
        ValueError: an unknown criterion, or it lacks `dims` or `received`.
    """
    if criterion == "dim_abs":
        mask = dim_abs(features, dims, tau)
    elif criterion == "dim_rms":
        mask = dim_rms(features, dims, tau)
    elif criterion == "norm":
        mask = norm(features, tau)
    elif criterion == "massive":
        mask = massive(features, tau, massive_ratio, valid)
    elif criterion == "attention_share":
        if received is None:
            raise ValueError("criterion attention_share needs the attention that each token receives")
        mask = attention_share(received, valid, tau)
    else:
        raise ValueError(f"unknown sink criterion {criterion}")
    return mask & valid


def sink_value(
    criterion: Criterion, features: jax.Array, *, dims: tuple[int, ...], received: jax.Array, among: jax.Array
) -> jax.Array:
    """What a criterion compares with its threshold tau: float32 [B, T]. `massive` asks for a multiple of the median besides.

    Args:
        features: [B, T, D].
        received: float32 [B, T], as `attention_share` takes it, which alone uses it.
        among: bool [B, T], likewise.
    """
    magnitude = jnp.abs(features.astype(jnp.float32))
    if criterion in ("dim_abs", "dim_rms"):
        peak: jax.Array = jnp.abs(_take(features, dims)).max(-1)
        rms = jnp.sqrt(jnp.mean(jnp.square(magnitude), -1))
        return peak if criterion == "dim_abs" else peak / jnp.maximum(rms, 1e-30)  # no 0 / 0
    if criterion == "norm":
        length: jax.Array = jnp.linalg.norm(magnitude, axis=-1)
        return length
    if criterion == "massive":
        return magnitude.max(-1)
    received = jnp.where(among, received, 0.0)
    return received / jnp.maximum(received.sum(-1, keepdims=True), 1e-30)


def group_visual_tokens(visual: VisualTokens, l_sink: jax.Array) -> SinkMasks:
    """Splits the visual tokens into three disjoint groups. A V-sink that reaches the L-sink threshold stays a V-sink.

    Args:
        l_sink: bool [B, T], tokens that reach the L-sink threshold at this layer.
    """
    l_sink = l_sink & visual.mask & ~visual.v_sink
    return SinkMasks(v_sink=visual.v_sink, l_sink=l_sink, ordinary=visual.mask & ~visual.v_sink & ~l_sink)


def _take(features: jax.Array, dims: tuple[int, ...]) -> jax.Array:
    """features[..., dims] as float32. An index out of bounds is an error, where jax would clamp it."""
    if not dims:
        raise ValueError(
            "no sink dimensions are known for this model: set sinks.vit_dims / sinks.llm_dims, or use criterion norm"
        )
    if bad := [d for d in dims if not 0 <= d < features.shape[-1]]:
        raise ValueError(f"sink dimension {bad[0]} is outside the model width {features.shape[-1]}")
    return features[..., jnp.asarray(dims)].astype(jnp.float32)
