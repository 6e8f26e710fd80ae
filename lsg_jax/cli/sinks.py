"""Commands that find sinks: sinks, calibrate."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

from lsg_jax.cli.options import Command, gate_options, load_model, out_option, progress_bar, template_option
from lsg_jax.errors import InputError

PROMPT = "Describe the image."
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif", ".jp2")

logger = logging.getLogger(__name__)


def add(command: Command) -> None:
    """Adds the commands."""
    sub = command(
        "sinks",
        _sinks,
        "V- and L-sinks of images, every criterion, attention by group: JSON, overlays, figures",
        (
            "lsg sinks lsg-quickstart/model --images lsg-quickstart/validation/images/00000.png --out sinks",
            "lsg sinks lsg-quickstart/model --images lsg-quickstart/validation/images/00001.png --sinks vit_tau=30",
        ),
    )
    sub.add_argument("model", type=Path, metavar="MODEL")
    sub.add_argument("--images", type=Path, nargs="+", required=True, metavar="FILE")
    out_option(sub, folder=True, help="write sinks.json, an overlay of each image, and figures")
    sub.add_argument("--prompt", default=PROMPT, metavar="TEXT", help="the question that goes with each image")
    text = "longest answer whose attention is measured (16); 0 for the prompt's alone"
    sub.add_argument("--max-new-tokens", type=int, default=16, metavar="N", help=text)
    template_option(sub)
    gate_options(sub)

    sub = command(
        "calibrate",
        _calibrate,
        "propose sink dimensions and thresholds from a folder of images, as TOML",
        (
            "lsg calibrate lsg-quickstart/model --images lsg-quickstart/validation/images --out sinks.toml",
            "lsg calibrate lsg-quickstart/model --images lsg-quickstart/train/images --limit 64 --json",
        ),
    )
    sub.add_argument("model", type=Path, metavar="MODEL")
    sub.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of images, searched with its subfolders")
    out_option(sub, folder=False, help="write the TOML to this file as well")
    sub.add_argument("--limit", type=int, default=256, metavar="N", help="use N images, evenly spaced by name (256)")
    sub.add_argument("--prompt", default=PROMPT, metavar="TEXT", help="the question that goes with each image")
    template_option(sub)
    sub.add_argument("--json", action="store_true", help="print the evidence as JSON instead of the TOML")


def _sinks(options: argparse.Namespace) -> None:
    from lsg_jax.analysis.sinks import find_sinks
    from lsg_jax.report.sink_files import write_sinks

    names = [path.stem for path in options.images]
    if options.out is not None and len(set(names)) < len(names):
        raise InputError("--images: two files have the same name, their overlays would overwrite each other")
    vlm = load_model(options)
    images = {str(path): path for path in options.images}
    with progress_bar("sinks") as progress:
        found = find_sinks(vlm, images, options.prompt, max_new_tokens=options.max_new_tokens, progress=progress)
    for warning in found["warnings"]:
        logger.warning("%s", warning)
    for path, entry in found["images"].items():
        for warning in entry["warnings"]:
            logger.warning("%s: %s", path, warning)
    if options.out is not None:
        write_sinks(found, images, options.out)
    print(json.dumps(found, allow_nan=False))


def _calibrate(options: argparse.Namespace) -> None:
    import lsg_jax
    from lsg_jax.analysis.calibrate import as_toml, calibrate
    from lsg_jax.files import write_atomic

    images = _images_below(options.images, options.limit)
    if options.out is not None and not options.out.parent.is_dir():
        raise InputError(f"--out {options.out}: there is no folder {options.out.parent}")
    vlm = lsg_jax.load(options.model, template=options.template)
    with progress_bar("calibrate") as progress:
        result = calibrate(vlm, images, options.prompt, progress=progress)
    for skipped in result["skipped"]:
        logger.warning("skipped: %s", skipped)
    for warning in result["warnings"]:
        logger.warning("%s", warning)
    text = as_toml(result)
    if options.out is not None:
        write_atomic(options.out, text.encode())
    print(json.dumps(result, allow_nan=False) if options.json else text, end="\n" if options.json else "")


def _images_below(folder: Path, limit: int) -> list[Path]:
    """Image files in a folder and its subfolders, sorted by name; at most `limit` of them, evenly spaced."""
    if limit < 1:
        raise InputError(f"--limit is {limit}, it must be at least 1")
    if not folder.is_dir():
        raise InputError(f"--images {folder}: no such folder")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if not found:
        raise InputError(f"--images {folder}: no image in it (known endings: {' '.join(IMAGE_SUFFIXES)})")
    return [found[index * len(found) // limit] for index in range(limit)] if len(found) > limit else found
