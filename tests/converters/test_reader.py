"""Reading weights in parts, and errors about damaged files."""

import json
import os
import pickle
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from checkpoints import to_hub_names, to_memory_names
from safetensors.numpy import save_file

from converters.families.llava import canonical_name
from converters.reader import canonical_names, open_source, read_header
from lsg_jax.errors import InputError

ARRAYS = {
    "a": np.arange(12, dtype=np.float32).reshape(4, 3),
    "b": np.arange(10).astype(ml_dtypes.bfloat16),
    "c": np.array(7, np.int64),
}


def test_rows_and_dtypes(tmp_path: Path) -> None:
    save_file(ARRAYS, tmp_path / "model.safetensors")
    source = open_source(tmp_path)
    assert {name: (t.shape, t.dtype.name) for name, t in source.tensors.items()} == {
        "a": ((4, 3), "float32"),
        "b": ((10,), "bfloat16"),
        "c": ((), "int64"),
    }
    np.testing.assert_array_equal(source.rows("a", 1, 3), ARRAYS["a"][1:3])
    np.testing.assert_array_equal(source.rows("b", 8, 10), ARRAYS["b"][8:])
    assert source.rows("c", 0, 1) == 7
    source.close()


def test_bin_files_give_the_same(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(12.0).reshape(4, 3), "b": torch.arange(10).to(torch.bfloat16), "c": torch.tensor(7)}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    source = open_source(tmp_path)
    assert {name: (t.shape, t.dtype) for name, t in source.tensors.items()} == {
        n: (a.shape, a.dtype) for n, a in ARRAYS.items()
    }
    np.testing.assert_array_equal(source.rows("a", 1, 3), ARRAYS["a"][1:3])
    np.testing.assert_array_equal(source.rows("b", 8, 10), ARRAYS["b"][8:])


class Hostile:
    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_hostile_pickle_never_runs(tmp_path: Path, zipped: bool) -> None:
    payload = {"a": Hostile(f"touch {tmp_path}/ran")}
    if zipped:
        torch.save(payload, tmp_path / "pytorch_model.bin")
    else:
        (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(payload, protocol=2))
    with pytest.raises(InputError, match=r"pytorch_model.bin: refused: ") as error:
        open_source(tmp_path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_two_shards(tmp_path: Path) -> None:
    save_file({"a": ARRAYS["a"]}, tmp_path / "model-1.safetensors")
    save_file({"b": ARRAYS["b"]}, tmp_path / "model-2.safetensors")
    write_index(tmp_path, {"a": "model-1.safetensors", "b": "model-2.safetensors"})
    source = open_source(tmp_path)
    for _ in range(2):
        assert [float(source.rows(name, 0, 1).ravel()[0]) for name in ("a", "b")] == [0, 0]
    write_index(tmp_path, {"a": "model-2.safetensors", "b": "model-2.safetensors"})
    with pytest.raises(InputError, match=r"the index and the files disagree: a is not in model-2.safetensors"):
        open_source(tmp_path)
    write_index(tmp_path, {"a": "model-1.safetensors", "b": "model-3.safetensors"})
    with pytest.raises(InputError, match=r"model-3.safetensors: no such file; is the download complete\?"):
        open_source(tmp_path)
    write_index(tmp_path, {"a": "../model-1.safetensors"})
    with pytest.raises(InputError, match="names a file outside of its folder"):
        open_source(tmp_path)
    save_file(ARRAYS, tmp_path / "model-1.safetensors")
    write_index(tmp_path, {"a": "model-1.safetensors", "b": "model-2.safetensors"})
    with pytest.raises(InputError, match="tensors stored in two files: b"):
        open_source(tmp_path)


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def with_header(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def entry(**changes) -> bytes:
    value = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes
    return json.dumps({"a": value}).encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated within its header"),
        (with_header(entry())[:20], "truncated within its header"),
        (with_header(entry(), b"1234"), "truncated: .* bytes, its header describes"),
        (with_header(entry(), b"123456789"), "1 bytes more than its header describes"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"<html><body>404</body></html>" * 9, "not a safetensors file"),
        (with_header(b"{" + b'"a":{' * 1000), "header: not valid JSON|nested deeper"),
        (with_header(b'{"a":1,"a":1}'), "a key occurs twice"),
        (with_header(entry(dtype="F4"), b"12345678"), "tensor a is of dtype F4, which is not supported"),
        (with_header(entry(shape=[3]), b"12345678"), "tensor a has 8 bytes, its shape and dtype need 12"),
        (with_header(entry(shape=[-2]), b"12345678"), "entry for a is malformed"),
        (with_header(entry(shape=None), b"12345678"), "entry for a is malformed"),
        (with_header(entry(data_offsets=[4, 12]), b"123456789012"), "does not begin where the one before it ends"),
    ],
)
def test_damaged_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_header(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    save_file(ARRAYS, tmp_path / "model.safetensors")
    source = open_source(tmp_path)
    os.truncate(tmp_path / "model.safetensors", source.tensors["a"].offset + 8)
    with pytest.raises(InputError, match="ended while tensor a was read"):
        source.rows("a", 0, 4)


def test_no_weights(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no weights: expected model.safetensors"):
        open_source(tmp_path)


@pytest.mark.parametrize("change", [lambda name: name, to_hub_names, to_memory_names])
@pytest.mark.parametrize(
    "name",
    [
        "vision_tower.embeddings.class_embedding",
        "vision_tower.encoder.layers.3.mlp.fc1.weight",
        "language_model.model.layers.0.mlp.up_proj.weight",
        "language_model.model.embed_tokens.weight",
        "language_model.lm_head.weight",
        "multi_modal_projector.linear_1.bias",
    ],
)
def test_canonical_names(change, name: str) -> None:
    assert canonical_name(change(name)) == name


def test_two_names_of_one_tensor() -> None:
    with pytest.raises(InputError, match=r"same tensor by two names: lm_head.weight and language_model.lm_head.weight"):
        canonical_names(["lm_head.weight", "language_model.lm_head.weight", "a"], canonical_name)
