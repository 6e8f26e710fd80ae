"""Commands for data, training and evaluation: prepare, train, eval."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lsg_jax.cli.compile_cache import use_compile_cache
from lsg_jax.cli.options import (
    Command,
    benchmark_option,
    config_arguments,
    named_paths,
    number_option,
    out_folder,
    out_option,
    process_options,
    progress_bar,
)
from lsg_jax.files import check_output

logger = logging.getLogger(__name__)


def add(command: Command) -> None:
    """Adds the commands."""
    sub = command(
        "prepare",
        _prepare,
        "turn LLaVA JSON/JSONL, Cambrian-7M or the paper's own records into training records, or CLEVR into probe data",
        (
            "lsg prepare lsg-quickstart/train/llava.jsonl records/scenes",
            "lsg prepare Cambrian7M.jsonl records/cambrian10k --format cambrian --images IMAGES --sample 10000",
        ),
    )
    sub.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="JSON array or JSONL; for paper also Parquet or a folder; the folder CLEVR_v1.0 for clevr",
    )
    out_folder(sub, "out", metavar="OUT", help="folder to write")
    sub.add_argument(
        "--format",
        choices=["llava", "cambrian", "paper", "clevr"],
        default="llava",
        help="paper: rows of JH-C-k/lsg_public; default: llava",
    )
    sub.add_argument("--images", type=Path, metavar="DIR", help="root of the image paths; default: the folder of SOURCE")
    number_option(
        sub, "--sample", int, "[1, 1e9]", metavar="N", help="cambrian: records to draw from six categories; default: 10000"
    )
    number_option(sub, "--seed", int, "[0, 4294967295]", metavar="N", help="cambrian: which records are drawn; default: 0")
    sub.add_argument("--source-map", type=Path, metavar="FILE.toml", help="cambrian: categories of further sources")
    sub.add_argument("--split", metavar="NAME", help="clevr: train or val; default: train")
    number_option(sub, "--limit", int, "[1, 1e9]", metavar="N", help="clevr: the first N scenes only")
    number_option(
        sub, "--max-bad-fraction", float, "[0, 1]", default=0.01, metavar="X", help="fail above this share of rejected records"
    )
    number_option(sub, "--threads", int, "[1, 1024]", metavar="N", help="threads that read images; default: one a core")
    text = "read images that links in the image folder lead to elsewhere; otherwise they are rejected"
    sub.add_argument("--follow-links", action="store_true", help=text)

    _add_runs(command)


def _add_runs(command: Command) -> None:
    """Adds the commands that take a configuration file."""
    sub = command(
        "train",
        _train,
        "train gates or another method; run it again to resume",
        (
            "lsg train lsg-quickstart/config.toml --set output=runs/layer4 'gate.layers=[4]'",
            "lsg train lsg-quickstart/config.toml --set output=runs/each gate.layers=each train.remat=full",
        ),
    )
    config_arguments(sub)
    text = "short for --set train.seeds=N: N runs of it, in OUTPUT/seed0, ..."
    number_option(sub, "--seeds", int, "[1, 1000]", metavar="N", help=text)
    process_options(sub)

    sub = command(
        "eval",
        _eval,
        "accuracy of the base model, with gates, and under the baselines",
        (
            "lsg eval lsg-quickstart/config.toml --benchmark scenes",
            "lsg eval lsg-quickstart/config.toml --method lsg sink_front --out eval/mine",
        ),
    )
    config_arguments(sub)
    sub.add_argument("--gates", metavar="G", help="run folder, gate file or Hub id; default: the run of CONFIG if there is one")
    sub.add_argument(
        "--method",
        nargs="+",
        action="extend",
        default=[],
        metavar="METHOD[=RUN]",
        help="base, lsg, var, pai, vaf, eah, damro, gift, sink_front, diysink, registers, lora, gated_output, fixed, full; "
        "base is always asked. Default: what --gates holds",
    )
    benchmark_option(sub)
    out_option(sub, folder=True, help="default: OUTPUT/eval")
    sub.add_argument("--json", action="store_true", help="print the result as JSON instead of a table")
    process_options(sub)


def _prepare(options: argparse.Namespace) -> None:
    from lsg_jax.data.cambrian import prepare_cambrian
    from lsg_jax.data.clevr import prepare_clevr
    from lsg_jax.data.paper_records import prepare_paper
    from lsg_jax.data.records import prepare_llava
    from lsg_jax.errors import ConfigError

    own = {
        "llava": ["images"],
        "cambrian": ["images", "sample", "seed", "source_map"],
        "paper": ["images"],
        "clevr": ["split", "limit"],
    }
    every = {name for names in own.values() for name in names}
    settings = {name: value for name in sorted(every) if (value := getattr(options, name)) is not None}
    for name in settings:
        if name not in own[options.format]:
            raise ConfigError(f"--{name.replace('_', '-')} does not go with --format {options.format}")
    settings |= {"max_bad_fraction": options.max_bad_fraction, "threads": options.threads, "follow_links": options.follow_links}
    if options.format != "clevr":
        settings.setdefault("images", options.source if options.source.is_dir() else options.source.parent)
    prepare: dict[str, Callable[..., Any]] = {
        "llava": prepare_llava,
        "cambrian": prepare_cambrian,
        "paper": prepare_paper,
        "clevr": prepare_clevr,
    }
    with progress_bar("prepare") as progress:
        report = prepare[options.format](options.source, out=options.out, progress=progress, **settings)
    print(report.summary())


def _train(options: argparse.Namespace) -> None:
    import jax

    from lsg_jax.progress import training_progress
    from lsg_jax.run_config import load_run_config
    from lsg_jax.train.goodput import start_of_process
    from lsg_jax.train.loop import train

    seeds = [] if options.seeds is None else [f"train.seeds={options.seeds}"]
    config = load_run_config(options.config, [*options.overrides, *seeds])
    use_compile_cache()
    with progress_bar("train") as progress:
        folder = train(config, on_step=training_progress(progress), began=start_of_process())
    if jax.process_index() == 0:
        print(folder)


def _eval(options: argparse.Namespace) -> None:
    import dataclasses

    import jax

    from lsg_jax.checkpoint import SEEDS
    from lsg_jax.checkpoint.run_record import RUN
    from lsg_jax.eval.methods import open_methods, seeds_of
    from lsg_jax.eval.runner import ask_all, evaluate
    from lsg_jax.eval.table import table
    from lsg_jax.opening import open_to_answer
    from lsg_jax.report.drawing import remove_drawings
    from lsg_jax.report.figures import draw_gains, draw_gate_ratios
    from lsg_jax.report.gains import rows_of_gains
    from lsg_jax.run_config import load_run_config

    config = load_run_config(options.config, options.overrides)
    settings = dataclasses.replace(config.eval, benchmarks=config.eval.benchmarks | named_paths(options.benchmark))
    output = Path(config.output)
    out = options.out or output / "eval"
    check_output(out, folder=True)
    asked = ask_all(settings)  # a wrong file is reported before the model is loaded
    use_compile_cache()
    gates = options.gates or (output if any((output / name).exists() for name in (RUN, SEEDS)) else None)
    if gates is None and not options.method and jax.process_index() == 0:
        logger.info("%s: no run in it, so only the unchanged model is asked; name trained gates with --gates", output)
    base = open_to_answer(config)
    models = open_methods(base, config, options.method, gates)
    with progress_bar("eval") as progress:
        result = evaluate(models, settings, out, asked=asked, seeds=seeds_of(models), progress=progress)
    if jax.process_index() == 0:
        plain = dataclasses.asdict(result)
        # of an earlier evaluation, of other methods
        remove_drawings(out / "gains", *(file.with_suffix("") for file in out.glob("ratios*.svg")))
        if len(models) > 1:
            draw_gains(rows_of_gains(result), out / "gains")
        gated = dict.fromkeys(row.method for row in result.ratios)
        for method in gated:
            own = [row for row in plain["ratios"] if row["method"] == method]
            draw_gate_ratios(own, out / ("ratios" if len(gated) == 1 else f"ratios_{method}"))
        print(json.dumps(plain, indent=2) if options.json else table(result.benchmarks))
