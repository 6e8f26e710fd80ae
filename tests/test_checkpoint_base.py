"""The backbone in a model folder: written in blocks, read back to the bit, and never silently wrong."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsg_jax.checkpoint import (
    BaseWriter,
    LeafSpec,
    Manifest,
    iter_base,
    load_base,
    read_manifest,
    verify_base,
    write_manifest,
    writer,
)
from lsg_jax.checkpoint.tree import flatten, nest
from lsg_jax.config import ImageConfig, ModelConfig, RopeConfig, TextConfig, VisionConfig
from lsg_jax.digest import json_sha256
from lsg_jax.errors import CheckpointError, InputError

CONFIG = ModelConfig(
    vision=VisionConfig("clip", 16, 8, 8, 16, 2, 2, 1e-5, "quick_gelu"),
    text=TextConfig("llama", 64, 8, 16, 2, 2, 1, 4, 1e-5, RopeConfig(1e4), 128),
    feature_layers=(-2,),
    feature_select="default",
    image_token_id=3,
    eos_token_ids=(2,),
    pad_token_id=0,
    image=ImageConfig(16, "pad", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
)


def example_leaves() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "language_model/layers/q_proj/kernel": rng.normal(size=(3, 4, 5)).astype(jnp.bfloat16),
        "language_model/embed": rng.normal(size=(7, 6)).astype(np.float32),
        "vision_tower/scale": np.asarray(2.5, np.float32),
        "vision_tower/zeros": np.zeros((2, 3), np.float16),
        "vision_tower/positions": np.arange(4, dtype=np.int32),
    }


def specs(leaves: dict[str, np.ndarray]) -> dict[str, LeafSpec]:
    return {name: LeafSpec(x.shape, x.dtype.name, stacked="layers" in name) for name, x in leaves.items()}


def put_all(writer_: BaseWriter, leaves: dict[str, np.ndarray]) -> list[bool]:
    wrote = []
    for name, leaf in leaves.items():
        spec = writer_.leaves[name]
        for offset in spec.offsets():
            wrote.append(writer_.put(name, offset, leaf[offset : offset + spec.rows] if leaf.shape else leaf))
    return wrote


def write_model(folder: Path, leaves: dict[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
    leaves = leaves or example_leaves()
    base = BaseWriter(folder / "base", specs(leaves))
    assert all(put_all(base, leaves))
    write_manifest(folder, Manifest(CONFIG, *base.finish()))
    return leaves


def abstract(leaves: dict[str, np.ndarray], **change) -> dict:
    structs = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in leaves.items()}
    return nest({**structs, **change})


def same(got, want: dict[str, np.ndarray]) -> None:
    got = flatten(got)
    assert got.keys() == want.keys()
    for name, leaf in want.items():
        assert got[name].dtype == leaf.dtype, name
        assert np.asarray(got[name]).tobytes() == leaf.tobytes(), name


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(writer, "BLOCK_BYTES", 50)  # two rows of the embedding, whose last block is then short


@pytest.mark.parametrize("verify", [True, False])
def test_round_trip(tmp_path, small_blocks, verify):
    leaves = write_model(tmp_path / "base" / "..")
    assert len(read_manifest(tmp_path).leaves["language_model/embed"].sha256) == 4
    same(load_base(tmp_path, abstract(leaves), verify=verify), leaves)
    (tmp_path / "beside").mkdir()
    assert verify_base(tmp_path) == verify_base(tmp_path / "beside" / "..") == []
    again = {name: np.empty_like(leaf) for name, leaf in leaves.items()}
    for name, offset, block in iter_base(tmp_path):
        if block.shape:
            again[name][offset : offset + len(block)] = block
        else:
            again[name][...] = block
    same(nest(again), leaves)


def test_orbax_itself_reads_the_folder(tmp_path, small_blocks):
    from orbax.checkpoint import v1 as ocp

    leaves = write_model(tmp_path)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    structs = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for name, x in leaves.items()}
    same(ocp.load(tmp_path / "base", nest(structs)), leaves)


def test_cast_only_when_asked_and_only_floats(tmp_path):
    leaves = write_model(tmp_path)
    loaded = flatten(load_base(tmp_path, abstract(leaves), dtype="bfloat16"))
    assert loaded["language_model/embed"].dtype == jnp.bfloat16
    assert loaded["vision_tower/positions"].dtype == jnp.int32
    want = {"language_model/embed": jax.ShapeDtypeStruct((7, 6), jnp.bfloat16)}
    with pytest.raises(CheckpointError, match="language_model/embed has dtype float32, expected bfloat16"):
        load_base(tmp_path, abstract(leaves, **want))
    assert (
        flatten(load_base(tmp_path, abstract(leaves, **want), dtype=jnp.bfloat16))["language_model/embed"].dtype == jnp.bfloat16
    )


def test_all_differences_in_one_error(tmp_path):
    leaves = write_model(tmp_path)
    wanted = abstract(leaves, **{"language_model/embed": jax.ShapeDtypeStruct((7, 5), np.int8), "new/leaf": jnp.ones(2)})
    del wanted["vision_tower"]["scale"]
    with pytest.raises(CheckpointError) as error:
        load_base(tmp_path, wanted)
    for part in ("new/leaf is missing", "vision_tower/scale is not expected", "embed has shape", "embed has dtype"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def stored_files(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "base").rglob("*") if path.is_file())


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damage_to_any_file_is_a_named_error(tmp_path, small_blocks, damage):
    leaves = write_model(tmp_path / "good")
    paths = stored_files(tmp_path / "good")
    assert len(paths) > 15
    for path in paths:
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        shutil.copytree(tmp_path / "good", tmp_path / "bad")
        target = tmp_path / "bad" / path.relative_to(tmp_path / "good")
        data = bytearray(target.read_bytes())
        if damage == "delete":
            target.unlink()
        elif not data:
            continue
        elif damage == "truncate":
            target.write_bytes(data[: len(data) // 2])
        else:
            data[len(data) // 3] ^= 4
            target.write_bytes(data)
        with pytest.raises(CheckpointError) as error:
            load_base(tmp_path / "bad", abstract(leaves))
        assert "lsg verify" in str(error.value) and "\n" not in str(error.value)
        parts = path.relative_to(tmp_path / "good" / "base").parts
        in_leaf = len(parts) > 2
        assert (f"leaf {parts[1].replace('.', '/')}" if in_leaf else path.name) in str(error.value)
        found = verify_base(tmp_path / "bad")
        assert found and all(str(problem).count("\n") == 0 for problem in found)
        if in_leaf and parts[2] == "c":
            with pytest.raises(CheckpointError, match="leaf"):
                list(iter_base(tmp_path / "bad"))


def test_digest_covers_what_a_checksum_does_not(tmp_path):
    """A whole chunk of another model has a valid crc32c."""
    leaves = write_model(tmp_path / "a")
    write_model(tmp_path / "b", {name: leaf + leaf.dtype.type(1) for name, leaf in leaves.items()})
    chunk = "base/state/language_model.embed/c/0/0"
    shutil.copy(tmp_path / "b" / chunk, tmp_path / "a" / chunk)
    with pytest.raises(CheckpointError, match="leaf language_model/embed: block 0 does not match its sha256"):
        load_base(tmp_path / "a", abstract(leaves))
    assert [str(p) for p in verify_base(tmp_path / "a")] == ["leaf language_model/embed: block 0 does not match its sha256"]


def test_extra_leaf_is_reported(tmp_path):
    write_model(tmp_path)
    shutil.copytree(tmp_path / "base/state/language_model.embed", tmp_path / "base/state/other")
    assert [p.where for p in verify_base(tmp_path)] == ["base/state/other"]


def test_restart_skips_done_blocks_and_is_byte_identical(tmp_path, small_blocks):
    leaves = example_leaves()
    write_model(tmp_path / "once", leaves)
    base = tmp_path / "twice" / "base"
    first = BaseWriter(base, specs(leaves))
    embed = leaves["language_model/embed"]
    assert first.put("language_model/embed", 0, embed[:4])
    assert first.put("vision_tower/scale", 0, leaves["vision_tower/scale"])
    with pytest.raises(CheckpointError, match="blocks were not written"):
        first.finish()
    with open(tmp_path / "twice" / "base.journal", "a") as journal:
        journal.write('{"leaf": "language_model/embed", "off')  # a line truncated by a crash
    (base / "state/language_model.embed/c/0/0").unlink()  # in the journal, but lost
    second = BaseWriter(base, specs(leaves))
    assert second.put("language_model/embed", 0, embed[:2]) is True
    assert second.put("language_model/embed", 2, embed[2:4]) is False
    assert second.put("vision_tower/scale", 0, leaves["vision_tower/scale"]) is False
    put_all(second, leaves)
    write_manifest(tmp_path / "twice", Manifest(CONFIG, *second.finish()))
    contents = [
        {str(p.relative_to(tmp_path / n)): p.read_bytes() for p in (tmp_path / n).rglob("*") if p.is_file()}
        for n in ("once", "twice")
    ]
    assert contents[0] == contents[1]


def test_restart_rewrites_changed_blocks_and_other_leaves(tmp_path):
    leaves = example_leaves()
    base = BaseWriter(tmp_path / "base", specs(leaves))
    put_all(base, leaves)
    changed = {**leaves, "language_model/embed": leaves["language_model/embed"] + 1}
    assert put_all(BaseWriter(tmp_path / "base", specs(leaves)), changed).count(True) == 1
    fewer = {"vision_tower/scale": leaves["vision_tower/scale"]}
    other = BaseWriter(tmp_path / "base", specs(fewer))
    assert put_all(other, fewer) == [True]
    assert os.listdir(tmp_path / "base/state") == ["vision_tower.scale"]


def test_kill_during_writing_then_restart(tmp_path):
    code = """
import os, signal, sys, threading
sys.path.insert(0, sys.argv[2])
import numpy as np
from lsg_jax.checkpoint import BaseWriter, LeafSpec
base = BaseWriter(sys.argv[1] + "/base", {"layers/w": LeafSpec((400, 64, 64), "float32", stacked=True)})
blocks = [np.full((1, 64, 64), i, np.float32) for i in range(400)]
base.put("layers/w", 0, blocks[0])
threading.Timer(0.15, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
for i in range(400):
    base.put("layers/w", i, blocks[i])
"""
    result = run_python(code, str(tmp_path), str(Path(__file__).parent), check=False)
    assert result.returncode in (-9, 0), result.stderr
    leaves = {"layers/w": np.arange(400, dtype=np.float32)[:, None, None] * np.ones((1, 64, 64), np.float32)}
    base = BaseWriter(tmp_path / "base", specs(leaves))
    wrote = put_all(base, leaves)
    assert wrote[0] is False
    write_manifest(tmp_path, Manifest(CONFIG, *base.finish()))
    assert verify_base(tmp_path) == []
    same(load_base(tmp_path, abstract(leaves)), leaves)


def test_put_refuses_what_does_not_fit(tmp_path, small_blocks):
    base = BaseWriter(tmp_path / "base", specs(example_leaves()))
    embed = example_leaves()["language_model/embed"]
    for name, offset, block in [
        ("unknown", 0, embed),
        ("language_model/embed", 1, embed[:2]),
        ("language_model/embed", 0, embed[:3]),
        ("language_model/embed", 0, embed[:, :5]),
        ("language_model/embed", 0, embed.astype(np.float16)),
        ("language_model/embed", 6, embed[:2]),
        ("language_model/embed", 0, embed[:0]),
        ("vision_tower/scale", 0, np.ones(1, np.float32)),
    ]:
        with pytest.raises(ValueError):
            base.put(name, offset, block)


@pytest.mark.parametrize(
    "leaves",
    [
        {"a.b": LeafSpec((2,), "float32")},
        {"a//b": LeafSpec((2,), "float32")},
        {"a": LeafSpec((2,), "float32"), "a/b": LeafSpec((2,), "float32")},
        {"a": LeafSpec((2, 0), "float32")},
        {"a": LeafSpec((2,), "floaty")},
        {"a": LeafSpec((2,), "f4")},
        {"a": LeafSpec((), "float32", stacked=True)},
    ],
)
def test_leaves_that_cannot_be_stored(tmp_path, leaves):
    with pytest.raises(CheckpointError):
        BaseWriter(tmp_path / "base", leaves)


def test_manifest_errors(tmp_path):
    with pytest.raises(InputError, match="no such model folder"):
        read_manifest(tmp_path / "none")
    with pytest.raises(InputError, match="lsg convert"):
        read_manifest(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="Hugging Face folder"):
        read_manifest(tmp_path)
    path = tmp_path / "lsg_manifest.json"
    for text, what in [("{", "not valid JSON"), ("[]", "unknown format"), ('{"format": "lsg-model-9"}', "lsg-model-9")]:
        path.write_text(text)
        with pytest.raises(CheckpointError, match=what):
            read_manifest(tmp_path)
    write_model(tmp_path)
    written = json.loads(path.read_text())
    for change, what in [
        ({"eos_token_ids": 1}, "changed after it was written"),
        ({"carried": 1}, "carried: expected a list"),
        ({"spare": 1}, "unknown field spare"),
        ({"files": None}, "files: expected a table"),
        ({"digest": "0" * 64}, "its digest does not fit its leaves"),
    ]:
        content = {**written, **change}
        del content["self_sha256"]
        sealed = {} if "eos_token_ids" in change else {"self_sha256": json_sha256(content)}
        path.write_text(json.dumps({**written, **change, **sealed}))
        with pytest.raises(CheckpointError, match=f"{what}.*lsg convert"):
            read_manifest(tmp_path)
    assert not (tmp_path / "base.journal").exists()


def test_identity_depends_on_leaves_alone(tmp_path):
    leaves = write_model(tmp_path / "a")
    manifest = read_manifest(tmp_path / "a")
    other = replace(CONFIG, eos_token_ids=(1, 2))
    write_manifest(tmp_path / "a", replace(manifest, config=other))
    assert read_manifest(tmp_path / "a") == replace(manifest, config=other)
    assert read_manifest(tmp_path / "a").digest == manifest.digest
    leaves["vision_tower/scale"] = np.asarray(2.75, np.float32)
    write_model(tmp_path / "b", leaves)
    assert read_manifest(tmp_path / "b").digest != manifest.digest


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        BaseWriter(tmp_path / "file" / "base", specs(example_leaves()))


def test_memory_does_not_grow(tmp_path):
    code = """
import sys, threading, time
import numpy as np, psutil
from lsg_jax.checkpoint import BaseWriter, LeafSpec
leaves = {f"layers/w{i}": LeafSpec((3, 1024, 2560), "float32", stacked=True) for i in range(10)}
base = BaseWriter(sys.argv[1] + "/base", leaves)
process = psutil.Process()
block = np.ones((1, 1024, 2560), np.float32)
start = peak = process.memory_info().rss
done = False
def sample():
    global peak
    while not done:
        peak = max(peak, process.memory_info().rss)
        time.sleep(0.005)
thread = threading.Thread(target=sample)
thread.start()
for name, spec in leaves.items():
    for offset in spec.offsets():
        block[:] = offset
        base.put(name, offset, block)
done = True
thread.join()
base.finish()
print((peak - start) >> 20)
"""
    grown = int(run_python(code, str(tmp_path)).stdout)
    assert grown < 150, f"{grown} MiB"


def run_python(code: str, *arguments: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "JAX_PLATFORMS": "cpu", **environment}
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=env, timeout=120)
    assert not check or result.returncode == 0, result.stderr
    return result


def test_manifest_is_plain_json(tmp_path):
    write_model(tmp_path)
    manifest = json.loads((tmp_path / "lsg_manifest.json").read_text())
    assert manifest["format"] == "lsg-model-1"
    entry = manifest["leaves"]["language_model/layers/q_proj/kernel"]
    assert entry["shape"] == [3, 4, 5] and entry["dtype"] == "bfloat16" and entry["rows"] == 1 and len(entry["sha256"]) == 3
