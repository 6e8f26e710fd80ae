"""The command `lsg config`: every key that `--set` takes."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lsg_jax.cli.options import Command

if TYPE_CHECKING:
    from lsg_jax.config.describe import Key

_MODEL = ("model", "output", "dtype", "sinks")
_TRAINING = ("seed", "data", "train", "mesh")
READS = {
    "train": (*_MODEL, "method", *_TRAINING, "TRAINED"),
    "eval": (*_MODEL, "method", "eval", "UNTRAINED"),
    "sweep": (*_MODEL, "eval"),
    "stack": (*_MODEL, *_TRAINING, "gate", "eval"),
    "ablate": (*_MODEL, "method", *_TRAINING, "gate", "lora", "eval"),
    "plan": (*_MODEL, "method", *_TRAINING, "eval", "TRAINED", "UNTRAINED"),
}
"""Command -> the keys and tables that it reads. TRAINED and UNTRAINED: the tables of methods that are trained, or are not."""

NO_TERMINAL = 140  # columns, where stdout is none


def add(command: Command) -> None:
    """Adds the command."""
    sub = command(
        "config",
        _config,
        "every key of --set with its type, range, default and meaning",
        ("lsg config train", "lsg config sweep --json"),
    )
    sub.add_argument("of", nargs="?", choices=list(READS), metavar="COMMAND", help=f"only what it reads: {', '.join(READS)}")
    sub.add_argument("--json", action="store_true", help="print a list of the keys as JSON instead of a table")


def _config(options: argparse.Namespace) -> None:
    found = keys(options.of)
    if options.json:
        print(json.dumps([dataclasses.asdict(key) for key in found], indent=2))
    else:
        _print_table(found)


def keys(of: str | None = None) -> list[Key]:
    """The keys that a command reads; all for None."""
    from lsg_jax.config.describe import keys_of
    from lsg_jax.methods.registry import METHODS
    from lsg_jax.run_config import method_tables, schema

    trained = {kind.Settings.table for kind in METHODS.values() if kind.Settings is not None and kind.trains}
    tables = {"TRAINED": trained, "UNTRAINED": method_tables().keys() - trained}
    named = [tables.get(name, {name}) for name in READS[of]] if of is not None else []
    read = {name for names in named for name in names}
    found = [key for key in keys_of(schema()) if of is None or key.name.partition(".")[0] in read]
    return [dataclasses.replace(key, values=", ".join(METHODS)) if key.name == "method" else key for key in found]


def _print_table(found: Sequence[Key]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for name, width in (("key", None), ("type", None), ("range", 30), ("default", 14), ("meaning", None)):
        table.add_column(name, max_width=width, overflow="fold", no_wrap=name in ("key", "type"))
    for key in found:
        table.add_row(*(Text(cell) for cell in (key.name, key.type, key.values, key.default, key.meaning)))
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else NO_TERMINAL
    console = Console(width=columns, color_system=None)
    with console.capture() as printed:
        console.print(table)
    print("\n".join(line.rstrip() for line in printed.get().splitlines()))
