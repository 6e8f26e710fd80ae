"""Runs a question, its answer, and the pass that the attention of the answer's tokens is taken from."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from lsg_jax.checkpoint.processes import host_array, tree_sha256
from lsg_jax.config import SinkConfig, to_dict
from lsg_jax.config.ranges import Range
from lsg_jax.data.images import opened_images
from lsg_jax.errors import InputError
from lsg_jax.look.answered import largest_behind, patches_behind, with_answer
from lsg_jax.look.look import MAPS, NEUTRAL_PROMPT, Criterion, Look, relative_to, without_sinks
from lsg_jax.memory import check_fits
from lsg_jax.methods.finite import check_finite
from lsg_jax.methods.method import BASE, Method
from lsg_jax.methods.method_model import assemble
from lsg_jax.methods.registry import name_of
from lsg_jax.model.layers import layer_at
from lsg_jax.progress import tracing
from lsg_jax.sinks.attention import received_attention
from lsg_jax.sinks.criteria import Reading, group_visual_tokens, side_by_side, sink_value
from lsg_jax.types import Batch, LayerView
from lsg_jax.vlm import VLM

Layers = tuple[int, ...]


def look(
    vlm: VLM,
    images: Any,
    prompt: str,
    max_new_tokens: int = 32,
    *,
    maps: Sequence[str] = ("raw", "no_sinks"),
    layers: Sequence[int] = (),
    most_text: int | None = None,
) -> Look:
    """`VLM.look` has the description. `most_text`: InputError if the prompt has more tokens, images aside."""
    _check(vlm, prompt, max_new_tokens, maps, layers)
    pictures = opened_images(images)
    if not pictures:
        raise InputError("there is no image to look at")
    batch = vlm.questions([pictures], [prompt])
    text, count = vlm.config.text, len(_places(batch))
    if most_text is not None and (length := int(np.asarray(batch.attention_mask).sum()) - count) > most_text:
        raise InputError(f"the question has {length:,} tokens: {most_text:,} is the most")
    needed = 4.0 * max_new_tokens * text.num_layers * text.num_heads * count
    check_fits(needed, f"a map of {max_new_tokens} answer tokens on {count} visual tokens", "lower max_new_tokens", host=True)
    whole, _, answer = with_answer(vlm, batch, max_new_tokens)
    seen = _observed(vlm, whole, max_new_tokens, tuple(layers))
    shown = seen.pop("visual")
    mine = lambda name: seen[name][..., shown]
    raw = mine("weights").transpose(2, 0, 1, 3)[: len(answer)]  # [A, L, N, V]
    check_finite(raw, ["the attention of an answer token"] * len(raw), vlm.method)
    v_sink, l_sink = mine("v_sink"), mine("l_sink")
    neutral = _neutral(vlm, pictures, max_new_tokens)[..., shown] if "relative" in maps else None
    made = {
        "raw": lambda: raw,
        "no_sinks": lambda: without_sinks(raw, v_sink | l_sink),
        "relative": lambda: relative_to(raw, neutral),  # type: ignore[arg-type]
    }
    valid = np.asarray(whole.attention_mask)[0]
    places = _places(whole)[shown]
    criteria, box, image = _criteria(vlm), *boxes(vlm, pictures, seen["order"])
    return Look(
        prompt=prompt,
        answer=vlm.processor.decode(answer),
        tokens=pieces(vlm, answer),
        maps={name: made[name]() for name in dict.fromkeys(("raw", *maps))},
        box=box[shown],
        image=image[shown],
        v_sink=v_sink,
        l_sink=l_sink,
        v_value=mine("v_value"),
        l_value=mine("l_value"),
        criteria=criteria,
        pictures=pictures,
        visual=(np.cumsum(valid) - 1)[places].astype(np.int32),
        neutral=neutral,
        hidden={layer: seen["hidden"][index][valid] for index, layer in enumerate(layers)},
        attention={layer: seen["attention"][index][:, valid][..., valid] for index, layer in enumerate(layers)},
        warnings=_warnings(criteria, v_sink, l_sink, maps),
        model=_model(vlm),
    )


def _model(vlm: VLM) -> dict[str, str | None]:
    """`Look.model`."""
    trained = tree_sha256(vlm.trained) if vlm.trained else None
    name = "" if vlm.folder is None else vlm.folder.absolute().name
    return {"name": name, "backbone": vlm.digest, "trained": trained, "method": in_words(vlm.method)}


def in_words(method: Method) -> str:
    """A method with those of its settings that are not the default, such as `pai alpha=0.3`."""
    if method == BASE:
        return ""
    if method.gate is not None:
        return f"gates at layer{'s' * (len(method.gate.layers) > 1)} {', '.join(map(str, method.gate.layers))}"
    settings = {} if method.settings is None else to_dict(method.settings)
    default = {} if method.settings is None else to_dict(type(method.settings)())
    return " ".join([name_of(method), *(f"{name}={value}" for name, value in settings.items() if value != default[name])])


def _check(vlm: VLM, prompt: Any, max_new_tokens: Any, maps: Any, layers: Any) -> None:
    """Raises InputError or ConfigError for arguments of `look` that nothing can be made of."""
    if not isinstance(prompt, str):
        raise InputError(f"the prompt is of type {type(prompt).__name__}; give a text")
    if isinstance(maps, str) or not isinstance(layers, (list, tuple, range)):
        raise InputError('maps and layers: give lists, such as maps=["raw"] and layers=[3]')
    if unknown := [name for name in maps if name not in MAPS]:
        raise InputError(f"there is no map {unknown[0]}: choose among {', '.join(MAPS)}")
    for layer in layers:
        Range(f"[0, {vlm.config.text.num_layers - 1}]").check(layer, "a layer", int)
    Range("[1, 1e8]").check(max_new_tokens, "max_new_tokens", int)  # there is a map for each token of an answer


def pieces(vlm: VLM, answer: np.ndarray) -> list[str]:
    """The text that each token adds to the answer; together they are the answer."""
    texts = [vlm.processor.decode(answer[:end]) for end in range(len(answer) + 1)]
    found, kept = [], ""
    for text in texts[1:]:
        # a token may be a part of a character, which stands as U+FFFD until it is whole
        whole = text.rstrip("\ufffd") if text is not texts[-1] else text
        found.append(whole[len(kept) :] if whole.startswith(kept) else "")
        kept = whole if whole.startswith(kept) else kept
    return found


def _places(batch: Batch) -> np.ndarray:
    """Positions of image tokens in the one row of a batch, newlines left out."""
    return np.flatnonzero(np.asarray(batch.source)[0, :, 0] >= 0)


def _neutral(vlm: VLM, pictures: Sequence[Image.Image], room: int) -> np.ndarray:
    """float32 [L, N, V], the attention of the position after the neutral prompt; its shapes are those of a question."""
    batch = vlm.questions([pictures], [NEUTRAL_PROMPT])
    whole, *_ = with_answer(vlm, batch, room, answer=np.zeros(0, np.int32))
    weights: np.ndarray = _observed(vlm, whole, room, ())["weights"]
    return weights[:, :, 0]


def _criteria(vlm: VLM) -> dict[str, Criterion]:
    readings = {"vit": reading(vlm.config.sinks, "vit"), "llm": reading(vlm.config.sinks, "llm")}
    return {stage: Criterion(each.criterion, each.tau, each.unknown) for stage, each in readings.items()}


def reading(sinks: SinkConfig, stage: Literal["vit", "llm"]) -> Reading:
    """The criterion in force."""
    return next(each for each in side_by_side(sinks, stage) if each.in_force)


def _warnings(criteria: dict[str, Criterion], v_sink: np.ndarray, l_sink: np.ndarray, maps: Sequence[str]) -> list[str]:
    warnings = []
    for kind, stage in (("V-sinks", "vit"), ("L-sinks", "llm")):
        if criteria[stage].unknown and "no_sinks" in maps:
            warnings.append(f"{kind} are not taken out: {criteria[stage].unknown} (`lsg calibrate` finds them)")
    if "no_sinks" in maps and not (v_sink.any() or l_sink.any()):
        warnings.append(
            "no visual token is a sink here, so the map without sinks is that of all attention, as shares of its sum"
        )
    if v_sink.mean() > 0.5:
        count = int(v_sink.sum())
        warnings.append(f"{count} of {len(v_sink)} visual tokens are V-sinks: sinks.vit_tau is implausibly low")
    return warnings


def boxes(vlm: VLM, pictures: Sequence[Image.Image], order: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Boxes float32 [V, 4] of all image tokens of a prompt, and the images int32 [V] that they show.

    Args:
        order: `ConnectorTokens.order`, of a method that moves tokens.
    """
    layouts = vlm.processor.layouts([picture.size for picture in pictures])
    own = [layout.source[:, 0] >= 0 for layout in layouts]
    box = np.concatenate([layout.box[mine] for layout, mine in zip(layouts, own, strict=True)])
    image = np.repeat(np.arange(len(layouts), dtype=np.int32), [int(mine.sum()) for mine in own])
    if order is not None:
        box, image = box[order[: len(box)]], image[order[: len(box)]]
    return box, image


def _observed(vlm: VLM, batch: Batch, count: int, layers: Layers) -> dict[str, Any]:
    """`_observe` on the host, its visual tokens reduced to a mask over those of `_places`.

    Args:
        batch: one row, a left-padded prompt and room for `count` tokens.
    """
    places = _places(batch)
    start = batch.input_ids.shape[1] - count  # of the answer; the position before it predicts its first token
    rows = np.arange(start - 1, start - 1 + count, dtype=np.int32)[None]
    prompt = np.asarray(batch.attention_mask) & (np.arange(batch.input_ids.shape[1]) < start)
    vit, llm = reading(vlm.config.sinks, "vit"), reading(vlm.config.sinks, "llm")
    found = observe(vlm.params, batch, rows, places.astype(np.int32), prompt, vlm.graphdef, vit, llm, layers)
    return jax.tree.map(host_array, found)


@functools.partial(jax.jit, static_argnums=(5, 6, 7, 8))
def observe(
    params: dict,
    batch: Batch,
    rows: jax.Array,
    places: jax.Array,
    prompt: jax.Array,
    graphdef: Any,
    vit: Reading,
    llm: Reading,
    layers: Layers,
) -> dict[str, Any]:
    """One pass over one row. Attention weights of a layer are computed for `rows` alone, and kept for visual tokens alone.

    Args:
        rows: int32 [1, A], positions whose attention is wanted.
        places: int32 [V], positions of image tokens.
        prompt: bool [1, T], the prompt's tokens.
        layers: those whose states and whole attention are wanted.

    Returns:
        weights float32 [L, N, A, V]; v_sink and visual bool [V]; l_sink bool and l_value float32 [L, V]; v_value float32 [V];
        order int32 [V] of a method that moves tokens, else None; hidden float32 [layers, T, D] and attention
        float32 [layers, N, T, T].
    """
    tracing("the pass that looks at attention", batch.input_ids)
    model = assemble(graphdef, params)
    assert batch.images is not None
    encoded = model.encode_images(batch.images)
    sequence = model.sequence(batch, encoded)
    visual = sequence.visual
    assert visual is not None
    received_matters = llm.criterion == "attention_share" and not llm.unknown

    def observe_layer(view: LayerView) -> dict[str, jax.Array]:
        weights, received = view.attention, jnp.zeros(prompt.shape, jnp.float32)
        if received_matters:
            received = received_attention(weights, prompt)
            weights = weights[:, :, rows[0]]
        among = visual.mask if received_matters else prompt
        raised = llm.mask(view.hidden, among, received)
        value = jnp.full(prompt.shape, jnp.nan)
        if not llm.unknown:
            value = sink_value(llm.criterion, view.hidden, dims=llm.dims, received=received, among=visual.mask)
        l_sink = group_visual_tokens(visual, raised).l_sink[0, places]
        found = {"weights": weights[0][..., places], "l_sink": l_sink, "l_value": value[0, places]}
        return found | ({"hidden": view.hidden[0]} if layers else {})

    seen = model(batch, sequence=sequence, observe=observe_layer, observe_attention=received_matters or rows).observed
    order = model.connect(encoded.features, encoded.v_sink, batch, model.language_model.embed(batch.input_ids)).order
    found = {
        "v_sink": visual.v_sink[0, places],
        "visual": visual.mask[0, places],
        "v_value": _v_value(model, encoded.features, batch, places, vit),
        "order": None if order is None else order[0],
    }
    if layers:
        found["hidden"] = seen["hidden"][jnp.array(layers)].astype(jnp.float32)
        found["attention"] = _whole_attention(model, batch, sequence, seen["hidden"], layers)
    return seen | found


def _v_value(model: Any, features: jax.Array, batch: Batch, places: jax.Array, vit: Reading) -> jax.Array:
    """float32 [V], what the criterion of V-sinks compares, the largest of the patches behind each token; NaN if not known."""
    if vit.criterion == "attention_share" or vit.unknown:
        return jnp.full(places.shape, jnp.nan)
    nothing = jnp.zeros(features.shape[:2])
    value = sink_value(vit.criterion, features, dims=vit.dims, received=nothing, among=nothing)
    return largest_behind(value[0], patches_behind(batch.source, places, value.shape[1], model.config))


def _whole_attention(model: Any, batch: Batch, sequence: Any, hidden: jax.Array, layers: Layers) -> jax.Array:
    """float32 [layers, N, T, T], the attention weights of some layers, one layer run after the other."""
    intervention = model.intervention(batch, sequence)
    runner = model.language_model.runner(sequence, intervention)
    inputs = None if intervention is None else intervention.per_layer(0, model.config.text.num_layers)

    def weights(layer: jax.Array) -> jax.Array:
        own = None if inputs is None else layer_at(inputs, layer)
        found = runner(layer, hidden[layer][None], inputs=own, return_weights=True).weights
        assert found is not None
        return found[0]

    return jax.lax.map(weights, jnp.array(layers))
