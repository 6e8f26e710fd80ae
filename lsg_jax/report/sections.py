"""The studies as sections of a report: findings as figures and tables, then the settings."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lsg_jax.errors import InputError
from lsg_jax.eval.best_cells import best_cells
from lsg_jax.report.drawing import distinct, interval_text, look_of, plain
from lsg_jax.report.figures import (
    draw_attention_shares,
    draw_gains,
    draw_oracle_map,
    draw_probe_curves,
    draw_sinks_by_layer,
    draw_stack,
)
from lsg_jax.report.gains import rows_of_ablation
from lsg_jax.report.overlay import Box, in_padding, l_sinks
from lsg_jax.report.parts import (
    Details,
    Gallery,
    Heading,
    Note,
    Paragraph,
    Part,
    Picture,
    Section,
    Table,
    drawing,
    picture,
    settings,
)
from lsg_jax.report.stacks import rows_of_stack

BULKY = ("rows", "images", "counts", "attention", "overlap", "base", "best", "singles", "steps", "by_benchmark", "warnings")
"""Fields of a study's JSON that are not settings."""

MAX_OVERLAYS = 12
MAX_PLACES = 8  # of V-sinks in an image's description

Study = Mapping[str, Any]


def sinks_section(study: Study, folder: Path, *, title: str) -> Section:
    """Sinks of images.

    Args:
        study: sinks.json.
        folder: the folder of sinks.json, which may also hold overlays, a PNG for each image.
    """
    parts = _warnings(study)
    parts += _overlays(study["images"], folder)
    if study["counts"]:
        caption = "Visual tokens of each group at each layer: mean and standard deviation over images."
        parts.append(drawing(draw_sinks_by_layer, study["counts"], "sinks_by_layer", caption))
    if study["attention"]:
        caption = "Whose keys the attention falls on at each layer, mean over heads and images."
        parts.append(drawing(draw_attention_shares, study["attention"], "attention_shares", caption))
    doubts = [f"{name}: {warning}" for name, entry in study["images"].items() for warning in entry["warnings"]]
    if doubts:
        parts.append(Details(f"Warnings about single images: {len(doubts)}", [Paragraph(text) for text in doubts]))
    return Section(title, [*parts, _settings(study)], gist=f"{len(study['images'])} images")


def _overlays(images: Mapping[str, Any], folder: Path) -> list[Part]:
    """The first images that have an overlay; an unreadable one is left out."""
    shown: list[Picture] = []
    for name, entry in images.items():
        path = folder / f"{Path(name).stem}.png"
        if len(shown) < MAX_OVERLAYS and path.is_file():
            caption = f"{Path(name).name}: {_found(entry)}"
            with contextlib.suppress(InputError):
                shown.append(picture(caption, path.read_bytes(), alt=f"{caption}{_places(entry)}"))
    if not shown:
        return []
    legend = "Large orange frames: V-sinks, decided before the projector."
    if any(map(l_sinks, images.values())):
        legend += " Small blue frames: L-sinks in some layer."
    if len(shown) < len(images):
        legend += f" {len(shown)} of {len(images)} images."
    return [Heading("Where the sinks are"), Paragraph(legend), Gallery(shown)]


def _found(entry: Mapping[str, Any]) -> str:
    count = lambda number, what: f"{number} {what}" + ("" if number == 1 else "s")
    v_sinks = "V-sinks unknown" if entry["v_sinks"] is None else count(len(entry["v_sinks"]), "V-sink")
    if hidden := sum(in_padding(_boxes(entry)[patch]) for patch in entry["v_sinks"] or []):
        v_sinks += f" ({hidden} in the padding)"
    found = l_sinks(entry)
    return f"{v_sinks}, {count(len(found), 'L-sink')}" if found else v_sinks


def _boxes(entry: Mapping[str, Any]) -> list[Box]:
    """Boxes of the patches; files of format lsg-sinks-1 have only the number of patches a side."""
    if "boxes" in entry:
        return list(entry["boxes"])
    grid = entry["grid"]
    return [(x / grid, y / grid, (x + 1) / grid, (y + 1) / grid) for y in range(grid) for x in range(grid)]


def _places(entry: Mapping[str, Any]) -> str:
    """Where the V-sinks are, for readers who cannot see the frames."""
    boxes = _boxes(entry)
    columns, rows = (sorted({box[axis] for box in boxes}) for axis in (0, 1))
    places = [(rows.index(boxes[patch][1]), columns.index(boxes[patch][0])) for patch in entry["v_sinks"] or []]
    listed = ", ".join(f"row {row + 1} column {column + 1}" for row, column in places[:MAX_PLACES])
    more = len(places) - MAX_PLACES
    of = f"{len(rows)} rows and columns" if len(rows) == len(columns) else f"{len(rows)} rows and {len(columns)} columns"
    return f" at {listed}{f' and {more} more' if more > 0 else ''}, of {of}" if listed else ""


def probe_section(study: Study, *, title: str) -> Section:
    """Linear probes: accuracy by layer, and the best layer of each group."""
    parts = _warnings(study)
    rows = study["rows"]
    if not rows:
        return Section(title, [*parts, Note("There are no rows."), _settings(study)])
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
    return Section(title, [*parts, _settings(study)], gist=", ".join(distinct(rows, "attribute")))


def sweep_section(study: Study, *, title: str) -> Section:
    """The oracle sweep: the oracle map, and the best cell of each task."""
    parts = _warnings(study)
    cells = best_cells(study["rows"])
    if not cells:
        return Section(title, [*parts, Note("There is no cell with a change."), _settings(study)])
    groups = study.get("groups", ())
    caption = (
        "The best change over fixed coefficients, and the coefficients that gave it, by task and layer. Each is the best of "
        "several settings on the same questions: an upper bound."
    )
    parts.append(drawing(partial(draw_oracle_map, groups=groups), study["rows"], "oracle", caption))
    lines = []
    for benchmark, task in distinct(cells, "benchmark", "task"):
        own = [cell for cell in cells if (cell["benchmark"], cell["task"]) == (benchmark, task)]
        best = max(own, key=lambda cell: cell["change"])
        where = [str(best["layer"]), ", ".join(f"{value:g}" for value in best["coefficients"])]
        lines.append([f"{benchmark}, {task}", _change(best), *where])
    named = "coefficients" + (f" ({', '.join(look_of(group).label for group in groups)})" if groups else "")
    parts.append(Table("The best cell of each task", ["task", "change", "layer", named], lines))
    gist = f"{len(lines)} tasks, {len(distinct(cells, 'layer'))} layers"
    return Section(title, [*parts, _settings(study)], gist=gist)


def stack_section(study: Study, *, title: str) -> Section:
    """The greedy stack: each gate alone, and stacks of growing size."""
    parts = _warnings(study)
    rows = rows_of_stack(study)
    if rows:
        caption = "The change that each gate brings alone, and that of the stack; filled where the interval excludes 0."
        parts.append(drawing(draw_stack, rows, "stack", caption))
    lines = [[row["part"], " + ".join(map(str, row["layers"])), plain(row["value"]), _change(row)] for row in rows]
    parts.append(Table("Gates alone and stacked", ["gates", "layers", "score", "change"], lines))
    if scores := study.get("by_benchmark"):
        parts.append(Details("By benchmark", [_scores("By benchmark", scores)]))
    return Section(title, [*parts, _settings(study)])


def ablate_section(study: Study, *, title: str) -> Section:
    """Ablations: the change of each variant over the base model."""
    parts = _warnings(study)
    rows = rows_of_ablation(study["rows"])
    if any(row["method"] != "base" for row in rows):
        caption = "Change of each variant over the base model; filled where the interval excludes 0."
        parts.append(drawing(draw_gains, rows, "ablation", caption))
    parts.append(_scores("Variants", rows))
    return Section(title, [*parts, _settings(study)])


def _scores(caption: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """A table of rows with the columns of report.gains."""
    lines = [[f"{row['benchmark']}, {row['metric']}", row["method"], plain(row["value"]), _change(row)] for row in rows]
    return Table(caption, ["benchmark, metric", "method", "score", "change"], lines)


def _change(row: Mapping[str, Any]) -> str:
    return interval_text(row["change"], row["low"], row["high"])


def _warnings(study: Study) -> list[Part]:
    return [Note(text) for text in study.get("warnings", [])]


def _settings(study: Study) -> Details:
    return settings({name: value for name, value in study.items() if name not in BULKY})
