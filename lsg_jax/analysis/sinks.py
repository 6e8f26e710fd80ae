"""Where the sinks of given images are: V-sinks before the projector, L-sinks as they enter each decoder layer."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lsg_jax.config import to_dict
from lsg_jax.model.llava import Llava, assemble
from lsg_jax.sinks.attention import received_attention
from lsg_jax.sinks.criteria import group_visual_tokens, sink_mask
from lsg_jax.types import Batch, LayerView
from lsg_jax.vlm import VLM

IMPLAUSIBLE_SHARE = 0.25
"""Above this share of an image's patches a criterion says little: sinks are few by nature (paper.md, known failures)."""


def find_sinks(vlm: VLM, pixels: list[np.ndarray], prompt: str) -> list[dict[str, Any]]:
    """V- and L-sinks of each image under one prompt.

    Args:
        pixels: uint8 [H, W, 3] each, as the processor prepares them.

    Returns:
        For each image a dict: `grid` patches a side; `v_sinks` patch indices (row-major) or None where the model has no
        criterion; `norms` of the features before the projector, one a patch; `l_sinks` for each layer the patch indices, or
        None; `ordinary` count at each layer; `warnings`.
    """
    encoded = vlm.processor.encode_question(prompt, has_image=True)
    sinks = vlm.config.sinks
    knows_v = bool(sinks.vit_dims) or sinks.criterion not in ("dim_abs", "dim_rms")
    knows_l = bool(sinks.llm_dims) or sinks.llm_criterion not in ("dim_abs", "dim_rms")
    found = []
    for image in pixels:
        batch = vlm.pad_questions([encoded], [image])
        norms, v_sink, l_sink = jax.tree.map(np.asarray, _find(vlm.params, batch, vlm.graphdef, knows_l))
        entry: dict[str, Any] = {
            "grid": math.isqrt(len(norms)),
            "criteria": to_dict(sinks),
            "norms": [round(float(n), 4) for n in norms],
            "v_sinks": np.flatnonzero(v_sink).tolist() if knows_v else None,
            "l_sinks": [np.flatnonzero(layer).tolist() for layer in l_sink] if knows_l else None,
        }
        entry["warnings"] = _warnings(entry, len(norms))
        found.append(entry)
    return found


def _warnings(entry: dict[str, Any], patches: int) -> list[str]:
    warnings = []
    if entry["v_sinks"] is None:
        warnings.append("no V-sink dimensions are known for this model: set sinks.vit_dims, or use criterion norm")
    elif len(entry["v_sinks"]) > IMPLAUSIBLE_SHARE * patches:
        warnings.append(
            f"{len(entry['v_sinks'])} of {patches} patches are flagged as V-sinks: the threshold is implausibly low"
        )
    if entry["l_sinks"] is None:
        warnings.append("no L-sink dimensions are known for this model: set sinks.llm_dims, or another llm_criterion")
    elif many := [layer for layer, where in enumerate(entry["l_sinks"]) if len(where) > IMPLAUSIBLE_SHARE * patches]:
        warnings.append(f"more than {IMPLAUSIBLE_SHARE:.0%} of the patches are flagged as L-sinks in layers {many}")
    return warnings


@functools.partial(jax.jit, static_argnums=(2, 3))
def _find(params: dict, batch: Batch, graphdef: Any, knows_l: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Feature norms float32 [P], V-sinks bool [P], L-sinks bool [L, P] of a batch of one image."""
    model: Llava = assemble(graphdef, params)
    features, v_sink = model.image_features(jnp.asarray(batch.pixels))
    norms = jnp.linalg.norm(features.astype(jnp.float32), axis=-1)[0]
    if not knows_l:
        return norms, v_sink[0], jnp.zeros((model.config.text.num_layers, len(norms)), bool)
    merged = model.merge(batch)
    visual, sinks = merged.visual, model.config.sinks
    assert visual is not None
    valid = jnp.asarray(batch.attention_mask)

    def observe(view: LayerView) -> jax.Array:
        received = None if view.attention is None else received_attention(view.attention, valid)
        over = sink_mask(
            sinks.llm_criterion,
            view.hidden,
            dims=sinks.llm_dims,
            tau=sinks.llm_tau,
            massive_ratio=sinks.massive_ratio,
            valid=visual.mask if sinks.llm_criterion == "attention" else valid,
            received=received,
        )
        return group_visual_tokens(visual, over).l_sink[0]

    out = model(batch, merged=merged, observe=observe, observe_attention=sinks.llm_criterion == "attention")
    positions = jnp.flatnonzero(visual.mask[0], size=len(norms))
    return norms, v_sink[0], out.observed[:, positions]
