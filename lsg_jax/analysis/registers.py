"""Proposes register neurons of the vision tower from a sample of images, for the method `registers` (arXiv 2506.08010).

Register neurons are those of the MLPs that are most active, on average, at patches of outlier norm, in the layers up to the
one that makes these outliers. As in the released code (nickjiang2378/test-time-registers) activations count by size, and each
image that has outliers counts once; there the threshold and the layer are set by hand, and the class token may be an outlier.
The result:

    format, model, backbone, images (their number), skipped (unreadable ones), warnings
    norm        the threshold; share: of the patches, those that reach it; images_with_outliers
    layer       the first after which half of the outliers reach it
    neurons     [{layer, neuron, activation (the mean of its size)}], largest first
    registers   the fields proposed for RegistersConfig
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lsg_jax.analysis.calibrate import Sample, shown_features
from lsg_jax.errors import InputError
from lsg_jax.methods.finite import check_finite
from lsg_jax.methods.method_model import assemble
from lsg_jax.methods.registers import layers_run
from lsg_jax.progress import Progress, silent, tracing
from lsg_jax.sinks.calibrate import find_gap, histogram
from lsg_jax.sinks.plausible import IMPLAUSIBLE_SHARE
from lsg_jax.types import Batch
from lsg_jax.vlm import VLM

FORMAT = "lsg-registers-1"


def find_registers(
    vlm: VLM, images: Sequence[Path], prompt: str, count: int, *, norm: float | None = None, progress: Progress = silent
) -> dict[str, Any]:
    """Finds the `count` neurons that do most for patches of outlier norm. On the host are 4 bytes a patch and layer.

    Args:
        images: image files, at least one of them readable.
        norm: from which a patch is an outlier, at the output of the highest layer that the features need; None for the middle
            of the gap between two modes of the norms.
        progress: counts images, in each of the two passes.

    Returns:
        Plain data; the module docstring describes it.

    Raises:
        ConfigError: the vision tower takes images of any size.
        InputError: no image can be read, or no patch is an outlier.
    """
    depth = layers_run(vlm.config)
    sample = Sample(vlm, list(images), prompt, progress)
    seen = []
    for _, batch, counted in sample.batches("1/2 norms"):
        norms, shown = jax.tree.map(np.asarray, _norms(vlm.params, batch, counted, vlm.graphdef, depth))
        check_finite(np.where(shown, norms.sum(0), 0), [f"an image of {sample.paths[0].parent}"] * len(shown), vlm.method)
        seen.append((norms, shown))
    last = np.concatenate([norms[-1][shown] for norms, shown in seen])
    tau = _threshold(last, len(sample.paths)) if norm is None else norm
    if not (share := float((last >= tau).mean())):
        raise InputError(f"no patch has a norm of {tau:g}, the largest is {last.max():.4g}: lower --norm")
    outliers = [shown & (norms[-1] >= tau) for norms, shown in seen]
    layer = growth_layer(np.concatenate([norms[:, where] for (norms, _), where in zip(seen, outliers, strict=True)], 1), tau)
    total = np.zeros((depth, vlm.config.vision.intermediate_size))
    for (_, batch, _), where in zip(sample.batches("2/2 neurons"), outliers, strict=True):
        total += np.asarray(_activations(vlm.params, batch, where, vlm.graphdef, depth))
    with_outliers = sum(int(where.any(1).sum()) for where in outliers)
    neurons = most_active(total / with_outliers, layer, count)
    return {
        "format": FORMAT,
        "model": str(vlm.folder),
        "backbone": vlm.digest,
        "images": len(sample.paths),
        "skipped": sample.skipped,
        "norm": float(f"{tau:.4g}"),
        "share": round(share, 5),
        "images_with_outliers": with_outliers,
        "layer": layer,
        "neurons": [{"layer": at, "neuron": number, "activation": float(f"{size:.4g}")} for at, number, size in neurons],
        "registers": {"neurons": [[at, number] for at, number, _ in neurons]},
        "warnings": [f"{share:.0%} of the patches are outliers: {tau:g} is implausibly low"] * (share > IMPLAUSIBLE_SHARE),
    }


def _threshold(norms: np.ndarray, images: int) -> float:
    gap = find_gap(histogram(norms), max(1, images // 4))
    if gap is None:
        raise InputError(
            f"the norms of the patches have no two modes, so none is an outlier (they reach {norms.max():.4g}); name a norm, "
            "--norm X"
        )
    return gap.tau


def growth_layer(norms: np.ndarray, tau: float) -> int:
    """The first layer after which half of the outliers have their norm: norms float [L, outliers] of the layers' outputs."""
    return int(np.argmax((norms >= tau).mean(1) >= 0.5))


def most_active(activations: np.ndarray, highest: int, count: int) -> list[tuple[int, int, float]]:
    """The neurons of largest activation in the layers up to `highest`, largest first.

    Args:
        activations: float [L, F], mean sizes at outliers.

    Returns:
        `count` triples of layer, neuron and activation; fewer if there are no more neurons.
    """
    below = activations[: highest + 1]
    order = np.argsort(-below, axis=None, kind="stable")[:count]
    layers, neurons = np.unravel_index(order, below.shape)
    return list(zip(layers.tolist(), neurons.tolist(), below[layers, neurons].tolist(), strict=True))


@functools.partial(jax.jit, static_argnums=(3, 4))
def _norms(params: dict, batch: Batch, counted: jax.Array, graphdef: Any, depth: int) -> tuple[jax.Array, jax.Array]:
    """Norms of the patches after each of `depth` layers float32 [L, B, S P], and bool [B, S P], those that a token shows."""
    tracing("the norms of patches", batch.input_ids)
    model, rows = assemble(graphdef, params), len(counted)
    assert batch.images is not None
    first = int(model.config.vision.has_class_token)
    norm = lambda _, x: jnp.linalg.norm(x[:, first:].astype(jnp.float32), axis=-1)
    norms = model.vision_tower.watch(model.by_tile(batch.images), depth, norm).reshape(depth, rows, -1)
    return norms, shown_features(batch, norms.shape[-1], model.config) & counted[:, None]


@functools.partial(jax.jit, static_argnums=(3, 4))
def _activations(params: dict, batch: Batch, outliers: jax.Array, graphdef: Any, depth: int) -> jax.Array:
    """float32 [L, F], sizes of activations: means over the outliers bool [B, S P] of each image, summed over the images."""
    tracing("the activations of neurons", batch.input_ids)
    model = assemble(graphdef, params)
    assert batch.images is not None
    first, (rows, tiles) = int(model.config.vision.has_class_token), batch.images.patches.shape[:2]
    share = (outliers / jnp.maximum(outliers.sum(1, keepdims=True), 1)).reshape(rows * tiles, -1)
    size = lambda neurons, _: jnp.einsum("BPF,BP->F", jnp.abs(neurons[:, first:].astype(jnp.float32)), share)
    sizes: jax.Array = model.vision_tower.watch(model.by_tile(batch.images), depth, size)
    return sizes


def as_toml(result: dict[str, Any]) -> str:
    """The proposal as a TOML [registers] table with the evidence as comments."""
    found, norm = result["neurons"], f"a norm of {result['norm']:g} or more"
    lines = [
        f"# Register neurons from {result['images']} images, backbone {result['backbone'][:12] or 'unknown'} (lsg calibrate).",
        f"# Outliers: {result['share']:.2%} of the patches have {norm}, most of them from layer {result['layer']} on.",
        f"# Mean activations at outliers: from {found[0]['activation']:g} to {found[-1]['activation']:g}.",
        "[registers]",
        f"neurons = {result['registers']['neurons']}",
    ]
    return "\n".join(lines) + "\n"
