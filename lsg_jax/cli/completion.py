"""The command `lsg completion`: a script with which a shell completes commands, options and paths."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

from lsg_jax.cli.options import Command

_SHELLS = ("bash", "zsh", "fish")
_RUNS = ("G", "RUN")  # what run folders and gate files are called, which may carry @LAYERS and so are texts


def add(command: Command, make_parser: Callable[[], argparse.ArgumentParser]) -> None:
    """Adds the command.

    Args:
        make_parser: makes the parser of all commands.
    """
    sub = command(
        "completion",
        lambda options: _completion(options, make_parser()),
        "print a script for completion in bash, zsh or fish; save it where your shell looks for such",
        ("lsg completion bash", "lsg completion zsh"),
    )
    text = (
        "bash: save as ~/.local/share/bash-completion/completions/lsg; zsh: as _lsg in a folder of $fpath; "
        "fish: as ~/.config/fish/completions/lsg.fish"
    )
    sub.add_argument("shell", choices=_SHELLS, metavar="SHELL", help=text)


def _completion(options: argparse.Namespace, top: argparse.ArgumentParser) -> None:
    import shtab

    for parser in parsers_of(top):
        for action in parser._actions:
            if action.choices is None and (action.type is Path or action.metavar in _RUNS):
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(top, shell=options.shell))


def parsers_of(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """A parser, and those of the commands below it."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from parsers_of(below)
