"""Machines that lack something: terminals in other encodings, other versions, no such device, no file locks."""

import importlib.metadata
import io
import os
import subprocess
import sys

import pytest

from lsg_jax.checkpoint import FolderLock
from lsg_jax.cli import main, models
from lsg_jax.data.reports import Report
from lsg_jax.errors import LsgError
from lsg_jax.installed import check_installed

ANSWER = "naïve café € 中文 🔴 \udc80"


class Answering:
    def generate(self, images, prompts, max_new_tokens):
        return [ANSWER]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
@pytest.mark.parametrize("command", ["generate", "prepare"])
def test_no_answer_is_lost_in_another_encoding(monkeypatch, tmp_path, encoding, command):
    monkeypatch.setattr(models, "load_model", lambda options: Answering())
    monkeypatch.setattr("lsg_jax.data.records.prepare_llava", lambda *args, **options: Report("x", notes={ANSWER: 1}))
    stdout = io.TextIOWrapper(written := io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stdout)
    arguments = {"generate": ["m", "--prompt", "q"], "prepare": [str(tmp_path / "x"), str(tmp_path / "out")]}
    assert main([command, *arguments[command]]) == 0
    text = written.getvalue().decode(encoding)
    assert ANSWER.encode(encoding, "backslashreplace").decode(encoding) in text
    kept = {"ascii": "na\\xefve caf\\xe9 \\u20ac", "cp1252": "naïve café € \\u4e2d", "utf-8": "中文 🔴 \\udc80"}
    assert kept[encoding] in text


def test_a_handler_that_the_user_chose_is_kept(monkeypatch):
    monkeypatch.setattr(models, "load_model", lambda options: Answering())
    stdout = io.TextIOWrapper(written := io.BytesIO(), encoding="ascii", errors="replace")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert main(["generate", "m", "--prompt", "q"]) == 0
    assert written.getvalue().startswith(b"na?ve caf? ? ?? ?")


def pretend(monkeypatch, package, number):
    true = importlib.metadata.version

    def version(name):
        if name == package and number is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return number if name == package else true(name)

    monkeypatch.setattr("lsg_jax.installed.version", version)


@pytest.mark.parametrize("command", ["generate", "convert"])
def test_another_transformers_is_named(monkeypatch, capfd, tiny_model, tiny_hf_folder, tmp_path, command):
    pretend(monkeypatch, "transformers", "4.57.1")
    arguments = {"generate": [tiny_model, "--prompt", "x"], "convert": [tiny_hf_folder, tmp_path / "out"]}
    assert main([command, *map(str, arguments[command])]) == 1
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1
    assert "transformers 4.57.1 is installed, but lsg_jax needs <6,>=5.23; run: pip install 'transformers<6,>=5.23'" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "number, fits", [("5.22.9", False), ("5.23.0", True), ("5.99.dev0", True), ("6.0", False), (None, False)]
)
def test_versions(monkeypatch, number, fits):
    pretend(monkeypatch, "transformers", number)
    if fits:
        check_installed("transformers")
        return
    with pytest.raises(LsgError, match=r"^transformers .*installed.*pip install 'transformers"):
        check_installed("transformers")


@pytest.mark.parametrize("platform", ["cuda", "nonsense"])
def test_a_device_that_is_not_there_is_named(tiny_model, platform):
    command = [sys.executable, "-m", "lsg_jax", "generate", str(tiny_model), "--prompt", "x"]
    done = subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": platform}, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert f"JAX cannot use JAX_PLATFORMS={platform}: " in line and line.count("JAX_PLATFORMS=cpu") == 1


def test_without_file_locks_the_system_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with pytest.raises(LsgError, match="out: cannot be locked: Windows has no fcntl; use Linux, macOS or WSL"):
        FolderLock(tmp_path / "out").acquire()
    assert not list(tmp_path.iterdir())
