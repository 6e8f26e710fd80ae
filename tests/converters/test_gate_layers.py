"""The layers of published gates: from paths, sink_cfg.json, --layers and the folder's name, which must agree."""

import json

import numpy as np
import pytest
import torch
from published import PEFT, STACK, STACK_NAME, NamedGate, gate_folder, list_of, plain_gate, tensors_of

from converters.gate_layers import layers_of_name
from converters.gate_settings import read_settings
from converters.gates import import_gates
from lsg_jax.errors import InputError


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("llava15_L10_PEFT", [(10,)]),
        (STACK_NAME, [STACK]),
        ("crossarch_phi3_L20", [(20,)]),
        ("L4", [(4,)]),
        ("gate-layer-7", [(7,)]),
        ("L10_7B", [(10,)]),
        ("L3_vs_L4", [(3,), (4,)]),
        ("llava15_7b", []),
        ("XL10", []),
        ("snapshots", []),
    ],
)
def test_layers_in_a_folder_name(name, layers):
    assert [each.layers for each in layers_of_name(name)] == layers


@pytest.mark.parametrize(
    ("settings", "layers"),
    [
        ({"layers": [3, 6]}, [(3, 6)]),
        ({"gate": {"layer_idx": 10}}, [(10,)]),
        ({"targetLayers": "3,6,7"}, [(3, 6, 7)]),
        ({"sink_layer": "L10"}, [(10,)]),
        ({"gates_by_layer": {"3": {"tau": 1}, "6": {"tau": 2}}}, [(3, 6)]),
        ({"num_layers": 5, "layer_norm_eps": 1e-5, "vision": {"feature_layer": 2}, "last_layer": 3, "hidden_layers": 32}, []),
        ({"layers": "all", "layer": -2, "gate_layer": True, "layer_ids": [[3]], "layers_": []}, []),
        ({"a": {"layers": [1]}, "layer": 2}, [(1,), (2,)]),
    ],
)
def test_layers_in_sink_cfg(tmp_path, settings, layers):
    (tmp_path / "sink_cfg.json").write_text(json.dumps(settings))
    assert [each.layers for each in read_settings(tmp_path / "sink_cfg.json").layers] == layers


def test_each_source_alone_states_the_layers_of_a_list(tmp_path):
    state, order = list_of(2), (7, 3)  # not ascending: the first gate is that of layer 7
    by_name = gate_folder(tmp_path, state, name="stack_L7_3")
    by_settings = gate_folder(tmp_path, state, name="stack", settings={"layers": order})
    found = [
        import_gates(by_name),
        import_gates(by_settings),
        import_gates(by_settings / "non_lora_trainables.bin", layers=order),
    ]
    for each in found:
        assert each.gates.gate.layers == (3, 7)
        np.testing.assert_array_equal(each.gates.parameters["fc1_kernel"][1], state["sink_gates.0.1.weight"].numpy().T)
    assert [each.described["layers_from"] for each in found] == [
        ["the folder's name stack_L7_3: 7, 3"], ["sink_cfg.json: layers: 7, 3"], ["--layers: 7, 3"],
    ]  # fmt: skip


def test_a_place_in_a_list_is_no_layer(tmp_path):
    for count in (1, 5):
        path = tmp_path / f"{count}.pt"
        torch.save(list_of(count), path)
        with pytest.raises(InputError, match=r"nothing says which layers its \d gates? .* a place in a list is not a layer"):
            import_gates(path)
    folder = gate_folder(tmp_path, list_of(5), name="stack")
    with pytest.raises(InputError, match="give --layers"):
        import_gates(folder)


@pytest.mark.parametrize(
    ("name", "settings", "layers", "message"),
    [
        (
            "L3_6",
            {"layers": [3, 7]},
            (),
            r"sources disagree about the layers \(sink_cfg.json: layers: 3, 7; the folder's name L3_6",
        ),
        ("L3_6", {"layers": [6, 3]}, (), "name the layers of a list in different orders"),
        ("L3_6", None, (3, 7), "sources disagree about the layers"),
        ("L3_6_7", None, (), "the folder's name L3_6_7: 3, 6, 7, but the file holds 2 gates"),
        ("stack", None, (3, 3), "a layer is named twice"),
        ("stack", {"layers": [3, 6], "gate_layer": [3, 9]}, (), r"gate_layer: 3, 9\)"),
        ("stack", None, (3, -1), "must lie in"),
    ],
)
def test_sources_that_disagree_are_refused(tmp_path, name, settings, layers, message):
    folder = gate_folder(tmp_path, list_of(2), name=name, settings=settings)
    with pytest.raises(InputError, match=message) as caught:
        import_gates(folder, layers=layers)
    assert "\n" not in str(caught.value)


def test_layers_of_the_decoder_must_agree_with_the_other_sources(tmp_path):
    state = tensors_of({PEFT.format(l=layer): NamedGate(plain_gate(layer)) for layer in (0, 1)})
    path = tmp_path / "gates.pt"
    torch.save(state, path)
    assert import_gates(path).gates.gate.layers == (0, 1)  # numbers of decoder layers may count from 0
    assert import_gates(path, layers=(1, 0)).gates.gate.layers == (0, 1)
    with pytest.raises(InputError, match=r"the decoder layer in the tensors' names: 0, 1; the folder's name L3_6"):
        import_gates(gate_folder(tmp_path, state, name="L3_6"))
