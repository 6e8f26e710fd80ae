"""Linear probes on the hidden states of sinks and ordinary tokens, layer by layer: study 1 of paper.md.

Probed are the states that enter a decoder layer (HF `hidden_states[l]`, l from 0 to L - 1), averaged over the V-sinks of an
image, over its L-sinks at that layer, and over a few ordinary tokens. A visual token is ordinary if it is a sink at no layer.
Each draw averages `ProbeSettings.tokens` ordinary tokens chosen at random. An image without a sink at a layer, or with too few
ordinary tokens, is left out of that group at that layer; the rows give the number of images used.

Each draw also splits the training images again, into those that fit the probe and those that choose its shrinkage. So for sinks
the standard deviation over draws comes from the split alone, for ordinary tokens from the split and from the tokens drawn.

Which tokens are ordinary is known only after the last layer. Keeping all states until then would take too much memory (150 MB
an image in a 7B model). So twice the tokens needed are picked in advance, in random order, and the first ordinary ones among
them are used. If they do not suffice, the batch is run again with tokens known to be ordinary. The result is the same as with
the sinks known in advance, and a second run is rare where sinks are few.
"""

from __future__ import annotations

import functools
import math
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from lsg_jax.analysis.linear_probe import SHRINKAGES, Attribute, Probes, Splits, make_splits, predict, score
from lsg_jax.analysis.probe_images import ProbeData
from lsg_jax.checkpoint.processes import host_array
from lsg_jax.config import to_dict
from lsg_jax.config.ranges import Range, Table
from lsg_jax.data.images import image_size
from lsg_jax.data.layout import ImageSize
from lsg_jax.data.rows import Pixels
from lsg_jax.data.sources import in_order, thread_count
from lsg_jax.errors import ConfigError, InputError, NonFiniteError
from lsg_jax.eval.identity import digests_of
from lsg_jax.gating.keys import GROUPS
from lsg_jax.methods.method_model import assemble
from lsg_jax.progress import Progress, tracing
from lsg_jax.sharding import batch_rows, local_rows, place_rows
from lsg_jax.sinks.attention import received_attention
from lsg_jax.sinks.criteria import group_visual_tokens, sink_mask
from lsg_jax.types import Batch, LayerView
from lsg_jax.vlm import VLM

FORMAT = "lsg-probe-1"
TOKENS = GROUPS["three"]
SPARE = 2
"""Tokens picked for each one needed, since some turn out to be sinks."""

IMPLAUSIBLE_SHARE = 0.5
"""If a larger share of the visual tokens is a sink at some layer, the thresholds are implausibly low."""


@dataclass(frozen=True)
class ProbeSettings(Table, name="probe"):
    """Settings of the study.

    Attributes:
        prompt: asked about each image. It follows the visual tokens, so without gates it hardly matters.
        draws: number of draws of ordinary tokens and of splits.
        tokens: ordinary tokens in each draw.
        seed: of the tokens, the splits and the scenes.
        layers: decoder layers to probe, None for all.
        batch_size: images at a time on each device along data and fsdp.
    """

    prompt: str = "Describe the image."
    draws: Annotated[int, Range("[2, 1e4]")] = 5  # a deviation needs two
    tokens: Annotated[int, Range("[1, 1e6]")] = 5
    seed: Annotated[int, Range("[0, 4294967295]")] = 0
    layers: tuple[Annotated[int, Range("[0, 1e4]")], ...] | None = None
    batch_size: Annotated[int, Range("[1, 1e6]")] = 8

    def chosen_layers(self, count: int) -> list[int]:
        """The layers, ascending; `count` is the model's number of layers. Raises ConfigError for one that does not exist."""
        chosen = list(range(count)) if self.layers is None else sorted(set(self.layers))
        if bad := [layer for layer in chosen if not 0 <= layer < count]:
            raise ConfigError(f"layer {bad[0]} does not exist, the model has layers 0 to {count - 1}")
        return chosen


# ------------------------------------------------------------------------------------------------------------------ states


@dataclass(frozen=True)
class PooledStates:
    """Averaged hidden states of all images at the chosen layers.

    Attributes:
        features: float32 [L, N, 2 + R, D], on disk: means over V-sinks, over L-sinks, and over each draw of ordinary tokens.
        present: bool [L, N, 3], whether the image has the group at the layer.
        values: the attributes of each image.
        flagged: share of the visual tokens that are a sink at some layer.
    """

    features: np.ndarray
    present: np.ndarray
    values: list[dict[str, Any]]
    flagged: float


def collect(vlm: VLM, data: ProbeData, settings: ProbeSettings, scratch: Path, progress: Progress) -> PooledStates:
    """Runs the model over all images; every process must call it.

    Args:
        scratch: folder for a temporary file of 4 (2 + R) D bytes a layer and image; the file is gone with the result.

    Raises:
        InputError: an image cannot be read, the disk has too little room, or hidden states are not finite.
    """
    layers, tokens = settings.chosen_layers(vlm.config.text.num_layers), settings.tokens
    count, size = data.train + data.test, settings.batch_size * batch_rows(vlm.mesh)
    first = data.read(0)[0]
    size_of_all = _size(first)
    encoded = vlm.processor.encode_question(settings.prompt, image_sizes=(size_of_all,))
    patches = int((vlm.processor.layouts([size_of_all])[0].source[:, 0] >= 0).sum())
    shape = (len(layers), count, 2 + settings.draws, vlm.config.text.hidden_size)
    features = _on_disk(shape, scratch)
    present, flagged, values = np.zeros((len(layers), count, 3), bool), 0.0, []

    def read(index: int) -> tuple[Pixels | None, dict[str, Any]]:
        image, found = data.read(min(index, count - 1))  # the last batch is filled up with the last image
        if vlm.config.image.kind != "square" and (size := _size(image)) != size_of_all:
            raise InputError(
                f"image {index} has {size[0]} x {size[1]} pixels, the first {size_of_all[0]} x {size_of_all[1]}: "
                "the tokens of this model's images depend on their size, and the probe needs all of one size"
            )
        return vlm.processor.all_pixels([image]), {name: found[name] for name in data.vocabularies}

    stream = in_order(read, range(-(-count // size) * size), thread_count(None))
    for start in range(0, count, size):
        pixels, found = zip(*(next(stream) for _ in range(size)), strict=True)
        kept = slice(start, min(start + size, count))
        values += found[: kept.stop - start]
        orders = np.stack([token_orders(settings, i, patches) for i in range(start, start + size)])
        states, sinks = _pool(vlm, encoded, pixels, orders, tokens)
        states, sinks = states[layers][:, : kept.stop - start], sinks[:, : kept.stop - start]
        if not np.isfinite(states).all():
            layer = layers[int(np.argmin(np.isfinite(states).all((1, 2, 3))))]
            raise NonFiniteError(f"hidden states that enter layer {layer} are not finite for images {start} to {kept.stop - 1}")
        features[:, kept] = states
        ever = sinks.any(0)
        present[:, kept, 0] = sinks[-1].any(-1)
        present[:, kept, 1] = sinks[layers].any(-1)
        present[:, kept, 2] = (~ever).sum(-1) >= tokens
        flagged += ever.sum() / (count * patches)
        progress(kept.stop, count, "images")
    return PooledStates(features, present, values, flagged)


def _size(image: Any) -> ImageSize:
    """(width, height) in pixels of an image or its bytes."""
    return image.size if isinstance(image, Image.Image) else image_size(image)


def _on_disk(shape: tuple[int, ...], folder: Path) -> np.ndarray:
    """float32 zeros in an unnamed temporary file."""
    needed, free = 4 * math.prod(shape), shutil.disk_usage(folder).free
    if needed > free:  # a write to a memory map on a full disk would kill the process
        raise InputError(
            f"{folder}: the states take {needed / 1e9:.1f} GB, {free / 1e9:.1f} are free; lower --images or --draws"
        )
    with tempfile.TemporaryFile(dir=folder) as file:
        return np.memmap(file, np.float32, "w+", shape=shape)


def token_orders(settings: ProbeSettings, image: int, patches: int) -> np.ndarray:
    """int [R, P]: a random order of an image's patches for each draw. It depends on the seed and the image's index only."""
    return np.stack(
        [np.random.default_rng([settings.seed, image, draw]).permutation(patches) for draw in range(settings.draws)]
    )


def ordinary_first(orders: np.ndarray, ordinary: np.ndarray) -> np.ndarray:
    """Stable sort of `orders` int [B, R, P], patches with `ordinary` bool [B, P] first."""
    is_sink = ~np.take_along_axis(ordinary[:, None], orders, axis=-1)
    return np.take_along_axis(orders, np.argsort(is_sink, axis=-1, kind="stable"), axis=-1)


def _pool(
    vlm: VLM, encoded: Any, pixels: Sequence[Pixels | None], orders: np.ndarray, tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Averaged states of one batch.

    Args:
        orders: int [B, R, P], see `token_orders`.

    Returns:
        States float32 [L, B, 2 + R, D]; sinks bool [L + 1, B, P], L-sinks of each layer, then V-sinks.
    """
    size, rows = len(pixels), local_rows(vlm.mesh, len(pixels))
    batch = vlm.pad_questions([encoded] * len(rows), [pixels[row] for row in rows])

    def run(picked: np.ndarray) -> tuple[jax.Array, jax.Array, np.ndarray]:
        placed, places = place_rows((batch, picked[rows]), vlm.mesh, size)
        knows_l, patches = vlm.config.sinks.knows_l_sinks, orders.shape[-1]
        pools, states, sinks = _observe(vlm.params, placed, places, vlm.graphdef, knows_l, patches)
        return pools, states, host_array(sinks)

    picked = orders[..., : SPARE * tokens]
    pools, states, sinks = run(picked)
    ordinary = np.logical_not(sinks.any(0))
    ordered = ordinary_first(orders, ordinary)
    drawn = ordered[..., :tokens]
    real = np.take_along_axis(ordinary[:, None], drawn, axis=-1)  # false if an image has too few ordinary tokens
    inside = lambda picked: ((picked[..., None] == drawn[..., None, :]) & real[..., None, :]).any(-1)
    if (inside(picked).sum(-1) < real.sum(-1)).any():
        picked = ordered[..., : SPARE * tokens]
        pools, states, _ = run(picked)
    weights = inside(picked).astype(np.float32) / tokens
    averaged = _average(states, place_rows(weights[rows], vlm.mesh, size))
    return np.concatenate([host_array(pools), host_array(averaged)], axis=2), sinks


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _observe(params: dict, batch: Batch, picked_BRX: Any, graphdef: Any, knows_l: bool, patches: int) -> tuple[jax.Array, ...]:
    """One forward pass. X is the number of patches picked in each draw.

    Returns:
        Means over V-sinks and over L-sinks [L, B, 2, D]; states of the patches picked [L, B, R, X, D]; sinks bool
        [L + 1, B, P], see `_pool`.
    """
    tracing("the pass that collects states", batch.input_ids)
    model = assemble(graphdef, params)
    sequence, sinks, valid = model.sequence(batch), model.config.sinks, jnp.asarray(batch.attention_mask)
    visual = sequence.visual
    assert visual is not None
    places_BP = jax.vmap(lambda mask: jnp.flatnonzero(mask, size=patches))(visual.mask)
    picked = jnp.take_along_axis(places_BP[:, None], picked_BRX, axis=-1)

    def l_sinks(view: LayerView) -> jax.Array:
        if not knows_l:
            return jnp.zeros_like(visual.mask)
        received = None if view.attention is None else received_attention(view.attention, valid)
        over = sink_mask(
            sinks.llm_criterion,
            view.hidden,
            dims=sinks.llm_dims,
            tau=sinks.llm_tau,
            massive_ratio=sinks.massive_ratio,
            valid=visual.mask if sinks.llm_criterion == "attention_share" else valid,
            received=received,
        )
        return group_visual_tokens(visual, over).l_sink

    def observe(view: LayerView) -> tuple[jax.Array, ...]:
        groups_BTG = jnp.stack([visual.v_sink, l_sinks(view)], axis=-1)
        total = jnp.einsum(
            "BTD,BTG->BGD",
            view.hidden,
            groups_BTG.astype(view.hidden.dtype),
            precision="highest",
            preferred_element_type=jnp.float32,
        )
        pools = total / jnp.maximum(groups_BTG.sum(1), 1)[..., None]
        states = jax.vmap(lambda hidden, places: hidden[places])(view.hidden, picked)
        return pools, states, jnp.take_along_axis(groups_BTG[..., 1], places_BP, axis=1)

    out = model(
        batch, sequence=sequence, observe=observe, observe_attention=knows_l and sinks.llm_criterion == "attention_share"
    )
    pools, states, l_sink = out.observed
    return pools, states, jnp.concatenate([l_sink, jnp.take_along_axis(visual.v_sink, places_BP, axis=1)[None]])


@jax.jit
def _average(states: jax.Array, weights: jax.Array) -> jax.Array:
    """Weighted sum over X: states [L, B, R, X, D], weights float32 [B, R, X]."""
    return jnp.einsum("LBRXD,BRX->LBRD", states.astype(jnp.float32), weights, precision="highest")


# ------------------------------------------------------------------------------------------------------------------- study


def probe_study(vlm: VLM, data: ProbeData, settings: ProbeSettings, scratch: Path, progress: Progress) -> dict[str, Any]:
    """Collects states, fits the probes and returns the content of probe.json; every process must call it.

    If one kind of sink has no criterion, its rows have a reason instead of a mean, and ordinary tokens are those that are no
    sink of the other kind.

    Raises:
        ConfigError: neither kind of sink has a criterion, or a layer does not exist. Also see `collect`.
    """
    unknown = {}
    if not vlm.config.sinks.knows_v_sinks:
        unknown["v_sink"] = "no V-sink dimensions are known for this model: set sinks.vit_dims, or another criterion"
    if not vlm.config.sinks.knows_l_sinks:
        unknown["l_sink"] = "no L-sink dimensions are known for this model: set sinks.llm_dims, or another llm_criterion"
    if len(unknown) == 2:
        raise ConfigError(
            "no sink dimensions are known for this model: run `lsg calibrate`, or give --sinks, e.g. criterion=norm vit_tau=100"
        )
    layers = settings.chosen_layers(vlm.config.text.num_layers)
    pooled = collect(vlm, data, settings, scratch, progress)
    labels = {}
    for name, words in data.vocabularies.items():
        attribute = Attribute(name, words, several=isinstance(pooled.values[0][name], tuple))
        labels[attribute] = attribute.encode(pooled.values)
    splits = make_splits(data.train, data.test, settings.draws, seed=settings.seed)
    rows = []
    for place, layer in enumerate(layers):
        for row in probe_layer(pooled.features[place], pooled.present[place], labels, splits):
            if row["group"] in unknown:
                row["reason"] = unknown[row["group"]]
            rows.append({"attribute": row["attribute"], "layer": layer, **row})
        progress(place + 1, len(layers), "layers")
    warnings = list(unknown.values())
    if pooled.flagged > IMPLAUSIBLE_SHARE:
        warnings.append(
            f"{pooled.flagged:.0%} of the visual tokens are a sink at some layer: the thresholds are implausibly low"
        )
    return {
        "format": FORMAT,
        "model": str(vlm.folder),
        **digests_of(vlm),
        "gated_layers": [] if vlm.gate is None else list(vlm.gate.layers),
        "sinks": to_dict(vlm.config.sinks),
        "data": data.name,
        "images": {"train": data.train, "test": data.test},
        **to_dict(settings),
        "layers": layers,
        "shrinkages": list(SHRINKAGES),
        "sink_share": pooled.flagged,
        "warnings": warnings,
        "rows": rows,
    }


def probe_layer(
    features: np.ndarray, present: np.ndarray, labels: dict[Attribute, np.ndarray], splits: Splits
) -> list[dict[str, Any]]:
    """Rows of one layer for every attribute, group and metric: `attribute`, `group` and the columns of `score`.

    Args:
        features: float32 [N, 2 + R, D].
        present: bool [N, 3].
        labels: int32 [N, J] of each attribute.
    """
    draws = np.arange(len(splits.fit))
    groups = len(TOKENS)
    probes = Probes(
        column=np.concatenate([0 * draws, 0 * draws + 1, draws + 2]),
        present=np.repeat(present.T, len(draws), axis=0),
        fit=np.tile(splits.fit, (groups, 1)),
        choose=np.tile(splits.choose, (groups, 1)),
    )
    beside = np.concatenate(list(labels.values()), axis=1)
    predicted = np.asarray(predict(features, beside, probes, classes=max(attribute.classes for attribute in labels)))
    rows, parts = [], np.cumsum([label.shape[1] for label in labels.values()])[:-1]
    for (attribute, label), found in zip(labels.items(), np.split(predicted, parts, axis=-1), strict=True):
        by_group = found.reshape(groups, len(draws), *label.shape)
        for group, own, there in zip(TOKENS, by_group, present.T, strict=True):
            for row in score(attribute, label, own, splits, there):
                rows.append({"attribute": attribute.name, "group": group, **row})
    return rows
