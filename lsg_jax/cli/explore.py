"""The command `lsg explore`: where the model looks, as a page on this machine."""

from __future__ import annotations

import argparse
import os
import secrets
import sys
from pathlib import Path

from lsg_jax.cli.options import Command, gate_options, load_model, model_argument, number_option, template_option

PORT = 8411


def add(command: Command) -> None:
    """Adds the command."""
    sub = command(
        "explore",
        _explore,
        "a page on 127.0.0.1: ask about images, see where the model looks, scale its sinks",
        ("lsg explore lsg-quickstart/model", "lsg explore lsg-quickstart/model --gates lsg-quickstart/run --open"),
    )
    sub.set_defaults(until_stopped=True)
    model_argument(sub)
    template_option(sub)
    gate_options(sub)
    number_option(
        sub, "--max-new-tokens", int, "[1, 1e8]", default=32, metavar="N", help="longest answer; default: %(default)s"
    )
    number_option(sub, "--port", int, "[0, 65535]", default=PORT, metavar="P", help="0: any free one; default: %(default)s")
    sub.add_argument("--open", action="store_true", help="open the page in the browser")


def _explore(options: argparse.Namespace) -> None:
    from lsg_jax.look.asking import Asker
    from lsg_jax.look.server import Explorer, make_app
    from lsg_jax.web import ADDRESS, bind, serve

    with bind(options.port) as listening:
        asker = Asker(load_model(options), max_new_tokens=options.max_new_tokens)
        gates = Path(options.gates).name if options.gates else ""
        explorer = Explorer(asker, name=options.model.resolve().name, gates=gates)
        token = secrets.token_urlsafe(16)
        url = f"http://{ADDRESS}:{listening.getsockname()[1]}/?token={token}"
        print(url, flush=True)
        if options.open:
            import webbrowser

            webbrowser.open(url)
        serve(make_app(explorer, token), listening)
        if explorer.worker.busy:
            # XLA cannot be interrupted, and a thread that is still in it when Python ends aborts the process:
            # so the process ends here, without Python's own end.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
