"""Do the maps of `vlm.look` point at what a question asks about? The pointing game (Zhang et al., arXiv 1608.00507).

Questions about rendered scenes know the box of what answers them (`data.scene_targets`). A map is read at the last token of the
prompt, which predicts the answer's first token.

A visual token is *on the target* if, across and down alike, its box and the target's share at least half of the shorter of the
two extents. So where tokens tile the picture, at least one is. A map *hits* if its largest value is on the target; a map of
zeros does not hit. Its *share* is what the tokens on the target hold of its sum. *Chance* is the part of visual tokens that
is on the target: the hit rate of a random token, and the share of a map that is the same everywhere.

Layers and heads differ, and the best of many is good by luck too. So the best are chosen on questions of another split
(`chosen_on`) and reported on those of `split`, where all other numbers come from too. `pointing_study` returns, and
pointing.json holds:

    format, model, backbone, gated_layers, template, sinks (the settings in force), the fields of PointingSettings, chosen_on,
    warnings
    kinds       {kind: {target, questions, chance}}; the kind `all` pools the others
    rows        {kind, map, layer, hit, low, high, share, share_low, share_high}, of the mean over heads
    changes     {kind, map, layer, hit, low, high, better, worse, p_value, share, share_low, share_high}: the map minus `raw`;
                better and worse: questions that only it, and only `raw`, hits
    best        {kind, map, choice `layer` | `head`, layer, head, chosen, hit, low, high, change, change_low, change_high,
                p_value}: `layer` is the best layer of the mean over heads (head is null), `head` the best single head; chosen:
                its hit rate where it was chosen; change: of `hit` over that of `raw` with a choice of its own, or null
    heads       {kind: {map: [L][N] hit rates of single heads}}
    attention   {kind, layer, share, visual}: what sinks draw of the attention on visual tokens, and these of all

Rates and shares are fractions. Intervals cover 95 %: Wilson's of hit rates, else bootstrap ones over questions. p_value is that
of McNemar's exact test.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lsg_jax.analysis.pointing_rows import Measured, best_rows, change_rows, hit_rows, pooled
from lsg_jax.checkpoint.processes import host_array
from lsg_jax.config import to_dict
from lsg_jax.config.ranges import Range, Table
from lsg_jax.data.drawing import Box, draw
from lsg_jax.data.scene_questions import SceneQuestion, Split
from lsg_jax.data.scene_targets import TARGETS, questions_with_target, target_box
from lsg_jax.errors import ConfigError
from lsg_jax.eval.identity import digests_of
from lsg_jax.look.compute import boxes, reading
from lsg_jax.look.look import MAPS, NEUTRAL_PROMPT, relative_to, without_sinks
from lsg_jax.methods.finite import check_finite
from lsg_jax.methods.method_model import assemble
from lsg_jax.progress import Progress, silent, tracing
from lsg_jax.sinks.attention import received_attention
from lsg_jax.sinks.criteria import Reading, group_visual_tokens
from lsg_jax.types import Batch, LayerView
from lsg_jax.vlm import VLM

FORMAT = "lsg-pointing-1"
ALL = "all"
OVERLAP = 0.5
"""Of the shorter of two extents: a token that shares so much with the target, across and down, is on it."""

ROUNDING = 1e-6
"""Boxes of tokens are float32: exactly half must count."""

CHOSEN_ON: dict[Split, Split] = {"test": "validation", "validation": "train", "train": "validation"}
"""Split of the questions -> split on which layers and heads are chosen."""


@dataclass(frozen=True)
class PointingSettings(Table, name="pointing"):
    """What is asked.

    `questions` of each of `kinds` come from `split`, and as many from another one that choose layers and heads. `maps` as
    `vlm.look` takes them; `raw`, which the others are compared with, is always made.
    """

    kinds: tuple[str, ...] = tuple(TARGETS)
    questions: Annotated[int, Range("[2, 1e6]")] = 200
    split: Split = "test"
    maps: tuple[str, ...] = ("raw", "no_sinks")
    seed: Annotated[int, Range("[0, 4294967295]")] = 0
    batch_size: Annotated[int, Range("[1, 1e5]")] = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, given, known in (
            ("kinds", self.kinds, TARGETS),
            ("maps", self.maps, MAPS),
            ("split", (self.split,), CHOSEN_ON),
        ):
            if unknown := [each for each in given if each not in known]:
                raise ConfigError(f"pointing.{name}: there is no {unknown[0]}; choose among {', '.join(known)}")

    @property
    def all_maps(self) -> tuple[str, ...]:
        """`maps`, `raw` first."""
        return tuple(dict.fromkeys(("raw", *self.maps)))


@dataclass(frozen=True)
class TargetQuestion:
    """A picture, a question about it, and the box in it that has the answer."""

    picture: Image.Image
    prompt: str
    target: Box


def on_target(boxes: NDArray[np.floating], target: Box) -> NDArray[np.bool_]:
    """Which of the boxes [V, 4] share at least half of the shorter extent with the target, across and down: bool [V]."""
    boxes = boxes.astype(np.float64)
    common = np.minimum(boxes[:, 2:], target[2:]) - np.maximum(boxes[:, :2], target[:2])
    shorter = np.minimum(boxes[:, 2:] - boxes[:, :2], np.subtract(target[2:], target[:2]))
    return np.asarray((common >= (OVERLAP - ROUNDING) * shorter).all(1) & (shorter > 0).all(1))


def pointing_study(vlm: VLM, settings: PointingSettings, *, progress: Progress = silent) -> dict[str, Any]:
    """Asks the questions, and measures where the maps point; see the module docstring for what comes back.

    Args:
        progress: counts questions.
    """
    llm = reading(vlm.config.sinks, "llm")
    splits = (settings.split, CHOSEN_ON[settings.split])
    total, done = len(splits) * len(settings.kinds) * settings.questions, 0
    found: dict[str, dict[str, Measured]] = {split: {} for split in splits}
    for split in splits:
        for kind in settings.kinds:
            asked = questions_with_target(split, kind, settings.questions, seed=settings.seed)
            parts = []
            for start in range(0, len(asked), settings.batch_size):
                some = [scene_target(question) for question in asked[start : start + settings.batch_size]]
                parts.append(measure(vlm, some, settings.all_maps, llm))
                done += len(some)
                progress(done, total, "questions")
            found[split][kind] = pooled(parts)
        if len(settings.kinds) > 1:
            found[split][ALL] = pooled(list(found[split].values()))
    return _result(vlm, settings, found[splits[0]], found[splits[1]])


def scene_target(question: SceneQuestion) -> TargetQuestion:
    """The question with its picture, 224 x 224 pixels as in the benchmark `scenes`."""
    target = target_box(question)
    assert target is not None
    return TargetQuestion(Image.fromarray(draw(question.scene)), question.prompt, target)


def measure(vlm: VLM, asked: Sequence[TargetQuestion], maps: Sequence[str], llm: Reading | None = None) -> Measured:
    """Runs a batch of questions, and measures each map on each target."""
    llm = llm or reading(vlm.config.sinks, "llm")
    rows = _attention(vlm, asked, [each.prompt for each in asked], llm)
    neutral = _attention(vlm, asked, [NEUTRAL_PROMPT] * len(asked), llm) if "relative" in maps else [None] * len(asked)
    each = []
    for question, row, beside in zip(asked, rows, neutral, strict=True):
        on = on_target(row.box, question.target)
        each.append(measure_maps(row.weights, row.sinks, on, maps, None if beside is None else beside.weights))
    return pooled(each)


def measure_maps(
    weights: NDArray[np.float32],
    sinks: NDArray[np.bool_],
    on: NDArray[np.bool_],
    maps: Sequence[str],
    neutral: NDArray[np.float32] | None = None,
) -> Measured:
    """The measures of one question.

    Args:
        weights: [L, N, V], attention of one position on the visual tokens.
        sinks: [L, V].
        on: [V], tokens on the target.
        neutral: as `weights`, of the position after the neutral prompt; for the map `relative`.
    """

    def made(name: str, raw: NDArray[np.float32], beside: NDArray[np.float32] | None) -> NDArray[np.float32]:
        if name == "no_sinks":
            return without_sinks(raw[None], sinks)[0]
        return raw if beside is None or name == "raw" else relative_to(raw[None], beside)[0]

    averaged = weights.mean(1), None if neutral is None else neutral.mean(1)
    of_mean = np.stack([made(name, *averaged) for name in maps])  # [M, L, V]
    of_heads = np.stack([made(name, weights, neutral) for name in maps])  # [M, L, N, V]
    hits = lambda values: on[values.argmax(-1)] & (values.max(-1) > 0)
    share = lambda values, some: np.where(some, values, 0).sum(-1) / np.maximum(values.sum(-1), np.finfo(np.float32).tiny)
    return Measured(
        hit=hits(of_mean)[None],
        share=share(of_mean, on)[None],
        head_hit=hits(of_heads)[None],
        chance=np.array([on.mean()]),
        sink_share=share(averaged[0], sinks)[None],
        visual=averaged[0].sum(-1)[None],
    )


@dataclass(frozen=True)
class _Row:
    """Of one question: weights float32 [L, N, V], sinks bool [L, V], box float32 [V, 4]."""

    weights: NDArray[np.float32]
    sinks: NDArray[np.bool_]
    box: NDArray[np.float32]


def _attention(vlm: VLM, asked: Sequence[TargetQuestion], prompts: Sequence[str], llm: Reading) -> list[_Row]:
    """The attention of the last prompt token of each question on its visual tokens."""
    batch = vlm.questions([[each.picture] for each in asked], prompts)
    seen = jax.tree.map(host_array, _observe(vlm.params, batch, vlm.graphdef, llm))
    rows = []
    for row, each in enumerate(asked):
        places = np.flatnonzero(np.asarray(batch.source)[row, :, 0] >= 0)
        box, _ = boxes(vlm, [each.picture], None if seen["order"] is None else seen["order"][row])
        shown = seen["visual"][row, places]
        places = places[shown]
        sinks = seen["v_sink"][row, places] | seen["l_sink"][:, row, places]
        weights = seen["weights"][:, row][..., places]
        check_finite(weights[None], [f"question {each.prompt!r}"], vlm.method)
        rows.append(_Row(weights, sinks, box[shown]))
    return rows


@functools.partial(jax.jit, static_argnums=(2, 3))
def _observe(params: dict, batch: Batch, graphdef: Any, llm: Reading) -> dict[str, Any]:
    """One pass over a batch; attention weights are kept for the last prompt token of each row alone.

    Returns:
        weights float32 [L, B, N, T]; l_sink bool [L, B, T]; visual and v_sink bool [B, T]; order int32 [B, V] of a method that
        moves tokens, else None.
    """
    tracing("the pass that looks at attention", batch.input_ids)
    model = assemble(graphdef, params)
    assert batch.images is not None
    encoded = model.encode_images(batch.images)
    sequence = model.sequence(batch, encoded)
    visual, valid = sequence.visual, jnp.asarray(batch.attention_mask)
    assert visual is not None
    last = jnp.asarray(batch.gate_position)[:, None]
    by_attention = llm.criterion == "attention_share" and not llm.unknown

    def observe(view: LayerView) -> dict[str, jax.Array]:
        weights, received = view.attention, jnp.zeros(valid.shape, jnp.float32)
        if by_attention:
            received = received_attention(weights, valid)
            weights = jnp.take_along_axis(weights, last[:, None, :, None], axis=2)
        raised = llm.mask(view.hidden, visual.mask if by_attention else valid, received)
        return {"weights": weights[:, :, 0], "l_sink": group_visual_tokens(visual, raised).l_sink}

    seen = model(batch, sequence=sequence, observe=observe, observe_attention=True if by_attention else last).observed
    order = model.connect(encoded.features, encoded.v_sink, batch, model.language_model.embed(batch.input_ids)).order
    return {**seen, "visual": visual.mask, "v_sink": visual.v_sink, "order": order}


def _result(
    vlm: VLM, settings: PointingSettings, found: Mapping[str, Measured], choosing: Mapping[str, Measured]
) -> dict[str, Any]:
    maps = settings.all_maps
    unknown = {"vit": reading(vlm.config.sinks, "vit").unknown, "llm": reading(vlm.config.sinks, "llm").unknown}
    rows: dict[str, list[dict[str, Any]]] = {"rows": [], "changes": [], "best": [], "attention": []}
    for kind, own in found.items():
        named = lambda some, kind=kind: [{"kind": kind, **row} for row in some]
        rows["rows"] += named(hit_rows(own, maps))
        rows["changes"] += named(change_rows(own, maps))
        rows["best"] += named(best_rows(own, choosing[kind], maps))
        drawn = zip(own.sink_share.mean(0).tolist(), own.visual.mean(0).tolist(), strict=True)
        rows["attention"] += named(
            {"layer": layer, "share": share, "visual": seen} for layer, (share, seen) in enumerate(drawn)
        )
    return {
        "format": FORMAT,
        "model": str(vlm.folder),
        **digests_of(vlm),
        "gated_layers": list(vlm.gate.layers) if vlm.gate else [],
        "template": vlm.processor.template,
        "sinks": to_dict(vlm.config.sinks),
        **to_dict(settings),
        "maps": list(maps),
        "chosen_on": CHOSEN_ON[settings.split],
        "warnings": [
            f"{name} are not taken out: {unknown[stage]} (`lsg calibrate` finds them)"
            for name, stage in (("V-sinks", "vit"), ("L-sinks", "llm"))
            if unknown[stage]
        ],
        "kinds": {
            kind: {"target": TARGETS.get(kind), "questions": len(own.hit), "chance": float(own.chance.mean())}
            for kind, own in found.items()
        },
        **rows,
        "heads": {kind: dict(zip(maps, own.head_hit.mean(0).tolist(), strict=True)) for kind, own in found.items()},
    }
