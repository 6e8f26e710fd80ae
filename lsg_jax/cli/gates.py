"""Commands for portable gate files: gates export, combine, import."""

from __future__ import annotations

import argparse
from pathlib import Path

from lsg_jax.cli.options import Command, out_option, sink_config, sink_option
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
        "turn a published PyTorch gate file into a portable one",
        (
            "lsg gates import gates.pt imported.safetensors",
            "lsg gates import layer10.pt imported.safetensors --layer 10 --sinks criterion=norm vit_tau=100",
        ),
    )
    sub.add_argument("file", type=Path, metavar="FILE")
    sub.add_argument("out", type=Path, metavar="OUT.safetensors")
    sub.add_argument("--layer", type=int, metavar="L", help="the gated layer, where the file does not say")
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
    from converters.gates import import_torch_gates
    from lsg_jax.config import SinkConfig
    from lsg_jax.gating.portable import write_gates

    _check_new(options.out)
    write_gates(options.out, import_torch_gates(options.file, sinks=sink_config(options, SinkConfig()), layer=options.layer))
    print(options.out)
