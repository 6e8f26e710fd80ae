"""Conversion and export in processes of their own: kill and resume, two at once, without torch, on a full disk."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import all_tensors, assert_same_bytes, files_below
from hf_models import save_tiny, tiny_hf

from converters.convert import convert
from converters.export import export
from lsg_jax.checkpoint import verify_base
from lsg_jax.errors import BusyError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tiny_hf("clip", "llama"), tmp_path_factory.mktemp("tiny") / "hf")


KILL = """
import os, signal, sys
from pathlib import Path
from converters.convert import convert
calls = 0
def stop(done, total, what):
    global calls
    calls += 1
    if calls == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
convert(sys.argv[1], sys.argv[2], progress=stop)
"""


def run_until(source: Path, target: Path, block: int) -> int:
    command = [sys.executable, "-c", KILL, str(source), str(target), str(block)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode


def test_kill_and_rerun_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "whole")
    for block in (1, 70):
        assert run_until(source, tmp_path / "model", block) == -signal.SIGKILL
        assert not (tmp_path / "model").exists()
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "model.tmp/base").rglob("c/*/*") if path.is_file()}
    assert len(finished) > 10
    convert(source, tmp_path / "model")
    assert files_below(tmp_path / "model") == files_below(tmp_path / "whole")
    assert all(
        (tmp_path / "model" / p.relative_to(tmp_path / "model.tmp")).stat().st_mtime_ns == t for p, t in finished.items()
    )
    assert not (tmp_path / "model.tmp").exists()


def test_a_rerun_from_another_checkpoint_takes_nothing_over(source: Path, tmp_path: Path) -> None:
    assert run_until(source, tmp_path / "model", 70) == -signal.SIGKILL
    other = save_tiny(tiny_hf("clip", "llama", seed=1), tmp_path / "other")
    convert(other, tmp_path / "model")
    export(tmp_path / "model", tmp_path / "back")
    assert_same_bytes(all_tensors(tmp_path / "back"), all_tensors(other))


def test_two_conversions_into_one_folder(source: Path, tmp_path: Path) -> None:
    def second(done: int, total: int, what: str) -> None:
        with pytest.raises(BusyError, match="in use by pid"):
            convert(source, tmp_path / "model")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "model", progress=second)
    convert(source, tmp_path / "model")
    assert verify_base(tmp_path / "model") == []


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
from converters.convert import convert
convert(sys.argv[1], sys.argv[2])
"""


def test_torch_is_not_needed(source: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_TORCH, str(source), str(tmp_path / "model")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    convert(source, tmp_path / "other")
    assert files_below(tmp_path / "model") == files_below(tmp_path / "other")


FULL_DISK = """
import resource, sys
from converters.convert import convert
from converters.export import export
resource.setrlimit(resource.RLIMIT_FSIZE, (15000, 15000))
try:
    (convert if sys.argv[1] == "convert" else export)(sys.argv[2], sys.argv[3])
except Exception as error:
    print(type(error).__name__, error)
"""


def test_full_disk(source: Path, tmp_path: Path) -> None:
    """A conversion keeps its work, an export leaves nothing; both end with an error of one line."""
    convert(source, tmp_path / "whole")
    for verb, start, target in (("convert", source, "model"), ("export", tmp_path / "whole", "back")):
        command = [sys.executable, "-c", FULL_DISK, verb, str(start), str(tmp_path / target)]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert result.stdout.startswith("CheckpointError ") and result.stdout.count("\n") == 1, result
        assert not (tmp_path / target).exists()
    assert not (tmp_path / "back.tmp").exists()
    convert(source, tmp_path / "model")
    assert files_below(tmp_path / "model") == files_below(tmp_path / "whole")
