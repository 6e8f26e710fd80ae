"""Criteria that choose no sinks of a gate, beside those that do: of heads (Gu et al.), of a model, and of LoT.

`analysis.sinks` says what sinks.json holds of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lsg_jax.analysis.sink_warnings import Readings, Seen
from lsg_jax.config import SinkConfig
from lsg_jax.sinks.criteria import (
    PUBLISHED_TAU,
    has_massive_activations,
    low_sink_scores,
    massive,
    sink_heads,
    sink_value,
)
from lsg_jax.types import LayerView

HEAD_TOKENS = ("first", "text", "visual")


def observe_others(
    view: LayerView, prompt: jax.Array, visual: jax.Array, patches: jax.Array, llm: Readings
) -> dict[str, jax.Array]:
    """What criteria need that judge more than visual tokens, in one layer.

    Returns:
        largest, median: float32 [], of |h| of the prompt.
        spikes: int32 [], its tokens with massive activations.
        head_sinks: bool [P], sinks in at least one head.
        sink_heads: float32 [3], shares of the heads in which one of HEAD_TOKENS is a sink.
        dim_rms: float32 [P], NaN if no dimensions are known.
    """
    magnitude = jnp.abs(view.hidden[0].astype(jnp.float32))
    by_head = sink_heads(view.attention, prompt)[0]
    first = jnp.arange(prompt.shape[1]) == jnp.argmax(prompt[0])
    groups = jnp.stack([first, ~visual[0] & ~first, visual[0]])
    nothing = jnp.zeros(prompt.shape)
    known = bool(llm[0].dims)
    value = sink_value("dim_rms", view.hidden, dims=llm[0].dims, received=nothing, among=prompt) if known else nothing * jnp.nan
    return {
        "largest": jnp.where(prompt[0, :, None], magnitude, 0.0).max(),
        "median": jnp.nanmedian(jnp.where(prompt[0, :, None], magnitude, jnp.nan)),
        "spikes": (massive(view.hidden, PUBLISHED_TAU["massive"], SinkConfig.massive_ratio, prompt) & prompt).sum(),
        "head_sinks": by_head.any(0)[patches],
        "sink_heads": (by_head[None] & groups[:, None]).any(-1).mean(-1),
        "dim_rms": value[0, patches],
    }


def massive_activations(seen: Sequence[Seen]) -> dict[str, Any]:
    """`massive_activations` of sinks.json."""
    mean = {name: np.mean([s["llm"][name] for s in seen], axis=0) for name in ("largest", "median", "spikes")}  # [L]
    massive_there = np.asarray(has_massive_activations(mean["largest"], mean["median"]))
    rows = [
        {
            "layer": layer,
            "largest": round(float(largest), 4),
            "median": round(float(median), 6),
            "tokens": round(float(tokens), 4),
        }
        for layer, (largest, median, tokens) in enumerate(zip(*mean.values(), strict=True))
    ]
    return {"layers": np.flatnonzero(massive_there).tolist(), "rows": rows}


def sink_head_rows(seen: Sequence[Seen]) -> list[dict[str, Any]]:
    """`sink_heads` of sinks.json: means over images."""
    shares = np.mean([s["llm"]["sink_heads"] for s in seen], axis=0)  # [L, 3]
    return [
        {"layer": layer, "tokens": name, "share": round(float(share), 6)}
        for layer, of_layer in enumerate(shares)
        for name, share in zip(HEAD_TOKENS, of_layer, strict=True)
    ]


def lot(values: np.ndarray) -> dict[str, Any] | None:
    """`lot` of an image, from `dim_rms` [L, P] of the states that enter the layers; the first of these is no layer's output."""
    if np.isnan(values).any() or len(values) < 2:
        return None
    score, kept = low_sink_scores(jnp.asarray(values[1:]))
    return {"score": [round(float(value), 4) for value in score], "kept": np.flatnonzero(kept).tolist()}
