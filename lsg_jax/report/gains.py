"""Scores of every method and their changes over the base model, with intervals, as rows and as a forest plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lsg_jax.eval.results import BASE, Estimate, EvaluationResult
from lsg_jax.report.drawing import (
    INK,
    Kept,
    Look,
    Row,
    check_rows,
    distinct,
    draw_interval,
    interval_text,
    plain,
    render,
    unit_of,
)

COLUMNS = ("benchmark", "metric", "method", "value", "change", "low", "high")
METHODS = {
    "base": "base",
    "lsg": "LSG",
    "var": "VAR",
    "pai": "PAI",
    "vaf": "VAF",
    "eah": "EAH",
    "damro": "DAMRO",
    "gift": "GIFT",
    "sink_front": "Sink-to-the-front",
    "diysink": "DIYSink",
    "registers": "test-time registers",
    "lora": "LoRA",
    "gated_output": "gated attention",
    "full": "trained model",
    "fixed": "fixed coefficients",
}
NO_CHANGE = Estimate(None, None, None)
BAND = "#EFEFEF"
CHANGE = Look("change", "#0072B2", "-", "o", "")
LINE_HEIGHT = 0.19  # inches
COLUMN_WIDTH = 4.6  # inches, with names at the left and numbers at the right
LINES_A_COLUMN, MAX_COLUMNS = 45, 3


def rows_of_gains(result: EvaluationResult, *, every_metric: bool = False) -> list[dict[str, Any]]:
    """The scores of an evaluation as rows of COLUMNS; rows of the base model have no change.

    A row has the interval of its value besides, as `score`, and the mean over seeds its `deviation` over them.

    Args:
        every_metric: all metrics of each benchmark, not only its official score or, without one, the first with a value.
    """
    rows = []
    for name, benchmark in result.benchmarks.items():
        base = benchmark.methods[BASE]
        for metric in base if every_metric else [benchmark.shown(BASE)]:
            place = {"benchmark": name, "metric": metric}
            for method, scores in benchmark.methods.items():
                change = benchmark.change.get(method, {}).get(metric, NO_CHANGE)
                rows.append({**place, "method": method, **_numbers(scores[metric], change)})
            for method, over in benchmark.over_seeds.items():
                named = f"{METHODS.get(method, method)}, mean of {len(over.seeds)} seeds"
                numbers = _numbers(over.methods[metric], over.change[metric])
                rows.append({**place, "method": named, **numbers, "deviation": over.deviation[metric]})
    return rows


def _numbers(score: Estimate, change: Estimate) -> dict[str, Any]:
    return {"value": score.value, "change": change.value, "low": change.low, "high": change.high, "score": score}


def score_text(row: Row) -> str:
    """The value of a row of `rows_of_gains` with its interval and, of a mean over seeds, the deviation over them."""
    score, deviation = row["score"], row.get("deviation")
    text = interval_text(score.value, score.low, score.high, sign="")
    return text if deviation is None else f"{text} ± {plain(deviation)}"


def rows_of_ablation(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows of ablate.json as rows of COLUMNS; the variant is the method."""
    return [{"method": row["variant"], **{name: row[name] for name in COLUMNS if name != "method"}} for row in rows]


@dataclass(frozen=True)
class _Block:
    """A benchmark and metric, and the rows of its methods."""

    title: str
    base: str
    unit: str
    rows: list[Row]

    @property
    def height(self) -> int:
        """Lines."""
        return 1 + len(self.rows)


def draw_gains(rows: Sequence[Row], stem: Path | Kept) -> list[Path]:
    """A forest plot: for each benchmark and metric one line a method, with its change and interval, drawn and as numbers.

    A filled marker means that the interval excludes 0. The score of the base model is beside the heading. Benchmarks scored in
    points (above 100) have an axis of their own.

    Args:
        rows: of COLUMNS; value in percent or points, changes in percentage points or points.
        stem: path of the three files without suffix; the CSV holds all rows.

    Raises:
        InputError: there are no rows, or only rows of the base model.
    """
    check_rows(rows, COLUMNS, study="lsg eval", stem=stem)
    check_rows([row for row in rows if row["method"] != BASE], COLUMNS, study="lsg eval with gates or a method", stem=stem)
    blocks = _blocks(rows)
    units = dict.fromkeys(block.unit for block in blocks)
    columns = [column for unit in units for column in _fold([block for block in blocks if block.unit == unit])]
    lines = max(sum(block.height for block in column) for column in columns)

    def paint(figure: Any) -> None:
        panels = figure.subplots(1, len(columns), squeeze=False)[0]
        for axes, column in zip(panels, columns, strict=True):
            same = [row for block in blocks if block.unit == column[0].unit for row in block.rows]
            reach = max((abs(row[of]) for row in same for of in ("change", "low", "high") if row[of] is not None), default=0.0)
            _draw_column(axes, column, lines)
            axes.set_xlim(-1.08 * max(reach, 0.1), 1.08 * max(reach, 0.1))
            axes.set_xlabel(f"change ({column[0].unit})")

    return render(stem, rows, COLUMNS, (COLUMN_WIDTH * len(columns), LINE_HEIGHT * (lines + 1) + 0.5), paint)


def _blocks(rows: Sequence[Row]) -> list[_Block]:
    blocks = []
    for benchmark, metric in distinct(rows, "benchmark", "metric"):
        own = [row for row in rows if (row["benchmark"], row["metric"]) == (benchmark, metric)]
        base = next((row["value"] for row in own if row["method"] == "base"), None)
        blocks.append(
            _Block(f"{benchmark}, {metric}", plain(base), unit_of(own), [row for row in own if row["method"] != "base"])
        )
    return blocks


def _fold(blocks: Sequence[_Block]) -> list[list[_Block]]:
    """Splits blocks into columns of about equal height, as few as LINES_A_COLUMN allows and at most MAX_COLUMNS."""
    total = sum(block.height for block in blocks)
    target = total / min(-(-total // LINES_A_COLUMN), MAX_COLUMNS)
    columns: list[list[_Block]] = [[]]
    for block in blocks:
        filled = sum(b.height for b in columns[-1])
        if columns[-1] and filled + block.height / 2 > target:
            columns.append([])
        columns[-1].append(block)
    return columns


def _draw_column(axes: Any, blocks: Sequence[_Block], lines: int) -> None:
    """Draws one column of blocks on lines 0, 1, ... from the top; the titles are on line -1."""
    _write_beside(axes, -1, "score", "change [interval]")
    names: dict[int, str] = {}
    line = 0
    for block in blocks:
        axes.axhspan(line - 0.5, line + 0.5, color=BAND, linewidth=0, zorder=3)
        place = {"transform": axes.get_yaxis_transform(), "va": "center", "fontsize": 7, "fontweight": "bold", "zorder": 4}
        axes.text(0.01, line, block.title, **place)
        _write_beside(axes, line, block.base, "base")
        for row in block.rows:
            line += 1
            names[line] = str(METHODS.get(row["method"], row["method"]))
            _write_beside(axes, line, plain(row["value"]), interval_text(row["change"], row["low"], row["high"]))
            draw_interval(axes, line, CHANGE, row, upright=False)
        line += 1
    axes.vlines(0, -0.5, line - 0.5, color=INK, linewidth=0.8, zorder=1)
    axes.set_ylim(lines - 0.5, -1.5)
    axes.set_yticks(list(names), list(names.values()))
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")


def _write_beside(axes: Any, line: int, score: str, change: str) -> None:
    """Writes a score and a change to the right of the axes, on one line."""
    place = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points", "va": "center", "fontsize": 7}
    axes.annotate(score, (1, line), (38, 0), ha="right", **place)
    axes.annotate(change, (1, line), (48, 0), ha="left", **place)
