"""A clock that is set forward or back in the middle of a save does not end a run."""

import time

import numpy as np
import pytest

from lsg_jax.checkpoint import RunFolder

JUMPS = (-1e9, 1e9)
CALLS = (1, 5, 13, 21)
"""After how many readings of the clock it jumps; a save reads it some 30 times."""


def saved_while_the_clock_jumps(folder, jump, after, monkeypatch):
    """Saves a step while `time.time` jumps by `jump` seconds after `after` calls; returns how often it was asked."""
    true, calls = time.time, 0

    def jumping():
        nonlocal calls
        calls += 1
        return true() + jump * (calls > after)

    run, state = RunFolder(folder), {"trained": {"a": np.arange(6.0, dtype=np.float32)}, "step": np.int32(1)}
    with run.lock():
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", jumping)
            run.save(1, state)
        run.save(2, state)
        restored = run.latest(state)
    assert restored.step == 2 and run.verify() == []
    np.testing.assert_array_equal(restored.state["trained"]["a"], state["trained"]["a"])
    return calls


@pytest.mark.parametrize("jump", JUMPS)
def test_a_clock_that_jumps_during_a_save(jump, tmp_path, monkeypatch):
    for after in CALLS:
        saved_while_the_clock_jumps(tmp_path / str(after), jump, after, monkeypatch)


@pytest.mark.soak
@pytest.mark.parametrize("jump", JUMPS)
def test_a_clock_that_jumps_during_a_save_long(jump, tmp_path, monkeypatch):
    after, asked = 0, 1
    while after < asked:
        asked = saved_while_the_clock_jumps(tmp_path / str(after), jump, after, monkeypatch)
        after += 1
    print(f"\njumps of {jump:g} s at each of {asked} readings of the clock")
