"""Commands for portable gate files: gates export, combine, import, push."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import get_args

from lsg_jax.cli.options import Command, number_option, out_option, sink_config, sink_option
from lsg_jax.config import Activation
from lsg_jax.errors import InputError
from lsg_jax.files import check_output

logger = logging.getLogger(__name__)

EXAMPLES = (
    "lsg gates export lsg-quickstart/run gate.safetensors",
    "lsg gates combine lsg-quickstart/run runs/layer4 stack.safetensors",
)


def add(command: Command) -> None:
    """Adds the commands."""
    sub = command(
        "export",
        _gates_export,
        "write the gates of a run as a portable file",
        (EXAMPLES[0], "lsg gates export runs/each@4,6 two.safetensors"),
    )
    sub.add_argument("source", metavar="RUN", help="run folder, or layers of it as RUN@3,6; or a Hub id")
    sub.add_argument("file", type=Path, metavar="FILE.safetensors", help="gate file to write")
    sub = command(
        "combine",
        _gates_combine,
        "join gates of several layers that were trained apart",
        (EXAMPLES[1], "lsg gates combine runs/each@4 gate.safetensors two.safetensors"),
    )
    sub.add_argument("sources", nargs="*", metavar="G", help="run folders, gate files or Hub ids, or layers of one as RUN@3,6")
    sub.add_argument("last", metavar="OUT.safetensors", help="gate file to write")
    out_option(sub, folder=False, help=argparse.SUPPRESS)  # as earlier versions had it, in place of the last argument
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
    sub.add_argument("out", type=Path, metavar="OUT.safetensors", help="gate file to write")
    text = "the gated decoder layers, from 0, in the order of the gates where these are a list"
    number_option(sub, "--layers", int, "[0, 1e4]", nargs="+", action="extend", default=[], metavar="L", help=text)
    sub.add_argument("--activation", choices=get_args(Activation), help="between the linear maps, which no file says; gelu")
    number_option(sub, "--key-scale", float, "(0, 1000]", metavar="X", help="multiplies the ratios; 1.0")
    text = "tensors within a gate to leave out, where they change nothing"
    sub.add_argument("--ignore", nargs="+", action="extend", default=[], metavar="TENSOR", help=text)
    sub.add_argument("--json", action="store_true", help="print what was understood as JSON instead of a table")
    sink_option(sub)
    _add_push(command)


def _add_push(command: Command) -> None:
    """Adds `gates push`."""
    sub = command(
        "push",
        _gates_push,
        "upload gates with a model card to the Hugging Face Hub; prints what --gates takes then",
        (
            "lsg gates push lsg-quickstart/run owner/embedded-gate --eval lsg-quickstart/eval --private",
            "lsg gates push runs/each@4,6 owner/two-gates --revision layers-4-6 --eval runs/each/eval-4-6",
        ),
    )
    sub.add_argument("source", metavar="RUN", help="run folder, or layers of it as RUN@3,6; or a gate file")
    sub.add_argument("repository", metavar="REPO", help="Hub id owner/name; made if there is none of that name")
    sub.add_argument("--private", action="store_true", help="make the new repository private")
    sub.add_argument("--revision", metavar="BRANCH", help="branch to write to, made if it is missing; default: main")
    sub.add_argument("--message", metavar="M", help="message of the commit")
    text = "evaluation of these gates, for the scores of the card; default: RUN/eval if it is of them"
    sub.add_argument("--eval", type=Path, metavar="DIR", help=text)
    text = "Hub id of the model; default: what the model folder of RUN was converted from"
    sub.add_argument("--base-model", metavar="ID", help=text)


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

    sources, out = (
        (options.sources, Path(options.last)) if options.out is None else ([*options.sources, options.last], options.out)
    )
    if options.out is None and (not sources or out.suffix != ".safetensors"):
        raise InputError(f"{out}: not a name of a gate file to write; give the gates, and then OUT.safetensors")
    _check_new(out)
    write_gates(out, combine_gates([open_gates(source) for source in sources]))
    print(out)


def _gates_push(options: argparse.Namespace) -> None:
    from lsg_jax.sharing.push import push_gates

    pushed = push_gates(
        options.source,
        options.repository,
        private=options.private,
        revision=options.revision,
        message=options.message,
        evaluation=options.eval,
        base_model=options.base_model,
    )
    logger.info("%s", pushed.url)
    print(f"{pushed.repository}@{pushed.commit}")


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
