"""Commands that find sinks: sinks."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

from lsg_jax.cli.options import Command, gate_options, load_model
from lsg_jax.errors import InputError


def add(command: Command) -> None:
    """Adds the commands."""
    sub = command("sinks", _sinks, "V- and L-sinks of images: JSON on stdout, overlays as PNG")
    sub.add_argument("model", type=Path, metavar="MODEL")
    sub.add_argument("--images", type=Path, nargs="+", required=True, metavar="FILE")
    sub.add_argument("--out", type=Path, metavar="DIR", help="write sinks.json and an overlay of each image")
    sub.add_argument("--prompt", default="Describe the image.", metavar="TEXT", help="the question that goes with each image")
    gate_options(sub)


def _sinks(options: argparse.Namespace) -> None:
    from lsg_jax.analysis.sinks import find_sinks
    from lsg_jax.checkpoint.files import write_json
    from lsg_jax.report.overlay import draw_sinks

    vlm = load_model(options)
    names = [path.stem for path in options.images]
    if options.out is not None and len(set(names)) < len(names):
        raise InputError("--images: two files have the same name, their overlays would overwrite each other")
    pixels = [vlm.processor.pixels(path) for path in options.images]
    found = dict(zip(map(str, options.images), find_sinks(vlm, pixels, options.prompt), strict=True))
    for path, entry in found.items():
        for warning in entry["warnings"]:
            logging.getLogger(__name__).warning("%s: %s", path, warning)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        write_json(options.out / "sinks.json", found)
        for name, image, entry in zip(names, pixels, found.values(), strict=True):
            draw_sinks(image, entry).save(options.out / f"{name}.png")
    print(json.dumps(found))
