"""Sinks of given images under every criterion, and the attention that they receive.

V-sinks are decided on the features before the projector, L-sinks on the hidden states that enter each decoder layer (HF
`hidden_states[l]`). A group whose criterion lacks its dimensions is left out everywhere, and its tokens count as ordinary. No
value is NaN. `find_sinks` returns, and sinks.json holds:

    format, model, backbone, gated_layers, prompt, template, sinks (the settings in force), warnings (about all images)
    criteria    {stage `vit` | `llm`: {name: {tau, in_force, published, unknown, share, verdict}}}; `unknown`: why it cannot be
                applied, or null; `share`: of the visual tokens that it flags, in the layer with most; `verdict`: `applies`,
                `flags none`, `flags too many` or `unknown`
    images      {name: {
        file        only where files were written: `file`.png is this image in each subfolder (`report.sink_files`)
        size        [width, height] of the original image, in pixels
        boxes       [P][4]: x0, y0, x1, y1 of each visual token, in units of the original image's width and height; outside
                    [0, 1] is padding
        v_sinks     token indices, in the order of the sequence: row by row, and with tiles the whole image first; null where
                    unknown
        l_sinks, ordinary   the same for each layer
        criteria    {stage: {name: the same}}; here L-sinks still include V-sinks
        patches     {boxes, v_sinks}: the patches that the tokens stand for, token by token and row by row within one, and
                    which of them are V-sinks; a token is one if any of its patches is. null where a token is a patch
        norms       of the features, one for each token: the largest of those that it combines
        answer_attention    [L][P], attention of the answer's tokens on each visual token, mean over heads and over the
                    positions that predict them, of a softmax over all tokens; null without an answer. Files written before
                    maps were have no such field
        values      rows {stage, layer, quantity `norm` | `dim 650`, group, tokens, mean, max}: norms, and |h[dim]|
        sink_heads  [L]: tokens that are sinks in at least one head by Gu et al. (`criteria.sink_heads`), text competing
        lot         {score [P], kept}: the score of LoT, and the tokens that it would keep (`criteria.low_sink_scores`), over
                    the outputs of all layers but the last; null where no L-sink dimensions are known
        answer, answer_tokens (without the end marker), warnings}}
    massive_activations {layers, rows {layer, largest, median, tokens}}: the layers that massive activations enter
                (`criteria.has_massive_activations`); |h| of the prompt, and its tokens that reach both thresholds; means
                over images
    sink_heads  rows {layer, tokens `first` | `text` | `visual`, share}: heads in which the first token, another token of
                text, a visual token is a sink by Gu et al.; mean over images
    counts      rows {layer, group, mean, std} of tokens over images
    attention   rows {layer, head, queries, group, share}: queries `prompt` are the prompt's tokens after the last image token,
                `answer` the answer's tokens; mean over images; the shares of each (layer, head, queries) sum to 1
    overlap     {criteria: names, vit: [C, C], llm: [L, C, C]}, Jaccard indices pooled over images; null where neither criterion
                flags a token, or one of them is unknown
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from lsg_jax.analysis.other_criteria import lot, massive_activations, observe_others, sink_head_rows
from lsg_jax.analysis.sink_warnings import Readings, Seen, image_warnings, in_force, run_warnings, verdicts
from lsg_jax.config import to_dict
from lsg_jax.config.ranges import Range
from lsg_jax.data.images import open_image
from lsg_jax.data.layout import ImageSize
from lsg_jax.data.record_shapes import RecordError
from lsg_jax.data.rows import Pixels
from lsg_jax.errors import ConfigError, InputError
from lsg_jax.eval.identity import digests_of
from lsg_jax.gating.keys import GROUPS
from lsg_jax.look.answered import largest_behind, patches_behind, with_answer
from lsg_jax.methods.finite import check_finite
from lsg_jax.methods.method_model import assemble
from lsg_jax.model.multimodal import gather_any
from lsg_jax.progress import Progress, silent, tracing
from lsg_jax.sinks.attention import group_mass, received_attention
from lsg_jax.sinks.criteria import PUBLISHED_TAU, Reading, group_visual_tokens, prominence, side_by_side
from lsg_jax.types import NO_SOURCE, Batch, LayerView
from lsg_jax.vlm import VLM

FORMAT = "lsg-sinks-2"

QUERIES = ("prompt", "answer")
TOKENS = ("text", *GROUPS["three"])


def find_sinks(
    vlm: VLM,
    images: Mapping[str, Image.Image | bytes | str | Path],
    prompt: str,
    *,
    max_new_tokens: int = 16,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Finds the sinks of each image, and measures the attention of the prompt and of the model's greedy answer.

    Args:
        images: name -> the original image, its file or the file's bytes.
        max_new_tokens: maximum length of the answer; 0 measures the prompt alone.
        progress: counts images.

    Returns:
        Plain data; the module docstring describes it.

    Raises:
        InputError: there are no images, one cannot be read, or `max_new_tokens` is negative.
    """
    if not images:
        raise InputError("there is no image to look at")
    Range("[0, 1e8]").check(max_new_tokens, "max_new_tokens", int)
    (vit, llm), seen, entries = _readings(vlm), [], {}
    for done, (name, image) in enumerate(images.items(), 1):
        size, pixels = _prepare(vlm, name, image)
        encoded = vlm.processor.encode_question(prompt, image_sizes=(size,))
        batch, prompt_mask, answer = with_answer(vlm, vlm.pad_questions([encoded], [pixels]), max_new_tokens)
        shown = int((batch.source[0, :, 0] >= 0).sum())
        seen.append(jax.tree.map(np.asarray, _observe(vlm.params, batch, prompt_mask, vlm.graphdef, vit, llm, shown)))
        sizes = seen[-1]["vit"]["norms"], seen[-1]["llm"]["norms"], seen[-1]["llm"]["mass"]
        check_finite(np.concatenate(sizes, axis=None)[None], [name], vlm.method)
        entries[name] = _place(vlm, size, seen[-1]["vit"]["patches"]) | _entry(seen[-1], vit, llm)
        entries[name] |= {"answer": vlm.processor.decode(answer), "answer_tokens": len(answer)}
        entries[name]["answer_attention"] = _digits(seen[-1]["llm"]["answer"]) if len(answer) else None
        if max_new_tokens and not len(answer):
            entries[name]["warnings"].append("the answer ends at once: there is no attention of answer tokens")
        progress(done, len(images), "images")
    return {
        "format": FORMAT,
        "model": str(vlm.folder),
        **digests_of(vlm),
        "gated_layers": list(vlm.gate.layers) if vlm.gate else [],
        "prompt": prompt,
        "template": vlm.processor.template,
        "sinks": to_dict(vlm.config.sinks),
        "criteria": {"vit": _criteria(seen, "vit", vit), "llm": _criteria(seen, "llm", llm)},
        "images": entries,
        "counts": _counts([_groups(s, vit, llm) for s in seen]),
        "attention": _attention(seen, _known_groups(vit, llm)),
        "overlap": _overlap(seen, vit, llm),
        "massive_activations": massive_activations(seen),
        "sink_heads": sink_head_rows(seen),
        "warnings": run_warnings(seen, vit, llm),
    }


def _criteria(seen: Sequence[Seen], stage: str, readings: Readings) -> dict[str, Any]:
    """Settings and verdict of each criterion of a stage."""
    judged = zip(readings, verdicts(seen, stage, readings), strict=True)
    return {reading.criterion: _settings(reading) | verdict for reading, verdict in judged}


def _prepare(vlm: VLM, name: str, image: Image.Image | bytes | str | Path) -> tuple[ImageSize, Pixels | None]:
    """The size of the original image, and its pixels as the model takes them. Raises InputError if it cannot be read."""
    opened = image if isinstance(image, Image.Image) else open_image(image)
    try:
        vlm.processor.layouts([opened.size])
    except RecordError as error:
        raise InputError(f"{name}: {error}") from None
    return opened.size, vlm.processor.all_pixels([opened])


def _place(vlm: VLM, size: ImageSize, v_sinks: np.ndarray) -> dict[str, Any]:
    """Where the tokens lie in the original image, and the patches behind them.

    Args:
        v_sinks: bool [P, merge^2], V-sinks among the patches of each token.
    """
    (layout,) = vlm.processor.layouts([size])
    box = layout.box[layout.source[:, 0] >= 0]
    rounded = lambda boxes: [[round(float(edge), 6) for edge in each] for each in boxes]
    merge, patches = vlm.config.merge, None
    if merge > 1:
        patches = {"boxes": rounded(_divided(box, merge)), "v_sinks": np.flatnonzero(v_sinks).tolist()}
    return {"size": list(size), "boxes": rounded(box), "patches": patches}


def _divided(box: np.ndarray, parts: int) -> np.ndarray:
    """Boxes [n, 4], each cut into `parts` x `parts`, row by row: [n parts^2, 4]."""
    start, step = box[:, None, :2], (box[:, None, 2:] - box[:, None, :2]) / parts
    row, column = np.divmod(np.arange(parts**2), parts)
    corner = start + step * np.stack([column, row], axis=-1)
    return np.concatenate([corner, corner + step], axis=-1).reshape(-1, 4)


def _readings(vlm: VLM) -> tuple[Readings, Readings]:
    vit, llm = side_by_side(vlm.config.sinks, "vit"), side_by_side(vlm.config.sinks, "llm")
    positions = vlm.config.vision.num_layers + 1
    if all(layer % positions == 0 for layer in vlm.config.feature_layers):  # hidden state 0, which no attention has made
        why = "the features are the ViT's embeddings: no attention has made them"
        if vlm.config.sinks.criterion == "attention_share":
            raise ConfigError(f"sinks.criterion attention_share: {why}; choose another")
        vit = tuple(dataclasses.replace(r, unknown=why) if r.criterion == "attention_share" else r for r in vit)
    return vit, llm


def _settings(reading: Reading) -> dict[str, Any]:
    published = reading.tau == PUBLISHED_TAU.get(reading.criterion)
    fields = {"tau": reading.tau, "in_force": reading.in_force, "published": published, "unknown": reading.unknown}
    return fields | ({"massive_ratio": reading.massive_ratio} if reading.criterion == "massive" else {})


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6))
def _observe(
    params: dict, batch: Batch, prompt: jax.Array, graphdef: Any, vit: Readings, llm: Readings, count: int
) -> dict[str, Any]:
    """Masks, sizes and attention mass of one image; attention weights are reduced within each layer and never stored.

    Returns:
        {"vit": {masks bool [C, P], norms [P], dims [P, d], patches bool [P, K merge^2], the V-sinks behind each token by the
        criterion in force}, "llm": masks, norms and dims with leading L, answer float32 [L, P], the attention of the answer's
        tokens, mass float32 [L, 2, N, 4], that of QUERIES on TOKENS, and what `other_criteria.observe_others` returns}.
    """
    tracing("the pass that measures sinks", batch.input_ids)
    model = assemble(graphdef, params)
    sequence = model.sequence(batch)
    visual, valid = sequence.visual, jnp.asarray(batch.attention_mask)
    assert visual is not None
    patches = jnp.flatnonzero(visual.mask[0], size=count)
    positions = jnp.arange(valid.shape[1])
    last = jnp.max(jnp.where(jnp.asarray(batch.source)[0, :, 0] != NO_SOURCE, positions, -1))  # of the image, newline included
    asking = (prompt & (positions > last), valid & ~prompt)
    predicting = jnp.roll(valid & ~prompt, -1, axis=1)  # the positions whose output is a token of the answer

    def observe(view: LayerView) -> dict[str, jax.Array]:
        received = received_attention(view.attention, prompt)
        masks = [r.mask(view.hidden, visual.mask if r.criterion == "attention_share" else prompt, received) for r in llm]
        groups = group_visual_tokens(visual, next(m for m, r in zip(masks, llm, strict=True) if r.in_force))
        members = jnp.stack([valid & ~visual.mask, groups.v_sink, groups.l_sink, groups.ordinary], axis=-1)
        mass = jnp.stack([group_mass(view.attention, queries, members)[0] for queries in asking])
        standing = jnp.where(valid[0, :, None], prominence(view.hidden[0], llm[0].dims), 0.0).max(0)
        sizes = _sizes(view.hidden[0, patches], llm)
        found = {"masks": jnp.stack([m[0, patches] for m in masks]), "mass": mass, "prominence": standing}
        found |= observe_others(view, prompt, visual.mask, patches, llm)
        return found | {"answer": received_attention(view.attention, predicting)[0, patches], **sizes}

    seen = model(batch, sequence=sequence, observe=observe, observe_attention=True).observed
    # the tower returns attention weights only if the criterion in force is `attention_share`
    sinks, attention = model.config.sinks, next(r for r in vit if r.criterion == "attention_share")
    if not attention.unknown:
        sinks = dataclasses.replace(sinks, criterion="attention_share", vit_tau=attention.tau)
    assert batch.images is not None
    features, by_attention = model.image_features(batch.images, sinks=sinks)
    by_tile = features.reshape(batch.images.patches.shape[1], -1, features.shape[-1])  # as the model judges them
    used = jnp.ones(by_tile.shape[:2], bool) if batch.images.used is None else jnp.asarray(batch.images.used)[0]
    judge = lambda r: r.mask(by_tile, used, None).reshape(by_attention.shape)
    masks = [by_attention if r is attention and not r.unknown else judge(r) for r in vit]
    shown = patches_behind(batch.source, patches, features.shape[1], model.config)
    of_tokens = jax.tree.map(lambda sizes: largest_behind(sizes, shown), _sizes(features[0], vit))
    of_tokens["prominence"] = largest_behind(prominence(features[0], vit[0].dims), shown).max(0)
    of_tokens["patches"] = masks[in_force(vit)][0][shown] & (shown >= 0)
    return {"vit": {"masks": jnp.stack([gather_any(m, shown[None])[0] for m in masks]), **of_tokens}, "llm": seen}


def _sizes(states: jax.Array, readings: Readings) -> dict[str, jax.Array]:
    """Norms [P] of states [P, D], and |h[d]| [P, d] of the known dimensions."""
    states = states.astype(jnp.float32)
    return {"norms": jnp.linalg.norm(states, axis=-1), "dims": jnp.abs(states[:, jnp.array(readings[0].dims, int)])}


def _known_groups(vit: Readings, llm: Readings) -> list[str]:
    unknown = {"v_sink": vit[in_force(vit)].unknown, "l_sink": llm[in_force(llm)].unknown}
    return [group for group in TOKENS if not unknown.get(group)]


def _groups(seen: Seen, vit: Readings, llm: Readings) -> dict[str, np.ndarray]:
    """{known group: bool [L, P]}, the patches in it at each layer."""
    raised = seen["llm"]["masks"][:, in_force(llm)]
    v_sink = np.broadcast_to(seen["vit"]["masks"][in_force(vit)], raised.shape)
    masks = {"v_sink": v_sink, "l_sink": raised & ~v_sink, "ordinary": ~raised & ~v_sink}
    return {group: masks[group] for group in _known_groups(vit, llm) if group in masks}


def _digits(values: np.ndarray) -> list[Any]:
    """float32 [L, P] as lists, to four significant digits."""
    return [[float(f"{value:.4g}") for value in row] for row in values]


def _indices(mask: np.ndarray) -> list[Any]:
    """Indices at which a mask [P] is true; for [L, P] a list of such lists."""
    return np.flatnonzero(mask).tolist() if mask.ndim == 1 else [_indices(row) for row in mask]


def _entry(seen: Seen, vit: Readings, llm: Readings) -> dict[str, Any]:
    groups = _groups(seen, vit, llm)
    criteria: dict[str, Any] = {
        stage: {
            reading.criterion: None if reading.unknown else _indices(seen[stage]["masks"][..., index, :])
            for index, reading in enumerate(readings)
        }
        for stage, readings in (("vit", vit), ("llm", llm))
    }
    v_sink = {group: mask[0] for group, mask in groups.items() if group == "v_sink"}
    # L-sinks exist in the language model only: before it all other tokens are ordinary
    others = ~v_sink["v_sink"] if v_sink else np.ones(len(seen["vit"]["norms"]), bool)
    values = _values("vit", None, seen["vit"], v_sink | {"ordinary": others}, vit)
    for layer in range(len(seen["llm"]["norms"])):
        sizes = {name: seen["llm"][name][layer] for name in ("norms", "dims")}
        values += _values("llm", layer, sizes, {group: mask[layer] for group, mask in groups.items()}, llm)
    entry: dict[str, Any] = {
        "v_sinks": _indices(groups["v_sink"][0]) if "v_sink" in groups else None,
        "l_sinks": _indices(groups["l_sink"]) if "l_sink" in groups else None,
        "ordinary": _indices(groups["ordinary"]),
        "criteria": criteria,
        "norms": [round(float(n), 4) for n in seen["vit"]["norms"]],
        "values": values,
        "sink_heads": _indices(seen["llm"]["head_sinks"]),
        "lot": lot(seen["llm"]["dim_rms"]),
    }
    return entry | {"warnings": image_warnings(entry, len(entry["norms"]))}


def _values(stage: str, layer: int | None, sizes: Seen, groups: Mapping[str, np.ndarray], readings: Readings) -> list[dict]:
    """Rows of norms and sink dimensions, by group."""
    columns = {"norm": sizes["norms"]}
    columns |= {f"dim {dim}": sizes["dims"][:, place] for place, dim in enumerate(readings[0].dims)}
    return [
        {
            "stage": stage,
            "layer": layer,
            "quantity": quantity,
            "group": group,
            "tokens": int(mask.sum()),
            # a group without tokens has no mean
            "mean": round(float(column[mask].mean()), 4) if mask.any() else None,
            "max": round(float(column[mask].max()), 4) if mask.any() else None,
        }
        for quantity, column in columns.items()
        for group, mask in groups.items()
    ]


def _counts(groups: Sequence[Mapping[str, np.ndarray]]) -> list[dict[str, Any]]:
    rows = []
    for group in groups[0]:
        tokens = np.stack([g[group].sum(-1) for g in groups])  # [images, L]
        for layer, (mean, std) in enumerate(zip(tokens.mean(0), tokens.std(0), strict=True)):
            rows.append({"layer": layer, "group": group, "mean": round(float(mean), 4), "std": round(float(std), 4)})
    return sorted(rows, key=lambda row: row["layer"])


def _attention(seen: Sequence[Seen], known: Sequence[str]) -> list[dict[str, Any]]:
    mass = np.stack([s["llm"]["mass"] for s in seen])  # [images, L, 2, N, 4]
    # an unknown group has no tokens, so its share is left out
    columns = [(group, TOKENS.index(group)) for group in known]
    rows = []
    for index, queries in enumerate(QUERIES):
        kept = [each for each in mass[:, :, index] if each.any()]  # all zeros: the image has no such queries
        if not kept:
            continue
        mean = np.stack(kept).mean(0, dtype=np.float64)
        rows += [
            {"layer": layer, "head": head, "queries": queries, "group": group, "share": round(float(mean[layer, head, at]), 6)}
            for layer in range(mean.shape[0])
            for head in range(mean.shape[1])
            for group, at in columns
        ]
    return rows


def _overlap(seen: Sequence[Seen], vit: Readings, llm: Readings) -> dict[str, Any]:
    vit_masks = np.concatenate([s["vit"]["masks"] for s in seen], axis=-1)
    llm_masks = np.concatenate([s["llm"]["masks"] for s in seen], axis=-1)
    return {
        "criteria": [reading.criterion for reading in vit],
        "vit": _jaccard(vit_masks, vit),
        "llm": [_jaccard(masks, llm) for masks in llm_masks],
    }


def _jaccard(masks: np.ndarray, readings: Readings) -> list[list[float | None]]:
    """Intersection over union of each pair of masks bool [C, N]; null if both are empty, or one is unknown."""
    flagged = masks.astype(np.int64)
    both = flagged @ flagged.T
    either = flagged.sum(1)[:, None] + flagged.sum(1) - both
    unknown = np.array([reading.unknown is not None for reading in readings])
    either[unknown], either[:, unknown] = 0, 0
    return [
        [round(float(b / e), 4) if e else None for b, e in zip(*rows, strict=True)] for rows in zip(both, either, strict=True)
    ]
