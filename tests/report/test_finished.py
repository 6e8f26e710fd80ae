"""`lsg report`: one page of all that is found, safe against what it shows, and refusals."""

import html.parser
import json
import re

import pytest
import study_rows
from PIL import Image

from lsg_jax.cli import main

HOSTILE = 'evil "<script>alert(1)</script> & co'


class Page(html.parser.HTMLParser):
    """Texts by tag, ids, references inside the page, and whether every element is closed in order."""

    VOID = ("meta", "img", "link", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.references, self.texts = [], [], [], [], {}
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            self.references += [value[1:]] if name == "href" and value.startswith("#") else re.findall(r"url\(#(.*?)\)", value)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_run(folder, steps=6, total=6, **metrics):
    gate = {"layers": [1, 2], "grouping": "v_sink_rest"}
    write(folder / "run.json", {"format": "lsg-run-1", "config": {"gate": gate}, "model_name": HOSTILE, "total_steps": total})
    lines = [
        {"step": step, "loss": 2.0 / step, "ratios": [[0.25, 0.75], [0.5, 0.5]], **metrics} for step in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 7, "lo')


def write_sinks(folder):
    entry = {"grid": 2, "v_sinks": [0, 3], "l_sinks": [[], [1]], "warnings": ["every patch is flagged"]}
    study = {"format": "lsg-sinks-1", "counts": study_rows.counts(), "attention": study_rows.attention()}
    write(folder / "sinks.json", study | {"images": {f"photos/{HOSTILE[:5]}.jpg": entry}, "warnings": [HOSTILE]})
    Image.new("RGB", (8, 8)).save(folder / "evil .png")


@pytest.fixture
def work(tmp_path):
    """A folder with one of each kind of finished work."""
    folder = tmp_path / "work <i>"
    write_run(folder / "run")
    result = study_rows.result()
    result["benchmarks"][HOSTILE] = result["benchmarks"].pop("cv_bench")
    write(folder / "run" / "eval" / "result.json", result)
    write(folder / "run" / "checkpoints" / "run.json", {"format": "not to be looked at"})
    write_sinks(folder / "sinks")
    write(folder / "probe" / "probe.json", {"format": "lsg-probe-1", "rows": study_rows.probe(), "seed": 5})
    sweep = {"format": "lsg-sweep-1", "groups": ["v_sink", "rest"], "rows": study_rows.sweep()}
    write(folder / "sweep" / "sweep.json", sweep)
    write(folder / "stack" / "stack.json", {"format": "lsg-stack-1", **study_rows.stack()})
    variants = [{"variant": row["method"], **row} for row in study_rows.gains()]
    write(folder / "ablate" / "ablate.json", {"format": "lsg-ablate-1", "rows": variants})
    return folder


def test_a_page_of_all_studies(work, tmp_path, capsys):
    out = tmp_path / "new" / "report.html"
    assert main(["report", str(work), str(work / "sweep"), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out.resolve()}\n"
    text = out.read_text()
    page = Page(text)
    headings = [heading.split(":")[0] for heading in page.texts["h2"]]
    assert headings == ["Ablation", "Probes", "Training", "Evaluation", "Sinks", "Stack", "Oracle sweep"]  # each once
    assert page.tags.count("svg") == 9 and page.tags.count("img") == 1 and page.tags.count("details") == 9
    assert len(set(page.ids)) == len(page.ids) and set(page.references) <= set(page.ids)
    assert "http://" not in text and "https://" not in text and "script" not in page.tags and "i" not in page.tags
    assert HOSTILE in "".join(page.texts["p"]) and any(HOSTILE in cell for cell in page.texts["td"])
    cells = page.texts["td"]
    assert "53.00 [51.00, 55.00]" in cells and "+3.00 [+1.00, +5.00]" in cells and "4 / 1, 0.375" in cells
    assert ["2", "0.50", "0.50"] in [cells[i : i + 3] for i in range(len(cells))]  # the ratios of layer 2
    assert any("7 questions of 10" in note for note in page.texts["p"])
    assert any("every patch is flagged" in note for note in page.texts["p"])
    assert '"seed": 5' in "".join(page.texts["pre"])


def test_work_that_is_not_whole(tmp_path):
    write_run(tmp_path / "begun", steps=0)
    write_run(tmp_path / "lora", steps=2, total=9, ratios=None)
    lines = [json.dumps({"step": step, "loss": [2.0, None]}) for step in (1, 2)]
    (tmp_path / "lora" / "metrics.jsonl").write_text("\n".join(lines))
    base = study_rows.result()
    base["benchmarks"]["cv_bench"] |= {"change": {}, "paired_test": {}, "unread": {"base": 0}}
    del base["benchmarks"]["cv_bench"]["methods"]["lsg"], base["ratios"]
    write(tmp_path / "eval" / "result.json", base)
    write(tmp_path / "sinks" / "sinks.json", {"format": "lsg-sinks-1", "counts": [], "attention": [], "images": {}})
    for study in ("probe", "sweep", "stack", "ablate"):
        write(tmp_path / study / f"{study}.json", {"format": f"lsg-{study}-1", "rows": []})
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "report.html")]) == 0
    page = Page((tmp_path / "report.html").read_text())
    assert len(page.texts["h2"]) == 8 and page.tags.count("svg") == 1
    assert sum("has not finished" in note for note in page.texts["p"]) == 2


def test_what_is_not_of_lsg_is_refused(work, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "old" / "result.json", {"format": "lsg-eval-2"})
    write(tmp_path / "list" / "probe.json", [1])
    write(tmp_path / "broken" / "result.json", {"format": "lsg-eval-3"})
    write(tmp_path / "rows" / "probe.json", {"format": "lsg-probe-1", "rows": [{"attribute": "count"}]})
    out = tmp_path / "report.html"
    out.write_text("kept")
    for path, message in (
        (tmp_path / "nowhere", "no such folder"),
        (work / "run" / "run.json", "a file; give a folder"),
        (tmp_path / "empty", "expected a folder with sinks.json, probe.json, sweep.json, run.json, result.json"),
        (tmp_path / "old", "format lsg-eval-2, but this version of lsg reads lsg-eval-3"),
        (tmp_path / "list", "format None"),
        (tmp_path / "broken", "not as lsg writes it (KeyError: 'benchmarks')"),
        (tmp_path / "rows", "row 0 of lsg probe lacks metric"),
    ):
        assert main(["report", str(path), "--out", str(out)]) == 65
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    assert out.read_text() == "kept"
