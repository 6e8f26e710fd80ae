"""Portable gate files: round trips and faults."""

import json
import os
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from lsg_jax.config import GateConfig, SinkConfig
from lsg_jax.errors import InputError
from lsg_jax.gating.keys import GROUPS
from lsg_jax.gating.portable import (
    PortableGates,
    check_width,
    combine_gates,
    from_torch_layout,
    gate_bytes,
    read_gates,
    to_torch_layout,
    write_gates,
)

WIDTH_IN, WIDTH = 20, 6
SINKS = SinkConfig(
    criterion="dim_rms", vit_dims=(3, 7), vit_tau=2.5, llm_criterion="massive", llm_dims=(1,), llm_tau=40.0, massive_ratio=300.0
)


def make_gates(layers=(2, 5), grouping="three", sinks=SINKS, seed=0) -> PortableGates:
    rng = np.random.default_rng(seed)
    gate = GateConfig(
        layers=layers, width=WIDTH, activation="silu", layer_norm_eps=1e-6, key_scale=1.25, signal="mean_all", grouping=grouping
    )
    n, groups = len(layers), len(GROUPS[gate.grouping])
    shapes = {"norm_scale": (n, WIDTH_IN), "norm_bias": (n, WIDTH_IN), "fc1_kernel": (n, WIDTH_IN, WIDTH)}
    shapes |= {"fc1_bias": (n, WIDTH), "fc2_kernel": (n, WIDTH, groups), "fc2_bias": (n, groups)}
    parameters = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return PortableGates(gate=gate, sinks=sinks, parameters=parameters, backbone="tiny sha256:0123")


def assert_same(a: PortableGates, b: PortableGates) -> None:
    assert (a.gate, a.sinks, a.backbone) == (b.gate, b.sinks, b.backbone)
    assert a.parameters.keys() == b.parameters.keys()
    for name in a.parameters:
        np.testing.assert_array_equal(a.parameters[name], b.parameters[name], strict=True)


@pytest.mark.parametrize("layers", [(0,), (2, 5), (9, 10)])
@pytest.mark.parametrize("grouping", ["v_sink_rest", "l_sink_rest", "three"])
def test_round_trip(tmp_path, layers, grouping):
    gates = make_gates(layers, grouping)
    write_gates(tmp_path / "g.safetensors", gates)
    assert_same(read_gates(tmp_path / "g.safetensors"), gates)


def test_equal_gates_give_equal_bytes(tmp_path):
    """So that the sha256 of a file, as on the card of pushed gates, is found again."""
    gates = replace(make_gates(), backbone="modèle 中")
    first = gate_bytes(gates, where="here")
    assert all(gate_bytes(gates, where="here") == first for _ in range(5))
    start = 8 + struct.unpack("<Q", first[:8])[0]
    assert start % 8 == 0 and first[8:start].isascii()
    (tmp_path / "gates.safetensors").write_bytes(first)
    assert read_gates(tmp_path / "gates.safetensors").backbone == "modèle 中"


def test_gates_trained_apart_are_one_stack():
    parts = [make_gates((7,), seed=1), make_gates((2, 9), seed=2), make_gates((5,), seed=3)]
    stack = combine_gates(parts)
    assert stack.gate == replace(parts[0].gate, layers=(2, 5, 7, 9)) and stack.sinks == SINKS
    apart = {layer: named for part in parts for layer, named in to_torch_layout(part.parameters, part.gate.layers).items()}
    for layer, named in to_torch_layout(stack.parameters, stack.gate.layers).items():
        for name, array in named.items():
            np.testing.assert_array_equal(array, apart[layer][name])
    for other, message in [
        (make_gates((9, 7)), "layer 7 is gated twice"),
        (make_gates((1,), grouping="v_sink_rest"), "differ in gate or sink settings"),
        (make_gates((1,), sinks=SinkConfig()), "differ in gate or sink settings"),
        (replace(make_gates((1,)), backbone="other"), "different backbones: tiny sha256:0123 and other"),
    ]:
        with pytest.raises(InputError, match=message):
            combine_gates([*parts, other])


def test_the_file_is_what_the_contract_says(tmp_path):
    gates = make_gates(sinks=SinkConfig(vit_dims=(650,)))
    gates = replace(gates, gate=replace(gates.gate, layer_norm_eps=1e-5, activation="gelu"))
    write_gates(tmp_path / "g.safetensors", gates)
    tensors = load_file(tmp_path / "g.safetensors")
    expected = {"norm.weight": (20,), "norm.bias": (20,), "fc1.weight": (6, 20), "fc1.bias": (6,)}
    expected |= {"fc2.weight": (3, 6), "fc2.bias": (3,)}
    assert {k: v.shape for k, v in tensors.items()} == {f"{n}.{k}": v for n in (2, 5) for k, v in expected.items()}
    np.testing.assert_array_equal(tensors["5.fc1.weight"], gates.parameters["fc1_kernel"][1].T)
    with safe_open(tmp_path / "g.safetensors", framework="np") as file:
        metadata = file.metadata()
    stated = {"format": "lsg-gates-1", "activation": "gelu", "layer_norm_eps": "1e-5", "key_scale": "1.25", "grouping": "three"}
    stated |= {
        "signal": "mean_all",
        "criterion": "dim_abs",
        "vit_dims": "650",
        "vit_tau": "70.0",
        "backbone": "tiny sha256:0123",
    }
    assert stated.items() <= metadata.items()


def test_layers_out_of_order_keep_their_parameters(tmp_path):
    gates = make_gates((7, 1))
    write_gates(tmp_path / "g.safetensors", gates)
    read = read_gates(tmp_path / "g.safetensors")
    assert read.gate.layers == (1, 7)
    np.testing.assert_array_equal(read.parameters["fc1_kernel"], gates.parameters["fc1_kernel"][::-1])


def test_the_layouts_are_inverse():
    parameters = make_gates().parameters
    back = from_torch_layout(to_torch_layout(parameters, (2, 5)))
    for name, array in parameters.items():
        np.testing.assert_array_equal(back[name], array)
    with pytest.raises(InputError, match="for 3 layers"):
        to_torch_layout(parameters, (0, 1, 2))
    with pytest.raises(InputError, match="gate parameters are"):
        to_torch_layout({"fc1_kernel": parameters["fc1_kernel"]}, (2, 5))


def test_absent_sink_fields_of_the_language_model_get_their_defaults(tmp_path):
    tensors, metadata = _parts(tmp_path)
    metadata = {k: v for k, v in metadata.items() if not k.startswith(("llm_", "massive_", "backbone"))}
    save_file(tensors, tmp_path / "g.safetensors", metadata=metadata | {"note": "by hand", "vit_dims": "[3, 7]"})
    read = read_gates(tmp_path / "g.safetensors")
    assert read.sinks == SinkConfig(criterion="dim_rms", vit_dims=(3, 7), vit_tau=2.5)
    assert read.backbone == ""


def _parts(tmp_path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors and metadata of a sound file, without the checksum, as another tool writes it."""
    path = tmp_path / "sound.safetensors"
    write_gates(path, make_gates())
    with safe_open(path, framework="np") as file:
        metadata = dict(file.metadata())
        return load_file(path), {name: value for name, value in metadata.items() if name != "sha256"}


def _nan(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flat[1] = np.nan
    return array


def _rename_layer(tensors: dict[str, np.ndarray], number: str) -> None:
    for key in [key for key in tensors if key.startswith("2.")]:
        tensors[number + key[1:]] = tensors.pop(key)


TENSOR_FAULTS = {
    "missing": (lambda t: t.pop("5.fc1.bias"), r"missing tensor 5\.fc1\.bias"),
    "extra": (lambda t: t.update({"2.fc3.weight": np.zeros((2, 2), np.float32)}), r"unknown tensor 2\.fc3\.weight"),
    "no layer": (lambda t: t.update({"norm.weight": np.zeros(20, np.float32)}), r"unknown tensor norm\.weight"),
    "transposed": (lambda t: t.update({"2.fc1.weight": t["2.fc1.weight"].T.copy()}), r"2\.fc\d\.\w+ has shape"),
    "another width": (lambda t: t.update({"5.norm.bias": np.zeros(21, np.float32)}), r"5\.norm\.bias has shape \[21\]"),
    "groups": (lambda t: t.update({"2.fc2.bias": np.zeros(2, np.float32)}), r"grouping three has 3 groups"),
    "scalar": (lambda t: t.update({"2.fc1.weight": np.float32([1.0])[0:1].reshape(())}), r"2\.fc\d\.\w+ has shape"),
    "double": (lambda t: t.update({"2.norm.bias": np.zeros(20)}), r"2\.norm\.bias is F64"),
    "half": (lambda t: t.update({"2.norm.bias": np.zeros(20, np.float16)}), r"2\.norm\.bias is F16"),
    "nan": (lambda t: t.update({"2.fc2.weight": _nan(t["2.fc2.weight"])}), r"2\.fc2\.weight holds values that are not finite"),
    "empty": (lambda t: t.clear(), "holds no gates"),
    "a leading zero": (lambda t: _rename_layer(t, "02"), r"unknown tensor 02\.\w+\.\w+"),
    "a layer twice": (lambda t: t.update({"02.fc1.bias": t["2.fc1.bias"] + 1}), r"unknown tensor 02\.fc1\.bias"),
    "another script": (lambda t: _rename_layer(t, "\u0662"), "unknown tensor \u0662"),
    "thousands of digits": (lambda t: _rename_layer(t, "9" * 5000), "unknown tensor 9+"),
}


@pytest.mark.parametrize("fault", TENSOR_FAULTS)
def test_faulty_tensors_are_refused(tmp_path, fault):
    damage, message = TENSOR_FAULTS[fault]
    tensors, metadata = _parts(tmp_path)
    damage(tensors)
    save_file(tensors, tmp_path / "g.safetensors", metadata=metadata)
    _refused(tmp_path / "g.safetensors", message)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("format", "lsg-gates-2", "metadata format is 'lsg-gates-2'"),
        ("format", None, "metadata format is None"),
        ("activation", "tanh", "activation: 'tanh' is not one of"),
        ("activation", None, "activation is missing"),
        ("grouping", "two", "grouping: 'two' is not one of"),
        ("grouping", "v_sink_rest", "grouping v_sink_rest has 2 groups"),
        ("signal", "first", "signal: 'first' is not one of"),
        ("criterion", "l2", "criterion: 'l2' is not one of"),
        ("key_scale", "much", "key_scale is 'much'"),
        ("key_scale", "nan", "key_scale is nan: it must lie in"),
        ("layer_norm_eps", "-1", r"layer_norm_eps is -1\.0: it must lie in"),
        ("vit_dims", "3;7", "vit_dims is '3;7'"),
        ("vit_tau", None, "vit_tau is missing"),
    ],
)
def test_faulty_metadata_is_refused(tmp_path, field, value, message):
    tensors, metadata = _parts(tmp_path)
    metadata = {k: v for k, v in metadata.items() if k != field} | ({} if value is None else {field: value})
    save_file(tensors, tmp_path / "g.safetensors", metadata=metadata)
    _refused(tmp_path / "g.safetensors", message)


def test_files_that_are_something_else_are_refused(tmp_path):
    path = tmp_path / "g.safetensors"
    _refused(path, "no such run folder or gate file")
    _refused(tmp_path, "no such run folder or gate file")
    write_gates(path, make_gates())
    whole = path.read_bytes()
    for length in (0, 4, 40, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        _refused(path, "not a readable safetensors file, or cut short")
    path.write_bytes(b"PK\x03\x04" + bytes(200))
    _refused(path, "not a readable safetensors file")
    header = json.dumps({"__metadata__": {}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    _refused(path, "not a gate file")


def _refused(path: Path, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read_gates(path)
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "g.safetensors"
    write_gates(path, make_gates())
    before = path.read_bytes()
    broken = make_gates(seed=1)
    broken.parameters["fc1_bias"][0, 0] = np.inf
    with pytest.raises(InputError, match="not finite"):
        write_gates(path, broken)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match="No space left"):
        write_gates(path, make_gates(seed=2))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["g.safetensors"]
    with pytest.raises(InputError, match="cannot write"):
        write_gates(tmp_path / "nowhere" / "g.safetensors", make_gates())


def test_gates_of_another_model_are_refused():
    gates = make_gates()
    check_width(gates, 20, 6)
    with pytest.raises(InputError, match=r"width of 20, the language model has 4096.*tiny sha256:0123"):
        check_width(gates, 4096, 32)
    with pytest.raises(InputError, match="layer 5, the language model has layers 0 to 4"):
        check_width(gates, 20, 5)
