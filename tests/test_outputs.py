"""An output that cannot be written, or belongs to something else, is refused before any work, in one line."""

import pytest

from lsg_jax.cli import main
from lsg_jax.files import check_only, check_output


@pytest.fixture
def refused(tmp_path, monkeypatch, capfd):
    """Runs a command in a folder with a file and a folder of pictures, and checks that it is refused and changes nothing."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/a.jpg").write_bytes(b"x")
    (tmp_path / "file").write_text("kept")
    (tmp_path / "run.toml").write_text('model = "none"\noutput = "run"\n[gate]\nlayers = [1]\n')

    def run(*arguments, says):
        before = sorted(tmp_path.rglob("*"))
        assert main([str(each) for each in arguments]) == 65
        error = capfd.readouterr().err
        assert says in error and error.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "file").read_text() == "kept"

    return run


@pytest.mark.parametrize(
    "command",
    [
        ("eval", "run.toml"),
        ("sweep", "run.toml"),
        ("stack", "run.toml", "--gates", "g"),
        ("ablate", "run.toml"),
        ("probe", "none", "--data", "scenes"),
        ("sinks", "none", "--images", "pictures/a.jpg"),
        ("quickstart",),
    ],
    ids=lambda command: command[0],
)
def test_a_file_where_a_folder_is_written(refused, command):
    refused(*command, "--out", "file", says="file: is a file, and a folder is written; choose another output")
    refused(*command, "--out", "file/below", says="file is a file; choose another output")


@pytest.mark.parametrize(
    "command",
    [("report", "pictures"), ("calibrate", "none", "--images", "pictures"), ("gates", "combine", "g")],
    ids=lambda command: command[-3 if len(command) == 3 else 0],
)
def test_a_folder_where_a_file_is_written(refused, command):
    refused(*command, "--out", "pictures", says="pictures: is a folder, and a file is written; choose another output")


def test_a_gate_file_replaces_nothing(refused):
    refused("gates", "export", "run", "file", says="file: exists; choose another output")
    refused("gates", "combine", "run", "--out", "file", says="file: exists; choose another output")
    refused(
        "gates", "combine", "run", "runs/4", says="runs/4: not a name of a gate file to write; give the gates, and then OUT"
    )
    refused("gates", "combine", "g.safetensors", says="g.safetensors: not a name of a gate file to write")
    refused("gates", "import", "g.pt", "file", says="file: exists; choose another output")


def test_a_folder_of_something_else_is_no_run_folder(refused, tmp_path):
    refused("quickstart", "--out", "pictures", says="pictures: holds a.jpg and is no quickstart folder; choose another output")
    refused("train", "run.toml", "--set", "output=", says="output is empty: it is the path of a folder")
    refused("train", "pictures", says="pictures: is a folder, and a file is read; give a file")
    known = frozenset({"eval"})
    for name in ("eval", ".hidden", "mine.toml", "mine.log"):
        (tmp_path / "new" / name).mkdir(parents=True)
    check_only(tmp_path / "new", known, "run folder")
    check_only(tmp_path / "none", known, "run folder")
    check_output(tmp_path / "a" / "b", folder=True)
