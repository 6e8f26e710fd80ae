"""Streams that are closed, full or without a reader, and characters that a terminal or a spreadsheet would obey."""

import io
import logging
import os
import subprocess
import sys

import pytest

from lsg_jax.cli import main, models, options
from lsg_jax.cli.printable import PrintableFormatter, printable
from lsg_jax.data.reports import Report
from lsg_jax.report.drawing import as_csv

GATES = "lsg_jax/embedded/gates.safetensors"
HOSTILE = "a\x1b[2Jb\r\x9bc\u202ed\u2066e\ttab\n"
SHOWN = "a\\x1b[2Jb\\r\\x9bc\\u202ed\\u2066e\ttab\n"

STREAMS = {
    # what the shell does with the streams -> exit code, lines on stderr
    ">&-": (0, 0),
    "<&-": (0, 0),
    "2>&-": (0, 0),
    ">&- 2>&- <&-": (0, 0),
    "| head -1 > /dev/null": (0, 0),
    "| true": (0, 0),
    "> /dev/full": (1, 1),
    "> /dev/full 2>&-": (1, 0),
    "> /dev/full 2> /dev/full": (1, 0),
}


RARE = (">&-", "<&-", "| head -1 > /dev/null", "> /dev/full 2>&-")


@pytest.mark.parametrize("streams", [pytest.param(each, marks=[pytest.mark.soak] * (each in RARE)) for each in STREAMS])
def test_a_closed_stream_is_no_error(streams):
    code, lines = STREAMS[streams]
    command = f"set -o pipefail; {sys.executable} -m lsg_jax inspect {GATES} --json {streams}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr.count("\n")) == (code, lines), done.stderr
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


def test_an_error_with_stderr_closed_keeps_its_code():
    command = f"{sys.executable} -m lsg_jax inspect nothing-there 2>&-"
    assert subprocess.run(["bash", "-c", command], capture_output=True, timeout=120).returncode == 65


def test_progress_without_a_reader_ends_nothing(monkeypatch):
    """As of `lsg train 2>&1 | tee log` whose tee was stopped: hours of training would be gone at the next line."""
    read, write = os.pipe()
    os.close(read)
    monkeypatch.setattr(options, "SECONDS_TO_FIRST_LINE", 0.0)
    with os.fdopen(write, "wb", buffering=0) as pipe:
        monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(pipe, write_through=True))
        with pytest.raises(BrokenPipeError):
            sys.stderr.write("x")
        with options.progress_bar("train") as progress:
            progress(1, 2, "loss 0.5")
        monkeypatch.undo()


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Answering:
    def generate(self, images, prompts, max_new_tokens):
        return [HOSTILE]


@pytest.mark.parametrize("stdout", [Terminal, io.StringIO])
def test_a_terminal_is_shown_what_it_would_obey(monkeypatch, tmp_path, stdout):
    monkeypatch.setattr(models, "load_model", lambda options: Answering())
    monkeypatch.setattr("lsg_jax.data.records.prepare_llava", lambda *args, **options: Report("x", notes={HOSTILE: 1}))
    shown = SHOWN if stdout is Terminal else HOSTILE
    for arguments in (["generate", "m", "--prompt", "q"], ["prepare", str(tmp_path / "x"), str(tmp_path / "out")]):
        monkeypatch.setattr(sys, "stdout", written := stdout())
        assert main(arguments) == 0
        assert shown in written.getvalue() and sys.stdout is written


def test_errors_and_logs_are_printable(capfd):
    assert main(["inspect", "x\x1b[31m\u202e"]) == 65
    err = capfd.readouterr().err
    assert "x\\x1b[31m\\u202e" in err and err.count("\n") == 1
    record = logging.LogRecord("x", logging.INFO, "", 0, "%s", (HOSTILE,), None)
    assert PrintableFormatter("%(message)s").format(record) == SHOWN
    assert printable("naïve 中文 \u200f א\n") == "naïve 中文 \u200f א\n"


def test_no_cell_is_a_formula():
    rows = [{"name": name, "n": -1.5} for name in ("=1+1", "+1", "-1", "@x", "\tx", "\rx", "fine", ["=a", "b"])]
    lines = as_csv(rows, ["name", "n"]).split("\n")
    assert lines[1:6] == ["'=1+1,-1.5", "'+1,-1.5", "'-1,-1.5", "'@x,-1.5", "'\tx,-1.5"] and "fine,-1.5" in lines
    assert "'=a b,-1.5" in lines
