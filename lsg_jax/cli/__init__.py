"""The `lsg` command. Subcommands import what they need when they run. Results go to stdout and files, logs to stderr."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import platform
import select
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from lsg_jax.cli import (
    completion,
    config,
    explore,
    gates,
    look,
    models,
    plan,
    pointing,
    probe,
    report,
    serve,
    sinks,
    stack,
    sweep,
    training,
)
from lsg_jax.cli.causes import cause_of, is_about_a_file
from lsg_jax.cli.compiling import compilations_told
from lsg_jax.cli.options import Command
from lsg_jax.cli.printable import PrintableFormatter, printable, printable_stdout, say
from lsg_jax.errors import LsgError, Preempted
from lsg_jax.files import check_output
from lsg_jax.stopping import AGAIN, handled, was_stopped


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0 done, 2 usage, others as in lsg_jax.errors."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        # A character that the terminal's encoding lacks is printed as \xe9 or \u4e2d, as on stderr.
        sys.stdout.reconfigure(errors="backslashreplace")
    command = ["lsg", *arguments[: 2 if arguments[:1] == ["gates"] else 1]]
    with handled():
        try:
            options = parser().parse_args(arguments)
            with printable_stdout():
                _run(options)
            return 0
        except (Exception, KeyboardInterrupt) as error:
            if isinstance(error, BrokenPipeError) and _reader_is_gone():
                return 0
            if "--traceback" in arguments:
                traceback.print_exc()
            if was_stopped() and not isinstance(error, LsgError):
                error = Preempted(AGAIN)  # a library has made another error of it
            code, text = _exit_code(error), cause_of(error)
    say(printable(f"{' '.join(command)}: {' '.join(text.split())}\n"))
    return code


def _run(options: argparse.Namespace) -> None:
    lines = logging.StreamHandler(sys.stderr)
    lines.setFormatter(PrintableFormatter("%(message)s"))
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, handlers=[lines], force=True)
    warnings.filterwarnings("ignore", module=r"PIL\.")  # one for each odd tag of an image, thousands in a hostile one
    logging.raiseExceptions = False  # a closed stderr is no error
    logging.getLogger("lsg_jax").setLevel(logging.INFO)
    logging.getLogger("converters").setLevel(logging.INFO)
    logging.getLogger("absl").setLevel(logging.INFO if options.verbose else logging.ERROR)  # Orbax logs through it
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if (out := getattr(options, getattr(options, "writes", ""), None)) is not None:
        check_output(out, folder=options.writes_folder)
    _quieten_libtpu()
    with compilations_told() if options.tells_compilations else contextlib.nullcontext():
        options.run(options)
    if was_stopped() and not options.until_stopped:
        raise Preempted(AGAIN)  # a library has dropped the exception: who knows what else
    sys.stdout.flush()


def _quieten_libtpu() -> None:
    """Says what libtpu would otherwise ask a machine without a TPU for, and complain of."""
    import jax

    if jax.config.values["jax_platforms"] is None:  # JAX chooses, and would have chosen a TPU if there were one
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


def _reader_is_gone() -> bool:
    """Whether the reader of stdout, such as `head`, has closed the pipe."""
    try:
        polled = select.poll()
        polled.register(sys.stdout, select.POLLOUT)
        return any(event & select.POLLERR for _, event in polled.poll(0))
    except (AttributeError, OSError, ValueError):  # no poll (Windows), or no descriptor
        return True


def _exit_code(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return Preempted.exit_code
    if isinstance(error, LsgError):
        return error.exit_code
    return 65 if is_about_a_file(error) else 1


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    top = _described(
        argparse.ArgumentParser,
        "find, understand and tame attention sinks in vision-language models",
        ("lsg quickstart", models.ASK),
        prog="lsg",
    )
    top.add_argument("--version", action=_Version, nargs=0, help="print the versions of lsg_jax, JAX and Python")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", help="what to do")
    for part in (models, look, explore, serve, sinks, training, sweep, probe, pointing, stack, plan, report, config):
        part.add(_adder(commands))
    completion.add(_adder(commands), parser)
    below = _described(commands.add_parser, "portable gate files", gates.EXAMPLES, name="gates", help="portable gate files")
    gates.add(_adder(below.add_subparsers(required=True, metavar="ACTION", dest="action", help="what to do with them")))
    return top


class _Version(argparse.Action):
    """Prints the versions and ends the command."""

    def __call__(self, parser: argparse.ArgumentParser, *arguments: Any) -> NoReturn:
        from importlib.metadata import version

        from lsg_jax import __version__

        print(f"lsg_jax {__version__}, JAX {version('jax')}, Python {platform.python_version()}")
        parser.exit()


def _adder(commands: Any) -> Command:
    def command(
        name: str, run: Callable[[argparse.Namespace], None], text: str, examples: tuple[str, str]
    ) -> argparse.ArgumentParser:
        sub = _described(commands.add_parser, text, examples, name=name, help=text)
        sub.set_defaults(run=run, until_stopped=False, tells_compilations=True)
        sub.add_argument("--traceback", action="store_true", help="print the whole traceback of an error")
        sub.add_argument("--verbose", action="store_true", help="log what the libraries do")
        return sub

    return command


def _described(
    make: Callable[..., argparse.ArgumentParser], text: str, examples: tuple[str, str], **settings: Any
) -> argparse.ArgumentParser:
    """A parser whose help begins with `text` and ends with the examples."""
    return make(
        **settings,
        description=text[0].upper() + text[1:] + ".",
        epilog="\n  ".join(["examples (`lsg quickstart` writes the folder lsg-quickstart):", *examples]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
