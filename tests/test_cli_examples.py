"""Every help ends with two examples. All parse, and those that take seconds run where `lsg quickstart` was run."""

import json
import shlex

import pytest

import lsg_jax.quickstart as quickstart
from lsg_jax.cli import main, parser
from lsg_jax.cli.completion import parsers_of

SMALL = {"TRAIN_SCENES": 32, "TEST_QUESTIONS": 8, "ORACLE_QUESTIONS": 4, "SHOWN_SCENES": 1, "PLANTED_SCENES": 8}


def helps():
    """Command, its help, for the program and every command and action."""
    for one in parsers_of(parser()):
        yield one.prog, one.format_help()


def examples(text):
    """The command lines at the end of a help."""
    head, _, tail = text.rpartition("examples (")
    assert head, text
    return [line.strip() for line in tail.splitlines()[1:]]


EXAMPLES = list(dict.fromkeys(line for _, text in helps() for line in examples(text)))
SLOW = {"quickstart", "train", "eval", "probe", "sweep", "stack", "ablate", "plan", "explore", "serve", "pointing", "plant"}
"""Commands that compile a lot, or that serve: run by the tutorial in `.ci/run`, and by their own tests."""
ONCE = {"generate", "look", "sinks", "calibrate", "report"}
"""Commands of which one example is enough here."""
ELSEWHERE = ("llava15_7b", "runs/", "Cambrian7M", ".pt ", "lsg_public", "owner/")
"""What only other examples or other people's files provide."""
QUICK = [line for line in EXAMPLES if line.split()[1] not in SLOW and not any(name in line for name in ELSEWHERE)]


@pytest.mark.parametrize(("command", "text"), list(helps()))
def test_every_help_ends_with_two_examples_that_parse(command, text, capsys):
    lines = examples(text)
    assert len(set(lines)) == 2
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "lsg" and line.split()[: len(command.split())] == command.split()
        parser().parse_args(arguments)
    with pytest.raises(SystemExit):
        parser().parse_args([*arguments, "--no-such-option"])


def test_every_argument_says_what_it_is():
    silent = [(one.prog, action.dest) for one in parsers_of(parser()) for action in one._actions if not action.help]
    assert not silent
    hidden = [
        (one.prog, action.dest) for one in parsers_of(parser()) for action in one._actions if action.help == "==SUPPRESS=="
    ]
    assert hidden == [("lsg gates combine", "out")]  # as earlier versions had it


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a small quickstart was run."""
    where = tmp_path_factory.mktemp("examples")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(where)
        for name, number in SMALL.items():
            patch.setattr(quickstart, name, number)
        assert main(["quickstart"]) == 0
    return where


def test_quickstart_tells_the_whole_story_and_can_be_run_again(folder, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    for name, number in SMALL.items():
        monkeypatch.setattr(quickstart, name, number)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.zarr")}
    assert main(["quickstart"]) == 0
    out, err = capfd.readouterr()
    report = (folder / "lsg-quickstart" / "report.html").resolve()
    assert "8/8" in err and "accuracy" in out and out.endswith(f"\n{report}\n")
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*.zarr")}
    page = report.read_text()
    assert all(title in page for title in ("Evaluation", "Sinks", "Oracle sweep", "Training"))
    assert "<img" in page and "http://" not in page and "https://" not in page


def test_quick_examples_run(folder, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    assert len(QUICK) > 12
    # an export before the conversion that reads it
    done = set()
    for line in sorted(QUICK, key=lambda line: line.split()[1] == "convert"):
        name = line.split()[1]
        if name in ONCE & done:
            continue
        done.add(name)
        code = main(shlex.split(line)[1:])
        out, err = capfd.readouterr()
        assert code == 0 and out, (line, err)
        if "--json" in line:
            json.loads(out)
