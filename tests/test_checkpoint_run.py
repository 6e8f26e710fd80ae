"""The run folder: saved steps come back to the bit or not at all."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lsg_jax.checkpoint import RunFolder, StepMeta, read_step, steps
from lsg_jax.errors import CheckpointError, InputError, NonFiniteError
from lsg_jax.types import TrainState


def make_state(seed: int) -> TrainState:
    """Gates, an AdamW state with moments of some value, and counters."""
    rng = np.random.default_rng(seed)
    gates = {str(i): {"kernel": jnp.asarray(rng.normal(size=(40, 30)), jnp.float32)} for i in range(2)}
    gates["0"]["bias"] = jnp.asarray(rng.normal(size=30), jnp.bfloat16)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    opt_state = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 9, x.dtype), optimizer.init(gates))
    return TrainState(trained=gates, opt_state=opt_state, step=jnp.int32(seed), skipped=jnp.int32(0))


def abstract(state):
    return jax.eval_shape(lambda: state)


def same(got, want) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert isinstance(a, jax.Array) and a.dtype == b.dtype and a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def saved_run(folder: Path, last: int = 3) -> RunFolder:
    run = RunFolder(folder)
    with run.lock():
        for step in range(1, last + 1):
            run.save(step, make_state(step), meta=StepMeta({"position": step}))
    return run


def run_python(code: str, *arguments: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parent), **environment}
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=env, timeout=120)
    assert not check or result.returncode == 0, result.stderr
    return result


def test_round_trip(tmp_path):
    run = saved_run(tmp_path / "run")
    restored = run.latest(abstract(make_state(0)))
    assert restored.step == 3 and restored.meta == StepMeta({"position": 3})
    assert isinstance(restored.state, TrainState)
    same(restored.state, make_state(3))
    assert run.verify() == [] and run.steps() == [1, 2, 3]


def test_a_path_with_dots_is_the_same_folder(tmp_path):
    (tmp_path / "beside").mkdir()
    run = saved_run(tmp_path / "beside" / ".." / "run", 1)
    same(run.latest(abstract(make_state(0))).state, make_state(1))
    assert run.verify() == RunFolder(tmp_path / "run").verify() == []


def test_orbax_itself_reads_a_step(tmp_path):
    from orbax.checkpoint import v1 as ocp

    run = saved_run(tmp_path, 1)
    tree = ocp.load(run.checkpoints / "1")
    np.testing.assert_array_equal(tree["gates"]["1"]["kernel"], make_state(1).trained["1"]["kernel"])


def test_what_is_trained_is_stored_under_the_name_that_version_0_1_reads(tmp_path):
    state = {"trained": {"up_a": jnp.ones(2)}, "opt_state": [{"mu": {"trained": {"up_a": jnp.zeros(2)}}}]}
    run = RunFolder(tmp_path)
    with run.lock():
        run.save(1, state)
        with pytest.raises(CheckpointError, match="one name on disk"):
            run.save(2, {"trained": {"a": jnp.ones(2)}, "gates": {"a": jnp.ones(2)}})
    assert set(steps.read_record(run.checkpoints, 1).leaves) == {"gates/up_a", "opt_state/0/mu/gates/up_a"}
    same(run.latest(abstract(state)).state, state)
    assert read_step(tmp_path)[1].keys() == {"trained", "opt_state"}


def test_nothing_saved_is_none(tmp_path):
    assert RunFolder(tmp_path / "run").latest({"a": jnp.ones(2)}) is None
    assert RunFolder(tmp_path / "run").steps() == []


def test_random_keys_and_containers(tmp_path):
    state = {
        "key": jax.random.key(7),
        "keys": jax.random.split(jax.random.key(1, impl="rbg"), 3),
        "old": jax.random.PRNGKey(3),
        "list": [np.arange(3, dtype=np.int32), (np.float32(2.0), jnp.asarray([True, False]))],
    }
    run = RunFolder(tmp_path)
    with run.lock():
        run.save(0, state)
    restored = run.latest(abstract(state)).state
    assert jax.random.key_impl(restored["keys"]) == jax.random.key_impl(state["keys"])
    for name in ("key", "keys"):
        assert restored[name].dtype == state[name].dtype
        np.testing.assert_array_equal(jax.random.key_data(restored[name]), jax.random.key_data(state[name]))
    np.testing.assert_array_equal(restored["list"][0], [0, 1, 2])
    assert restored["list"][1][1].dtype == bool
    with pytest.raises(CheckpointError, match="key has dtype key<fry>"):
        run.latest({**state, "key": jax.random.key(7, impl="rbg")})


def test_read_step_needs_no_tree_and_changes_nothing(tmp_path):
    run = saved_run(tmp_path)
    step, tree, meta = read_step(tmp_path)
    assert step == 3 and meta.data["position"] == 3
    np.testing.assert_array_equal(tree["trained"]["0"]["bias"], make_state(3).trained["0"]["bias"])
    assert tree["trained"]["0"]["bias"].dtype == jnp.bfloat16
    assert read_step(tmp_path, 1)[0] == 1
    with pytest.raises(InputError, match="no step 9; there are 1, 2, 3"):
        read_step(tmp_path, 9)
    with pytest.raises(InputError, match="no run folder"):
        read_step(tmp_path / "nothing")
    shutil.rmtree(run.checkpoints / "3" / "state")
    assert read_step(tmp_path)[0] == 2
    assert run.steps() == [1, 2, 3]  # a reader without the lock moves nothing
    with pytest.raises(CheckpointError, match="lsg verify"):
        read_step(tmp_path, 3)


def test_keeps_the_newest(tmp_path):
    run = RunFolder(tmp_path, keep=2)
    with run.lock():
        for step in (1, 5, 7):
            run.save(step, make_state(step))
    assert run.steps() == [5, 7] and sorted(os.listdir(run.checkpoints)) == ["5", "7"]


def test_a_step_at_or_below_the_latest_is_refused(tmp_path):
    run = saved_run(tmp_path)
    with run.lock():
        for step in (3, 2, -1):
            with pytest.raises(CheckpointError, match="was not saved"):
                run.save(step, make_state(0))
    assert run.steps() == [1, 2, 3]
    same(run.latest(abstract(make_state(0))).state, make_state(3))


def test_save_needs_the_lock(tmp_path):
    with pytest.raises(RuntimeError, match="lock"):
        RunFolder(tmp_path).save(1, make_state(1))


def test_state_that_cannot_be_stored(tmp_path):
    run = saved_run(tmp_path, 1)
    bad = make_state(2)
    bad.trained["1"]["kernel"] = bad.trained["1"]["kernel"].at[2, 2].set(jnp.nan)
    cases = [
        (bad, StepMeta(), NonFiniteError, "gates/1/kernel"),
        ({"a": jnp.asarray([jnp.inf], jnp.bfloat16)}, StepMeta(), NonFiniteError, "leaf a"),
        ({"a": 3}, StepMeta(), CheckpointError, "leaf a is a int"),
        ({"a": np.zeros(2)}, StepMeta(), CheckpointError, "float64"),
        ({"a": jnp.zeros((0, 2))}, StepMeta(), CheckpointError, "leaf a"),
        ({"a.b": jnp.ones(2)}, StepMeta(), CheckpointError, "a.b"),
        ({"a/b": jnp.ones(2)}, StepMeta(), CheckpointError, "a/b"),
        ({}, StepMeta(), CheckpointError, "no leaves"),
        (make_state(2), StepMeta({"loss": float("nan")}), CheckpointError, "meta is no JSON"),
        (make_state(2), StepMeta({"loss": jnp.ones(1)}), CheckpointError, "meta is no JSON"),
    ]
    with run.lock():
        for state, meta, kind, text in cases:
            with pytest.raises(kind, match=text):
                run.save(2, state, meta=meta)
    assert run.steps() == [1] and run.verify() == [] and os.listdir(run.checkpoints) == ["1"]


def test_a_tree_that_does_not_fit_is_never_cast(tmp_path):
    run = saved_run(tmp_path)
    state = make_state(0)
    wrong = abstract(state.replace(step=jnp.float32(0)))
    wrong.trained["1"]["kernel"] = jax.ShapeDtypeStruct((40, 5), np.float32)
    wrong.trained["2"] = wrong.trained.pop("0")
    with run.lock(), pytest.raises(CheckpointError) as error:
        run.latest(wrong)
    for part in ("step has dtype int32, expected float32", "gates/1/kernel has shape (40, 30), expected (40, 5)", "gates/2"):
        assert part in str(error.value)
    assert run.steps() == [1, 2, 3] and not run.quarantine.exists()


@pytest.mark.parametrize("damage", ["truncate", "delete", "flip"])
def test_damage_to_any_file_of_a_step(tmp_path, damage, caplog):
    """Either nothing reads the file and the step is restored to the bit, or it is quarantined and the step before is used."""
    saved_run(tmp_path / "good", 2)
    newest = tmp_path / "good" / "checkpoints" / "2"
    paths = sorted(p.relative_to(tmp_path / "good") for p in newest.rglob("*") if p.is_file())
    assert len(paths) > 6
    fell_back = 0
    for path in paths:
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        shutil.copytree(tmp_path / "good", tmp_path / "bad")
        hurt(tmp_path / "bad" / path, damage)
        run = RunFolder(tmp_path / "bad")
        caplog.clear()
        with run.lock():
            restored = run.latest(abstract(make_state(0)))
        same(restored.state, make_state(restored.step))
        assert restored.meta == StepMeta({"position": restored.step})
        if restored.step == 1:
            fell_back += 1
            assert run.steps() == [1] and os.listdir(run.quarantine) == ["2"]
            assert "step 2 is damaged" in caplog.text
            with run.lock():
                run.save(2, make_state(20))  # the number is free again
            same(run.latest(abstract(make_state(0))).state, make_state(20))
    # Metadata, index and data; Orbax also leaves markers and copies that nothing reads.
    assert fell_back >= 3


def hurt(path: Path, damage: str) -> None:
    data = bytearray(path.read_bytes())
    if damage == "delete":
        path.unlink()
    elif damage == "truncate":
        path.write_bytes(data[: len(data) // 2])
    elif data:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)


def test_flipped_bytes_never_give_other_values(tmp_path):
    """Many flips over the data and the metadata of one step."""
    run = saved_run(tmp_path, 2)
    rng = random.Random(0)
    paths = [p for p in (run.checkpoints / "2").rglob("*") if p.is_file() and p.stat().st_size]
    want = {step: make_state(step) for step in (1, 2)}
    for _ in range(40):
        path = rng.choice(paths)
        good = path.read_bytes()
        data = bytearray(good)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        restored = run.latest(abstract(want[1]))
        same(restored.state, want[restored.step])
        assert restored.meta == StepMeta({"position": restored.step})
        path.write_bytes(good)


def test_all_steps_damaged_is_an_error_each_time(tmp_path):
    run = saved_run(tmp_path, 2)
    for step in (1, 2):
        (run.checkpoints / str(step) / "_CHECKPOINT_METADATA").unlink()
    for _ in range(2):
        with run.lock(), pytest.raises(CheckpointError, match="every step is damaged"):
            run.latest(abstract(make_state(0)))
    assert len(run.verify()) == 2
    with pytest.raises(CheckpointError, match="every step is damaged"):
        read_step(tmp_path)


def test_a_renamed_step_is_damaged(tmp_path):
    run = saved_run(tmp_path, 1)
    shutil.copytree(run.checkpoints / "1", run.checkpoints / "9")
    assert run.latest(abstract(make_state(0))).step == 1
    assert [p.where for p in run.verify()] == ["step 9"]


def test_quarantine_keeps_every_damaged_step(tmp_path):
    run = saved_run(tmp_path, 1)
    for _ in range(2):
        with run.lock():
            run.save(2, make_state(2))
            (run.checkpoints / "2" / "state" / "manifest.ocdbt").unlink()
            assert run.latest(abstract(make_state(0))).step == 1
    assert sorted(os.listdir(run.quarantine)) == ["2", "2-2"]


def test_kill_during_save(tmp_path):
    code = """
import sys
from test_checkpoint_run import make_state, RunFolder, StepMeta
run = RunFolder(sys.argv[1])
with run.lock():
    start = run.steps()[-1]
    for step in range(start + 1, 1000):
        run.save(step, make_state(step), meta=StepMeta({"position": step}))
        print("saved", flush=True)
"""
    run = saved_run(tmp_path / "run", 1)
    rng = random.Random(1)
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parent)}
    for _ in range(2):
        before = run.steps()[-1]
        child = subprocess.Popen([sys.executable, "-c", code, str(run.path)], stdout=subprocess.PIPE, env=env)
        assert child.stdout.readline() == b"saved\n"
        time.sleep(rng.random() * 0.3)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        with run.lock():
            restored = run.latest(abstract(make_state(0)))
        assert restored.step > before
        same(restored.state, make_state(restored.step))
        assert all(name.isdecimal() for name in os.listdir(run.checkpoints))  # leftovers are gone
    assert not run.quarantine.exists()


def test_a_full_disk_is_one_line_and_keeps_earlier_steps(tmp_path):
    code = """
import resource, sys
import jax.numpy as jnp, numpy as np
from lsg_jax.checkpoint import BaseWriter, LeafSpec, RunFolder
from lsg_jax.errors import CheckpointError
base = BaseWriter(sys.argv[1] + "/base", {"layers/w": LeafSpec((2, 64, 64), "float32", stacked=True)})
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
try:
    base.put("layers/w", 0, np.ones((1, 64, 64), np.float32))
except CheckpointError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
run = RunFolder(sys.argv[1] + "/run")
def state(n):
    return {"w": jnp.asarray(np.random.default_rng(0).normal(size=n), jnp.float32)}
with run.lock():
    run.save(1, state(10))
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))
    for _ in range(2):
        try:
            run.save(2, state(100_000))
        except CheckpointError as error:
            print(error)
    try:
        run.write_json("run.json", {"a": "x" * 100_000})
    except CheckpointError as error:
        print(error)
    run.save(3, state(10))
"""
    first, *lines = run_python(code, str(tmp_path)).stdout.splitlines()
    assert "leaf layers/w, block 0 was not written" in first
    assert len(lines) == 3 and all("step 2 was not saved" in line and "earlier steps are kept" in line for line in lines[:2])
    run = RunFolder(tmp_path / "run")
    assert "run.json: cannot be written" in lines[2] and not (run.path / "run.json").exists()
    assert sorted(os.listdir(run.checkpoints)) == ["1", "3"] and run.verify() == []


def test_unwritable_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "run", tmp_path / "file"):
        with pytest.raises(InputError, match="cannot be written"), RunFolder(path).lock():
            pytest.fail("locked")


def test_read_only_folder_is_refused():
    user = os.geteuid()
    # Not below tmp_path, which only its owner may enter: that would be another refusal.
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        if user == 0:
            os.seteuid(65534)  # file modes do not bind root
        try:
            message = f"{folder}: cannot be written: Permission denied; choose another output"
            with pytest.raises(InputError, match=f"^{re.escape(message)}$"), RunFolder(folder).lock():
                pytest.fail("locked")
        finally:
            os.seteuid(user)


def test_json_files(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.write_json("run.json", {"b": 1, "a": [1.5, None]})
    assert run.read_json("run.json") == {"a": [1.5, None], "b": 1}
    assert os.listdir(run.path) == ["run.json"]
    for text in ('{"a": NaN}', '{"a": 1, "a": 2}', "{", "[" * 100_000):
        (run.path / "bad.json").write_text(text)
        with pytest.raises(InputError, match=r"bad\.json: not valid JSON"):
            run.read_json("bad.json")
    assert [p.where for p in run.verify()] == ["bad.json"]
    with pytest.raises(InputError, match="no such file"):
        run.read_json("none.json")
