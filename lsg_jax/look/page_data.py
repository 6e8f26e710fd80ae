"""The numbers of a `Look` in the form that the page draws from: maps in bytes, each row with its largest value."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from lsg_jax.look.look import Floats, Look
from lsg_jax.report.pictures import data_url, small

PICTURE_SIDE = 768
"""Pictures on a page have at most so many pixels a side."""

HEAD_BYTES = 2_000_000
"""Maps of every head are put into a page up to this size; a larger one has means over heads."""

LEVELS = 255


def look_data(look: Look, title: str, *, heads: bool | None = None) -> dict[str, Any]:
    """What `page.js` draws one look from; arrays are base64 of little-endian bytes.

    Args:
        title: stands above the answer.
        heads: whether the maps of every head are held; None: while they are at most `HEAD_BYTES`.
    """
    _, layers, count, _ = look.maps["raw"].shape
    if heads is None:
        heads = len(look.maps) * look.maps["raw"].size <= HEAD_BYTES
    return {
        "title": title,
        "prompt": look.prompt,
        "answer": look.answer,
        "tokens": look.tokens,
        "layers": layers,
        "heads": count,
        "box": floats(look.box),
        "image": look.image.tolist(),
        "v_sink": octets(look.v_sink),
        "l_sink": octets(look.l_sink),
        "v_value": floats(look.v_value),
        "l_value": floats(look.l_value),
        "criteria": {stage: {"name": c.name, "tau": c.tau, "unknown": c.unknown} for stage, c in look.criteria.items()},
        "warnings": list(look.warnings),
        "maps": {name: quantised(look.over_heads(name)) for name in look.maps},
        "by_head": {name: quantised(values) for name, values in look.maps.items()} if heads else None,
        "shares": shares(look),
    }


def head_data(look: Look, token: int, layer: int, head: int) -> dict[str, dict[str, str]]:
    """The maps of one token, layer and head, as in `look_data`. Raises InputError for one that does not exist."""
    return {name: quantised(look.values(name, token, layer, head)) for name in look.maps}


def shares(look: Look) -> dict[str, str]:
    """Attention of each token, layer and head on all visual tokens and on sinks, float32 [A, L, N]; V- and L-sinks count."""
    raw = look.maps["raw"]
    sinks = (look.v_sink | look.l_sink)[None, :, None]
    return {"visual": floats(raw.sum(-1)), "sinks": floats(np.where(sinks, raw, 0).sum(-1))}


def quantised(values: Floats) -> dict[str, str]:
    """Values [..., V], not negative, as bytes of 255ths of each row's largest, which is kept: float32 [...]."""
    largest = values.max(-1, initial=0.0)
    steps = np.divide(LEVELS * values, largest[..., None], out=np.zeros_like(values), where=largest[..., None] > 0)
    return {"largest": floats(largest), "steps": octets(np.rint(steps))}


def picture_data(pictures: Sequence[Image.Image]) -> list[dict[str, Any]]:
    """The pictures, scaled down to `PICTURE_SIDE`, as data URLs, with their own sizes in pixels."""
    return [
        {"src": data_url(*small(picture, PICTURE_SIDE)), "width": picture.width, "height": picture.height}
        for picture in pictures
    ]


def floats(values: np.ndarray) -> str:
    """Base64 of float32 values, little-endian."""
    return base64.b64encode(np.ascontiguousarray(values, "<f4").tobytes()).decode()


def octets(values: np.ndarray) -> str:
    """Base64 of whole numbers from 0 to 255."""
    return base64.b64encode(np.ascontiguousarray(values, np.uint8).tobytes()).decode()
