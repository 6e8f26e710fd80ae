"""`Look`: the attention of answer tokens on visual tokens, by layer and head, and how it becomes a map on a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lsg_jax.data.grids import ImageSize
from lsg_jax.errors import InputError
from lsg_jax.report.map_values import Floats, spread, without_sinks

MapName = Literal["raw", "no_sinks", "relative"]
MAPS: tuple[MapName, ...] = get_args(MapName)

NEUTRAL_PROMPT = "Write a general description of the image."
"""The prompt whose attention `relative` divides by (Zhang et al., arXiv 2502.17422)."""

SMALLEST = np.float32(1e-6)
"""Attention weights below it are rounding errors: quotients by them would say nothing."""


@dataclass(frozen=True, eq=False)
class Criterion:
    """What decided which visual tokens are sinks of one kind.

    Attributes:
        name, tau: criterion and threshold (SinkConfig).
        unknown: why it could not be applied; None if it could.
    """

    name: str
    tau: float
    unknown: str | None = None


@dataclass(frozen=True, eq=False)
class Look:
    """Where a model looked. A answer tokens, L layers, N heads, V visual tokens in the order of the sequence.

    Attributes:
        prompt, answer: texts; the answer without its end marker.
        tokens: the A pieces of the answer; together they are the answer.
        maps: name -> float32 [A, L, N, V], from the position that predicts answer token a.
            `raw`: attention weights, of a softmax over all tokens, text included.
            `no_sinks`: those on visual tokens that are no V-sink, and no L-sink of the layer, divided by their sum.
            `relative`: raw, divided by what the position after `NEUTRAL_PROMPT` pays to the same token.
        box: float32 [V, 4], x0, y0, x1, y1 in units of the sides of the original image; outside [0, 1] is padding.
        image: int32 [V], the image that each token shows.
        v_sink: bool [V].
        l_sink: bool [L, V], sinks of the language model that are no V-sinks.
        v_value: float32 [V], what the criterion of V-sinks compares with its threshold, the largest of the patches behind a
            token; NaN where it is not known.
        l_value: float32 [L, V], the same of L-sinks.
        criteria: `vit` and `llm` -> the criterion.
        pictures: the images, as they were given.
        hidden: layer -> float32 [T, D], the residual stream that enters it, for the layers asked for; T tokens of prompt and
            answer, without padding.
        attention: layer -> float32 [N, T, T], its attention weights.
        visual: int32 [V], the positions of the visual tokens among these T.
        warnings: lines about sinks that could not be found.
        model: what answered: `name` of its folder; `backbone` and `trained`, digests of the weights and of what was trained on
            them; `method`, gates or another method in words, "" for none.
    """

    prompt: str
    answer: str
    tokens: list[str]
    maps: Mapping[str, Floats]
    box: Floats
    image: NDArray[np.int32]
    v_sink: NDArray[np.bool_]
    l_sink: NDArray[np.bool_]
    v_value: Floats
    l_value: Floats
    criteria: Mapping[str, Criterion]
    pictures: Sequence[Image.Image]
    visual: NDArray[np.int32]
    neutral: Floats | None = None
    """float32 [L, N, V], attention of the position after the neutral prompt; None without the map `relative`."""
    hidden: Mapping[int, Floats] = field(default_factory=dict)
    attention: Mapping[int, Floats] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    model: Mapping[str, str | None] = field(default_factory=dict)

    @property
    def sizes(self) -> list[ImageSize]:
        """(width, height) of each image, in pixels."""
        return [picture.size for picture in self.pictures]

    def over_heads(self, name: str) -> Floats:
        """A map averaged over heads, float32 [A, L, V].

        Of `relative` it is the quotient of the averages, as in its source, and of `no_sinks` the share in the average.
        """
        self._check(name)
        if name == "no_sinks":
            return without_sinks(self.maps["raw"].mean(2), self.v_sink | self.l_sink)
        if name == "relative":
            assert self.neutral is not None
            return relative_to(self.maps["raw"].mean(2), self.neutral.mean(1))
        return self.maps[name].mean(2)

    def values(self, name: str, token: int, layer: int, head: int | None = None) -> Floats:
        """float32 [V], one map of one answer token in one layer; of one head, or of all (`over_heads`)."""
        self._check(name)
        count, layers, heads, _ = self.maps[name].shape
        for what, index, limit in (("token", token, count), ("layer", layer, layers), ("head", head, heads)):
            if index is not None:
                _check_index(what, index, limit)
        if head is not None:
            return self.maps[name][token, layer, head]
        one = slice(token, token + 1)
        return Look.over_heads(self._at(one, layer), name)[0, 0]

    def _at(self, tokens: slice, layer: int) -> Look:
        """Only these tokens and this layer, so that a mean over heads is of what is asked for."""
        at = slice(layer, layer + 1)
        maps = {name: values[tokens, at] for name, values in self.maps.items()}
        neutral = None if self.neutral is None else self.neutral[at]
        return replace(self, maps=maps, neutral=neutral, l_sink=self.l_sink[at], l_value=self.l_value[at])

    def on_picture(self, values: Floats, image: int = 0, *, side: int = 384) -> Floats:
        """Places values [V] on one of the images: each is spread evenly over the box of its token.

        Where boxes overlap, as those of tiles and of the whole image do, they add up. What lies in the padding is left out.

        Args:
            side: of the result's longer side, in pixels.

        Returns:
            float32 [height, width], value per area, in units of the whole image's.
        """
        _check_index("image", image, len(self.pictures))
        if side < 1:
            raise InputError(f"side is {side}; give 1 pixel or more")
        width, height = self.sizes[image]
        scale = side / max(width, height)
        own = self.image == image
        return spread(self.box[own], values[own], (max(round(width * scale), 1), max(round(height * scale), 1)))

    def _check(self, name: str) -> None:
        if name not in self.maps:
            raise InputError(f"there is no map {name}: look(..., maps=...) made {', '.join(self.maps) or 'none'}")

    def save(self, folder: str | Path) -> None:
        """Writes the pictures with their maps as PNG and SVG, a page, and the numbers as look.json; see `look.files`."""
        from lsg_jax.look.files import write_look

        write_look(self, Path(folder))

    def _repr_html_(self) -> str:
        from lsg_jax.look.page import notebook_html

        return notebook_html(self)


def _check_index(what: str, index: Any, limit: int) -> None:
    """Raises InputError for anything but a whole number from 0 to `limit` - 1."""
    if not limit:
        raise InputError(f"there is no {what}: no answer")
    if isinstance(index, bool) or not isinstance(index, int | np.integer) or not 0 <= index < limit:
        raise InputError(f"{what} {index} is not in [0, {limit - 1}]")


def relative_to(raw: Floats, neutral: Floats) -> Floats:
    """raw [A, L, ..., V] over neutral [L, ..., V], of which less than `SMALLEST` counts as that."""
    return np.asarray(raw / np.maximum(neutral, SMALLEST), np.float32)
