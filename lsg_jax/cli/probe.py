"""The command that probes hidden states: probe."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

from lsg_jax.cli.options import Command, gate_options, load_model, model_argument, number_option, out_option, progress_bar
from lsg_jax.errors import ConfigError

SCENES = "scenes"


def add(command: Command) -> None:
    """Adds the command."""
    sub = command(
        "probe",
        _probe,
        "what linear probes can read from sinks and from ordinary tokens, layer by layer",
        (
            "lsg probe lsg-quickstart/model --data scenes --images 500 --layers 0 4 7 --out probe",
            "lsg probe models/llava15_7b --data records/clevr --out probe",
        ),
    )
    model_argument(sub)
    sub.add_argument(
        "--data", required=True, metavar="scenes|FOLDER", help="rendered scenes, or what `lsg prepare --format clevr` wrote"
    )
    sub.add_argument("--test-data", type=Path, metavar="FOLDER", help="held-out images; default: a fifth of those of --data")
    number_option(
        sub, "--images", int, "[1, 1e9]", metavar="N", help="images, a fifth held out; default: 5000, or all of a folder"
    )
    sub.add_argument("--prompt", default="Describe the image.", metavar="TEXT", help="the question that goes with each image")
    number_option(
        sub,
        "--draws",
        int,
        "[2, 1e4]",
        default=5,
        metavar="N",
        help="random draws of ordinary tokens and of training images; default: 5",
    )
    number_option(sub, "--tokens", int, "[1, 1e6]", default=5, metavar="N", help="ordinary tokens per draw; default: 5")
    number_option(
        sub, "--seed", int, "[0, 4294967295]", default=0, metavar="N", help="of scenes and draws; default: %(default)s"
    )
    number_option(sub, "--layers", int, "[0, 1e4]", nargs="+", metavar="L", help="decoder layers, 0-based; default: all")
    number_option(
        sub, "--batch-size", int, "[1, 1e6]", default=8, metavar="N", help="images at a time on each device; default: 8"
    )
    gate_options(sub)
    out_option(sub, folder=True, required=True, help="folder for probe.json and the figure")
    sub.add_argument("--json", action="store_true", help="print the result as JSON instead of a table")


def _probe(options: argparse.Namespace) -> None:
    from lsg_jax.analysis.probe import ProbeSettings, probe_study
    from lsg_jax.analysis.probe_images import clevr_data, scene_data
    from lsg_jax.config import MeshConfig
    from lsg_jax.json_files import write_sealed
    from lsg_jax.report.figures import draw_probe_curves
    from lsg_jax.sharding import make_mesh

    settings = ProbeSettings(
        prompt=options.prompt,
        draws=options.draws,
        tokens=options.tokens,
        seed=options.seed,
        layers=None if options.layers is None else tuple(options.layers),
        batch_size=options.batch_size,
    )
    if options.data == SCENES and options.test_data is not None:
        raise ConfigError("--test-data goes with a folder as --data; scenes have a held-out split of their own")
    if options.data == SCENES:
        vlm = load_model(options, make_mesh(MeshConfig()))  # over all devices
        data = scene_data(options.images, side=vlm.config.vision.image_size, seed=options.seed)
    else:  # a wrong folder is reported before the model is loaded
        data = clevr_data(Path(options.data), options.test_data, options.images, seed=options.seed)
        vlm = load_model(options, make_mesh(MeshConfig()))  # over all devices
    options.out.mkdir(parents=True, exist_ok=True)
    with progress_bar("probe") as progress:
        result = probe_study(vlm, data, settings, options.out, progress)
    for warning in result["warnings"]:
        logging.getLogger(__name__).warning("%s", warning)
    write_sealed(options.out / "probe.json", result)
    draw_probe_curves(result["rows"], options.out / "probe")
    print(json.dumps(result) if options.json else _summary(result))


def _summary(result: dict[str, Any]) -> str:
    """Accuracy in percent of each attribute and group: the mean over layers, and the best layer."""
    rows = [row for row in result["rows"] if row["metric"] == "accuracy"]
    lines = [f"{'attribute':<11}{'group':<10}{'mean':>6}{'best':>7}{'+-':>6}{'layer':>7}{'chance':>8}"]
    for attribute, group in dict.fromkeys((row["attribute"], row["group"]) for row in rows):
        own = [row for row in rows if (row["attribute"], row["group"]) == (attribute, group)]
        known = [row for row in own if row["mean"] is not None]
        if not known:
            lines.append(f"{attribute:<11}{group:<10}  none: {own[0]['reason']}")
            continue
        mean, best = sum(row["mean"] for row in known) / len(known), max(known, key=lambda row: row["mean"])
        lines.append(
            f"{attribute:<11}{group:<10}{100 * mean:6.1f}{100 * best['mean']:7.1f}{100 * best['std']:6.1f}"
            f"{best['layer']:7}{100 * best['chance']:8.1f}"
        )
    return "\n".join(lines)
