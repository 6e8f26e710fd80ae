"""The command `lsg serve`: the OpenAI chat-completions protocol."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lsg_jax.cli.options import Command, gate_options, load_model, model_argument, number_option, template_option
from lsg_jax.errors import ConfigError

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from lsg_jax.serve.question import Limits
    from lsg_jax.vlm import VLM

HOST, PORT = "127.0.0.1", 8412
TOKEN = "LSG_API_KEY"


def add(command: Command) -> None:
    """Adds the command."""
    sub = command(
        "serve",
        _serve,
        "answer over the OpenAI chat-completions protocol, with gates and without",
        ("lsg serve lsg-quickstart/model", "lsg serve lsg-quickstart/model --gates lsg-quickstart/run --port 8000"),
    )
    sub.set_defaults(until_stopped=True)
    model_argument(sub)
    template_option(sub)
    gate_options(sub)
    sub.add_argument("--host", default=HOST, metavar="H", help="address to listen on; default: %(default)s, this machine alone")
    number_option(sub, "--port", int, "[0, 65535]", default=PORT, metavar="P", help="0: any free one; default: %(default)s")
    text = f"file that holds the token which clients must send; or the variable {TOKEN}. Needed unless H is this machine alone"
    sub.add_argument("--token-file", type=Path, metavar="FILE", help=text)
    sub.add_argument("--name", metavar="NAME", help="of the model, as clients have it; default: the name of its folder")
    text = "hosts that images are fetched from, by https; without any, images come as data URLs alone"
    sub.add_argument("--allow-hosts", nargs="+", action="extend", default=[], metavar="HOST", help=text)
    _limits(sub)


def _limits(sub: argparse.ArgumentParser) -> None:
    group = sub.add_argument_group("limits")
    add = lambda name, interval, default, text: number_option(
        group, name, int, interval, default=default, metavar="N", help=f"{text}; default: {'%(default)s' if default else 'all'}"
    )
    add("--batch-size", "[1, 1024]", 8, "requests that are answered at a time")
    add("--queue", "[1, 1e5]", 256, "requests that wait; others are told to come back")
    add("--max-new-tokens", "[1, 1e6]", 1024, "longest answer, and its length where a request names none")
    add("--max-length", "[2, 1e7]", None, "tokens of prompt and answer together, images included, of the model's positions")
    add("--max-images", "[0, 1024]", 16, "images of a request")
    add("--max-pixels", "[1, 89478485]", 50_000_000, "pixels of an image")
    add("--max-body", "[1, 1024]", 32, "MiB of a request")
    add("--grace", "[0, 86400]", 60, "seconds that requests get to end when the server is stopped")


def _serve(options: argparse.Namespace) -> None:
    from lsg_jax import stopping
    from lsg_jax.serve.pictures import check_hosts
    from lsg_jax.serve.server import chat_server, make_app
    from lsg_jax.web import bind, serve

    token, name = _token(options), options.name or options.model.resolve().name
    if not name.isprintable():
        raise ConfigError(f"--name {name!a}: no reply can hold this name: give one of visible characters")
    check_hosts(options.allow_hosts)
    with bind(options.port, options.host) as listening:
        vlm = load_model(options, _mesh(options))
        server = chat_server(
            vlm,
            _checked_limits(options, vlm),
            name=name,
            batch_size=options.batch_size,
            max_waiting=options.queue,
            hosts=options.allow_hosts,
        )
        host = f"[{options.host}]" if ":" in options.host else options.host
        with server.metrics.compilations(), stopping.finishing():
            print(f"http://{host}:{listening.getsockname()[1]}/v1", flush=True)
            server.engine.start()
            serve(make_app(server, token), listening, grace=options.grace)
        if not server.engine.idle:
            # XLA cannot be interrupted, and a thread that is still in it when Python ends aborts the process:
            # so the process ends here, without Python's own end.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)


def _mesh(options: argparse.Namespace) -> Mesh | None:
    """The mesh of all devices; None for a single one."""
    import jax

    from lsg_jax.opening import model_mesh

    return model_mesh(options.model) if jax.device_count() > 1 else None


def _checked_limits(options: argparse.Namespace, vlm: VLM) -> Limits:
    """The limits of requests. ConfigError for those that the model, or the memory, cannot keep."""
    from lsg_jax.memory import check_answers
    from lsg_jax.serve.batching import padded_length
    from lsg_jax.serve.question import Limits

    positions = vlm.config.text.max_positions
    length = options.max_length or positions
    if length > positions:
        raise ConfigError(f"--max-length {length}: the model has {positions} positions")
    new_tokens = min(options.max_new_tokens, length - 1)
    check_answers(vlm, options.batch_size, padded_length(length), "lower --batch-size or --max-length")
    return Limits(length, new_tokens, options.max_images, options.max_pixels, options.max_body << 20)


def _token(options: argparse.Namespace) -> str | None:
    """The token of the file or of the environment; None if there is none, and none is needed."""
    from lsg_jax.files import read_regular
    from lsg_jax.serve.guard import check_token, is_loopback

    if options.token_file is not None:
        text = read_regular(options.token_file, limit=1 << 16).decode(errors="replace")
        return check_token(text, f"--token-file {options.token_file}")
    if (given := os.environ.get(TOKEN)) is not None:
        return check_token(given, TOKEN)
    if not is_loopback(options.host):
        raise ConfigError(f"--host {options.host}: others can reach this address: give a token by --token-file or {TOKEN}")
    return None
