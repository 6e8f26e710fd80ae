"""The notebook runs from start to end at small sizes, on the embedded model; what is committed shows its outputs."""

import json
import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "look.ipynb"
SMALL = {
    "PLANTED": "(1,)",
    "LAYERS, KEY_SCALE, LEARNING_RATE": "(1,), 1.0, 3e-3",
    "BATCH, LENGTH, SIDE": "16, 160, 112",
    "SCENES, QUESTIONS": "16, 16",
}


def test_it_runs(tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    (settings,) = (cell for cell in notebook.cells if cell.cell_type == "code" and "SCENES, QUESTIONS = " in cell.source)
    for name, value in SMALL.items():
        settings.source, count = re.subn(rf"^{name} = .*", f"{name} = {value}", settings.source, flags=re.MULTILINE)
        assert count == 1, name
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "lsg-notebook" / "run" / "run.json").exists()
    result = json.loads((tmp_path / "lsg-notebook" / "eval" / "result.json").read_text(encoding="utf-8"))
    assert result["benchmarks"]["scenes"]["methods"].keys() == {"base", "lsg"}


def test_what_is_committed_was_run_and_is_small():
    assert NOTEBOOK.stat().st_size < 300_000
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    shown = [kind for cell in cells for output in cell.outputs for kind in output.get("data", {})]
    assert shown.count("image/png") == 2 and "text/html" in shown
    assert not re.search(r"/(home|root|tmp|work)/", NOTEBOOK.read_text(encoding="utf-8"))
