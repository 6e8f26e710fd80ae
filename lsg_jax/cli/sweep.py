"""The command `lsg sweep`: the oracle map over layers, fixed coefficients and tasks."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from lsg_jax.cli.compile_cache import use_compile_cache
from lsg_jax.cli.options import (
    Command,
    benchmark_option,
    config_arguments,
    named_paths,
    number_option,
    out_option,
    process_options,
    progress_bar,
)
from lsg_jax.cli.printable import say
from lsg_jax.config.ranges import Range
from lsg_jax.files import check_output

COEFFICIENT = Range("[-1000, 1000]")  # as of the method `fixed`


def add(command: Command) -> None:
    """Adds the commands."""
    sub = command(
        "sweep",
        _sweep,
        "the effect of fixed key coefficients on each task, layer by layer",
        (
            "lsg sweep lsg-quickstart/config.toml --layers 6 --step 0.5",
            "lsg sweep lsg-quickstart/config.toml --benchmark scenes --coefficients 0,1 1,0 --out sweeps/scenes",
        ),
    )
    config_arguments(sub)
    benchmark_option(sub)
    number_option(
        sub, "--layers", int, "[0, 1e4]", nargs="+", default=[], metavar="L", help="decoder layers, from 0; default: all"
    )
    sub.add_argument(
        "--grouping",
        choices=["v_sink_rest", "l_sink_rest", "three"],
        default="v_sink_rest",
        help="tokens that share a coefficient; three: V-sinks, L-sinks, ordinary; default: v_sink_rest",
    )
    which = sub.add_mutually_exclusive_group()
    number_option(
        which,
        "--step",
        float,
        "[0.01, 1]",
        metavar="X",
        help="step of the grid of coefficients that sum to 1; default: 0.1, with three groups 0.25",
    )
    which.add_argument(
        "--coefficients", type=_numbers, nargs="+", metavar="A,B", help="coefficients in place of the grid, e.g. 0,1 0.5,0.5"
    )
    number_option(
        sub,
        "--batch-size",
        int,
        "[1, 1e6]",
        words=("auto",),
        metavar="N",
        help="questions at a time on each device, each under all coefficients; auto: as many as fit; "
        "default: eval.batch_size / their number",
    )
    out_option(sub, folder=True, help="default: OUTPUT/sweep")
    sub.add_argument("--json", action="store_true", help="print sweep.json instead of a table")
    process_options(sub)


def _numbers(text: str) -> tuple[float, ...]:
    """`0.5,1` -> (0.5, 1.0). Raises ConfigError for a number out of range."""
    try:
        values = tuple(map(float, text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} are not numbers with commas between them, as 0.5,1") from None
    for value in values:
        COEFFICIENT.check(value, "--coefficients")
    return values


def _sweep(options: argparse.Namespace) -> None:
    import dataclasses

    import jax

    from lsg_jax.analysis.sweep import SweepConfig, coefficient_grid, sweep, sweep_batch
    from lsg_jax.analysis.sweep_table import table
    from lsg_jax.eval.runner import ask_all
    from lsg_jax.gating.keys import GROUPS
    from lsg_jax.opening import open_to_answer
    from lsg_jax.report.figures import draw_oracle_map
    from lsg_jax.run_config import load_run_config

    config = load_run_config(options.config, options.overrides)
    groups = len(GROUPS[options.grouping])
    step = options.step if options.step is not None else 0.1 if groups == 2 else 0.25
    grid = options.coefficients or coefficient_grid(groups, step)
    batch_size = options.batch_size or sweep_batch(config.eval.batch_size, len(grid))
    settings = SweepConfig(tuple(sorted(set(options.layers))), tuple(grid), options.grouping, batch_size)
    questions = dataclasses.replace(config.eval, benchmarks=config.eval.benchmarks | named_paths(options.benchmark))
    out = options.out or Path(config.output) / "sweep"
    check_output(out, folder=True)
    asked = ask_all(questions)  # a wrong file is reported before the model is loaded
    use_compile_cache()
    vlm = open_to_answer(config, sinks=config.sinks)
    with progress_bar("sweep") as progress:
        result = sweep(vlm, settings, questions, out, asked=asked, progress=progress)
    if jax.process_index() != 0:
        return
    for name, entry in result["benchmarks"].items():
        run, naive, share = (entry["work"][key] for key in ("layers_run", "layers_naive", "share"))
        say(f"{name}: {run} layers run of {naive} in separate runs ({share:.2f})\n")
    if result["best"]:
        draw_oracle_map(result["rows"], out / "oracle", groups=result["groups"])
    print(json.dumps(result, indent=2) if options.json else table(result))
