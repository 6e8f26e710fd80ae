"""Figures: the CSV holds the rows, the SVG is valid XML with its labels, equal rows give equal bytes, None is a gap."""

import csv
import math
import re
import sys
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
import study_rows
from matplotlib.figure import Figure

from lsg_jax.errors import InputError
from lsg_jax.eval.benchmark import LOWER
from lsg_jax.eval.best_cells import extreme_cells
from lsg_jax.eval.results import Estimate, result_of
from lsg_jax.methods import registry
from lsg_jax.report import figures
from lsg_jax.report.drawing import unit_of
from lsg_jax.report.gains import METHODS, rows_of_ablation, rows_of_gains
from lsg_jax.report.heat_map import lines_of
from lsg_jax.report.ratios import _draw_points, greatest_ratio, table_of_ratios
from lsg_jax.report.stacks import rows_of_stack

SVG = "{http://www.w3.org/2000/svg}"
TASK_LABELS = ["cv_bench", "Count", "Depth $ & <b>", "mmstar", "math"]

THREE_GROUPS = ((0.2, 0.5, 0.1), (1.0, 0.0, 0.4))
FIGURES = {
    "draw_oracle_map": (study_rows.sweep(), [*TASK_LABELS, "Coefficient of V-sinks", "percentage points"]),
    "draw_probe_curves": (study_rows.probe(), ["count", "shapes", "accuracy", "F1", "V-sinks", "chance"]),
    "draw_sinks_by_layer": (study_rows.counts(), ["V-sinks", "L-sinks", "ordinary", "tokens an image"]),
    "draw_attention_shares": (study_rows.attention(), ["Queries: prompt tokens", "Queries: answer tokens", "text"]),
    "draw_gate_ratios": (study_rows.ratios(), [*TASK_LABELS, "layer 0", "layer 2", "gate ratio"]),
    "draw_gains": (study_rows.gains(), ["mmstar, mean_of_18", "LSG", "+2.00 [+1.00, +3.00]", "33.27", "change (points)"]),
    "draw_stack": (rows_of_stack(study_rows.stack()), ["+ L0", "change (percentage points)"]),
    "draw_loss": (study_rows.losses(), ["step", "loss (nats a token)"]),
}


def read(path):
    return list(csv.DictReader(path.open(encoding="utf-8")))


def as_cells(rows):
    """Rows as csv.DictReader returns them: None as an empty cell, lists separated by spaces."""
    text = lambda value: "" if value is None else " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return [{name: text(value) for name, value in row.items()} for row in rows]


def drawn_text(svg):
    return ["".join(element.itertext()).strip() for element in ElementTree.parse(svg).getroot().iter(f"{SVG}text")]


def settings_of_matplotlib():
    """All settings but the backend, which is resolved when it is read."""
    return {name: matplotlib.rcParams[name] for name in matplotlib.rcParams if name != "backend"}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """name -> the files of each figure, drawn under user settings of matplotlib, which must be ignored and unchanged."""
    folder = tmp_path_factory.mktemp("figures") / "new"
    loaded = set(sys.modules)
    with matplotlib.rc_context({"font.size": 30, "axes.grid": True, "svg.fonttype": "path"}):
        before = settings_of_matplotlib()
        paths = {name: getattr(figures, name)(rows, folder / name) for name, (rows, _) in FIGURES.items()}
        assert settings_of_matplotlib() == before
    assert "matplotlib.pyplot" not in set(sys.modules) - loaded
    return paths


def test_every_method_has_a_name():
    assert METHODS.keys() == registry.METHODS.keys()


@pytest.mark.parametrize("name", FIGURES)
def test_files_of_a_figure(name, drawn):
    (rows, labels), paths = FIGURES[name], drawn[name]
    assert [path.name for path in paths] == [f"{name}.csv", f"{name}.svg", f"{name}.png"]
    assert set(labels) <= set(drawn_text(paths[1])), drawn_text(paths[1])
    assert paths[2].read_bytes().startswith(b"\x89PNG")
    cells = read(paths[0])
    assert not any("nan" in value.lower() for row in cells for value in row.values())
    if name not in ("draw_oracle_map", "draw_attention_shares"):  # these aggregate rows, see below
        own = [key for key in cells[0] if (name, key) != ("draw_loss", "trend")]
        assert [{key: cell[key] for key in own} for cell in cells] == [{key: row[key] for key in own} for row in as_cells(rows)]


def test_equal_rows_give_equal_bytes(drawn, tmp_path):
    again = figures.draw_attention_shares(study_rows.attention(), tmp_path / "again")
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in drawn["draw_attention_shares"]]


def test_the_oracle_map_shows_the_best_coefficients_of_each_cell(drawn):
    check_best_cells(study_rows.sweep(), drawn["draw_oracle_map"][0])


def test_the_oracle_map_of_three_groups_without_benchmarks_that_count_points(tmp_path):
    rows = study_rows.sweep(THREE_GROUPS)
    for row in rows:
        if row["benchmark"] == "mmstar" and row["value"] is not None:
            row |= {name: 50 * row[name] for name in ("value", "change", "low", "high")}
    table, svg, _ = figures.draw_oracle_map(rows, tmp_path / "three", groups=("v_sink", "l_sink", "ordinary"))
    check_best_cells([row for row in rows if row["benchmark"] == "cv_bench"], table)
    labels = {f"Coefficient of {name}" for name in ("V-sinks", "L-sinks", "ordinary")}
    assert {*labels, "left out, since they count points: mmstar"} <= set(drawn_text(svg))


def check_best_cells(rows, table):
    cells = read(table)
    assert len(cells) == 2 * len({(row["benchmark"], row["task"], row["layer"]) for row in rows})
    for cell in cells:
        extreme = {"best": np.argmax, "worst": np.argmin}[cell.pop("which")]
        tied = cell.pop("tied")
        place = (cell["benchmark"], cell["task"], int(cell["layer"]))
        own = [r for r in rows if (r["benchmark"], r["task"], r["layer"]) == place and set(r["coefficients"]) != {1.0}]
        if place == ("mmstar", "math", 1):  # was not measured
            assert [cell[name] for name in ("coefficients", "value", "change", "low", "high")] == [""] * 5 and tied == ""
        else:
            assert [cell] == as_cells([own[int(extreme([row["change"] for row in own]))]]) and tied == "1"


def test_the_oracle_map_hatches_what_may_be_zero_and_marks_ties(tmp_path):
    rows = study_rows.sweep()
    for row in rows:
        if (row["task"], row["layer"]) == ("Count", 0):
            row |= {"change": 0.0, "low": 0.0, "high": 0.0}
        if row["task"].startswith("Depth") and row["layer"] == 1 and row["coefficients"] != [1.0, 0.0]:
            row |= {"change": 50.0, "low": 49.0, "high": 51.0}
    table, svg, _ = figures.draw_oracle_map(rows, tmp_path / "ties")
    best = [cell for cell in read(table) if cell["which"] == "best"]
    (tie,) = [cell for cell in best if (cell["task"], cell["layer"]) == ("Count", "0")]
    assert tie["coefficients"] == "" and tie["tied"] == "3"
    (some,) = [cell for cell in best if cell["task"].startswith("Depth") and cell["layer"] == "1"]
    assert some["coefficients"] == "0.0 1.0" and some["tied"] == "2"
    dots = [use for use in ElementTree.parse(svg).getroot().iter(f"{SVG}use") if "fill: #fefefe" in use.get("style", "")]
    assert len(dots) == 1
    clear = [cell for cell in read(table) if cell["low"] and not float(cell["low"]) <= 0 <= float(cell["high"])]
    unclear = [cell for cell in read(table) if cell["low"] and float(cell["low"]) <= 0 <= float(cell["high"])]
    hatched = [path for path in ElementTree.parse(svg).getroot().iter(f"{SVG}path") if "url(#" in path.get("style", "")]
    assert len(hatched) == len(unclear) and clear and unclear
    marks = {"circle: all tie; dot: several, the first is drawn", "hatched: interval covers 0; cross: not measured"}
    assert marks <= set(drawn_text(svg))


def test_ratios_are_drawn_up_to_what_they_can_reach():
    """Two groups, whose ratios sum to 1, and to 2 with gate.key_scale = 2; a deviation may reach beyond."""
    for scale in (1.0, 2.0):
        rows = [row | {"mean": scale * mean, "std": 0.3} for row, mean in zip(study_rows.ratios(), (0.9, 0.1) * 9, strict=True)]
        assert greatest_ratio(rows) == scale
        lines, figure = lines_of(study_rows.TASKS), Figure()
        _draw_points(figure, rows, lines, study_rows.LAYERS, ["v_sink", "rest"], greatest_ratio(rows))
        for axes in figure.axes:
            ends = np.concatenate([np.concatenate(drawn.get_segments())[:, 0] for drawn in axes.collections])
            assert ends.min() == 0 and ends.max() == scale and axes.get_xlim() == (0, scale)


def test_attention_shares_are_means_over_heads_with_their_range(drawn):
    cells = read(drawn["draw_attention_shares"][0])
    found = {row["group"]: [float(row[name]) for name in ("share", "low", "high", "heads")] for row in cells}
    expected = {"text": [0.5, 0.45, 0.55, 2], "v_sink": [0.3, 0.25, 0.35, 2], "l_sink": [0.05, 0.05, 0.05, 2]}
    for group, numbers in expected.items():
        np.testing.assert_allclose(found[group], numbers)
    assert len(cells) == 2 * len(study_rows.LAYERS) * 4


def test_a_null_breaks_the_line(drawn):
    svg = ElementTree.parse(drawn["draw_probe_curves"][1]).getroot()
    lines = [path for path in svg.iter(f"{SVG}path") if "fill: none" in path.get("style", "")]
    strokes = {"v_sink": "#d55e00", "l_sink": "#0072b2", "ordinary": "#009e73"}
    for group, pieces in (("v_sink", 1), ("l_sink", 2), ("ordinary", 1)):
        curves = [path.get("d") for path in lines if strokes[group] in path.get("style") and path.get("d").count("L") > 1]
        assert [len(re.findall("M", curve)) for curve in curves[:2]] == [pieces] * 2, group


def test_many_gated_layers_are_a_heat_map(tmp_path):
    rows = study_rows.ratios(range(8), ("v_sink", "l_sink", "ordinary"))
    svg = figures.draw_gate_ratios(rows, tmp_path / "ratios")[1]
    assert {"Gate ratio of V-sinks", "Gate ratio of L-sinks", "Gate ratio of ordinary"} <= set(drawn_text(svg))


def test_rows_that_cannot_be_drawn_are_refused(tmp_path):
    studies = {"draw_oracle_map": "lsg sweep", "draw_probe_curves": "lsg probe", "draw_stack": "lsg stack"}
    studies |= dict.fromkeys(("draw_sinks_by_layer", "draw_attention_shares"), "lsg sinks")
    studies |= dict.fromkeys(("draw_gate_ratios", "draw_gains"), "lsg eval") | {"draw_loss": "lsg train"}
    for name, study in studies.items():
        with pytest.raises(InputError, match=f"no rows of {study}"):
            getattr(figures, name)([], tmp_path / "figure")
        with pytest.raises(InputError, match=f"row 0 of {study}.* lacks "):
            getattr(figures, name)([{"other": 1}], tmp_path / "figure")
    unchanged = [row for row in study_rows.sweep() if set(row["coefficients"]) == {1.0}]
    with pytest.raises(InputError, match="nothing to draw"):
        figures.draw_oracle_map(unchanged, tmp_path / "figure")
    with pytest.raises(InputError, match="gates or a method"):
        figures.draw_gains([row for row in study_rows.gains() if row["method"] == "base"], tmp_path / "figure")
    assert list(tmp_path.iterdir()) == []


def test_gains_of_an_evaluation_and_of_an_ablation():
    base, lsg = rows_of_gains(result_of(study_rows.result()))
    place, unchanged = {"benchmark": "cv_bench", "metric": "accuracy"}, dict.fromkeys(("change", "low", "high"))
    assert base == place | unchanged | {"method": "base", "value": 50.0, "score": Estimate(50.0, 48.0, 52.0)}
    assert (lsg["score"].value, lsg["method"], lsg["value"]) == (53.0, "lsg", 53.0)
    assert (lsg["change"], lsg["low"], lsg["high"]) == (3.0, 1.0, 5.0)
    assert [row["metric"] for row in rows_of_gains(result_of(study_rows.result()), every_metric=True)] == ["accuracy"] * 2 + [
        "2D"
    ] * 2
    official = study_rows.result()
    official["benchmarks"]["cv_bench"]["score"] = "2D"
    assert {row["metric"] for row in rows_of_gains(result_of(official))} == {"2D"}
    alike = {name: value for name, value in lsg.items() if name not in ("method", "score")}
    assert rows_of_ablation([{"variant": "mean_all", **alike}]) == [alike | {"method": "mean_all"}]


def test_the_longer_side_of_a_table_of_ratios_goes_down():
    rows = study_rows.ratios()
    rows[0] = rows[0] | {"mean": None}  # Count, layer 0, V-sinks
    header, lines = table_of_ratios(rows, "v_sink")
    assert header == ["benchmark, task", "questions", "layer 0", "layer 1", "layer 2"]
    assert lines[0] == ["cv_bench, Count", "7", "-", "0.20 ± 0.05", "0.20 ± 0.05"] and len(lines) == 3
    header, lines = table_of_ratios(study_rows.ratios(range(32)), "rest")
    assert header == ["layer", "cv_bench, Count", "cv_bench, Depth $ & <b>", "mmstar, math"]
    assert len(lines) == 32 and lines[31] == ["layer 31", *["0.70 ± 0.05"] * 3]


def test_the_trend_of_a_loss():
    rng = np.random.default_rng(0)
    losses = rng.uniform(1, 3, 101)
    kept = 0.5 ** (1 / figures.half_life(101))
    weights = [kept ** np.arange(step, -1, -1) for step in range(101)]  # the youngest loss has weight 1
    expected = [float(np.average(losses[: step + 1], weights=weights[step])) for step in range(101)]
    np.testing.assert_allclose(figures.trend_of(losses.tolist()), expected, rtol=1e-12)
    assert figures.half_life(101) == 5 and figures.half_life(3) == 1
    np.testing.assert_allclose(figures.trend_of([2.0] * 40), 2.0, rtol=1e-12)
    gaps = figures.trend_of([1.0, None, math.nan, 3.0])
    assert gaps[1:3] == [None, None] and gaps[0] == 1 and gaps[3] == pytest.approx((0.5 * 1 + 3) / 1.5)
    assert figures.trend_of([None]) == [None]


def test_the_oracle_map_draws_harm_as_harm_where_less_is_better(tmp_path):
    """`chair_s` rises at every layer under one setting and falls under the other; lengths and ratios of yes are no gain."""
    rows, place = [], {"benchmark": "chair", "layer": 0, "questions": 9, "value": 50.0}
    for task, first in ((f"chair_s{LOWER}", 7.0), ("mean_length", 40.0), ("random: yes_ratio", 30.0), ("unasked", None)):
        for change, values in ((first, [0.0, 1.0]), (None if first is None else -first, [1.0, 0.0])):
            rows.append({**place, "task": task, "coefficients": values, "change": change, "low": change, "high": change})
    table, svg, _ = figures.draw_oracle_map(rows, tmp_path / "lower")
    drawn = {cell["which"]: float(cell["change"]) for cell in read(table)}
    assert {cell["task"] for cell in read(table)} == {f"chair_s{LOWER}"} and drawn == {"best": -7, "worst": 7}
    fills = re.findall(r"fill: (#[0-9a-f]{6})", svg.read_text())
    blue, red = "#053061", "#67001f"  # the ends of the scale
    assert fills.index(blue) < fills.index(red) and "percentage points better" in drawn_text(svg)
    assert extreme_cells(rows, "best") == [row | {"tied": [[1.0, 0.0]], "of": 2} for row in rows[1:2]]


@pytest.mark.filterwarnings("error")  # a font that lacks a script is no news to a user
def test_a_cell_of_unknown_interval_is_hatched_and_long_names_leave_room(tmp_path):
    rows = [row | {"low": None, "high": None} for row in study_rows.sweep()]
    name = "\N{CJK UNIFIED IDEOGRAPH-65E5}, the start of a name of many words that would leave no room for a map, and its end"
    rows = [row | {"task": name} if row["task"] == "Count" else row for row in rows]
    _, svg, _ = figures.draw_oracle_map(rows, tmp_path / "unknown")
    hatched = [path for path in ElementTree.parse(svg).getroot().iter(f"{SVG}path") if "url(#" in path.get("style", "")]
    assert len(hatched) == 2 * 8  # all cells but the one without a change, in both maps
    (label,) = {text for text in drawn_text(svg) if "the start" in text}
    assert label.endswith("and its end") and len(label) == 56


def test_coefficients_below_0_have_their_own_colour(tmp_path):
    """Clipped at 0 they would look like 0."""
    rows = study_rows.sweep(((-2.0, 1.0), (0.0, 3.0)))
    _, svg, _ = figures.draw_oracle_map(rows, tmp_path / "negative")
    assert "\N{MINUS SIGN}2" in drawn_text(svg)


def test_points_are_points_however_few():
    row = lambda benchmark, metric, value=40.0: [{"benchmark": benchmark, "metric": metric, "value": value}]
    assert unit_of(row("mme", "perception")) == unit_of(row("ocrbench", "points: Text Recognition")) == "points"
    assert unit_of(row("other", "x", 101.0)) == unit_of([{"benchmark": "mme", "task": "count", "value": 1.0}]) == "points"
    percent = [("mme", "accuracy"), ("mme", "count: acc_plus"), ("ocrbench", "accuracy"), ("cv_bench", "official")]
    assert {unit_of(row(*place)) for place in percent} == {"percentage points"}
