"""Options that several commands share, opening a model as they say, and progress on stderr."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

SECONDS_BETWEEN_LINES = 30.0

Command = Callable[[str, Callable[[argparse.Namespace], None], str], argparse.ArgumentParser]
"""Adds a command: (name, what it runs, its help) -> its parser."""


def gate_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--gates", metavar="G", help="run folder or gate file; RUN@10 for the gate of layer 10 alone")
    sink_option(sub)


def benchmark_option(sub: argparse.ArgumentParser) -> None:
    """--benchmark, which `named_paths` reads."""
    sub.add_argument(
        "--benchmark",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=PATH",
        help="Parquet file, folder or glob of a known benchmark; `scenes` needs no path; own questions as NAME=FILE.jsonl",
    )


def named_paths(pairs: list[str]) -> dict[str, str]:
    """NAME=PATH -> {name: path}; the path is empty where there is none."""
    return {name: path for name, _, path in (pair.partition("=") for pair in pairs)}


def sink_option(sub: argparse.ArgumentParser) -> None:
    text = "sink settings, e.g. criterion=norm vit_tau=100; fields as in [sinks] of a configuration"
    sub.add_argument("--sinks", nargs="+", action="extend", default=[], metavar="FIELD=VALUE", help=text)


def load_model(options: argparse.Namespace, mesh: Any = None) -> Any:
    """The model, gates and sink settings that the options name."""
    import lsg_jax

    vlm = lsg_jax.load(options.model, options.gates, mesh=mesh)
    if options.sinks:
        vlm = lsg_jax.load(options.model, options.gates, mesh=mesh, sinks=sink_config(options, vlm.config.sinks))
    return vlm


def sink_config(options: argparse.Namespace, base: Any) -> Any:
    """The sink settings `base` with the fields of --sinks."""
    from lsg_jax.config import SinkConfig, apply_override, from_dict, to_dict

    tree = to_dict(base)
    for override in options.sinks:
        apply_override(tree, override, where="--sinks")
    return from_dict(SinkConfig, tree, where="--sinks")


@contextlib.contextmanager
def progress_bar(what: str) -> Iterator[Callable[..., None]]:
    """A progress bar on stderr, or a line now and then where that is no terminal: call with (done, total or None, text)."""
    if not sys.stderr.isatty():
        last = time.monotonic()

        def tell(done: int, total: int | None = None, text: str = "") -> None:
            nonlocal last
            if time.monotonic() - last >= SECONDS_BETWEEN_LINES:
                last = time.monotonic()
                print(f"{what} {done}{f'/{total}' if total else ''} {text}".rstrip(), file=sys.stderr, flush=True)

        yield tell
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=None)

        def show(done: int, total: int | None = None, text: str = "") -> None:
            bar.update(task, completed=done, total=total, description=f"{what} {text}".strip())

        yield show
