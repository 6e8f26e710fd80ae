"""`lsg report`: one page of all results found, safe against hostile content, and refusals."""

import json

import pytest
import study_rows
from pages import HOSTILE, check_structure, write, write_run, write_work
from PIL import Image

from lsg_jax.cli import main
from lsg_jax.eval.benchmark import LOWER
from lsg_jax.report.page import _found
from lsg_jax.report.sections import sweep_section


@pytest.fixture
def work(tmp_path):
    """A folder with one result of each kind."""
    return write_work(tmp_path / "work <i>")


def test_a_page_of_all_studies(work, tmp_path, capsys):
    out = tmp_path / "new" / "report.html"
    assert main(["report", str(work), str(work / "sweep"), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out.resolve()}\n"
    page = check_structure(out.read_text())
    results = ["Scores", "Ablation: ablate", "Probes: probe", "Evaluation: run/eval", "Stack: stack", "Oracle sweep: sweep"]
    titles = ["Sinks: sinks", *results, "Training: run", "Settings", "Glossary"]
    assert page.texts["h2"] == ["What was found", *titles]  # each once, sinks first
    assert [text for text in page.texts["a"] if text in titles] == titles  # the contents
    assert page.tags.count("svg") == 9 and page.tags.count("i") == 0
    # the marked images, two maps of one of them in two pictures each, the scenes, the own questions with an image
    assert page.tags.count("img") == 2 + 2 * 2 + 8 + 5
    marked = [image["alt"] for image in page.all("img") if "V-sink" in image["alt"]]
    placed = "2 V-sinks, 1 L-sink at row 1 column 1, row 2 column 2, of 2 rows and columns"
    assert marked == [f"evil .jpg: {placed}", f"x.jpg: {placed}"]
    found = " ".join(page.texts["p"][:6])
    assert "In layer 1, where sinks draw most of the answers' attention, they get 88 % of what falls on the image" in found
    assert HOSTILE in "".join(page.texts["p"])
    cells = [text.strip() for text in page.texts["td"]]
    assert "53.00 [51.00, 55.00]" in cells and "+3.00 [+1.00, +5.00]" in cells and "4 / 1, 0.375" in cells
    assert ["0.50", "0.50"] in [cells[i : i + 2] for i in range(len(cells))]  # the ratios of layer 2
    assert "0.20 ± 0.05" in cells and "layer 2" in page.texts["th"]  # those by task
    assert any("8 questions of 8" in note for note in page.texts["p"])
    assert any("every patch is flagged" in note for note in page.texts["p"])
    assert '"seed": 5' in "".join(page.texts["pre"])


def test_incomplete_results(tmp_path):
    write_run(tmp_path / "begun", steps=0)
    write_run(tmp_path / "lora", steps=2, total=9, ratios=None)
    lines = [json.dumps({"step": step, "loss": [2.0, None]}) for step in (1, 2)]
    (tmp_path / "lora" / "metrics.jsonl").write_text("\n".join(lines))
    base = study_rows.result()
    base["benchmarks"]["cv_bench"] |= {"change": {}, "paired_test": {}, "unread": {"base": 0}}
    del base["benchmarks"]["cv_bench"]["methods"]["lsg"], base["methods"]["lsg"], base["ratios"]
    write(tmp_path / "eval" / "result.json", base)
    write(tmp_path / "moved" / "result.json", study_rows.result() | {"ratios": []})  # without its answers
    entry = {"grid": 2, "v_sinks": None, "l_sinks": None, "warnings": []}
    boxes = {"boxes": [[0, -0.5, 1, 0], [0, 0, 1, 1]], "v_sinks": [0, 1]}  # the first is in the padding
    images = {"a.jpg": entry, "b.jpg": entry, "c.jpg": entry | {"v_sinks": [1]}, "d.jpg": entry | boxes}
    sinks = {"format": "lsg-sinks-1", "counts": [], "attention": [], "images": images}  # of an older version
    write(tmp_path / "sinks" / "sinks.json", sinks)
    (tmp_path / "sinks" / "a.png").write_bytes(b"no image")
    for name in "bcd":
        Image.new("RGB", (8, 8)).save(tmp_path / "sinks" / f"{name}.png")
    for study in ("probe", "sweep", "stack", "ablate"):
        write(tmp_path / study / f"{study}.json", {"format": f"lsg-{study}-1", "rows": []})
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "report.html")]) == 0
    page = check_structure((tmp_path / "report.html").read_text())
    assert len(page.texts["h2"]) == 1 + 9 + len(["Scores", "Settings", "Glossary"]) and page.tags.count("svg") == 2
    assert [image["alt"] for image in page.all("img")] == [
        "b.jpg: V-sinks unknown",
        "c.jpg: 1 V-sink at row 1 column 2, of 2 rows and columns",
        "d.jpg: 2 V-sinks (1 in the padding) at row 1 column 1, row 2 column 1, of 2 rows and 1 columns",
    ]
    assert sum("has not finished" in note for note in page.texts["p"]) == 2
    assert "cv_bench: the answers cannot be shown, since cv_bench.base.jsonl, cv_bench.lsg.jsonl" in "".join(page.texts["p"])


def test_files_that_lsg_did_not_write_are_refused(work, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "old" / "result.json", {"format": "lsg-eval-2"})
    write(tmp_path / "list" / "probe.json", [1])
    write(tmp_path / "broken" / "result.json", {"format": "lsg-eval-3", "methods": {}})
    write(tmp_path / "rows" / "probe.json", {"format": "lsg-probe-1", "rows": [{"attribute": "count"}]})
    write(tmp_path / "answers" / "result.json", json.loads((work / "run" / "eval" / "result.json").read_text()))
    for file in (work / "run" / "eval").glob("*.jsonl"):
        lines = file.read_text().splitlines()
        (tmp_path / "answers" / file.name).write_text("\n".join(lines[1:] if "lsg" in file.name else lines))
    out = tmp_path / "report.html"
    out.write_text("kept")
    for path, message in (
        (tmp_path / "nowhere", "no such folder"),
        (work / "run" / "run.json", "a file; give a folder"),
        (tmp_path / "empty", "expected a folder with sinks.json, probe.json, sweep.json, run.json, result.json"),
        (tmp_path / "old", "format lsg-eval-2, but this version of lsg reads lsg-eval-3"),
        (tmp_path / "list", "expected a JSON object, got an array"),
        (tmp_path / "broken", "not as lsg writes it (KeyError: 'benchmarks')"),
        (tmp_path / "rows", "row 0 of lsg probe lacks metric"),
        (tmp_path / "answers", "ValueError: scenes: the methods were asked different questions"),
    ):
        assert main(["report", str(path), "--out", str(out)]) == 65
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    assert out.read_text() == "kept"


def test_a_sweep_counts_a_clear_fall_as_an_improvement_where_lower_is_better():
    task = f"chair_s{LOWER}"
    cell = {"benchmark": "chair", "task": task, "value": 30.0, "questions": 9}
    changes = {0: (-6.0, -9.0, -3.0), 1: (6.0, 3.0, 9.0), 2: (-1.0, -2.0, 0.5)}  # better, worse, unclear
    rows = [
        {**cell, "layer": layer, "coefficients": [0.0, 1.0], "change": change, "low": low, "high": high}
        for layer, (change, low, high) in changes.items()
    ]
    section = sweep_section({"rows": rows, "groups": ["v_sink", "rest"]}, title="Sweep")
    assert section.found == [
        f"Fixed coefficients clearly improve a task at a layer in 1 of 3 cases, most chair, {task}, at layer 0: "
        "\u22126.00 [\u22129.00, \u22123.00], an upper bound."
    ]


def test_of_several_sweeps_each_finding_says_whose_it_is():
    rows = [row | {"low": -1.0, "high": 1.0} for row in study_rows.sweep()]
    sweeps = [sweep_section({"rows": rows}, title=f"Oracle sweep: {name}") for name in ("a", "b")]
    nothing = "No fixed coefficients clearly improve any task at any layer."
    assert _found(sweeps) == [f"Oracle sweep: {name}: {nothing}" for name in ("a", "b")]
    assert _found(sweeps[:1]) == [nothing]
