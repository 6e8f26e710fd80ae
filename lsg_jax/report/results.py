"""Training runs and evaluations as sections of a report."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lsg_jax.checkpoint import METRICS, RunRecord, read_run, read_seeds, read_step, read_steps, seed_folder
from lsg_jax.checkpoint.processes import tree_sha256
from lsg_jax.errors import LsgError
from lsg_jax.eval.results import BASE, BenchmarkResult, EvaluationResult, result_of
from lsg_jax.gating.keys import GROUPS
from lsg_jax.report.drawing import distinct, interval_text, look_of, plain
from lsg_jax.report.figures import draw_gains, draw_gate_ratios, draw_loss, half_life
from lsg_jax.report.gains import METHODS, rows_of_gains, score_text
from lsg_jax.report.parts import Details, Heading, Note, Paragraph, Part, Section, Table, drawing
from lsg_jax.report.ratios import drawn_groups, table_of_ratios
from lsg_jax.report.side_by_side import answer_parts

OTHER_GATES = "The gates asked here are not those that the run around this folder holds now: was it trained further?"


def run_section(run: RunRecord, folder: Path, *, title: str) -> Section:
    """A training run, finished or not: its loss and its gate ratios.

    Args:
        run: run.json.
        folder: the run folder, which also holds the log of steps.
    """
    steps, damaged = read_steps(folder / METRICS)
    last: dict[str, Any] = steps[-1] if steps else {"step": 0}
    gate = run.table("gate")
    layers = gate["layers"] or list(range(len(last.get("ratios", []))))  # independent gates without layers: one at each
    parts: list[Part] = [Paragraph(f"Model {run.model_name}; step {last['step']} of {run.total_steps}.")]
    if last["step"] < run.total_steps:
        parts.append(Note("This run has not finished."))
    if damaged:
        parts.append(Note(f"Lines of {METRICS} that are damaged or were cut short, and are left out: {damaged}."))
    rows = [row for step in steps for row in _loss_rows(step, layers)]
    if len(steps) > 1:
        trend = f"the line is an exponential moving average that forgets half in {half_life(len(steps))} steps"
        parts.append(drawing(draw_loss, rows, "loss", f"Training loss: each dot is a step, {trend}."))
    if steps:
        finals = [
            ["all" if row["layer"] is None else str(row["layer"]), plain(row["loss"])]
            for row in rows
            if row["step"] == last["step"]
        ]
        parts.append(Table("Loss at the last step, nats a token", ["gates of layer", "loss"], finals))
    if "ratios" in last:
        names = [look_of(group).label for group in GROUPS[gate["grouping"]]]
        ratios = [[str(layer), *map(plain, of)] for layer, of in zip(layers, last["ratios"], strict=True)]
        parts.append(Table("Gate ratios at the last step, mean over its images", ["layer", *names], ratios))
    used = {name: run.as_json()[name] for name in ("config", "sinks", "backbone", "versions", "devices")}
    gist = f"{run.model_name}, step {last['step']} of {run.total_steps}"
    return Section(title, parts, gist=gist, group="training", settings=used)


def _loss_rows(step: Mapping[str, Any], layers: list[int]) -> list[dict[str, Any]]:
    """The loss at one step; gates that are trained independently have a row for each layer."""
    loss = step["loss"]
    if not isinstance(loss, list):
        return [{"step": step["step"], "layer": None, "loss": loss}]
    return [{"step": step["step"], "layer": layer, "loss": of} for layer, of in zip(layers, loss, strict=True)]


def eval_section(tree: Mapping[str, Any], folder: Path, *, title: str) -> Section:
    """An evaluation: scores and changes of every method, gate ratios, and the answers side by side.

    Args:
        tree: result.json.
        folder: the folder of result.json, which also holds the answers.
    """
    result = result_of(tree)
    parts: list[Part] = [Note(OTHER_GATES)] if _other_gates(folder.parent, result) else []
    for name, benchmark in result.benchmarks.items():
        parts += [Note(text) for text in _remarks(name, benchmark)]
    rows = rows_of_gains(result)
    if any(row["method"] != BASE for row in rows):
        parts.append(drawing(draw_gains, rows, "gains", "Change over the base model; filled where the interval excludes 0."))
    parts.append(Details("All metrics, and tests of the changes", [_scores("All metrics", result)]))
    parts += _ratios([asdict(row) for row in result.ratios])
    parts += answer_parts(result, folder)
    used = {name: value for name, value in tree.items() if name not in ("benchmarks", "ratios")}
    asked = ", ".join(f"{benchmark.questions} questions of {name}" for name, benchmark in result.benchmarks.items())
    gist = f"{asked}; {', '.join(METHODS.get(method, method) for method in result.methods)}"
    return Section(title, parts, gist=gist, settings=used, evaluation=(title.partition(": ")[2], result))


def _other_gates(run: Path, result: EvaluationResult) -> bool:
    """Whether the gates of an evaluation inside a run folder differ from those of the run; False where it cannot be told."""
    with contextlib.suppress(LsgError, ValueError):  # no run, a damaged one, or one of other layers
        seeds = {f"lsg_seed{seed}": seed_folder(run, seed) for seed in read_seeds(run)}
        return any(_is_other(result, method, folder) for method, folder in (seeds or {"lsg": run}).items())
    return False


def _is_other(result: EvaluationResult, method: str, run: Path) -> bool:
    asked, gate = result.trained.get(method), result.methods[method].gate if method in result.methods else None
    if not (asked and gate and (record := read_run(run)).method == "lsg"):
        return False
    layers = record.table("gate")["layers"]
    slots = [layers.index(layer) for layer in gate["layers"]]
    return asked != tree_sha256({name: leaf[slots] for name, leaf in read_step(run)[1]["trained"].items()})


def _ratios(rows: Sequence[Mapping[str, Any]]) -> list[Part]:
    parts: list[Part] = [Heading("Gate ratios by question")] if rows else []
    for method in distinct(rows, "method"):
        own = [row for row in rows if row["method"] == method]
        name = METHODS.get(method, method)
        caption = f"Gate ratios of {name} by task and layer, mean and standard deviation over questions."
        parts.append(drawing(draw_gate_ratios, own, f"ratios_{method}", caption))
        for group in drawn_groups(own):
            label = look_of(group).label
            caption = f"Gate ratios of {name}, {label}: mean ± standard deviation over questions"
            parts.append(Details(f"As a table: {label}", [Table(caption, *table_of_ratios(own, group))]))
    return parts


def _scores(caption: str, result: EvaluationResult) -> Table:
    lines = []
    for row in rows_of_gains(result, every_metric=True):
        benchmark = result.benchmarks[row["benchmark"]]
        test = benchmark.paired_test.get(row["method"])
        lines.append(
            [
                f"{row['benchmark']}, {row['metric']}" + (" *" if row["metric"] == benchmark.score else ""),
                METHODS.get(row["method"], row["method"]),
                plain(benchmark.majority.get(row["metric"])),
                score_text(row),
                "" if row["method"] == BASE else interval_text(row["change"], row["low"], row["high"]),
                "" if test is None else f"{test.better} / {test.worse}, {test.p_value:.3g}",
            ]
        )
    header = ["benchmark, metric (* official score)", "method", "majority answer", "score", "change", "better / worse, p"]
    return Table(caption, header, lines)


def _remarks(name: str, benchmark: BenchmarkResult) -> list[str]:
    remarks = []
    if benchmark.partial:
        remarks.append(f"{name}: {benchmark.questions} questions of {benchmark.of}, so there is no official score.")
    remarks += [f"{name}: {lack}." for lack in benchmark.lacks]
    if benchmark.note:
        remarks.append(f"{name}: {benchmark.note}")
    unread = ", ".join(f"{method} {count}" for method, count in benchmark.unread.items() if count)
    return [*remarks, f"{name}: outputs in which no answer was found: {unread}."] if unread else remarks
