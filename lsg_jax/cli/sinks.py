"""Commands that find sinks: sinks, calibrate."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from lsg_jax.cli.options import (
    Command,
    gate_options,
    load_model,
    model_argument,
    number_option,
    out_option,
    progress_bar,
    template_option,
)
from lsg_jax.errors import ConfigError, InputError

PROMPT = "Describe the image."
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif", ".jp2")

logger = logging.getLogger(__name__)


def add(command: Command) -> None:
    """Adds the commands."""
    sub = command(
        "sinks",
        _sinks,
        "V- and L-sinks of images, every criterion, attention by group: JSON, overlays, maps, figures",
        (
            "lsg sinks lsg-quickstart/model --images lsg-quickstart/validation/images/00000.png --out sinks",
            "lsg sinks lsg-quickstart/model --images lsg-quickstart/validation/images --limit 4 --sinks vit_tau=30",
        ),
    )
    model_argument(sub)
    text = "image files, or folders, which are searched with their subfolders"
    sub.add_argument("--images", type=Path, nargs="+", required=True, metavar="PATH", help=text)
    text = "use N images of each folder that can be read, evenly spaced by name (32)"
    number_option(sub, "--limit", int, "[1, 1e9]", default=32, metavar="N", help=text)
    out_option(sub, folder=True, help="write sinks.json, each image with its sinks and its maps, and figures")
    text = "decoder layer of the maps; by default the one in which sinks draw most"
    number_option(sub, "--layer", int, "[0, 1e4]", metavar="N", help=text)
    sub.add_argument("--prompt", default=PROMPT, metavar="TEXT", help="the question that goes with each image")
    text = "longest answer whose attention is measured (16); 0 for the prompt's alone"
    number_option(sub, "--max-new-tokens", int, "[0, 1e8]", default=16, metavar="N", help=text)
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
    model_argument(sub)
    sub.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of images, searched with its subfolders")
    out_option(sub, folder=False, help="write the TOML to this file as well")
    number_option(
        sub,
        "--limit",
        int,
        "[1, 1e9]",
        default=256,
        metavar="N",
        help="use N images that can be read, evenly spaced by name (256)",
    )
    sub.add_argument("--prompt", default=PROMPT, metavar="TEXT", help="the question that goes with each image")
    text = "propose N register neurons of the vision tower instead, for the method `registers`"
    number_option(sub, "--registers", int, "[1, 1e6]", metavar="N", help=text)
    text = "with --registers: the norm from which a patch is an outlier; default: where the norms part"
    number_option(sub, "--norm", float, "(0, 1e9]", metavar="X", help=text)
    template_option(sub)
    sub.add_argument("--json", action="store_true", help="print the evidence as JSON instead of the TOML")


def _sinks(options: argparse.Namespace) -> None:
    from lsg_jax.analysis.sinks import find_sinks
    from lsg_jax.report.sink_files import check_folder, check_layer, write_sinks

    images = {str(path): path for path in _named_images(options.images, options.limit)}
    if options.out is not None:
        check_folder(options.out, images.values())  # before the model runs
    vlm = load_model(options)
    check_layer(options.layer, vlm.config.text.num_layers)
    with progress_bar("sinks") as progress:
        found = find_sinks(vlm, images, options.prompt, max_new_tokens=options.max_new_tokens, progress=progress)
    for warning in found["warnings"]:
        logger.warning("%s", warning)
    for path, entry in found["images"].items():
        for warning in entry["warnings"]:
            logger.warning("%s: %s", path, warning)
    if options.out is not None:
        found = write_sinks(found, images, options.out, layer=options.layer)
    print(json.dumps(found, allow_nan=False))


def _named_images(paths: Sequence[Path], limit: int) -> list[Path]:
    """The files named, and those in the folders named, each once; unreadable files of a folder are skipped with a line.

    Raises:
        InputError: a file is named twice, or a folder holds no image that can be read.
    """
    from lsg_jax.data.images import check_image

    chosen: dict[Path, None] = {}
    for path in paths:
        if not path.is_dir():
            if path in chosen:
                raise InputError(f"--images: {path} is named twice")
            check_image(path)  # before anything is computed
            chosen[path] = None
            continue
        readable, skipped = _images_below(path, limit)
        for each in skipped:
            logger.warning("skipped: %s", each)
        chosen |= dict.fromkeys(readable)
    return list(chosen)


def _calibrate(options: argparse.Namespace) -> None:
    import lsg_jax
    from lsg_jax.analysis import calibrate, registers
    from lsg_jax.files import write_atomic

    if options.norm is not None and options.registers is None:
        raise ConfigError("--norm goes with --registers")
    images, skipped = _images_below(options.images, options.limit)
    if options.out is not None and not options.out.parent.is_dir():
        raise InputError(f"--out {options.out}: there is no folder {options.out.parent}")
    vlm = lsg_jax.load(options.model, template=options.template)
    with progress_bar("calibrate") as progress:
        if options.registers is None:
            result = calibrate.calibrate(vlm, images, options.prompt, progress=progress)
            text = calibrate.as_toml(result)
        else:
            result = registers.find_registers(
                vlm, images, options.prompt, options.registers, norm=options.norm, progress=progress
            )
            text = registers.as_toml(result)
    result["skipped"] = [*skipped, *result["skipped"]]
    for each in result["skipped"]:
        logger.warning("skipped: %s", each)
    for warning in result["warnings"]:
        logger.warning("%s", warning)
    if options.out is not None:
        write_atomic(options.out, text.encode())
    print(json.dumps(result, allow_nan=False) if options.json else text, end="\n" if options.json else "")


def _images_below(folder: Path, limit: int) -> tuple[list[Path], list[str]]:
    """Images in a folder and its subfolders, sorted by name: at most `limit`, evenly spaced.

    Returns:
        The images, and errors of those that cannot be read; in the place of such a one stands the next that can.
    """
    from lsg_jax.data.images import check_image

    if not folder.is_dir():
        raise InputError(f"--images {folder}: no such folder")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if not found:
        raise InputError(f"--images {folder}: no image in it (known endings: {' '.join(IMAGE_SUFFIXES)})")
    skipped: dict[Path, str] = {}
    chosen: set[Path] = set()
    for index in range(count := min(limit, len(found))):
        start = index * len(found) // count
        for path in (found[(start + step) % len(found)] for step in range(len(found))):
            if path in chosen or path in skipped:
                continue
            try:
                check_image(path)
            except InputError as error:
                skipped[path] = str(error)
                continue
            chosen.add(path)
            break
    if not chosen:
        raise InputError(f"--images {folder}: no image in it can be read, the first: {next(iter(skipped.values()))}")
    return sorted(chosen), list(skipped.values())
