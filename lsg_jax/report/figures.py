"""The figures of the studies: each function draws the rows of one study and writes `stem.csv`, `stem.svg` and `stem.png`.

All return these three paths, and raise InputError if the study has no rows or rows of another kind. The CSV holds the figure's
numbers as tidy rows; an unknown number is an empty cell in it and a gap in the figure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lsg_jax.report.drawing import (
    COLUMN_WIDTH,
    INK,
    PAGE_WIDTH,
    RIM,
    Kept,
    Look,
    Row,
    check_rows,
    distinct,
    draw_line,
    key_line,
    layer_axis,
    legend_above,
    look_of,
    numbers,
    render,
)
from lsg_jax.report.gains import draw_gains
from lsg_jax.report.oracle import draw_oracle_map
from lsg_jax.report.ratios import draw_gate_ratios
from lsg_jax.report.stacks import draw_stack

__all__ = [
    "draw_attention_shares",
    "draw_gains",
    "draw_gate_ratios",
    "draw_loss",
    "draw_oracle_map",
    "draw_probe_curves",
    "draw_sinks_by_layer",
    "draw_stack",
    "half_life",
    "trend_of",
]

PROBE = ("attribute", "metric", "group", "layer", "mean", "std", "chance", "draws", "train", "test")
COUNTS = ("layer", "group", "mean", "std")
ATTENTION = ("layer", "head", "queries", "group", "share")
SHARES = ("queries", "layer", "group", "share", "low", "high", "heads")
LOSS = ("step", "layer", "loss")
TREND = (*LOSS, "trend")
DOT_ALPHA, LOSS_COLOUR = 0.45, "#0072B2"
LAYER_COLOURS = (0.25, 0.8)  # the part of viridis that stands out from white and from black

METRICS = {"accuracy": "accuracy", "f1": "F1"}
STACKING = ("v_sink", "l_sink", "ordinary", "text")  # bottom to top
CHANCE = Look("chance", INK, ":", "", "")


def draw_probe_curves(rows: Sequence[Row], stem: Path | Kept) -> list[Path]:
    """Scores of the probes of each token group by layer, a panel for each attribute and metric; bands: std over draws."""
    check_rows(rows, PROBE, study="lsg probe", stem=stem)
    panels, groups = distinct(rows, "attribute", "metric"), distinct(rows, "group")
    height = math.ceil(len(panels) / 2)

    def paint(figure: Any) -> None:
        from matplotlib.ticker import PercentFormatter

        grid = figure.subplots(height, 2, sharex=True, squeeze=False).ravel()
        for axes, (attribute, metric) in zip(grid, panels, strict=False):
            own = [row for row in rows if (row["attribute"], row["metric"]) == (attribute, metric)]
            for group in groups:
                draw_line(axes, look_of(group), *_series(own, group, "mean", "std"), most=1.0)
            _draw_chance(axes, own)
            axes.set_title(attribute.replace("_", " "))
            axes.set_ylabel(METRICS.get(metric, metric))
            axes.yaxis.set_major_formatter(PercentFormatter(xmax=1.0))
            axes.tick_params(labelbottom=True)
            layer_axis(axes, distinct(rows, "layer"))
        for axes in grid[len(panels) :]:
            axes.remove()
        legend_above(figure, [*(key_line(look_of(group)) for group in groups), key_line(CHANCE)])

    return render(stem, rows, PROBE, (PAGE_WIDTH, 2.1 * height + 0.4), paint)


def _draw_chance(axes: Any, rows: Sequence[Row]) -> None:
    """Chance as a dotted line; as one for each group if groups are probed on different images, whose chance differs."""
    known = {row["chance"] for row in rows} - {None}
    if len(known) == 1:
        axes.axhline(*known, color=INK, linestyle=":", linewidth=0.9)
        return
    for group in distinct(rows, "group"):
        layers, chance = _series(rows, group, "chance")
        axes.plot(layers, numbers(chance), color=look_of(group).colour, linestyle=":", linewidth=0.9)


def _series(rows: Sequence[Row], group: str, *columns: str) -> list[list[Any]]:
    """The layers of a group's rows in order, and the columns asked for beside them."""
    own = sorted((row for row in rows if row["group"] == group), key=lambda row: row["layer"])
    return [[row[name] for row in own] for name in ("layer", *columns)]


def draw_sinks_by_layer(rows: Sequence[Row], stem: Path | Kept) -> list[Path]:
    """Tokens of each group at each layer, mean and standard deviation over images; sinks above, ordinary tokens below."""
    check_rows(rows, COUNTS, study="lsg sinks", stem=stem)
    groups = distinct(rows, "group")
    parts = [part for part in ([g for g in groups if g != "ordinary"], [g for g in groups if g == "ordinary"]) if part]

    def paint(figure: Any) -> None:
        panels = figure.subplots(len(parts), 1, sharex=True, squeeze=False, height_ratios=[2, 1][: len(parts)])[:, 0]
        for axes, part in zip(panels, parts, strict=True):
            for group in part:
                draw_line(axes, look_of(group), *_series(rows, group, "mean", "std"))
            if not any(row["mean"] for row in rows if row["group"] in part):  # else the axis would reach below 0
                axes.set_ylim(-0.05, 1)
                axes.set_yticks([0, 1])
            axes.grid(axis="y")
            layer_axis(axes, distinct(rows, "layer"))
            axes.label_outer()
        figure.supylabel("tokens an image", fontsize=8)
        legend_above(figure, [key_line(look_of(group)) for group in groups])

    return render(stem, rows, COUNTS, (COLUMN_WIDTH, 1.3 + 0.9 * len(parts)), paint)


def draw_attention_shares(rows: Sequence[Row], stem: Path | Kept) -> list[Path]:
    """Attention on the keys of each token group by layer: stacked shares, mean over heads, a panel for each kind of query.

    The CSV holds these means, and the lowest and highest share of a single head.
    """
    check_rows(rows, ATTENTION, study="lsg sinks", stem=stem)
    shares = _over_heads(rows)
    queries, layers = distinct(shares, "queries"), distinct(shares, "layer")
    groups = sorted(distinct(shares, "group"), key=lambda group: (*STACKING, group).index(group))

    def paint(figure: Any) -> None:
        panels = figure.subplots(1, len(queries), sharey=True, squeeze=False)[0]
        for axes, kind in zip(panels, queries, strict=True):
            _draw_shares(axes, [row for row in shares if row["queries"] == kind], groups)
            axes.set_title(f"Queries: {kind} tokens")
            layer_axis(axes, layers)
        panels[0].set_ylabel("share of attention (%)")
        legend_above(figure, [_key_area(look_of(group)) for group in groups])

    return render(stem, shares, SHARES, (PAGE_WIDTH if len(queries) > 1 else COLUMN_WIDTH, 2.7), paint)


def _over_heads(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows of SHARES, in [0, 1]; null shares are ignored."""
    of: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        of.setdefault((row["queries"], row["layer"], row["group"]), []).extend([row["share"]] * (row["share"] is not None))
    summary = lambda v: (float(np.mean(v)), min(v), max(v), len(v)) if v else (None, None, None, 0)
    return [dict(zip(SHARES, (*key, *summary(v)), strict=True)) for key, v in of.items()]


def _draw_shares(axes: Any, rows: Sequence[Row], groups: Sequence[str]) -> None:
    """Stacked shares, one step for each layer; a layer without numbers is empty."""
    share = {(row["layer"], row["group"]): row["share"] or 0.0 for row in rows}
    layers = range(min(layer for layer, _ in share), max(layer for layer, _ in share) + 1)
    edges = np.arange(layers.start, layers.stop + 1) - 0.5
    floor = np.zeros(len(layers))
    for group in groups:
        look = look_of(group)
        top = floor + 100 * np.array([share.get((layer, group), 0.0) for layer in layers])
        area = axes.stairs(top, edges, baseline=floor, fill=True, facecolor=look.colour, edgecolor=RIM, linewidth=0)
        area.set_hatch(look.hatch)
        floor = top
    axes.set_ylim(0, 100)


def _key_area(look: Look) -> Any:
    from matplotlib.patches import Patch

    return Patch(facecolor=look.colour, edgecolor=RIM, linewidth=0, hatch=look.hatch, label=look.label)


def half_life(steps: int) -> int:
    """After how many of a run's steps the trend of its loss has forgotten half: a twentieth of them."""
    return max(round(steps / 20), 1)


def trend_of(losses: Sequence[float | None]) -> list[float | None]:
    """The exponential moving average of losses, None where a loss is no number.

    Weights sum to 1 from the first step on: the trend starts at the first loss, and a constant loss is its own trend.
    """
    from scipy.signal import lfilter

    known = [index for index, loss in enumerate(losses) if loss is not None and math.isfinite(loss)]
    kept = 0.5 ** (1 / half_life(len(losses)))
    values = np.array([losses[index] for index in known], np.float64)
    sums, weights = (lfilter([1.0], [1.0, -kept], signal) for signal in (values, np.ones_like(values)))
    trend: list[float | None] = [None] * len(losses)
    for index, value in zip(known, sums / weights, strict=True):
        trend[index] = float(value)
    return trend


def draw_loss(rows: Sequence[Row], stem: Path | Kept) -> list[Path]:
    """Training loss by step as dots, and its trend as a line; of several layers if gates are trained independently.

    Args:
        rows: `{step, layer, loss}`; layer is None for gates that are trained together. A loss that is not finite is no dot.
    """
    check_rows(rows, LOSS, study="lsg train", stem=stem)
    layers = distinct(rows, "layer")
    lines = {layer: [row for row in rows if row["layer"] == layer] for layer in layers}
    drawn = [
        {**row, "trend": trend}
        for own in lines.values()
        for row, trend in zip(own, trend_of([row["loss"] for row in own]), strict=True)
    ]

    def paint(figure: Any) -> None:
        from matplotlib import colormaps
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import ListedColormap, Normalize

        axes = figure.subplots()
        part = ListedColormap(colormaps["viridis"](np.linspace(*LAYER_COLOURS, 256)))
        scale = ScalarMappable(Normalize(0, max(layers[-1] or 0, 1)), part)
        for layer in layers:
            own = [row for row in drawn if row["layer"] == layer]
            steps = [row["step"] for row in own]
            colour = LOSS_COLOUR if len(layers) == 1 else scale.to_rgba(np.array([layer or 0]))[0]
            axes.plot(
                steps, numbers(r["loss"] for r in own), color=colour, marker=".", markersize=2.5, linestyle="", alpha=DOT_ALPHA
            )
            axes.plot(steps, numbers(r["trend"] for r in own), color=colour, linewidth=1.4 if len(layers) == 1 else 0.9)
        if len(layers) > 1:
            figure.colorbar(scale, ax=axes, label="decoder layer", pad=0.01)
        axes.set_xlabel("step")
        axes.set_ylabel("loss (nats a token)")
        axes.grid(axis="y")

    return render(stem, drawn, TREND, (COLUMN_WIDTH, 2.1), paint)
