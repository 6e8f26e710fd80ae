"""The lock of a run folder: one run at a time writes."""

import json
import logging
import os
import subprocess
import sys

import pytest

from lsg_jax.checkpoint import FolderLock, RunFolder
from lsg_jax.errors import BusyError

HOLD = """
import sys
from lsg_jax.checkpoint import FolderLock
with FolderLock(sys.argv[1]):
    print("locked", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, stdin=subprocess.PIPE)
    assert child.stdout.readline() == b"locked\n"
    yield child
    child.kill()
    child.wait()
    child.stdout.close()
    child.stdin.close()


def test_two_processes_one_folder(tmp_path, holder, caplog):
    busy = rf"in use by pid {holder.pid} on .* since 20.*; wait or choose another output"
    with pytest.raises(BusyError, match=busy), RunFolder(tmp_path).lock():
        pytest.fail("locked")
    holder.stdin.write(b"\n")
    holder.stdin.flush()
    holder.wait()
    with RunFolder(tmp_path).lock():
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    assert "taking over" not in caplog.text


def test_lock_of_a_killed_process_is_taken_over(tmp_path, holder, caplog):
    holder.kill()
    holder.wait()
    with caplog.at_level(logging.WARNING), FolderLock(tmp_path):
        assert f"taking over the lock of pid {holder.pid}" in caplog.text


def test_lock_of_another_machine(tmp_path, caplog):
    (tmp_path / "lock").write_text(json.dumps({"pid": 1, "host": "elsewhere", "started": "2026-01-01"}))
    with pytest.raises(BusyError, match="another machine"), FolderLock(tmp_path):
        pytest.fail("locked")
    with FolderLock(tmp_path, take_over=True):
        assert "pid 1 on elsewhere" in caplog.text


def test_lock_is_exclusive_within_a_process_and_after_deletion(tmp_path):
    lock = FolderLock(tmp_path)
    with lock:
        for other in (lock, FolderLock(tmp_path)):
            with pytest.raises(BusyError):
                other.acquire()
    with lock:
        assert lock.held
    assert not lock.held and (tmp_path / "lock").read_text() == ""
