"""Shared by all figures: colours and markers of token groups, fonts, and writing a figure as CSV, SVG and PNG.

Colours are those of Okabe and Ito, which can be told apart with any of the common colour deficiencies. Markers, line styles or
hatches carry the same information.
"""

from __future__ import annotations

import csv
import io
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lsg_jax.errors import InputError
from lsg_jax.eval.registry import BENCHMARKS
from lsg_jax.files import write_atomic

Row = Mapping[str, Any]
Line = Literal["-", "--", "-.", ":", ""]

PAGE_WIDTH = 7.2  # inches; two columns of a paper
COLUMN_WIDTH = 3.5
DOTS_PER_INCH = 150
HIGHEST_PERCENTAGE, PERCENTAGE_POINTS = 100.0, "percentage points"
MINUS = "\N{MINUS SIGN}"
INK, FAINT, GRID, PAPER = "#222222", "#8A8A8A", "#DDDDDD", "#FFFFFF"
"""The report gives these another colour on a dark screen."""

RIM, STROKE = "#FEFEFE", "#777777"  # on coloured cells, which look the same on any screen
NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))

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
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
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
    "text.hinting": "no_hinting",  # text is as wide in the SVG as in the PNG, at any resolution
    "text.parse_math": False,  # a task may be named with a dollar sign
    "svg.fonttype": "none",  # text stays text: searchable, editable
    "svg.hashsalt": "lsg",  # otherwise ids in the file are random
}


@dataclass(frozen=True)
class Look:
    """How a token group is drawn, the same in every figure."""

    label: str
    colour: str
    line: Line
    marker: str
    hatch: str


LOOKS = {
    "v_sink": Look("V-sinks", "#D55E00", "-", "o", "////"),
    "l_sink": Look("L-sinks", "#0072B2", "--", "s", "\\\\\\\\"),
    "ordinary": Look("ordinary", "#009E73", "-.", "^", "...."),
    "rest": Look("rest", "#009E73", "-.", "^", "...."),
    "text": Look("text", "#CCCCCC", ":", "D", ""),
}


def look_of(group: str) -> Look:
    """The look of a token group; an unknown group is grey and keeps its name."""
    return LOOKS.get(group, Look(group, FAINT, ":", "x", ""))


@dataclass
class Kept:
    """Stands for the path of a figure that is kept in memory.

    Attributes:
        files: suffix -> content.
    """

    name: str
    files: dict[str, bytes] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


def check_rows(rows: Sequence[Row], columns: Iterable[str], *, study: str, stem: Path | Kept) -> None:
    """Checks that there are rows and that each has the columns.

    Raises:
        InputError: names the study that should have written them.
    """
    if not rows:
        raise InputError(f"{stem}: there are no rows of {study} to draw; run {study} first, or see why it found nothing")
    for index, row in enumerate(rows):
        if missing := [name for name in columns if name not in row]:
            raise InputError(f"{stem}: row {index} of {study} lacks {', '.join(missing)}: not written by this version of lsg")


def render(
    stem: Path | Kept, rows: Sequence[Row], columns: Sequence[str], size: tuple[float, float], paint: Callable[[Any], None]
) -> list[Path]:
    """Draws a figure and writes it together with its numbers. Equal rows give equal bytes.

    Matplotlib's global state is neither read nor changed.

    Args:
        stem: path of the files without suffix; a missing folder is created. `Kept` keeps them in memory.
        rows, columns: the content of stem.csv, see `as_csv`.
        size: width and height in inches.
        paint: draws onto a matplotlib Figure of that size.

    Returns:
        The paths of the CSV, the SVG and the PNG; none of what is kept in memory.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    svg = io.BytesIO()
    png = painted(size, paint, then=lambda figure: FigureCanvasSVG(figure).print_svg(svg, metadata=NO_METADATA))
    files = {".csv": as_csv(rows, columns).encode(), ".svg": svg.getvalue(), ".png": png}
    if isinstance(stem, Kept):
        stem.files |= files
        return []
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = {stem.with_name(stem.name + suffix): data for suffix, data in files.items()}
    for path, data in paths.items():
        write_atomic(path, data)
    return list(paths)


def remove_drawings(*stems: Path) -> None:
    """Removes what `render` wrote there, if it did."""
    for stem in stems:
        for suffix in (".csv", ".svg", ".png"):
            stem.with_name(stem.name + suffix).unlink(missing_ok=True)


def painted(
    size: tuple[float, float],
    paint: Callable[[Any], None],
    *,
    then: Callable[[Any], object] = lambda figure: None,
    dots_per_inch: int = DOTS_PER_INCH,
    metadata: Mapping[str, str] | None = None,
) -> bytes:
    """A figure as PNG.

    Args:
        size: width and height in inches.
        paint: draws onto a matplotlib Figure of that size.
        then: what else to do with the finished figure, under the same settings.
        metadata: texts that the file states, such as Software.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    png = io.BytesIO()
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the SVG and the CSV have the text
        matplotlib.rcdefaults()  # ignore a user's matplotlibrc
        matplotlib.rcParams.update(SETTINGS)
        figure = Figure(figsize=size, dpi=dots_per_inch, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        paint(figure)
        _lay_out(figure)
        canvas.print_png(png, metadata=metadata)
        then(figure)
    return png.getvalue()


def _lay_out(figure: Any) -> None:
    """Places the axes once for all formats. The solver's last digits differ from run to run, so they are left out."""
    figure.get_layout_engine().execute(figure)
    figure.set_layout_engine("none")
    for axes in figure.axes:
        axes.set_position([round(side, 6) for side in axes.get_position(original=True).bounds])


def as_csv(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Rows as CSV with a header. Unknown values are empty cells; items of a list are separated by spaces.

    A text that a spreadsheet would run as a formula gets an apostrophe in front; numbers stay numbers.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(map(_cell, columns))
    writer.writerows([_cell(row.get(name)) for name in columns] for row in rows)
    return out.getvalue()


def _cell(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(_cell(item) for item in value)
    if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")):
        return f"'{value}"
    return "" if value is None or (isinstance(value, float) and not math.isfinite(value)) else str(value)


def numbers(values: Iterable[float | None]) -> np.ndarray:
    """float64 [N]; None becomes NaN, which matplotlib does not draw."""
    return np.array([math.nan if value is None else value for value in values], np.float64)


def distinct(rows: Iterable[Row], *names: str) -> list[Any]:
    """Distinct values of a column, or tuples of several columns, in order of appearance."""
    pick = (lambda row: row[names[0]]) if len(names) == 1 else (lambda row: tuple(row[name] for name in names))
    return list(dict.fromkeys(pick(row) for row in rows))


def unit_of(rows: Iterable[Row]) -> str:
    """The unit of changes: points for metrics that count them (MME, OCRBench), as any score above 100 does."""
    return (
        "points" if any(abs(row["value"] or 0.0) > HIGHEST_PERCENTAGE or _in_points(row) for row in rows) else PERCENTAGE_POINTS
    )


def _in_points(row: Row) -> bool:
    """Whether a metric of a known benchmark counts points, however few there are: a part of MME may have less than 100."""
    benchmark, metric = BENCHMARKS.get(str(row.get("benchmark"))), str(row.get("metric", row.get("task")))
    return benchmark is not None and benchmark.points(metric)


def plain(value: float | None, sign: str = "") -> str:
    """A number as text with a typographic minus, and with `sign` "+" also a plus; "-" for None."""
    return "-" if value is None else f"{value:{sign}.2f}".replace("-", MINUS)


def interval_text(value: float | None, low: float | None, high: float | None, *, sign: str = "+") -> str:
    """A change, or with `sign` "" a score, with its interval if that is known."""
    bounds = "" if low is None or high is None else f" [{plain(low, sign)}, {plain(high, sign)}]"
    return plain(value, sign) + bounds


def draw_line(
    axes: Any,
    look: Look,
    layers: Sequence[int],
    mean: Sequence[float | None],
    std: Sequence[float | None],
    *,
    most: float = math.inf,
) -> None:
    """A line over layers with a band of one standard deviation, clipped at 0 and at `most`; None makes a gap."""
    middle, spread = numbers(mean), numbers(std)
    low, high = np.maximum(middle - spread, 0.0), np.minimum(middle + spread, most)
    axes.fill_between(layers, low, high, color=look.colour, alpha=0.18, linewidth=0)
    axes.plot(layers, middle, color=look.colour, linestyle=look.line, marker=look.marker)


def draw_interval(axes: Any, at: float, look: Look, row: Row, *, upright: bool) -> None:
    """A change and its interval at one position of the other axis; the marker is hollow if the interval covers 0."""
    change, low, high = numbers(row[name] for name in ("change", "low", "high"))
    (axes.vlines if upright else axes.hlines)(at, low, high, color=look.colour, linewidth=1.2)
    axes.plot(
        *((at, change) if upright else (change, at)),
        color=look.colour,
        marker=look.marker,
        markersize=4.5,
        markerfacecolor=look.colour if low > 0 or high < 0 else PAPER,
    )


def key_line(look: Look, *, line: Line | None = None) -> Any:
    """Legend entry of a line, or with an empty `line` of a marker alone."""
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
    """One legend for all panels, in one line above them."""
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), handlelength=2.6, columnspacing=2.0)
