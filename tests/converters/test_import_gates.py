"""Published gates: found by shape, put at layers that some source states, and refused where none does."""

import json
import os

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from published import PEFT, STACK, NamedGate, Stack, gate_folder, list_of, plain_gate, tensors_of
from safetensors.torch import save_file
from test_gates import SINKS, WIDTH_IN, assert_same, make_gates

from converters.gates import as_table, import_gates
from lsg_jax.cli import main
from lsg_jax.config import GateConfig, SinkConfig
from lsg_jax.errors import InputError
from lsg_jax.gating.gate import SinkGate
from lsg_jax.gating.portable import PortableGates, read_gates, to_torch_layout, write_gates

# ---------------------------------------------------------------------------------------------- against plain torch modules


LAYOUTS = {
    "list of sequentials": lambda gates: Stack(gates).state_dict(),
    "list of modules, wrapped": lambda gates: tensors_of({"module.base_model": Stack([NamedGate(gate) for gate in gates])}),
    "list called layers below the gates": lambda gates: tensors_of(
        {f"sink_gates.layers.{i}.net": g for i, g in enumerate(gates)}
    ),
    "list called layers alone": lambda gates: {"model": {f"layers.{i}": g.state_dict() for i, g in enumerate(gates)}},
    "dictionary by layer": lambda gates: tensors_of({f"lsg.{layer}": gate for layer, gate in zip(STACK, gates, strict=True)}),
    "within the decoder": lambda gates: tensors_of(
        {PEFT.format(l=layer): NamedGate(gate) for layer, gate in zip(STACK, gates, strict=True)}
    ),
    "beside other weights": lambda gates: (
        Stack(gates).state_dict()
        | {"model.mm_projector.0.weight": torch.zeros(WIDTH_IN, 9), "model.mm_projector.0.bias": torch.zeros(WIDTH_IN)}
    ),
    "PEFT, untrained copies beside": lambda gates: {
        **tensors_of({f"{PEFT.format(l=n)}.modules_to_save.default": g for n, g in zip(STACK, gates, strict=True)}),
        **tensors_of({f"{PEFT.format(l=n)}.original_module": plain_gate(9) for n in STACK}),
    },
}


def _assert_ratios(gates: PortableGates, expected: dict[int, torch.nn.Module]) -> None:
    signal = np.random.default_rng(5).normal(size=(4, WIDTH_IN)).astype(np.float32)
    assert set(gates.gate.layers) == set(expected)
    for slot, layer in enumerate(gates.gate.layers):
        ours = SinkGate(WIDTH_IN, gates.gate, rngs=nnx.Rngs(0))
        for name, stacked in gates.parameters.items():
            getattr(ours, name).set_value(jnp.asarray(stacked[slot]))
        with torch.no_grad():
            theirs = expected[layer](torch.tensor(signal)).numpy()
        np.testing.assert_allclose(ours(jnp.asarray(signal)), theirs, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ratios_of_an_imported_stack_equal_those_of_torch(tmp_path, layout):
    modules = [plain_gate(seed) for seed in range(5)]
    folder = gate_folder(tmp_path, LAYOUTS[layout](modules), settings={"sink_layers": list(STACK)})
    found = import_gates(folder, gate=GateConfig(activation="gelu_exact"))
    _assert_ratios(found.gates, dict(zip(STACK, modules, strict=True)))
    assert found.described["in_a_list"] == ("list" in layout or layout == "beside other weights")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("suffix", [".pt", ".bin", ".safetensors"])
def test_other_dtypes_and_missing_biases(tmp_path, dtype, suffix):
    module, path = plain_gate(1, biases=False).to(dtype), tmp_path / f"gate{suffix}"
    state = tensors_of({"lsg.10": module})
    (save_file if suffix == ".safetensors" else torch.save)(state, path)
    found = import_gates(path, gate=GateConfig(activation="gelu_exact"))
    assert found.described["gates"][0]["no_bias"] == ["fc1", "fc2"]
    _assert_ratios(found.gates, {10: module.float()})


# ------------------------------------------------------------------------------------------------------- sinks and the command


@pytest.mark.parametrize(
    ("settings", "sinks"),
    [
        ({"vit_dims": [650], "vit_tau": 60, "llm_dims": [1415, 2533], "llm_tau": 90.5}, ((650,), 60.0, (1415, 2533), 90.5)),
        ({"D_vit": 650, "tau_vit": 60.0, "D_llm": [1415, 2533]}, ((650,), 60.0, (1415, 2533), 100.0)),
        ({"v_sink": {"threshold": 60, "dims": [650]}, "l_sink": {"channels": [1415]}}, ((650,), 60.0, (1415,), 100.0)),
        ({"v_sink_tau": "60", "v_sink_dims": "650", "l_sink_dims": "1415, 2533"}, ((650,), 60.0, (1415, 2533), 100.0)),
        ({"vit_dim": 650, "vit_tau": " 6e1 ", "llm_dims": ["1415", "2533"]}, ((650,), 60.0, (1415, 2533), 100.0)),
        ({"vit_dims": 1024, "llm_dim": [2560], "llm_tau": "90"}, ((1024,), 70.0, (2560,), 90.0)),
        # widths of models, and text that is no number
        ({"vision_dim": 1024, "llm_dim": 4096, "D_vit": 1152, "text_dim": "3584"}, ((), 70.0, (), 100.0)),
        ({"vit_tau": "inf", "llm_tau": "1_0", "vit_dims": "L650", "llm_dims": "1415, x"}, ((), 70.0, (), 100.0)),
        (
            {"llm_hidden_dim": 4096, "vit_feature_dim": 1024, "tau": 3, "dims": [1], "prior": 1.25, "vit_tau": "high"},
            ((), 70.0, (), 100.0),
        ),
    ],
)
def test_sinks_in_sink_cfg(tmp_path, settings, sinks):
    found = import_gates(gate_folder(tmp_path, list_of(1), name="L10", settings=settings))
    vit_dims, vit_tau, llm_dims, llm_tau = sinks
    assert found.gates.sinks == SinkConfig(vit_dims=vit_dims, vit_tau=vit_tau, llm_dims=llm_dims, llm_tau=llm_tau)
    unused = [name.split(": ")[1].split(" = ")[0] for name in found.described["not_used"]]
    assert unused == ([] if vit_dims else list(settings))


@pytest.mark.parametrize("key", ["layers", "llm_layers"])
@pytest.mark.parametrize("count", [32, "32"])
def test_one_number_of_layers_is_a_count(tmp_path, key, count):
    """Of one gate too, for which it would fit as a layer."""
    found = import_gates(gate_folder(tmp_path, list_of(1), name="L10", settings={key: count}))
    assert found.gates.gate.layers == (10,)
    assert found.described["not_used"] == [f"sink_cfg.json: {key} = {count!r}"]


@pytest.mark.parametrize(
    "settings", [{"layer": 10}, {"gate_layer": "10"}, {"layer_idx": 10}, {"layers": [10]}, {"layers": "L10"}]
)
def test_one_layer_by_its_number(tmp_path, settings):
    found = import_gates(gate_folder(tmp_path, list_of(1), name="gates", settings=settings))
    assert found.gates.gate.layers == (10,)


def test_contradicting_sinks_are_refused(tmp_path):
    folder = gate_folder(tmp_path, list_of(1), name="L10", settings={"vit_tau": 60, "tau_vit": 70})
    with pytest.raises(InputError, match=r"vit_tau and tau_vit state different values of sinks.vit_tau"):
        import_gates(folder)


def test_the_command_says_what_it_understood(tmp_path, capsys):
    settings = {"gate_layers": list(STACK), "vit_dims": [650], "prior": 1.25}
    folder, out = (
        gate_folder(tmp_path, LAYOUTS["beside other weights"]([plain_gate(s) for s in range(5)]), settings=settings),
        tmp_path / "g.safetensors",
    )
    command = ["gates", "import", str(folder), str(out), "--key-scale", "1.25", "--activation", "silu", "--sinks", "vit_tau=50"]
    assert main(command) == 0
    table = capsys.readouterr().out
    for line in (
        "3      sink_gates.0  20    6 x 20  2 x 6",
        "from sink_cfg.json: gate_layers: 3, 6, 7, 10, 19",
        "the first gate takes the first layer stated",
        "vit_dims = [650] (sink_cfg.json: vit_dims)",
        "vit_tau = 50.0 (not from the file)",
        "activation = silu",
        "key_scale = 1.25",
        "not used  model.mm_projector.0.weight",
        "not used  sink_cfg.json: prior = 1.25",
        f"written   {out}",
    ):
        assert line in table
    read = read_gates(out)
    assert (read.gate.layers, read.gate.key_scale, read.gate.activation) == (STACK, 1.25, "silu")
    assert read.sinks == SinkConfig(vit_dims=(650,), vit_tau=50.0)
    command[3] = str(tmp_path / "again.safetensors")
    assert main([*command, "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert [row["layer"] for row in described["gates"]] == list(STACK) and described["applied"]["activation"] == "silu"
    command[3] = str(tmp_path / "none.safetensors")
    assert main([*command, "--layers", "1"]) == 65
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "none.safetensors").exists()


# ------------------------------------------------------------------------------------------------ layouts of single files


def _published(gates: PortableGates, names: dict[str, str]) -> dict[str, torch.Tensor]:
    """A state dict whose modules are called `names[role]`; {l} stands for the layer."""
    return {
        f"{names[name.split('.')[0]].format(l=layer)}.{name.split('.')[1]}": torch.tensor(array)
        for layer, tensors in to_torch_layout(gates.parameters, gates.gate.layers).items()
        for name, array in tensors.items()
    }


BY_LAYER = {
    "portable": {"norm": "{l}.norm", "fc1": "{l}.fc1", "fc2": "{l}.fc2"},
    "gates": {"norm": "gates.{l}.ln", "fc1": "gates.{l}.linear1", "fc2": "gates.{l}.linear2"},
    "sequential": {"norm": "layers.{l}.gate.net.0", "fc1": "layers.{l}.gate.net.1", "fc2": "layers.{l}.gate.net.3"},
    "prefixed": {"norm": "model.layers.{l}.layer_norm", "fc1": "model.layers.{l}.fc1", "fc2": "model.layers.{l}.fc2"},
    "numbered names": {"norm": "gate_layer{l}.a", "fc1": "gate_layer{l}.b", "fc2": "gate_layer{l}.c"},
}


@pytest.mark.parametrize("layout", BY_LAYER)
def test_files_with_gates_by_layer(tmp_path, layout):
    gates, path = make_gates(), tmp_path / "gates.pt"
    torch.save(_published(gates, BY_LAYER[layout]), path)
    assert_same(import_gates(path, gate=gates.gate, sinks=lambda _: SINKS, backbone=gates.backbone).gates, gates)


def test_nested_state_dicts_and_layers_as_numbers(tmp_path):
    gates, path = make_gates(), tmp_path / "gates.pt"
    layers = to_torch_layout(gates.parameters, gates.gate.layers)
    nested = {layer: {name: torch.tensor(a) for name, a in named.items()} for layer, named in layers.items()}
    for content in (nested, {"state_dict": nested, "step": 3}):
        torch.save(content, path)
        assert_same(import_gates(path, gate=gates.gate, sinks=lambda _: SINKS, backbone=gates.backbone).gates, gates)


# -------------------------------------------------------------------------------------------- damaged, hostile and other files


class _Evil:
    def __reduce__(self):
        return (os.system, ("touch executed",))


def _within_itself() -> dict:
    tree: dict = {}
    tree["again"] = tree
    return tree


WIDER = torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.Linear(8, 4), torch.nn.Linear(4, 2))
GATE = {f"gate.{name}": tensor for name, tensor in plain_gate(0).state_dict().items()}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model.embed.weight": torch.zeros(4, 4)}, r"not a gate file: .* found model\.embed\.weight \[4, 4\]"),
        ({"3.norm.weight": torch.zeros(20)}, r"not a gate file: .* found 3\.norm\.weight \[20\]"),
        ({}, "found nothing"),
        (torch.zeros(3), "expected a state dict, found Tensor"),
        (_Evil(), "it holds objects other than tensors and plain data"),
        (_within_itself(), "nested deeper than 8 levels"),
        (GATE | {"gate.1.bias": torch.zeros(7)}, r"gate\.1\.bias has shape \[7\], its weight \[6, 20\] needs 6"),
        (GATE | {"gate.1.bias": torch.full((6,), torch.nan)}, r"gate\.1\.bias holds values that are not finite"),
        (GATE | {"gate.prior": torch.ones(2)}, r"gate\.prior \[2\] lies within the gate gate .* --ignore gate\.prior"),
        (GATE | {"gate.5.weight": torch.zeros(WIDTH_IN)}, "below gate fit each other in several ways"),
        (GATE | {"gate.0.weight": torch.zeros(1).expand(WIDTH_IN)}, r"gate\.0\.weight is sparse, quantized or without data"),
        (GATE | {"gate.0.weight": torch.zeros(WIDTH_IN).to_sparse()}, r"gate\.0\.weight is sparse, quantized or without data"),
        (GATE | {"gate.0.weight": torch.zeros(WIDTH_IN, device="meta")}, "sparse|not a PyTorch file"),
        (GATE | {"gate.0.weight": torch.zeros(WIDTH_IN, dtype=torch.int8)}, r"gate\.0\.weight is int8"),
        (GATE | {"head": torch.zeros(1).expand(1 << 29)}, "too many for gates"),
        (GATE | {"other.fc2.weight": torch.zeros(2, 6)}, r"other\.fc2\.weight \[2, 6\] looks like a part of a gate"),
        (GATE | tensors_of({"wider": WIDER}), "differ in shape"),
        (
            {name: tensor for name, tensor in list_of(3).items() if name != "sink_gates.1.3.bias"},
            r"incomplete: sink_gates\.1\.3\.bias is missing, while sink_gates\.0\.3 has one",
        ),
    ],
)  # fmt: skip
def test_other_contents_are_refused(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    torch.save(content, "gates.pt")
    with pytest.raises(InputError, match=message) as caught:
        import_gates("gates.pt", layers=(10,))
    assert "\n" not in str(caught.value) and "gates.pt" in str(caught.value)
    assert not (tmp_path / "executed").exists()


def test_a_portable_file_is_not_imported_again(tmp_path):
    write_gates(tmp_path / "own.safetensors", make_gates((1, 3)))
    with pytest.raises(InputError, match=r"a portable gate file already, .* use it as it is, with --gates"):
        import_gates(tmp_path / "own.safetensors")


def test_a_tensor_within_a_gate_can_be_left_out(tmp_path):
    path = tmp_path / "gates.pt"
    torch.save(GATE | {"gate.prior": torch.ones(2)}, path)
    found = import_gates(path, layers=(10,), ignore=["gate.prior"])
    assert found.described["not_used"] == ["gate.prior"] and "not used  gate.prior" in as_table(found.described)
    with pytest.raises(InputError, match=r"no tensor gate.other to ignore"):
        import_gates(path, layers=(10,), ignore=["gate.other"])


def test_gates_of_three_outputs_need_their_grouping(tmp_path):
    gates, path = make_gates(), tmp_path / "gates.pt"
    torch.save(_published(gates, BY_LAYER["portable"]), path)
    with pytest.raises(InputError, match="3 outputs, grouping v_sink_rest needs 2"):
        import_gates(path)


def test_files_and_folders_that_hold_no_gates_are_refused(tmp_path):
    path = tmp_path / "gates.pt"
    torch.save(GATE, path)
    whole = path.read_bytes()
    for damaged in (b"", whole[:-100], whole[:40], b"text", b"version https://git-lfs.github.com/spec/v1\n"):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"not a PyTorch file of plain tensors|Git LFS pointer"):
            import_gates(path, layers=(10,))
    for name, message in (
        ("none.pt", "no such gate file or folder"),
        ("empty", "no gate file in it"),
        ("two", "give one of a.pt, b.bin"),
        ("sets", "give one of L10"),
    ):
        if name != "none.pt":
            (tmp_path / name).mkdir()
        if name == "two":
            for other in ("a.pt", "b.bin"):
                torch.save(GATE, tmp_path / name / other)
        if name == "sets":
            gate_folder(tmp_path / name, GATE, name="L10")
        with pytest.raises(InputError, match=message):
            import_gates(tmp_path / name)
    folder = gate_folder(tmp_path, GATE, name="L10")
    for text in ("{", '{"layers": NaN}', "[10]", '{"layers": 10, "layers": 11}'):
        (folder / "sink_cfg.json").write_text(text)
        with pytest.raises(InputError, match=r"sink_cfg.json"):
            import_gates(folder)
