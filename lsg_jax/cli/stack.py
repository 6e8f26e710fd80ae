"""The studies of trained gates: stack combines gates, ablate trains variants of them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
from lsg_jax.files import check_output


def add(command: Command) -> None:
    """Adds the commands."""
    sub = command(
        "stack",
        _stack,
        "combine gates of single layers, greedily by the gain of each alone",
        (
            "lsg stack lsg-quickstart/config.toml --gates lsg-quickstart/run runs/layer4 --benchmark scenes",
            "lsg stack lsg-quickstart/config.toml --gates runs/each --benchmark scenes --select validation --joint",
        ),
    )
    _common_options(sub)
    sub.add_argument(
        "--gates",
        nargs="+",
        action="extend",
        required=True,
        metavar="G",
        help="run folders, gate files or Hub ids, one gate a layer",
    )
    sub.add_argument(
        "--select",
        metavar="NAME",
        help="the benchmark that decides; the stack's change is optimistic on it, not on the others. "
        "Default: the mean change over all",
    )
    number_option(sub, "--max-gates", int, "[1, 1e4]", default=5, metavar="N", help="the largest stack to try; default: 5")
    sub.add_argument("--joint", action="store_true", help="also train the gates of the chosen layers together, from scratch")

    sub = command(
        "ablate",
        _ablate,
        "train the gates of CONFIG with other signals and groupings, and LoRA instead",
        (
            "lsg ablate lsg-quickstart/config.toml --benchmark scenes",
            "lsg ablate lsg-quickstart/config.toml --benchmark scenes --variants signal lora",
        ),
    )
    _common_options(sub)
    sub.add_argument(
        "--variants",
        nargs="+",
        action="extend",
        default=[],
        metavar="V",
        help="signal, grouping, lora, or one of them by name, e.g. mean_all three; default: all",
    )


def _common_options(sub: argparse.ArgumentParser) -> None:
    study = sub.prog.split()[-1]
    config_arguments(sub)
    benchmark_option(sub)
    out_option(sub, folder=True, help=f"default: OUTPUT/{study}")
    sub.add_argument("--json", action="store_true", help=f"print {study}.json instead of a table")
    process_options(sub)


def _stack(options: argparse.Namespace) -> None:
    import jax

    from lsg_jax.analysis.stack import StackConfig, stack_study
    from lsg_jax.report.figures import draw_gains, draw_stack
    from lsg_jax.report.stacks import rows_of_stack

    settings = StackConfig(options.select, options.max_gates, options.joint)
    config, out = _open(options, "stack")
    with progress_bar("stack") as progress:
        study = stack_study(config, options.gates, settings, out, progress=progress)
    if jax.process_index() == 0:
        draw_stack(rows_of_stack(study), out / "stack")
        draw_gains(study["by_benchmark"], out / "gains")
        print(json.dumps(study, indent=2) if options.json else _stack_table(study, out))


def _ablate(options: argparse.Namespace) -> None:
    import jax

    from lsg_jax.analysis.ablation import ablation_study
    from lsg_jax.report.figures import draw_gains
    from lsg_jax.report.gains import rows_of_ablation

    config, out = _open(options, "ablate")
    with progress_bar("ablate") as progress:
        study = ablation_study(config, options.variants, out, progress=progress)
    if jax.process_index() == 0:
        draw_gains(rows_of_ablation(study["rows"]), out / "gains")
        print(json.dumps(study, indent=2) if options.json else _ablation_table(study))


def _open(options: argparse.Namespace, study: str) -> tuple[Any, Path]:
    """The configuration with the benchmarks of the command line, and the output folder."""
    import dataclasses

    from lsg_jax.run_config import load_run_config

    config = load_run_config(options.config, options.overrides)
    questions = dataclasses.replace(config.eval, benchmarks=config.eval.benchmarks | named_paths(options.benchmark))
    out = options.out or Path(config.output) / study
    check_output(out, folder=True)
    return dataclasses.replace(config, eval=questions), out


def _stack_table(study: dict[str, Any], out: Path) -> str:
    """The single gates, the growing stack and joint training on the deciding benchmark; then every benchmark."""
    name = lambda layers: "+".join(f"L{layer}" for layer in layers)
    lines = [("one gate alone", "value", "change [95 %]")]
    lines += [(name([row["layer"]]), *_numbers(row)) for row in study["singles"]]
    lines.append(("stack", "", ""))
    lines += [(name(row["layers"]), *_numbers(row)) for row in study["steps"]]
    if joint := study.get("joint"):
        lines.append((f"{name(joint['layers'])} trained together", *_numbers(joint)))
    title = f"selection: {study['selection']}, {study['metric']}"
    chosen = next(row for row in study["steps"] if row["layers"] == study["chosen"])
    end = [f"chosen: {name(study['chosen'])}, written to {out / 'stack.safetensors'}"]
    if chosen["change"] <= 0:
        end.append("no stack gains anything over the base model")
    end.append(
        f"chosen by {study['selection']}, so its change there is optimistic; --select names another benchmark to choose by"
    )
    lasts = [("on each benchmark", "value", "change [95 %]")]
    for row in study["by_benchmark"]:
        if row["method"] in ("base", name(study["chosen"]), "joint"):
            lasts.append((f"{row['benchmark']}, {row['metric']}: {row['method']}", *_numbers(row)))
    return "\n".join([title, *_aligned(lines), *end, "", *_aligned(lasts)])


def _ablation_table(study: dict[str, Any]) -> str:
    """Every variant on every benchmark with its number of trained parameters, and the skipped ones."""
    parts = []
    for benchmark, metric in dict.fromkeys((row["benchmark"], row["metric"]) for row in study["rows"]):
        lines = [("variant", "parameters", "value", "change [95 %]")]
        for row in study["rows"]:
            if (row["benchmark"], row["metric"]) == (benchmark, metric):
                lines.append((row["variant"], str(study["parameters"].get(row["variant"], "-")), *_numbers(row)))
        parts.append("\n".join([f"{benchmark}, {metric}", *_aligned(lines)]))
    parts += ["\n".join(f"skipped {row['variant']}: {row['reason']}" for row in study["skipped"])] * bool(study["skipped"])
    return "\n\n".join(parts)


def _numbers(row: dict[str, Any]) -> tuple[str, str]:
    """The value, and the change with its interval, as text; a dash for unknown numbers."""
    text = lambda of, sign="": "-" if row[of] is None else f"{row[of]:{sign}.2f}"
    if row["change"] is None:
        return text("value"), "-"
    return text("value"), f"{text('change', '+')} [{text('low', '+')}, {text('high', '+')}]"


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Aligned columns, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))]).rstrip()
        for line in lines
    ]
