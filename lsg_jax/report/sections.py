"""The studies as sections of a report: findings as figures and tables, then the settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from lsg_jax.eval.benchmark import gain
from lsg_jax.eval.best_cells import WHERE_WORDS, WHICH, extreme_cells, extreme_layer, where_words
from lsg_jax.report.drawing import distinct, interval_text, look_of, plain
from lsg_jax.report.figures import (
    draw_gains,
    draw_oracle_map,
    draw_probe_curves,
    draw_stack,
)
from lsg_jax.report.gains import rows_of_ablation
from lsg_jax.report.parts import (
    Details,
    Note,
    Part,
    Section,
    Table,
    drawing,
)
from lsg_jax.report.pointing import MAP_LOOKS, draw_pointing
from lsg_jax.report.stacks import rows_of_stack

BULKY = {
    *("rows", "images", "counts", "attention", "overlap", "base", *WHICH, "singles", "steps", "by_benchmark", "warnings"),
    *("kinds", "changes", "heads", "massive_activations", "sink_heads"),
}
"""Fields of a study's JSON that are not settings."""

Study = Mapping[str, Any]


def probe_section(study: Study, *, title: str) -> Section:
    """Linear probes: accuracy by layer, and the best layer of each group."""
    parts = warnings_of(study)
    rows = study["rows"]
    if not rows:
        return Section(title, [*parts, Note("There are no rows.")], settings=used_settings(study))
    caption = "What linear probes read from each token group at each layer, on held-out images; bands: deviation over draws."
    parts.append(drawing(draw_probe_curves, rows, "probe", caption))
    lines = []
    for attribute, metric, group in distinct(rows, "attribute", "metric", "group"):
        own = [row for row in rows if (row["attribute"], row["metric"], row["group"]) == (attribute, metric, group)]
        known = [row for row in own if row["mean"] is not None]
        best = max(known, key=lambda row: row["mean"], default=None)
        found = ["-", "-", own[0].get("reason", "")]
        if best is not None:
            percent = [f"{100 * best[name]:.1f}" for name in ("mean", "std", "chance") if best[name] is not None]
            found = [str(best["layer"]), " ± ".join(percent[:2]), " ".join(percent[2:])]
        lines.append([f"{attribute}, {metric}", look_of(group).label, *found])
    parts.append(
        Table("The best layer of each group, in percent", ["attribute", "tokens", "layer", "held out", "chance"], lines)
    )
    return Section(title, parts, gist=", ".join(distinct(rows, "attribute")), settings=used_settings(study))


def pointing_section(study: Study, *, title: str) -> Section:
    """The pointing game: hit rates by layer, the layers and heads that were chosen."""
    caption = (
        "How often the most attended token lies on what a question asks about, by layer, mean over heads; bands: 95 % "
        "intervals. Grey: what sinks draw of the attention on the image."
    )
    parts = [*warnings_of(study), drawing(lambda _, stem: draw_pointing(study, stem), study["rows"], "pointing", caption)]
    lines = []
    for row in study["best"]:
        where = f"layer {row['layer']}" + ("" if row["head"] is None else f", head {row['head']}")
        percent = lambda *names, row=row: [None if row[name] is None else 100 * row[name] for name in names]
        hit, change = percent("hit", "low", "high"), percent("change", "change_low", "change_high")
        shown = "-" if change[0] is None else interval_text(*change)
        what = row["map"] if row["map"] not in MAP_LOOKS else MAP_LOOKS[row["map"]].label
        lines.append([row["kind"], what, where, interval_text(*hit, sign=""), shown])
    heading = f"Hit rate in percent, layer and head chosen on the split {study['chosen_on']}; change: against all attention"
    parts.append(Table(heading, ["kind", "map", "chosen", "hit rate", "change"], lines))
    kinds = len(study["kinds"].keys() - {"all"})  # which pools the others
    return Section(title, parts, gist=f"{kinds} kind{'' if kinds == 1 else 's'} of question", settings=used_settings(study))


def sweep_section(study: Study, *, title: str) -> Section:
    """The oracle sweep: the oracle map, and the best cell of each task."""
    parts = warnings_of(study)
    cells, worst = (extreme_cells(study["rows"], which) for which in WHICH)
    if not cells:
        return Section(title, [*parts, Note("There is no cell with a change.")], settings=used_settings(study))
    groups = study.get("groups", ())
    caption = (
        "The best and the worst change over fixed coefficients, and the coefficients that gave the best, by task and layer. "
        "Blue is better. Hatched: the interval covers 0; circle: all coefficients tie; dot: several tie, the first is drawn. "
        "The best of several settings on the same questions is an upper bound."
    )
    parts.append(drawing(partial(draw_oracle_map, groups=groups), study["rows"], "oracle", caption))
    lines = []
    for benchmark, task in distinct(cells, "benchmark", "task"):
        line = [f"{benchmark}, {task}"]
        for which, of in zip(WHICH, (cells, worst), strict=True):
            found_there = extreme_layer([cell for cell in of if (cell["benchmark"], cell["task"]) == (benchmark, task)], which)
            line += [_change(found_there), *where_words(found_there)]
        lines.append(line)
    named = "coefficients" + (f" ({', '.join(look_of(group).label for group in groups)})" if groups else "")
    header = ["task", "best change", "layer", named, "worst change", "layer", "coefficients"]
    parts.append(Table(f"The best and the worst cell of each task; {WHERE_WORDS}", header, lines))
    gist = ", ".join(
        f"{count} {what}{'s' * (count != 1)}"
        for count, what in ((len(lines), "task"), (len(distinct(cells, "layer")), "layer"))
    )
    clear = [cell for cell in cells if cell["low"] is not None and min(_gains(cell, "low", "high")) > 0]
    found = ["No fixed coefficients clearly improve any task at any layer."]
    if clear:
        best = max(clear, key=lambda cell: _gains(cell, "change"))
        found = [
            f"Fixed coefficients clearly improve a task at a layer in {len(clear)} of {len(cells)} cases, most "
            f"{best['benchmark']}, {best['task']}, at layer {best['layer']}: {_change(best)}, an upper bound."
        ]
    return Section(title, parts, gist=gist, found=found, settings=used_settings(study))


def _gains(cell: Mapping[str, Any], *names: str) -> list[float]:
    """Changes of a cell, or ends of its interval, positive where they are for the better."""
    return [gain(cell["task"], cell[name]) for name in names]


def stack_section(study: Study, *, title: str) -> Section:
    """The greedy stack: each gate alone, and stacks of growing size."""
    parts = warnings_of(study)
    rows = rows_of_stack(study)
    if rows:
        caption = "The change that each gate brings alone, and that of the stack; filled where the interval excludes 0."
        parts.append(drawing(draw_stack, rows, "stack", caption))
    lines = [[row["part"], " + ".join(map(str, row["layers"])), plain(row["value"]), _change(row)] for row in rows]
    parts.append(Table("Gates alone and stacked", ["gates", "layers", "score", "change"], lines))
    if scores := study.get("by_benchmark"):
        parts.append(Details("By benchmark", [_scores("By benchmark", scores)]))
    return Section(title, parts, settings=used_settings(study))


def ablate_section(study: Study, *, title: str) -> Section:
    """Ablations: the change of each variant over the base model."""
    parts = warnings_of(study)
    rows = rows_of_ablation(study["rows"])
    if any(row["method"] != "base" for row in rows):
        caption = "Change of each variant over the base model; filled where the interval excludes 0."
        parts.append(drawing(draw_gains, rows, "ablation", caption))
    parts.append(_scores("Variants", rows))
    return Section(title, parts, settings=used_settings(study))


def _scores(caption: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """A table of rows with the columns of report.gains."""
    lines = [[f"{row['benchmark']}, {row['metric']}", row["method"], plain(row["value"]), _change(row)] for row in rows]
    return Table(caption, ["benchmark, metric", "method", "score", "change"], lines)


def _change(row: Mapping[str, Any]) -> str:
    return interval_text(row["change"], row["low"], row["high"])


def warnings_of(study: Study) -> list[Part]:
    """The warnings of a study, as notes."""
    return [Note(text) for text in study.get("warnings", [])]


def used_settings(study: Study) -> dict[str, Any]:
    """What a study was run with."""
    return {name: value for name, value in study.items() if name not in BULKY}
