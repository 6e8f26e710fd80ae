"""Commands for portable gate files: gates export, combine, import."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from lsg_jax.cli.options import Command, number_option, out_option, sink_config, sink_option
from lsg_jax.config import Activation
from lsg_jax.errors import InputError
from lsg_jax.files import check_output

EXAMPLES = (
    "lsg gates export lsg-quickstart/run gate.safetensors",
    "lsg gates combine lsg-quickstart/run runs/layer4 --out stack.safetensors",
)


def add(command: Command) -> None:
    """Adds the commands."""
    sub = command(
        "export",
        _gates_export,
        "write the gates of a run as a portable file",
        (EXAMPLES[0], "lsg gates export runs/each@4,6 two.safetensors"),
    )
    sub.add_argument("source", metavar="RUN", help="run folder, or layers of it as RUN@3,6")
    sub.add_argument("file", type=Path, metavar="FILE.safetensors")
    sub = command(
        "combine",
        _gates_combine,
        "join gates of several layers that were trained apart",
        (EXAMPLES[1], "lsg gates combine runs/each@4 gate.safetensors --out two.safetensors"),
    )
    sub.add_argument("sources", nargs="+", metavar="G", help="run folders or gate files, or layers of one as RUN@3,6")
    out_option(sub, folder=False, required=True)
    sub = command(
        "import",
        _gates_import,
        "turn published PyTorch gates into a portable file, and say what was understood",
        (
            "lsg gates import lsg_public/llava15_stack_L3_6_7_10_19_PEFT stack.safetensors",
            "lsg gates import layer10.pt imported.safetensors --layers 10 --sinks criterion=norm vit_tau=100",
        ),
    )
    sub.add_argument(
        "path",
        type=Path,
        metavar="FILE|FOLDER",
        help="a folder counts with its name and sink_cfg.json; a file is read alone",
    )
    sub.add_argument("out", type=Path, metavar="OUT.safetensors")
    text = "the gated decoder layers, from 0, in the order of the gates where these are a list"
    number_option(sub, "--layers", int, "[0, 1e4]", nargs="+", action="extend", default=[], metavar="L", help=text)
    sub.add_argument("--activation", choices=get_args(Activation), help="between the linear maps, which no file says; gelu")
    number_option(sub, "--key-scale", float, "(0, 1000]", metavar="X", help="multiplies the ratios; 1.0")
    text = "tensors within a gate to leave out, where they change nothing"
    sub.add_argument("--ignore", nargs="+", action="extend", default=[], metavar="TENSOR", help=text)
    sub.add_argument("--json", action="store_true", help="print what was understood as JSON instead of a table")
    sink_option(sub)


def _check_new(path: Path) -> None:
    """InputError for a file that exists or cannot be written."""
    check_output(path, folder=False)
    if path.exists():
        raise InputError(f"{path}: exists; choose another output")


def _gates_export(options: argparse.Namespace) -> None:
    from lsg_jax.gating.portable import write_gates
    from lsg_jax.opening import open_gates

    _check_new(options.file)
    write_gates(options.file, open_gates(options.source))
    print(options.file)


def _gates_combine(options: argparse.Namespace) -> None:
    from lsg_jax.gating.portable import combine_gates, write_gates
    from lsg_jax.opening import open_gates

    _check_new(options.out)
    write_gates(options.out, combine_gates([open_gates(source) for source in options.sources]))
    print(options.out)


def _gates_import(options: argparse.Namespace) -> None:
    import json

    from converters.gates import as_table, import_gates
    from lsg_jax.config import GateConfig
    from lsg_jax.gating.portable import write_gates

    _check_new(options.out)
    stated = {"activation": options.activation, "key_scale": options.key_scale}
    gate = GateConfig(**{name: value for name, value in stated.items() if value is not None})
    found = import_gates(
        options.path,
        layers=options.layers,
        gate=gate,
        sinks=lambda published: sink_config(options, published),
        ignore=options.ignore,
    )
    write_gates(options.out, found.gates)
    described = {**found.described, "written": str(options.out)}
    print(json.dumps(described, indent=2) if options.json else as_table(described))
