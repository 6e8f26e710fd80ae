"""The folder that `Look.save` writes: the page, pictures with their maps, a figure by layer, and the numbers."""

from __future__ import annotations

import io
import itertools
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lsg_jax.data.grids import ImageSize
from lsg_jax.files import check_only, write_atomic
from lsg_jax.json_files import write_sealed
from lsg_jax.look.look import Floats, Look
from lsg_jax.look.page import page_html
from lsg_jax.report.drawing import LOOKS, render
from lsg_jax.report.map_values import MAP_TITLES
from lsg_jax.report.overlay import draw_map, draw_sinks

FORMAT = "lsg-look-1"
COLUMNS = ("layer", "visual", "v_sink", "l_sink", "ordinary")
GROUPS = COLUMNS[2:]
ACROSS = 8  # layers in a row of the figure
CELL, GAP, THINNEST = 160, 6, 4  # pixels of the longer side of a map there, and between maps; largest ratio of its sides
KNOWN = frozenset({"look.json", "maps.npz", "look.html"})
OF_IMAGES = (*(f"{name}.png" for name in (*MAP_TITLES, "sinks")), *(f"layers.{kind}" for kind in ("csv", "svg", "png")))
NAMES = KNOWN.union(f"{number}.{name}" for number in range(1, 100) for name in OF_IMAGES)


def write_look(look: Look, folder: Path) -> None:
    """Writes a folder; look.json comes last. Maps in pictures are means over answer tokens, layers and heads.

    look.html           the page: tokens, layers, heads and sinks to choose from
    look.json           what `as_json` returns
    maps.npz            the maps of every head, float32 [A, L, N, V] each
    1.raw.png ...       image and map, by number of the image; 1.sinks.png marks the sinks
    1.layers.svg .png .csv  each layer's map, and shares of its attention: all visual tokens, V-sinks, L-sinks, the rest

    Raises:
        InputError: the folder holds files of another kind.
    """
    pictures = {}
    for number, picture in enumerate(look.pictures, 1):
        for name in look.maps:
            pictures[f"{number}.{name}.png"] = draw_map(picture, look.on_picture(_mean_map(look, name), number - 1, side=672))
        pictures[f"{number}.sinks.png"] = draw_sinks(picture.convert("RGB"), _marked(look, number - 1))
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "look.json").unlink(missing_ok=True)  # an interrupted command leaves no numbers beside other pictures
    for left in NAMES - pictures.keys() - KNOWN:  # of an earlier look at more images
        (folder / left).unlink(missing_ok=True)
    write_atomic(folder / "look.html", page_html(look).encode())
    for name, drawn in pictures.items():
        write_atomic(folder / name, png(drawn))
    maps = io.BytesIO()
    np.savez_compressed(maps, **dict(look.maps))  # type: ignore[arg-type]
    write_atomic(folder / "maps.npz", maps.getvalue())
    for number in range(1, len(look.pictures) + 1):
        draw_layers(look, folder / f"{number}.layers", number - 1)
    write_sealed(folder / "look.json", as_json(look))


def check_folder(folder: Path) -> None:
    """Raises InputError for a folder that holds something else than a saved look."""
    check_only(folder, NAMES, "folder of lsg look")


def as_json(look: Look) -> dict[str, Any]:
    """The numbers of a look as plain data: maps as means over heads [A][L][V], the rest as in `Look`; NaN becomes null."""
    plain = lambda values: [[None if np.isnan(v) else round(float(v), 5) for v in row] for row in np.atleast_2d(values)]
    return {
        "format": FORMAT,
        "model": dict(look.model),
        "prompt": look.prompt,
        "answer": look.answer,
        "tokens": look.tokens,
        "sizes": [list(size) for size in look.sizes],
        "criteria": {stage: {"criterion": c.name, "tau": c.tau, "unknown": c.unknown} for stage, c in look.criteria.items()},
        "boxes": [[round(float(edge), 6) for edge in box] for box in look.box],
        "images": look.image.tolist(),
        "v_sinks": np.flatnonzero(look.v_sink).tolist(),
        "l_sinks": [np.flatnonzero(layer).tolist() for layer in look.l_sink],
        "v_values": plain(look.v_value)[0],
        "l_values": plain(look.l_value),
        "maps": {
            name: [[[float(f"{v:.5g}") for v in layer] for layer in token] for token in look.over_heads(name)]
            for name in look.maps
        },
        "shares": shares(look),
        "warnings": list(look.warnings),
    }


def shares(look: Look, image: int | None = None) -> list[dict[str, Any]]:
    """Shares of all attention by layer, means over answer tokens and heads: rows of COLUMNS, for one image or all."""
    raw = look.over_heads("raw").mean(0) if look.tokens else np.zeros_like(look.l_value)
    raw = raw if image is None else np.where(look.image == image, raw, 0)
    rows = []
    for layer, values in enumerate(raw):
        masks = {"v_sink": look.v_sink, "l_sink": look.l_sink[layer], "ordinary": ~(look.v_sink | look.l_sink[layer])}
        of_groups = {group: round(float(values[mask].sum()), 6) for group, mask in masks.items()}
        rows.append({"layer": layer, "visual": round(float(values.sum()), 6), **of_groups})
    return rows


def draw_layers(look: Look, stem: Path, image: int) -> list[Path]:
    """The maps of each layer on one image, means over answer tokens and heads, and shares of the attention on it below."""
    rows, names, layers = shares(look, image), list(look.maps), range(len(look.l_sink))
    lines = [layers[start : start + ACROSS] for start in range(0, len(layers), ACROSS)]
    across = min(ACROSS, len(layers))
    cell = _cell_size(look.sizes[image])
    tall = 7.2 / across * cell[1] / cell[0]
    means = {name: look.over_heads(name).mean(0) if look.tokens else np.zeros_like(look.l_value) for name in names}

    def paint(figure: Any) -> None:
        top, bottom = figure.subfigures(2, 1, height_ratios=(len(lines) * len(names) * (tall + 0.15), 1.5))
        panels = top.subplots(len(lines) * len(names), 1, squeeze=False)[:, 0]
        for place, (line, name) in enumerate(itertools.product(lines, names)):
            maps = [draw_map(look.pictures[image], look.on_picture(means[name][layer], image, side=CELL)) for layer in line]
            _paint_strip(panels[place], [drawn.resize(cell, Image.Resampling.NEAREST) for drawn in maps], across)
            title = "\n".join(textwrap.wrap(MAP_TITLES[name], 9))
            panels[place].set_ylabel(title, fontsize=6, rotation=0, ha="right", va="center")
            centres = [(cell[0] + GAP) * column + cell[0] / 2 for column in range(len(line))]
            panels[place].set_xticks(centres, [f"layer {layer}" for layer in line] if name == names[0] else [""] * len(line))
        _paint_shares(bottom.subplots(), rows)

    return render(stem, rows, COLUMNS, (7.2, len(lines) * len(names) * (tall + 0.15) + 1.6), paint)


def _cell_size(size: ImageSize) -> ImageSize:
    """Pixels of a map in the figure of layers; a picture that is thinner than 4 : 1 is stretched to that."""
    width, height = (max(side / max(size), 1 / THINNEST) for side in size)
    return round(CELL * width), round(CELL * height)


def _paint_strip(axes: Any, maps: list[Image.Image], across: int) -> None:
    """Maps of one size side by side."""
    width, height = maps[0].size
    strip = Image.new("RGB", ((width + GAP) * across - GAP, height), "white")
    for column, drawn in enumerate(maps):
        strip.paste(drawn, (column * (width + GAP), 0))
    axes.imshow(strip, interpolation="nearest")
    axes.tick_params(top=False, bottom=False, labeltop=True, labelbottom=False, pad=0)
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def _paint_shares(axes: Any, rows: list[dict[str, Any]]) -> None:
    below = np.zeros(len(rows))
    for group in GROUPS:
        heights = np.array([100 * row[group] for row in rows])
        layers, drawn = [row["layer"] for row in rows], LOOKS[group]
        axes.bar(layers, heights, bottom=below, color=drawn.colour, hatch=drawn.hatch, label=drawn.label, edgecolor="white")
        below += heights
    axes.set_xlabel("decoder layer")
    axes.set_ylabel("% of attention")
    axes.legend(ncols=len(GROUPS), loc="upper right", bbox_to_anchor=(1.0, 1.35))


def _mean_map(look: Look, name: str) -> Floats:
    """float32 [V], the mean over answer tokens, layers and heads; zeros for an empty answer."""
    if not look.tokens:
        return np.zeros(len(look.box), np.float32)
    return np.asarray(look.over_heads(name).mean((0, 1)), np.float32)


def _marked(look: Look, image: int) -> dict[str, Any]:
    """What `draw_sinks` takes, for one of the images."""
    own = look.image == image
    of = lambda mask: np.flatnonzero(mask & own).tolist()
    return {"boxes": look.box.tolist(), "v_sinks": of(look.v_sink), "l_sinks": [of(layer) for layer in look.l_sink]}


def png(image: Image.Image) -> bytes:
    """A picture as the bytes of a PNG file."""
    out = io.BytesIO()
    image.save(out, "png")
    return out.getvalue()
