"""Options shared by several commands, opening the model that they name, and progress on stderr."""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from lsg_jax import distributed
from lsg_jax.cli.compile_cache import use_compile_cache
from lsg_jax.cli.printable import say
from lsg_jax.config.ranges import Range, shown
from lsg_jax.errors import ConfigError
from lsg_jax.progress import Progress, silent

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from lsg_jax.config import SinkConfig
    from lsg_jax.methods.method import Method
    from lsg_jax.vlm import VLM

SECONDS_TO_FIRST_LINE, SECONDS_BETWEEN_LINES = 2.0, 30.0

Command = Callable[[str, Callable[[argparse.Namespace], None], str, tuple[str, str]], argparse.ArgumentParser]
"""Adds a command: (name, the function that runs it, its help, two examples) -> its parser."""


def out_option(sub: argparse.ArgumentParser, *, folder: bool, **settings: Any) -> None:
    """Adds --out, which `main` checks before it runs the command."""
    sub.add_argument("--out", type=Path, metavar="DIR" if folder else "FILE", **settings)
    sub.set_defaults(writes="out", writes_folder=folder)


def out_folder(sub: argparse.ArgumentParser, name: str, **settings: Any) -> None:
    """Adds an argument that is the folder to write, which `main` checks before it runs the command."""
    sub.add_argument(name, type=Path, **settings)
    sub.set_defaults(writes=name, writes_folder=True)


def number_option(
    sub: Any,
    name: str,
    kind: type,
    interval: str,
    *,
    also: int | None = None,
    words: tuple[str, ...] = (),
    **settings: Any,
) -> None:
    """Adds an option that takes numbers in a range (`lsg_jax.config.ranges.Range`). Others raise ConfigError, which names it.

    Args:
        sub: a parser or a group of its options.
        kind: int or float.
        words: that are taken in place of a number.
    """
    limits = Range(interval, also)

    def read(text: str) -> Any:
        if text in words:
            return text
        try:
            value = kind(text)
        except ValueError:
            expected = " or ".join([kind.__name__, *words])
            raise argparse.ArgumentTypeError(f"expected {expected}, got {shown(text)}") from None
        limits.check(value, name, kind, words)
        return value

    sub.add_argument(name, type=read, **settings)


def model_argument(sub: argparse.ArgumentParser) -> None:
    """Adds MODEL."""
    sub.add_argument("model", type=Path, metavar="MODEL", help="model folder, as `lsg convert` writes it")


def config_arguments(sub: argparse.ArgumentParser) -> None:
    """Adds CONFIG and --set, for `load_run_config`."""
    sub.add_argument(
        "config", type=Path, metavar="CONFIG", help="configuration of the run, a TOML file such as those in configs/"
    )
    sub.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="A.B=VALUE",
        dest="overrides",
        help="change keys of CONFIG, values as in TOML; `unset` takes a key out; `lsg config` lists them",
    )


def gate_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--gates",
        metavar="G",
        help="run folder, gate file, or Hub id owner/name[@revision]; RUN@10 for the gate of layer 10 alone",
    )
    sink_option(sub)


def benchmark_option(sub: argparse.ArgumentParser) -> None:
    """Adds --benchmark, for `named_paths`."""
    sub.add_argument(
        "--benchmark",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=PATH",
        help="file, folder or glob of a known benchmark; `scenes` needs no path; own questions as NAME=FILE.jsonl",
    )


def named_paths(pairs: list[str]) -> dict[str, str]:
    """NAME=PATH -> {name: path}; the path is empty if there is none. ConfigError if a name is given twice."""
    paths: dict[str, str] = {}
    for name, _, path in (pair.partition("=") for pair in pairs):
        if name in paths:
            raise ConfigError(f"--benchmark {name}: given twice; give each file a name of its own")
        paths[name] = path
    return paths


def sink_option(sub: argparse.ArgumentParser) -> None:
    text = "sink settings, e.g. criterion=norm vit_tau=100; fields as in [sinks] of a configuration"
    sub.add_argument("--sinks", nargs="+", action="extend", default=[], metavar="FIELD=VALUE", help=text)


def template_option(sub: argparse.ArgumentParser) -> None:
    """Adds --template, for `load_model`."""
    from lsg_jax.config import Template

    text = "text template of the prompt, as data.template and eval.template; default: the checkpoint's own"
    sub.add_argument("--template", choices=get_args(Template), metavar="NAME", help=text)


def method_option(sub: argparse.ArgumentParser) -> None:
    """Adds --method, for `load_model`."""
    text = "a method that is not trained, and its settings, e.g. pai alpha=0.3; fields as in its table of a configuration"
    sub.add_argument("--method", nargs="+", metavar=("METHOD", "FIELD=VALUE"), help=text)


def load_model(options: argparse.Namespace, mesh: Mesh | None = None) -> VLM:
    """The model with the gates or method, and the sink settings, that the options name. Its programs are kept once compiled."""
    import lsg_jax

    method = _method(options)
    use_compile_cache()
    template = getattr(options, "template", None)
    vlm = lsg_jax.load(options.model, options.gates, mesh=mesh, template=template)
    if options.sinks:
        sinks = sink_config(options, vlm.config.sinks)
        vlm = lsg_jax.load(options.model, options.gates, mesh=mesh, template=template, sinks=sinks)
    return vlm if method is None else vlm.with_method(method)


def _method(options: argparse.Namespace) -> Method | None:
    """What --method names; None without it."""
    if not (words := getattr(options, "method", None)):
        return None
    from lsg_jax.config import apply_override, from_dict
    from lsg_jax.methods.registry import METHODS

    name, *settings = words
    where, kind = f"--method {name}", METHODS.get(name)
    if kind is not None and kind.trains:
        raise ConfigError(f"{where}: it is trained; name its run with --gates RUN")
    if kind is None or kind.Settings is None:
        untrained = [known for known, each in METHODS.items() if each.Settings is not None and not each.trains]
        raise ConfigError(f"{where}: unknown; known are {', '.join(untrained)}")
    if options.gates is not None:
        raise ConfigError(f"{where}: cannot be combined with --gates; give one of them")
    tree: dict[str, Any] = {}
    for override in settings:
        apply_override(tree, override, where=where)
    return kind(from_dict(kind.Settings, tree, where=where))


def sink_config(options: argparse.Namespace, base: SinkConfig) -> SinkConfig:
    """The sink settings `base`, with the fields of --sinks replaced."""
    from lsg_jax.config import SinkConfig, apply_override, from_dict, to_dict

    tree = to_dict(base)
    for override in options.sinks:
        apply_override(tree, override, where="--sinks")
    return from_dict(SinkConfig, tree, where="--sinks")


def process_options(sub: argparse.ArgumentParser) -> None:
    """Adds the options of a command that several processes run together; they are connected before it runs."""
    group = sub.add_argument_group("several processes")
    group.add_argument("--multihost", action="store_true", help="this is one of several processes: find the others first")
    group.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="the same with the address of process 0; needed, like the next two, without a TPU slice, Slurm, Open MPI or "
        "Kubernetes",
    )
    number_option(group, "--num-processes", int, "[1, 1e6]", metavar="N", help="number of processes")
    number_option(group, "--process-id", int, "[0, 1e6]", metavar="I", help="index of this process, from 0")
    number_option(
        group,
        "--heartbeat",
        int,
        "[1, 1e6]",
        default=distributed.HEARTBEAT,
        metavar="SECONDS",
        help="a process that is silent for so long ends all; default: %(default)s",
    )
    run = sub.get_default("run")
    sub.set_defaults(run=lambda options: _run_joined(run, options))


def _run_joined(run: Callable[[argparse.Namespace], None], options: argparse.Namespace) -> None:
    by_hand = options.coordinator, options.num_processes, options.process_id
    if not options.multihost and options.coordinator is None:
        if any(value is not None for value in by_hand):
            raise ConfigError("--num-processes and --process-id go with --multihost or --coordinator")
        run(options)
        return
    with distributed.joined(*by_hand, heartbeat=options.heartbeat):
        if not distributed.is_first():
            logging.getLogger("lsg_jax").setLevel(logging.WARNING)
        run(options)


@contextlib.contextmanager
def progress_bar(title: str) -> Iterator[Progress]:
    """Shows progress as a bar on stderr. Process 0 only.

    Where stderr is no terminal, a line says how far it is with the first report after 2 seconds, then every 30.
    """
    if not distributed.is_first():
        yield silent
        return
    if not sys.stderr.isatty():
        due = time.monotonic() + SECONDS_TO_FIRST_LINE

        def print_line(done: int, total: int | None, what: str) -> None:
            nonlocal due
            if time.monotonic() >= due:
                due = time.monotonic() + SECONDS_BETWEEN_LINES
                say(f"{title} {done}{f'/{total}' if total else ''} {what}\n")

        yield print_line
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Task, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar
    from rich.text import Text

    class Count(MofNCompleteColumn):
        """Nothing until something is done: before, the command loads and compiles."""

        def render(self, task: Task) -> Text:
            return super().render(task) if task.completed else Text()

    columns = (TextColumn("{task.description}"), BarColumn(), Count(), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(f"{title}: getting ready", total=None)

        def show(done: int, total: int | None, what: str) -> None:
            bar.update(task, completed=done, total=total, description=f"{title} {what}")

        yield show
