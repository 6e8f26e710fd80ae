"""The command `lsg plan`: memory, work and cost of a configuration on TPU slices, without a TPU."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from lsg_jax.cli.options import Command, config_arguments, number_option

UTILISATION = 0.5


def add(command: Command) -> None:
    """Adds the command."""
    sub = command(
        "plan",
        _plan,
        "compile for a TPU slice without one: memory, work, time bounds, cost of the study",
        (
            "lsg plan lsg-quickstart/config.toml --topology v5e:2x2 --programs train",
            "lsg plan lsg-quickstart/config.toml --topology v5e:4x4 v5p:2x2x1 --rows-per-chip 8 --json",
        ),
    )
    sub.set_defaults(tells_compilations=False)  # it says itself what it compiles
    config_arguments(sub)
    sub.add_argument("--topology", nargs="+", required=True, metavar="NAME", help="slices such as v5e:4x4 or v5p:2x2x1")
    sub.add_argument(
        "--programs",
        nargs="+",
        default=["train", "each", "sweep", "eval"],
        choices=["forward", "train", "each", "sweep", "eval", "look"],
        help="default: train each sweep eval",
    )
    sub.add_argument(
        "--remat",
        nargs="+",
        choices=["none", "dots", "mlp", "full", "offload"],
        help="policies to compile; default: from the fastest to the first that fits, and that of CONFIG",
    )
    rows = sub.add_mutually_exclusive_group()
    number_option(rows, "--batch", int, "[1, 1e6]", metavar="N", help="training batch over all chips; default: that of CONFIG")
    number_option(rows, "--rows-per-chip", int, "[1, 1e6]", metavar="N", help="training batch for each chip: for weak scaling")
    sub.add_argument(
        "--largest-batch",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="search for the largest training batch: two or three compilations",
    )
    number_option(
        sub, "--records", int, "[1, 1e12]", metavar="N", help="training examples; default: data.records if there, else 10000"
    )
    number_option(
        sub, "--questions", int, "[1, 1e12]", metavar="N", help="default: of [eval.benchmarks], else CV-Bench and MMStar"
    )
    number_option(
        sub,
        "--utilisation",
        float,
        "(0, 1]",
        default=UTILISATION,
        metavar="X",
        help="share of the peak rate that a run reaches; default: %(default)s",
    )
    sub.add_argument(
        "--model-config",
        type=Path,
        metavar="PATH",
        help="config.json or folder in HF format; default: the model folder of CONFIG, else what its name stands for",
    )
    sub.add_argument("--json", action="store_true", help="print the plan as JSON instead of a table")


def _plan(options: argparse.Namespace) -> None:
    import dataclasses

    import jax

    from lsg_jax.plan.plan import PlanSettings, plan
    from lsg_jax.plan.recipe import assume
    from lsg_jax.plan.record_lengths import record_lengths
    from lsg_jax.plan.results import as_json
    from lsg_jax.plan.table import table
    from lsg_jax.run_config import load_run_config

    jax.config.update("jax_enable_compilation_cache", False)  # it keeps programs for devices that are there
    jax.config.update("jax_platforms", "cpu")  # a TPU of this machine is not used
    config = load_run_config(options.config, options.overrides)
    if options.batch is not None:
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=options.batch))
    model, source = _model_config(config, options.model_config)
    settings = PlanSettings(
        topologies=tuple(options.topology),
        programs=tuple(dict.fromkeys(options.programs)),
        policies=None if options.remat is None else tuple(dict.fromkeys(options.remat)),
        rows_per_chip=options.rows_per_chip,
        find_largest=options.largest_batch,
    )
    trains = bool({"train", "each"} & {*settings.programs})
    assumed = assume(
        config,
        utilisation=options.utilisation,
        records=options.records,
        questions=options.questions,
        lengths=record_lengths(config, model) if trains else None,
    )
    result = plan(config, model, settings, assumed, source=source)
    print(json.dumps(as_json(result), indent=2) if options.json else table(result))
    if result.failed is not None:
        raise result.failed


def _model_config(config: Any, given: Path | None) -> tuple[Any, str]:
    """The shapes of the model, and their source."""
    import dataclasses
    from importlib.resources import files

    from converters.hf_config import model_config, read_config
    from lsg_jax.checkpoint import MANIFEST, read_manifest
    from lsg_jax.errors import InputError
    from lsg_jax.json_files import read_object

    folder = Path(config.model)
    known = files("lsg_jax.plan") / "models"
    if given is not None:
        model = read_config(given) if given.is_dir() else model_config(read_object(given), where=str(given))
        source = f"shapes of {given}"
    elif (folder / MANIFEST).is_file():
        model, source = read_manifest(folder).config, f"shapes of {folder}"
    elif (known / f"{folder.name}.json").is_file():
        stated = json.loads((known / f"{folder.name}.json").read_text(encoding="utf-8"))
        model = model_config(stated, preprocessor=stated.pop("preprocessor", None), where=folder.name)
        source = f"{folder} is not there: shapes that are known of {folder.name}"
    else:
        names = ", ".join(sorted(entry.name.removesuffix(".json") for entry in known.iterdir()))
        raise InputError(
            f"{folder}: no such model folder, and no shapes are known of that name (known: {names}): give --model-config"
        )
    return (dataclasses.replace(model, sinks=config.sinks) if config.sinks is not None else model), source
