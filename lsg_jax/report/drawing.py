"""What all figures share: looks that do not rest on colour alone, fonts, and one figure as CSV, SVG and PNG.

The colours are those of Okabe and Ito, which readers with any of the common colour deficiencies can tell apart.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lsg_jax.errors import InputError
from lsg_jax.files import write_atomic

Row = Mapping[str, Any]
Line = Literal["-", "--", "-.", ":", ""]

PAGE_WIDTH = 7.2  # inches; two columns of a paper
COLUMN_WIDTH = 3.5
DOTS_PER_INCH = 150
HIGHEST_PERCENTAGE, PERCENTAGE_POINTS = 100.0, "percentage points"
MINUS = "\N{MINUS SIGN}"
INK, FAINT, GRID = "#222222", "#8A8A8A", "#DDDDDD"

SETTINGS: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Arial", "Helvetica"],
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.edgecolor": INK,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlepad": 5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "grid.color": GRID,
    "grid.linewidth": 0.5,
    "hatch.linewidth": 0.5,
    "lines.linewidth": 1.3,
    "lines.markersize": 3.2,
    "text.hinting": "no_hinting",  # as wide in the SVG as in the PNG, at any number of dots an inch
    "text.parse_math": False,  # a task may be named with a dollar sign
    "svg.fonttype": "none",  # text stays text: searchable, editable
    "svg.hashsalt": "lsg",  # without it the ids in the file are random
}


@dataclass(frozen=True)
class Look:
    """How a token group is drawn, the same in every figure."""

    label: str
    colour: str
    line: Line
    marker: str
    hatch: str


GROUPS = {
    "v_sink": Look("V-sinks", "#D55E00", "-", "o", "////"),
    "l_sink": Look("L-sinks", "#0072B2", "--", "s", "\\\\\\\\"),
    "ordinary": Look("ordinary", "#009E73", "-.", "^", "...."),
    "rest": Look("rest", "#009E73", "-.", "^", "...."),
    "text": Look("text", "#CCCCCC", ":", "D", ""),
}


def look_of(group: str) -> Look:
    """The look of a token group; an unknown one is drawn in grey under its own name."""
    return GROUPS.get(group, Look(group, FAINT, ":", "x", ""))


def check_rows(rows: Sequence[Row], columns: Iterable[str], *, study: str, stem: Path) -> None:
    """Refuses rows that cannot be drawn.

    Raises:
        InputError: there are none, or one lacks a column; names the study that should have given them.
    """
    if not rows:
        raise InputError(f"{stem}: there are no rows of {study} to draw; run {study} first, or see why it found nothing")
    for index, row in enumerate(rows):
        if missing := [name for name in columns if name not in row]:
            raise InputError(f"{stem}: row {index} of {study} lacks {', '.join(missing)}: not written by this version of lsg")


def render(
    stem: Path, rows: Sequence[Row], columns: Sequence[str], size: tuple[float, float], paint: Callable[[Any], None]
) -> list[Path]:
    """Draws one figure and writes it with its numbers; equal rows give equal bytes.

    Args:
        stem: the files' path without a suffix; its folder is made where it is missing.
        rows, columns: what stem.csv holds, see `as_csv`.
        size: width and height in inches.
        paint: draws onto a matplotlib Figure of that size.

    Returns:
        The paths of the CSV, the SVG and the PNG. Nothing of matplotlib's global state is changed, nor read.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    png, svg = io.BytesIO(), io.BytesIO()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's matplotlibrc must not change the figures
        matplotlib.rcParams.update(SETTINGS)
        figure = Figure(figsize=size, dpi=DOTS_PER_INCH, layout="constrained")
        paint(figure)
        FigureCanvasAgg(figure).print_png(png)
        figure.set_layout_engine("none")  # it is laid out by now; once is enough, and half of the time
        FigureCanvasSVG(figure).print_svg(svg, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    stem.parent.mkdir(parents=True, exist_ok=True)
    files = {".csv": as_csv(rows, columns).encode(), ".svg": svg.getvalue(), ".png": png.getvalue()}
    paths = {stem.with_name(stem.name + suffix): data for suffix, data in files.items()}
    for path, data in paths.items():
        write_atomic(path, data)
    return list(paths)


def as_csv(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Rows as CSV with a header. What is not known is an empty cell, a list is written with spaces between its items."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_cell(row.get(name)) for name in columns] for row in rows)
    return out.getvalue()


def _cell(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(_cell(item) for item in value)
    return "" if value is None or (isinstance(value, float) and not math.isfinite(value)) else str(value)


def numbers(values: Iterable[float | None]) -> np.ndarray:
    """float64 [N]; None becomes NaN, which matplotlib leaves out."""
    return np.array([math.nan if value is None else value for value in values], np.float64)


def distinct(rows: Iterable[Row], *names: str) -> list[Any]:
    """The values of a column, or tuples of several, each once and in order of appearance."""
    pick = (lambda row: row[names[0]]) if len(names) == 1 else (lambda row: tuple(row[name] for name in names))
    return list(dict.fromkeys(pick(row) for row in rows))


def unit_of(rows: Iterable[Row]) -> str:
    """The unit of the changes of some scores: a score above 100 is no percentage but points (MME, OCRBench)."""
    return "points" if any(abs(row["value"] or 0.0) > HIGHEST_PERCENTAGE for row in rows) else PERCENTAGE_POINTS


def plain(value: float | None, sign: str = "") -> str:
    """A number as text, with a true minus, and with `sign` "+" also a plus; a dash where there is none."""
    return "-" if value is None else f"{value:{sign}.2f}".replace("-", MINUS)


def interval_text(value: float | None, low: float | None, high: float | None, *, sign: str = "+") -> str:
    """A change, or with `sign` "" a score, with its interval, as far as they are known."""
    bounds = "" if low is None or high is None else f" [{plain(low, sign)}, {plain(high, sign)}]"
    return plain(value, sign) + bounds


def draw_line(axes: Any, look: Look, layers: Sequence[int], mean: Sequence[float | None], std: Sequence[float | None]) -> None:
    """A line over layers with a band of one standard deviation, cut at 0 as all that it shows is; None breaks both."""
    middle, spread = numbers(mean), numbers(std)
    axes.fill_between(layers, np.maximum(middle - spread, 0.0), middle + spread, color=look.colour, alpha=0.18, linewidth=0)
    axes.plot(layers, middle, color=look.colour, linestyle=look.line, marker=look.marker)


def draw_interval(axes: Any, at: float, look: Look, row: Row, *, upright: bool) -> None:
    """A change with its interval at one place of the other axis; the mark is hollow where the interval covers 0."""
    change, low, high = numbers(row[name] for name in ("change", "low", "high"))
    (axes.vlines if upright else axes.hlines)(at, low, high, color=look.colour, linewidth=1.2)
    axes.plot(
        *((at, change) if upright else (change, at)),
        color=look.colour,
        marker=look.marker,
        markersize=4.5,
        markerfacecolor=look.colour if low > 0 or high < 0 else "white",
    )


def key_line(look: Look, *, line: Line | None = None) -> Any:
    """What stands for a line in a legend, or with an empty `line` for a mark alone."""
    from matplotlib.lines import Line2D

    return Line2D(
        [], [], color=look.colour, linestyle=look.line if line is None else line, marker=look.marker, label=look.label
    )


def layer_axis(axes: Any, layers: Sequence[int]) -> None:
    """Labels the x axis with decoder layers; ticks at whole layers only."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("decoder layer")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True, steps=[1, 2, 4, 5, 10]))
    axes.set_xlim(min(layers) - 0.5, max(layers) + 0.5)


def legend_above(figure: Any, handles: Sequence[Any]) -> None:
    """One legend for all panels, in a line above them."""
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), handlelength=2.6, columnspacing=2.0)
