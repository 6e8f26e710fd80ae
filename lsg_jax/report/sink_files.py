"""Writes the result folder of `lsg sinks`: sinks.json, each image with its sinks marked, and two figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from lsg_jax.data.images import open_image, to_rgb
from lsg_jax.files import write_json
from lsg_jax.report.figures import draw_attention_shares, draw_sinks_by_layer
from lsg_jax.report.overlay import draw_sinks


def write_sinks(found: dict[str, Any], images: Mapping[str, Image.Image | bytes | str | Path], out: Path) -> None:
    """Writes a result of `analysis.sinks.find_sinks` on `images` into the folder `out`; sinks.json comes last."""
    out.mkdir(parents=True, exist_ok=True)
    for name, entry in found["images"].items():
        image = images[name]
        opened = to_rgb(image) if isinstance(image, Image.Image) else open_image(image)
        draw_sinks(opened, entry).save(out / f"{Path(name).stem}.png")
    draw_sinks_by_layer(found["counts"], out / "sinks_by_layer")
    draw_attention_shares(found["attention"], out / "attention_shares")
    write_json(out / "sinks.json", found, sort_keys=False)
