"""Proposes sink dimensions and thresholds for a model from a sample of images, with a confidence.

There are two passes over the images. The first counts how often each dimension reaches each size; the second makes histograms
of the dimensions found. Memory does not grow with the sample, except by one number an image: on the host are 2 x E x (Dv + D)
counts and histograms by layer (6 MB for a 7B model), on the device [L, E, D] int32 (30 MB). The result:

    format, model, backbone, prompt, images (their number), skipped (unreadable ones), layers (those examined), warnings
    vit, llm    null where nothing was found, else {
        dims        largest first; sizes: the |h[d]| that they reach in as many tokens as half the images (times layers)
        typical     the usual |h[d]|; lead: ratio of the smallest of these dimensions to the next largest one
        tau         the threshold; gap: [low, high], the range with no or few tokens
        sinks       number of tokens that reach tau; share: of all tokens; images_with_sinks, text_sinks
        flagged     share of the visual tokens that reach tau, in each layer
        confidence  high | medium | low | none; reasons
        norm        `vit` only: {tau, gap, share}, null where norms have one mode}
    sinks       the fields proposed for SinkConfig
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lsg_jax.config import ModelConfig, to_dict
from lsg_jax.data.encoded import Encoded
from lsg_jax.data.images import open_image
from lsg_jax.data.record_shapes import RecordError
from lsg_jax.data.rows import Pixels
from lsg_jax.errors import InputError
from lsg_jax.methods.finite import check_finite
from lsg_jax.methods.method_model import assemble
from lsg_jax.model.projector import members
from lsg_jax.progress import Progress, silent, tracing
from lsg_jax.sinks.calibrate import (
    FINE,
    SIZES,
    Gap,
    SinkDims,
    confidence,
    find_dims,
    find_gap,
    histogram,
    reach,
    reaching,
)
from lsg_jax.sinks.plausible import IMPLAUSIBLE_SHARE
from lsg_jax.types import Batch
from lsg_jax.vlm import VLM

FORMAT = "lsg-calibrate-1"
BATCH = 4  # images at a time


@dataclass
class Sample:
    """The images, read again in each pass; unreadable ones are left out and named in `skipped`."""

    vlm: VLM
    paths: list[Path]
    prompt: str
    progress: Progress
    skipped: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.size = min(BATCH, -(-len(self.paths) // 2))  # two halves, however few images there are

    def batches(self, what: str) -> Iterator[tuple[int, Batch, np.ndarray]]:
        """Yields (half of the sample, 0 or 1; batch of one of few shapes; bool [B], the rows that are not padding)."""
        size = self.size
        processor = self.vlm.processor
        # the first pass keeps only the readable paths, so that the second one makes the same batches
        pending: list[tuple[Encoded, Pixels | None]] = []
        read = []
        for done, path in enumerate(self.paths, 1):
            try:
                opened = open_image(path)
                question = processor.encode_question(self.prompt, image_sizes=(opened.size,))
                pending.append((question, processor.all_pixels([opened])))
                read.append(path)
            except InputError as error:
                self.skipped.append(str(error))
            except RecordError as error:
                if error.reason != "image_size":
                    raise
                self.skipped.append(f"{path}: {error}")
            self.progress(done, len(self.paths), what)
            if len(pending) == size or (pending and done == len(self.paths)):
                batch = self.vlm.pad_questions(*zip(*pending, *pending[:1] * (size - len(pending)), strict=True))
                yield (len(read) - 1) // size % 2, batch, np.arange(size) < len(pending)
                pending = []
        if not read:
            raise InputError(f"none of the {len(self.paths)} images can be read, the first: {self.skipped[0]}")
        self.paths = read


@dataclass
class Site:
    """Counts of one stage: the features before the projector (one "layer"), or the residual stream of the language model.

    Attributes:
        looked: the layers that are examined.
        sizes: int64 [2, E, D], number of tokens that reach each of SIZES, by half of the sample.
        tokens: int64 [2], number of tokens counted in `sizes`.
        peaks: int64 [2, L, F], histogram of max |h[d]| over the dimensions found, of visual tokens.
        text: int64 [L, F], the same of text tokens.
        norms: int64 [F], histogram of the norms of visual tokens.
        largest: the largest peak of each image.
    """

    looked: slice
    sizes: np.ndarray
    tokens: np.ndarray
    peaks: np.ndarray
    text: np.ndarray
    norms: np.ndarray
    largest: list[float] = field(default_factory=list)

    @classmethod
    def empty(cls, width: int, layers: int, looked: slice) -> Site:
        bins = len(FINE)
        zeros = lambda *shape: np.zeros(shape, np.int64)
        return cls(looked, zeros(2, len(SIZES), width), zeros(2), zeros(2, layers, bins), zeros(layers, bins), zeros(bins))

    @property
    def depth(self) -> int:
        """Number of layers examined."""
        return self.looked.stop - self.looked.start


def calibrate(vlm: VLM, images: Sequence[Path], prompt: str, *, progress: Progress = silent) -> dict[str, Any]:
    """Finds sink dimensions and thresholds for `dim_abs`, for the features and the residual stream.

    In the language model the layers from a quarter to three quarters of its depth are examined, where sinks are fully grown.
    Dimensions are sought in visual and text tokens, since the first token is a sink as well; the threshold in visual tokens.

    Args:
        images: image files, at least one of them readable.
        progress: counts images, in each of the two passes.

    Returns:
        Plain data; the module docstring describes it.

    Raises:
        InputError: no image can be read.
    """
    depth = vlm.config.text.num_layers
    middle = slice(depth // 4, max(3 * depth // 4, depth // 4 + 1))
    sample = Sample(vlm, list(images), prompt, progress)
    sites = {
        "vit": Site.empty(vlm.config.vision.hidden_size * len(vlm.config.feature_layers), 1, slice(0, 1)),
        "llm": Site.empty(vlm.config.text.hidden_size, depth, middle),
    }
    _count_sizes(sample, sites)
    count = len(sample.paths)
    found = {name: _dims(site, count) for name, site in sites.items()}
    _count_peaks(sample, sites, {name: dims.dims for name, (dims, _) in found.items()})
    results = {name: _result(site, *found[name], count) for name, site in sites.items()}
    results["vit"]["norm"] = _norm_gap(sites["vit"], count)
    return {
        "format": FORMAT,
        "model": str(vlm.folder),
        "backbone": vlm.digest,
        "prompt": prompt,
        "images": count,
        "skipped": sample.skipped,
        "layers": list(range(depth))[middle],
        **results,
        "sinks": _proposal(vlm, results),
        "warnings": _warnings(results),
    }


def _count_sizes(sample: Sample, sites: dict[str, Site]) -> None:
    for half, batch, counted in sample.batches("1/2 dimensions"):
        seen = _sizes(sample.vlm.params, batch, counted, sample.vlm.graphdef)
        vit, (llm, sound), norms, used = jax.tree.map(np.asarray, seen)
        rows = np.where(used, norms, 0) + np.where(sound.all(0), 0, np.nan)[:, None]
        check_finite(rows, [f"an image of {sample.paths[0].parent}"] * len(rows), sample.vlm.method)
        sites["vit"].sizes[half] += vit
        sites["llm"].sizes[half] += llm[sites["llm"].looked].sum(0, dtype=np.int64)
        sites["vit"].tokens[half] += used.sum()
        sites["llm"].tokens[half] += batch.attention_mask[counted].sum() * sites["llm"].depth
        sites["vit"].norms += histogram(norms[used])


@functools.partial(jax.jit, static_argnums=3)
def _sizes(params: dict, batch: Batch, counted: jax.Array, graphdef: Any) -> tuple[jax.Array, ...]:
    """Counts of tokens that reach each of SIZES, in the rows `counted` bool [B].

    Returns:
        Counts of the features int32 [E, Dv]; those of the residual stream int32 [L, E, D], with whether it is finite
        bool [L, B]; norms of the features float32 [B, N], and bool [B, N], those that a token of these rows shows.
    """
    tracing("the search for sink dimensions", batch.input_ids)
    model = assemble(graphdef, params)
    assert batch.images is not None
    features, _ = model.image_features(batch.images)
    used = shown_features(batch, features.shape[1], model.config) & counted[:, None]
    valid = batch.attention_mask & counted[:, None]
    sound = lambda states: jnp.isfinite(jnp.where(valid[..., None], states, 0)).all((1, 2))
    streams = model(batch, observe=lambda view: (reach(view.hidden, valid), sound(view.hidden))).observed
    return reach(features, used), streams, jnp.linalg.norm(features.astype(jnp.float32), axis=-1), used


def shown_features(batch: Batch, count: int, config: ModelConfig) -> jax.Array:
    """bool [B, count], the features that some token shows; the others are of padding."""
    source = jnp.asarray(batch.source).reshape(len(batch.source), -1)
    behind = members(count, config)

    def shown(row: jax.Array) -> jax.Array:
        places = jnp.where(row[:, None] < 0, count, behind[row])
        return jnp.zeros(count, bool).at[places.ravel()].set(True, mode="drop")

    return jax.vmap(shown)(source)


def _dims(site: Site, images: int) -> tuple[SinkDims, list[SinkDims]]:
    """The dimensions found in the whole sample, and in each half unless one is empty."""
    # a sink in every second image suffices, an outlier in a single image does not
    least = lambda share: max(1, round(share * images * site.depth / 2))
    whole = find_dims(site.sizes.sum(0), int(site.tokens.sum()), least(1.0))
    if not site.tokens.all():
        return whole, []
    shares = site.tokens / site.tokens.sum()
    return whole, [find_dims(site.sizes[h], int(site.tokens[h]), least(shares[h])) for h in (0, 1)]


def _count_peaks(sample: Sample, sites: dict[str, Site], dims: dict[str, tuple[int, ...]]) -> None:
    if not any(dims.values()):
        return
    for half, batch, counted in sample.batches("2/2 thresholds"):
        seen = _peaks(sample.vlm.params, batch, sample.vlm.graphdef, dims["vit"], dims["llm"])
        vit, llm, used = jax.tree.map(np.asarray, seen)
        visual = batch.source[..., 0] >= 0
        text = batch.attention_mask & ~visual & counted[:, None]
        sites["vit"].peaks[half, 0] += histogram(vit[used & counted[:, None]])
        sites["vit"].largest += np.where(used, vit, 0.0).max(-1)[counted].tolist()
        for layer, peak in enumerate(llm):
            sites["llm"].peaks[half, layer] += histogram(peak[visual & counted[:, None]])
            sites["llm"].text[layer] += histogram(peak[text])
        sites["llm"].largest += np.where(visual, llm[sites["llm"].looked], 0.0).max((0, 2))[counted].tolist()


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _peaks(params: dict, batch: Batch, graphdef: Any, vit_dims: tuple, llm_dims: tuple) -> tuple[jax.Array, ...]:
    """max |h[d]| over the dimensions: of the features float32 [B, N], of the stream [L, B, T]; 0 without dimensions.

    The third result is `shown_features`.
    """
    tracing("the search for thresholds", batch.input_ids)
    model = assemble(graphdef, params)
    peak = lambda states, dims: jnp.abs(states[..., jnp.array(dims, int)].astype(jnp.float32)).max(-1, initial=0.0)
    assert batch.images is not None
    features, _ = model.image_features(batch.images)
    streams = model(batch, observe=lambda view: peak(view.hidden, llm_dims)).observed
    return peak(features, vit_dims), streams, shown_features(batch, features.shape[1], model.config)


def _result(site: Site, dims: SinkDims, halves: list[SinkDims], images: int) -> dict[str, Any]:
    peaks, text = site.peaks[:, site.looked].sum(1), site.text[site.looked].sum(0)
    least = lambda tokens: max(1, round(images * site.depth / 4 * tokens.sum() / max(peaks.sum(), 1)))
    gap = find_gap(peaks.sum(0), least(peaks)) if dims.dims else None
    half_gaps: list[Gap | None] = [find_gap(half, least(half)) if dims.dims else None for half in peaks]
    sure, reasons = confidence(dims, gap, list(zip(halves, half_gaps, strict=False)))
    flagged = None
    if gap:
        by_layer = site.peaks.sum(0)
        flagged = [round(reaching(counts, gap.tau) / max(int(counts.sum()), 1), 5) for counts in by_layer]
    return {
        "dims": list(dims.dims) or None,
        "sizes": [float(f"{size:.4g}") for size in dims.sizes] or None,
        "typical": float(f"{dims.typical:.4g}"),
        "lead": round(dims.lead, 2) if dims.dims else None,
        "tau": float(f"{gap.tau:.4g}") if gap else None,
        "gap": [float(f"{gap.low:.4g}"), float(f"{gap.high:.4g}")] if gap else None,
        "sinks": gap.above if gap else None,
        "share": round(gap.share, 5) if gap else None,
        "images_with_sinks": sum(peak >= gap.tau for peak in site.largest) if gap else None,
        "text_sinks": reaching(text, gap.tau) if gap else None,
        "flagged": flagged,
        "confidence": sure,
        "reasons": reasons,
    }


def _norm_gap(site: Site, images: int) -> dict[str, Any] | None:
    gap = find_gap(site.norms, max(1, images // 4))
    if gap is None:
        return None
    return {
        "tau": float(f"{gap.tau:.4g}"),
        "gap": [float(f"{gap.low:.4g}"), float(f"{gap.high:.4g}")],
        "share": round(gap.share, 5),
    }


def _proposal(vlm: VLM, results: dict[str, Any]) -> dict[str, Any]:
    """Fields of SinkConfig: those found, else those of the model folder."""
    known = to_dict(vlm.config.sinks)
    vit, llm = results["vit"], results["llm"]
    fields: dict[str, Any] = {}
    if vit["tau"] is not None:
        fields |= {"criterion": "dim_abs", "vit_dims": vit["dims"], "vit_tau": vit["tau"]}
    elif vit["norm"] is not None:
        fields |= {"criterion": "norm", "vit_tau": vit["norm"]["tau"]}
    elif known["vit_dims"]:
        fields |= {name: known[name] for name in ("criterion", "vit_dims", "vit_tau")}
    if llm["tau"] is not None:
        fields |= {"llm_criterion": "dim_abs", "llm_dims": llm["dims"], "llm_tau": llm["tau"]}
    elif known["llm_dims"]:
        fields |= {name: known[name] for name in ("llm_criterion", "llm_dims", "llm_tau")}
    return fields


def _warnings(results: dict[str, Any]) -> list[str]:
    warnings = []
    for name, kind in (("vit", "V-sink"), ("llm", "L-sink")):
        result = results[name]
        if result["tau"] is None:
            warnings.append(f"no {kind} dimensions were found: {result['reasons'][0]}")
        elif result["confidence"] == "low":
            warnings.append(f"the {kind} dimensions and threshold are uncertain: {'; '.join(result['reasons'])}")
    if high := [layer for layer, share in enumerate(results["llm"]["flagged"] or []) if share > IMPLAUSIBLE_SHARE]:
        warnings.append(
            f"llm_tau {results['llm']['tau']:g} flags more than {IMPLAUSIBLE_SHARE:.0%} of the visual tokens in layers {high}: "
            "norms grow there, and one threshold does not fit all layers"
        )
    return warnings


def as_toml(result: dict[str, Any]) -> str:
    """The proposal as a TOML [sinks] table with the evidence as comments; only comments if there is nothing to propose."""
    lines = [
        f"# Sink settings from {result['images']} images, backbone {result['backbone'][:12] or 'unknown'} (lsg calibrate).",
        *(f"# {warning}" for warning in result["warnings"]),
    ]
    fields = result["sinks"]
    if not fields:
        return "\n".join([*lines, "# Nothing to propose."]) + "\n"
    lines.append("[sinks]")
    for stage, criterion in (("vit", "criterion"), ("llm", "llm_criterion")):
        if criterion not in fields:
            continue
        lines += _evidence(stage, result[stage], fields[criterion])
        for name in (criterion, f"{stage}_dims", f"{stage}_tau"):
            if name in fields:
                value = fields[name]
                lines.append(f'{name} = "{value}"' if isinstance(value, str) else f"{name} = {value}")
    return "\n".join(lines) + "\n"


def _evidence(stage: str, site: dict[str, Any], criterion: str) -> list[str]:
    kind = "V-sinks (features before the projector)" if stage == "vit" else "L-sinks (residual stream, middle layers)"
    if site["tau"] is not None:
        return [f"# {kind}: confidence {site['confidence']}", *(f"#   {reason}" for reason in site["reasons"])]
    if stage == "vit" and criterion == "norm" and site["norm"] is not None:
        low, high = site["norm"]["gap"]
        return [f"# {kind}: no dimension found, but norms have two modes with a gap from {low:g} to {high:g}"]
    return [f"# {kind}: none found; as the model folder has them"]
