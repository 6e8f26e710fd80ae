"""Where a model looks: the command look."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

from lsg_jax.cli.models import IMAGE
from lsg_jax.cli.options import (
    Command,
    gate_options,
    load_model,
    method_option,
    model_argument,
    number_option,
    out_option,
    template_option,
)

logger = logging.getLogger(__name__)


def add(command: Command) -> None:
    """Adds the command."""
    ask = f'lsg look lsg-quickstart/model --image {IMAGE} --prompt "Which colour is most common?"'
    sub = command(
        "look",
        _look,
        "where the model looks: its answer, and maps of the attention with and without sinks",
        (f"{ask} --out looked", f"{ask} --maps raw no_sinks relative --json"),
    )
    model_argument(sub)
    sub.add_argument("--image", type=Path, nargs="+", action="extend", required=True, metavar="FILE", help="one or more")
    text = "<image> says where each of several images stands; else they come first"
    sub.add_argument("--prompt", required=True, metavar="TEXT", help=text)
    out_option(sub, folder=True, help="write look.html, pictures, a figure by layer, look.json and maps.npz")
    text = "raw: attention weights; no_sinks: without V- and L-sinks; relative: over a neutral prompt. Default: raw no_sinks"
    sub.add_argument("--maps", nargs="+", choices=("raw", "no_sinks", "relative"), default=["raw", "no_sinks"], help=text)
    number_option(sub, "--max-new-tokens", int, "[1, 1e8]", default=32, metavar="N", help="longest answer (32)")
    sub.add_argument("--json", action="store_true", help="print look.json instead of the answer and the shares")
    template_option(sub)
    gate_options(sub)
    method_option(sub)


def _look(options: argparse.Namespace) -> None:
    from lsg_jax.look.files import as_json, check_folder, shares

    if options.out is not None:
        check_folder(options.out)
    vlm = load_model(options)
    look = vlm.look(options.image, options.prompt, options.max_new_tokens, maps=options.maps)
    for warning in look.warnings:
        logger.warning("%s", warning)
    if not look.tokens:
        logger.warning("the answer ends at once: there are no answer tokens to map")
    if options.out is not None:
        look.save(options.out)
    if options.json:
        print(json.dumps(as_json(look), allow_nan=False))
        return
    print(look.answer)
    print("\nlayer  % of attention on  visual tokens  V-sinks  L-sinks  the rest")
    for row in shares(look):
        percent = [100 * row[name] for name in ("visual", "v_sink", "l_sink", "ordinary")]
        print(f"{row['layer']:5}{percent[0]:33.1f}{percent[1]:9.1f}{percent[2]:9.1f}{percent[3]:10.1f}")
    if options.out is not None:
        print(f"\n{options.out / 'look.html'}")
