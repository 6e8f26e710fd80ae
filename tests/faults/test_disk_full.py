"""A disk that is full at any write: one line, code 1 or 65, and nothing half-written. A size limit of files stands for it."""

import contextlib
import resource

import pytest

from lsg_jax.cli import main
from lsg_jax.eval.answering import Answer
from lsg_jax.eval.answers import AnswerLog
from lsg_jax.eval.benchmark import Item
from lsg_jax.files import write_atomic
from lsg_jax.train.metrics import JsonLines

GATES = "lsg_jax/embedded/gates.safetensors"


@contextlib.contextmanager
def largest_file(size):
    """No file of this process grows beyond `size` bytes inside the block; Python ignores the signal that tells so."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 100, 2000, 20_000])
@pytest.mark.parametrize("command", ["convert", "export", "prepare", "gates combine", "gates import"])
def test_commands_that_write(command, size, tiny_model, tiny_hf_folder, scenes, tmp_path, capfd):
    out = tmp_path / "out"
    arguments = {
        "convert": ["convert", tiny_hf_folder, out],
        "export": ["export", tiny_model, out],
        "prepare": ["prepare", scenes / "llava.jsonl", out],
        "gates combine": ["gates", "combine", GATES, "--out", out],
        "gates import": ["gates", "import", GATES, out],
    }[command]
    capfd.readouterr()
    with capfd.disabled(), pytest.MonkeyPatch.context() as patch:
        import io

        error = io.StringIO()
        patch.setattr("sys.stderr", error)
        patch.setattr("sys.stdout", io.StringIO())
        with largest_file(size):
            code = main(list(map(str, arguments)))
    text = error.getvalue()
    if code == 0:  # its files are smaller than that
        assert out.exists() and size >= 2000
        return
    assert code in (1, 65) and "fault of lsg" not in text and "Traceback" not in text, text
    assert [line for line in text.splitlines() if line.startswith("lsg ")] == text.splitlines()[-1:], text
    assert len(text.splitlines()) <= 2 and not out.exists(), text


def test_earlier_content_stays(tmp_path):
    path = tmp_path / "a.json"
    write_atomic(path, b"before")
    for size in (0, 1, 5):
        with largest_file(size), pytest.raises(OSError, match="File too large"):
            write_atomic(path, b"after this")
        assert path.read_bytes() == b"before" and [each.name for each in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("kind", ["file", "answers", "metrics"])
def test_the_error_names_the_file(kind, tmp_path):
    answers = AnswerLog(tmp_path, "mine.base", {}, [Item("1", "?", ("yes",))], ["?"])
    metrics = JsonLines(tmp_path / "metrics.jsonl", after=0)
    path, write = {
        "file": (tmp_path / "a.json", lambda: write_atomic(tmp_path / "a.json", b"{}")),
        "answers": (answers.path, lambda: answers.add({0: Answer("yes")})),
        "metrics": (metrics.path, lambda: metrics.write({"step": 1})),
    }[kind]
    with largest_file(0), pytest.raises(OSError) as error:
        write()
    assert error.value.filename == str(path)
    metrics.close()
