"""The attention of an answer on an image, by layer, as read from sinks.json: maps, and what they say in words."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from lsg_jax.data.grids import ImageSize
from lsg_jax.report.map_values import MAP_TITLES, Floats, spread, without_sinks
from lsg_jax.report.overlay import MAP_DARK, MAP_GREY, map_colours

TITLES = {name: MAP_TITLES[name] for name in ("raw", "no_sinks")}
MAX_CELLS = 64  # a side of a map in the page


@dataclass(frozen=True, eq=False)
class AnswerMaps:
    """Where the answer about one image looks. L layers, V visual tokens.

    Attributes:
        box: float32 [V, 4], in units of the image's sides.
        maps: `raw` and `no_sinks` -> float32 [L, V], shares of the attention on visual tokens, and of that on those that are
            no sinks; each layer sums to 1, or to 0.
        on_image: float32 [L], the share of all attention that falls on visual tokens.
        on_sinks: float32 [L], the share of that which falls on V- and L-sinks.
        sinks: int [L], how many tokens these are.
        unknown: kinds of sinks that are not known, and so not taken out.
    """

    box: Floats
    maps: Mapping[str, Floats]
    on_image: Floats
    on_sinks: Floats
    sinks: np.ndarray
    unknown: Sequence[str]

    def drawn(self, name: str, layer: int, size: ImageSize) -> Floats:
        """A map as float32 [height, width]; 1 is what each place would get if the attention were spread evenly."""
        return spread(self.box, self.maps[name][layer], size)

    def words(self, layer: int) -> str:
        """How strong the attention on the image is in one layer, and where it is strongest."""
        if not self.maps["raw"][layer].any():
            return f"Layer {layer}: the answer does not look at the image."
        count = int(self.sinks[layer])
        kinds = " and ".join(kind for kind in ("V-sinks", "L-sinks") if kind not in self.unknown)
        text = f"Layer {layer}: {100 * self.on_image[layer]:.1f} % of the answer's attention falls on the image"
        if kinds:
            text += f"; {100 * self.on_sinks[layer]:.1f} % of that on its {kinds} ({count} of {len(self.box)} tokens)"
        places = [f"{TITLES[name]} at {self._peak(name, layer)}" for name in self.maps if self.maps[name][layer].any()]
        return f"{text}. Strongest: {'; '.join(places)}."

    def _peak(self, name: str, layer: int) -> str:
        area = (self.box[:, 2] - self.box[:, 0]) * (self.box[:, 3] - self.box[:, 1])
        x0, y0, x1, y1 = self.box[np.argmax(self.maps[name][layer] / area)]
        across, down = (min(max((low + high) / 2, 0), 1) for low, high in ((x0, x1), (y0, y1)))
        return f"{100 * across:.0f} % from the left, {100 * down:.0f} % from the top"


def answer_maps(entry: Mapping[str, Any]) -> AnswerMaps | None:
    """The maps of an image's entry in sinks.json; None without an answer, and in files that are older than maps."""
    if not entry.get("answer_attention"):
        return None
    raw = np.array(entry["answer_attention"], np.float32)  # [L, V]
    sinks = np.zeros(raw.shape, bool)
    if entry["v_sinks"] is not None:
        sinks[:, entry["v_sinks"]] = True
    for layer, found in enumerate(entry["l_sinks"] or []):
        sinks[layer, found] = True
    share = lambda mask: without_sinks(raw[None], mask)[0]
    everything = share(np.zeros_like(sinks))
    return AnswerMaps(
        box=np.array(entry["boxes"], np.float32),
        maps={"raw": everything, "no_sinks": share(sinks)},
        on_image=raw.sum(1),
        on_sinks=np.where(sinks, everything, 0).sum(1),
        sinks=sinks.sum(1),
        unknown=[kind for kind, field in (("V-sinks", "v_sinks"), ("L-sinks", "l_sinks")) if entry[field] is None],
    )


def telling_layer(maps: Sequence[AnswerMaps]) -> int:
    """The layer in which sinks draw most of the answers' attention, mean over images; without sinks that in which images do."""
    on_sinks = np.mean([each.on_image * each.on_sinks for each in maps], axis=0)
    return int(on_sinks.argmax() if on_sinks.any() else np.mean([each.on_image for each in maps], axis=0).argmax())


@dataclass(frozen=True)
class Strip:
    """The maps of all layers, one below the other.

    Attributes:
        png: the colours that lie over the grey picture; each layer is scaled by its own peak.
        peaks: of each layer, in units of an even spread.
        size: (width, height) of one layer in cells.
    """

    png: bytes
    peaks: Sequence[float]
    size: ImageSize


def strip_of(maps: AnswerMaps, name: str) -> Strip:
    """One map at every layer, a few cells for each token."""
    size = _cells(maps.box)
    layers = [maps.drawn(name, layer, size) for layer in range(len(maps.on_image))]
    peaks = [float(layer.max(initial=0)) for layer in layers]
    shares = [layer / peak if peak > 0 else layer for layer, peak in zip(layers, peaks, strict=True)]
    drawn = Image.fromarray((255 * np.concatenate(shares)).round().astype(np.uint8), mode="P")
    colour, opacity = (np.rint(255 * part).astype(np.uint8) for part in map_colours(np.arange(256) / 255))
    drawn.putpalette(colour.tobytes())
    out = io.BytesIO()
    drawn.save(out, "png", optimize=True, transparency=opacity.tobytes())
    return Strip(out.getvalue(), peaks, size)


def css_bar() -> str:
    """The colours of a map over mid-grey, from 0 to its peak, as stops of a CSS gradient."""
    return ", ".join(f"rgb({red} {green} {blue})" for red, green, blue in bar_colours(9).tolist())


def bar_colours(count: int) -> np.ndarray:
    """uint8 [count, 3], the colours of a map over mid-grey, from 0 to its peak."""
    colour, opacity = map_colours(np.linspace(0, 1, count))
    grey = MAP_DARK + MAP_GREY / 2
    return np.rint(255 * (grey + opacity[:, None] * (colour - grey))).astype(np.uint8)


def _cells(box: Floats) -> ImageSize:
    """(width, height) of a map: a cell for each of the smallest tokens, and more if these are few."""
    sides = (box[:, 2:] - box[:, :2]).min(0)
    across, down = (max(round(1 / float(side)), 1) for side in sides)
    finer = max(MAX_CELLS // (2 * max(across, down)), 1)
    return min(across * finer, MAX_CELLS), min(down * finer, MAX_CELLS)
