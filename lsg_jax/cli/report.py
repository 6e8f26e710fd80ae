"""The command `lsg report`: finished work as a page."""

from __future__ import annotations

import argparse
from pathlib import Path

from lsg_jax.cli.options import Command, out_option


def add(command: Command) -> None:
    """Adds the command."""
    sub = command(
        "report",
        _report,
        "figures and tables of finished work, as one HTML page",
        ("lsg report lsg-quickstart --out report.html", "lsg report lsg-quickstart/run lsg-quickstart/eval --out gate.html"),
    )
    sub.add_argument(
        "paths", type=Path, nargs="+", metavar="RUN", help="folder of a run, an evaluation or a study, or of several"
    )
    out_option(sub, folder=False, required=True, help="HTML file to write")


def _report(options: argparse.Namespace) -> None:
    from lsg_jax.report.finished import read_sections
    from lsg_jax.report.page import write_report

    write_report(options.out, title="Attention sinks", notes=[], sections=read_sections(options.paths))
    print(options.out.resolve())
