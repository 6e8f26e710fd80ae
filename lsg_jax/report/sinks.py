"""The sinks of images as a section of a report: where they are, where the answers look, how much attention they draw."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lsg_jax.errors import InputError
from lsg_jax.report.figures import draw_attention_shares, draw_sinks_by_layer
from lsg_jax.report.maps import TITLES, AnswerMaps, answer_maps, css_bar, strip_of, telling_layer
from lsg_jax.report.overlay import Box, in_padding, l_sinks
from lsg_jax.report.parts import (
    Details,
    Gallery,
    Heading,
    LayerMap,
    MappedImage,
    Maps,
    Paragraph,
    Part,
    Picture,
    Section,
    drawing,
    picture,
)
from lsg_jax.report.pictures import data_url
from lsg_jax.report.sections import Study, used_settings, warnings_of
from lsg_jax.report.sink_files import MARKED, PLAIN, file_stems

MAX_OVERLAYS = 12
MAX_PLACES = 8  # of V-sinks in an image's description


def _massive(layers: Sequence[int]) -> str:
    if not layers:
        return "No massive activations enter any layer: no value is at least 100 and 1000 times the median of its layer."
    return (
        f"Massive activations, values of at least 100 and 1000 times the median, enter {len(layers)} layers, "
        f"from {layers[0]} to {layers[-1]}."
    )


def sinks_section(study: Study, folder: Path, *, title: str) -> Section:
    """Sinks of images.

    Args:
        study: sinks.json.
        folder: the folder of sinks.json, which may also hold the images, marked and as they are.
    """
    maps = {name: of for name, entry in study["images"].items() if (of := answer_maps(entry)) is not None}
    parts = _looked_at(study["images"], maps, folder, study.get("prompt", ""))
    if study["counts"]:
        caption = "Visual tokens of each group at each layer: mean and standard deviation over images."
        parts.append(drawing(draw_sinks_by_layer, study["counts"], "sinks_by_layer", caption))
    if study["attention"]:
        caption = "Whose keys the attention falls on at each layer, mean over heads and images."
        if any(row["queries"] == "answer" for row in study["attention"]):
            caption += " Under “answer” the answer's tokens ask; the maps are of the positions before them, which predict them."
        parts.append(drawing(draw_attention_shares, study["attention"], "attention_shares", caption))
    if "massive_activations" in study:
        parts.append(Paragraph(_massive(study["massive_activations"]["layers"])))
    parts += warnings_of(study)
    doubts = [f"{name}: {warning}" for name, entry in study["images"].items() for warning in entry["warnings"]]
    if doubts:
        parts.append(Details(f"Warnings about single images: {len(doubts)}", [Paragraph(text) for text in doubts]))
    found = _summary(study["images"], list(maps.values()))
    gist = _count(len(study["images"]), "image")
    return Section(title, parts, gist=gist, group="sinks", found=found, settings=used_settings(study))


def _summary(images: Mapping[str, Any], maps: list[AnswerMaps]) -> list[str]:
    """One sentence: how many V-sinks there are, and how much of the attention on the image they and the L-sinks draw."""
    of = "image" if len(images) == 1 else f"{len(images)} images"
    known = [entry for entry in images.values() if entry["v_sinks"] is not None]
    if not known:
        return [f"Which tokens of the {of} are V-sinks is not known for this model; lsg calibrate proposes dimensions."]
    tokens = np.mean([len(_boxes(entry)) for entry in known])
    if len(images) == 1:
        sentence, over = f"The image has {_count(len(known[0]['v_sinks']), 'V-sink')}, of {tokens:.0f} tokens", ""
    else:
        each = np.mean([len(entry["v_sinks"]) for entry in known])
        sentence, over = f"The {of} have {each:.1f} V-sinks each, of {tokens:.0f} tokens", ", on average"
    if not maps:
        return [f"{sentence}{over}."]
    layer = telling_layer(maps)
    on_image, on_sinks = (100 * np.mean([getattr(each, name)[layer] for each in maps]) for name in ("on_image", "on_sinks"))
    count = np.mean([each.sinks[layer] / len(each.box) for each in maps])
    if not any(each.sinks.any() for each in maps):
        where = f"In layer {layer}, where the answers look most at the image"
        return [f"{sentence}{over}. {where}, {on_image:.0f} % of all attention falls on it."]
    return [
        f"{sentence}{over}. In layer {layer}, where sinks draw most of the answers' attention, they get {on_sinks:.0f} % of "
        f"what falls on the image, and are {100 * count:.0f} % of its tokens. "
        f"{on_image:.0f} % of all attention falls on the image there."
    ]


def _looked_at(images: Mapping[str, Any], maps: Mapping[str, AnswerMaps], folder: Path, prompt: str) -> list[Part]:
    """The first images that are in the folder: with maps where these are known, else with marks alone."""
    layers = {len(each.on_image) for each in maps.values()}
    layer = telling_layer(list(maps.values())) if len(layers) == 1 else 0
    mapped: list[MappedImage] = []
    marked: list[Picture] = []
    shown: list[Mapping[str, Any]] = []
    for name, stem in file_stems(images).items():
        entry = images[name]
        stem = Path(entry.get("file", stem)).name
        if len(mapped) + len(marked) == MAX_OVERLAYS:
            break
        framed, plain = _picture(name, entry, folder / MARKED / f"{stem}.png"), None
        framed = framed or _picture(name, entry, folder / f"{stem}.png")  # where older versions wrote it
        if name in maps and len(layers) == 1:
            plain = _picture(name, entry, folder / PLAIN / f"{stem}.png")
        if plain is not None or framed is not None:
            shown.append(entry)
        if plain is not None:
            mapped.append(_mapped(name, entry, maps[name], framed, plain))
        elif framed is not None:
            marked.append(framed)
    if not mapped and not marked:
        return []
    legend = _legend(shown)
    if len(mapped) + len(marked) < len(images):
        legend += f" {len(mapped) + len(marked)} of {len(images)} images."
    if not mapped:
        return [Heading("Where the sinks are"), Paragraph(legend), Gallery(marked)]
    reading = (
        f"The question is: {prompt} The maps show how the positions that predict the answer's tokens attend to the image, "
        "mean over heads: all attention, and without sinks. 1 is what each place would get if attention were spread evenly; "
        "the colours of a map reach up to its own peak."
    )
    parts: list[Part] = [Heading("Where the answers look"), Paragraph(legend), Paragraph(reading)]
    parts += [Maps(layer, layers.pop(), css_bar(), mapped)]
    return [*parts, Gallery(marked)] if marked else parts


def _legend(shown: Sequence[Mapping[str, Any]]) -> str:
    """What the frames in the pictures mean, of those that there are."""
    legend = []
    if any(entry["v_sinks"] for entry in shown):
        legend.append("Large orange frames: V-sinks, decided before the projector.")
    if any(map(l_sinks, shown)):
        legend.append("Small blue frames: L-sinks in some layer.")
    return " ".join(legend) or "No token is marked as a sink."


def _picture(name: str, entry: Mapping[str, Any], path: Path) -> Picture | None:
    """An image of the folder; None if it is not there or cannot be read."""
    caption = f"{Path(name).name}: {_found(entry)}"
    with contextlib.suppress(InputError, OSError):
        return picture(caption, path.read_bytes(), alt=f"{caption}{_places(entry)}")
    return None


def _mapped(name: str, entry: Mapping[str, Any], maps: AnswerMaps, marked: Picture | None, plain: Picture) -> MappedImage:
    drawn = []
    for kind, title in TITLES.items():
        strip = strip_of(maps, kind)
        drawn.append(LayerMap(title, data_url("png", strip.png), [f"{peak:.1f}" for peak in strip.peaks]))
    caption = f"{Path(name).name}, answer: {entry['answer']}"
    words = [maps.words(layer) for layer in range(len(maps.on_image))]
    marked = None if marked is None else replace(marked, caption=_found(entry))
    return MappedImage(caption, marked, plain.source, drawn, words)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _found(entry: Mapping[str, Any]) -> str:
    v_sinks = "V-sinks unknown" if entry["v_sinks"] is None else _count(len(entry["v_sinks"]), "V-sink")
    if hidden := sum(in_padding(_boxes(entry)[patch]) for patch in entry["v_sinks"] or []):
        v_sinks += f" ({hidden} in the padding)"
    found = l_sinks(entry)
    return f"{v_sinks}, {_count(len(found), 'L-sink')}" if found else v_sinks


def _boxes(entry: Mapping[str, Any]) -> list[Box]:
    """Boxes of the patches; files of format lsg-sinks-1 have only the number of patches a side."""
    if "boxes" in entry:
        return list(entry["boxes"])
    grid = entry["grid"]
    return [(x / grid, y / grid, (x + 1) / grid, (y + 1) / grid) for y in range(grid) for x in range(grid)]


def _places(entry: Mapping[str, Any]) -> str:
    """Where the V-sinks are, for readers who cannot see the frames."""
    boxes = _boxes(entry)
    columns, rows = (sorted({box[axis] for box in boxes}) for axis in (0, 1))
    places = [(rows.index(boxes[patch][1]), columns.index(boxes[patch][0])) for patch in entry["v_sinks"] or []]
    listed = ", ".join(f"row {row + 1} column {column + 1}" for row, column in places[:MAX_PLACES])
    more = len(places) - MAX_PLACES
    of = f"{len(rows)} rows and columns" if len(rows) == len(columns) else f"{len(rows)} rows and {len(columns)} columns"
    return f" at {listed}{f' and {more} more' if more > 0 else ''}, of {of}" if listed else ""
