"""Commands for models and what is on disk: quickstart, convert, export, inspect, verify, generate."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from lsg_jax.cli.options import (
    Command,
    gate_options,
    load_model,
    method_option,
    model_argument,
    number_option,
    out_folder,
    out_option,
    progress_bar,
    template_option,
)

IMAGE = "lsg-quickstart/validation/images/00000.png"
ASK = f'lsg generate lsg-quickstart/model --image {IMAGE} --prompt "How many shapes are there?"'


def add(command: Command) -> None:
    """Adds the commands."""
    sub = command(
        "quickstart",
        _quickstart,
        "all steps on the embedded model, on CPU, in minutes",
        ("lsg quickstart", "lsg quickstart --out story"),
    )
    out_option(sub, folder=True, default=Path("lsg-quickstart"), help="folder to write; default: %(default)s")

    sub = command(
        "convert",
        _convert,
        "convert a Hugging Face checkpoint into a model folder",
        (
            "lsg convert llava-hf/llava-1.5-7b-hf models/llava15_7b --dtype bfloat16",
            "lsg convert embedded models/embedded --dtype int8",
        ),
    )
    sub.add_argument(
        "source",
        metavar="SOURCE",
        help="local folder in HF format or an original layout, a Hub id, or `embedded`: the model that comes with the package",
    )
    out_folder(sub, "model", metavar="MODEL", help="folder to write")
    text = "int8: 8-bit weights in the decoder layers, the rest bfloat16. Default: as stored"
    sub.add_argument("--dtype", choices=["bfloat16", "float32", "int8"], help=text)
    sub.add_argument("--revision", metavar="R", help="branch, tag or commit of the Hub id")
    sub.add_argument(
        "--base", metavar="B", help="folder or Hub id that SOURCE, an adapter or a projector alone, was trained on"
    )
    text = "shrink larger images to N pixels; for models that take images of any size. Default: as the checkpoint says"
    number_option(sub, "--max-pixels", int, "[1, 1e9]", metavar="N", help=text)

    sub = command(
        "export",
        _export,
        "write a model folder back in Hugging Face format",
        ("lsg export lsg-quickstart/model hf/embedded", "lsg export models/llava15_7b hf/llava15_7b --trained runs/full"),
    )
    model_argument(sub)
    out_folder(sub, "hf_dir", metavar="HF_DIR", help="folder to write")
    text = "default: as stored; 8-bit weights are written as bfloat16, which rounds them, or exactly as float32"
    sub.add_argument("--dtype", choices=["bfloat16", "float32"], help=text)
    sub.add_argument("--trained", type=Path, metavar="RUN", help='replace the parts that a run of method = "full" has trained')

    _add_readers(command)


def _add_readers(command: Command) -> None:
    """Adds the commands that only read what is there."""
    sub = command(
        "inspect",
        _inspect,
        "show what a model folder, run folder, prepared records or gate file contains, or gates on the Hub",
        ("lsg inspect lsg-quickstart/model", "lsg inspect lsg-quickstart/run --json"),
    )
    sub.add_argument("path", type=Path, metavar="PATH", help="folder or gate file, or Hub id owner/name[@revision] of gates")
    sub.add_argument("--json", action="store_true", help="print JSON instead of a table")

    sub = command(
        "verify",
        _verify,
        "check every digest of a model folder, run folder, prepared records or gate file, or of a folder that holds such",
        ("lsg verify lsg-quickstart/model", "lsg verify lsg-quickstart/records"),
    )
    sub.add_argument("path", type=Path, metavar="PATH", help="folder or gate file, or Hub id owner/name[@revision] of gates")

    sub = command(
        "generate",
        _generate,
        "answer a question about an image; prints the answer only",
        (ASK, f"{ASK} --gates lsg-quickstart/run"),
    )
    model_argument(sub)
    sub.add_argument(
        "--image", type=Path, nargs="+", action="extend", metavar="FILE", help="one or more; leave out for a text-only question"
    )
    sub.add_argument(
        "--prompt", required=True, metavar="TEXT", help="<image> says where each of several images stands; else they come first"
    )
    template_option(sub)
    gate_options(sub)
    method_option(sub)
    number_option(
        sub, "--max-new-tokens", int, "[1, 1e8]", default=128, metavar="N", help="longest answer; default: %(default)s"
    )


def _quickstart(options: argparse.Namespace) -> None:
    from converters.convert import convert
    from converters.plant_sinks import PlantSettings, plant
    from lsg_jax import quickstart

    planting = PlantSettings(**quickstart.PLANTED, scenes=quickstart.PLANTED_SCENES)
    report = quickstart.quickstart(options.out, convert=convert, plant=plant, planting=planting, progress_bar=progress_bar)
    print(report)


def _convert(options: argparse.Namespace) -> None:
    from converters.convert import convert
    from lsg_jax.quickstart import CHECKPOINT

    own = options.source == "embedded" and not Path(options.source).exists()
    with progress_bar("convert") as progress:
        convert(
            CHECKPOINT if own else options.source,
            options.model,
            dtype=options.dtype,
            revision=options.revision,
            base=options.base,
            max_pixels=options.max_pixels,
            progress=progress,
        )
    print(options.model)


def _export(options: argparse.Namespace) -> None:
    from converters.export import export, trained_leaves

    trained = trained_leaves(options.model, options.trained) if options.trained else None
    with progress_bar("export") as progress:
        export(options.model, options.hf_dir, dtype=options.dtype, trained=trained, progress=progress)
    print(options.hf_dir)


def _inspect(options: argparse.Namespace) -> None:
    from lsg_jax.inspection import as_table, describe

    found = describe(options.path)
    print(json.dumps(found, indent=2) if options.json else as_table(found))


def _verify(options: argparse.Namespace) -> None:
    from lsg_jax.errors import CheckpointError
    from lsg_jax.inspection import problems

    found, remarks = problems(options.path)
    for line in (*found, *remarks):
        print(line)
    if found:
        raise CheckpointError(f"{options.path}: {len(found)} problem{'s' * (len(found) > 1)} found")
    print(f"{options.path}: ok")


def _generate(options: argparse.Namespace) -> None:
    vlm = load_model(options)
    print(vlm.generate([options.image], [options.prompt], options.max_new_tokens)[0])
