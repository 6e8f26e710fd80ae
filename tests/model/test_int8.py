"""8-bit weights: rounding, and every family against Hugging Face with the same rounded weights in float32."""

import json

import jax
import numpy as np
import pytest
import torch
import transformers
from family_models import CONFIGS, family_inputs, save_family, tiny_family
from hf_models import IMAGE_TOKEN, save_tiny, tiny_hf
from PIL import Image
from safetensors.numpy import load_file

import lsg_jax
from converters.convert import convert
from converters.export import export
from converters.plant_sinks import PlantSettings, plant
from converters.quantize import dequantize, quantize
from converters.torch_gate import attach
from lsg_jax.checkpoint import read_manifest, verify_base
from lsg_jax.config import GateConfig, SinkConfig
from lsg_jax.errors import ConfigError, InputError
from lsg_jax.gating.portable import PortableGates
from lsg_jax.inspection import describe
from lsg_jax.methods.full import Full
from lsg_jax.methods.gates import Gates

TOLERANCE = 1e-4  # absolute; logits are of order 1
LLAVAS = {
    "llava-llama": ("clip", "llama", False),
    "llava-mistral": ("clip", "mistral", False),
    "llava-phi3": ("clip", "phi3", False),  # its projections are fused in the file
    "llava-qwen2-tied": ("siglip", "qwen2", True),
}


@pytest.mark.parametrize(("shape", "in_axes"), [((6, 4), 1), ((5, 2, 3), 1), ((2, 3, 7), 2)])
def test_a_rounded_kernel_is_within_half_a_step_of_each_channel(shape, in_axes):
    rng = np.random.default_rng(0)
    outputs, inputs = shape[in_axes:], tuple(range(in_axes))
    kernel = (rng.normal(size=shape) * np.exp(rng.normal(size=outputs))).astype(np.float32)
    rounded, scale = quantize(kernel, in_axes)
    assert rounded.dtype == np.int8 and scale.dtype == np.float32 and scale.shape == outputs
    np.testing.assert_array_equal(np.abs(rounded.astype(int)).max(inputs), 127)
    assert (np.abs(dequantize(rounded, scale) - kernel) <= scale * 0.5001).all()


def test_a_channel_of_zeros_stays_zero():
    kernel = np.array([[0, 1], [0, -3]], np.float32)
    rounded, scale = quantize(kernel, 1)
    np.testing.assert_array_equal(dequantize(rounded, scale)[:, 0], 0)
    np.testing.assert_allclose(scale, [1, 3 / 127], rtol=1e-6)


NAMES = [*LLAVAS, *(name for name in CONFIGS if name != "internvl-llama")]
DEFAULT = {"llava-phi3", "llava-qwen2-tied", "qwen2_5_vl", "qwen3_vl", "internvl-qwen3", "gemma3", "smolvlm"}
"""Every family; the others have decoders that `llava` or one of these has, and are in `pytest -m soak`."""


@pytest.fixture(scope="module", params=[pytest.param(name, marks=[pytest.mark.soak] * (name not in DEFAULT)) for name in NAMES])
def folders(request, tmp_path_factory):
    """(name, folder): `hf` the checkpoint, `model` its 8-bit model, `back` what that exports to float32."""
    root = tmp_path_factory.mktemp("int8") / request.param
    if request.param in LLAVAS:
        vision, text, tied = LLAVAS[request.param]
        save_tiny(tiny_hf(vision, text, tied=tied), root / "hf")
    else:
        save_family(request.param, tiny_family(request.param), root / "hf")
    convert(root / "hf", root / "model", dtype="int8")
    export(root / "model", root / "back", dtype="float32")
    return request.param, root


def inputs(name):
    """Arrays as the family's HF processor returns them."""
    rng = np.random.default_rng(0)
    if name not in LLAVAS:
        sizes = [(60, 100), (77, 90)]
        shown = [[Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))] for width, height in sizes]
        return family_inputs(name, shown, "left")
    ids = np.concatenate([np.full((2, 1), 1), np.full((2, 9), IMAGE_TOKEN), rng.integers(4, 260, (2, 8))], axis=1)
    pixels = rng.normal(size=(2, 3, 42, 42)).astype(np.float32)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "pixel_values": pixels}


def reference(folder):
    """The HF model of a folder, in float32."""
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = getattr(transformers, config.architectures[0])
    return kind.from_pretrained(folder, dtype=torch.float32).eval()


def test_logits_equal_those_of_the_same_weights_in_float32(folders):
    name, root = folders
    torch.set_num_threads(1)
    arrays = inputs(name)
    tensors = {key: torch.tensor(np.asarray(value)) for key, value in arrays.items()}
    with torch.no_grad():
        expected = reference(root / "back")(**tensors).logits.numpy()
        unrounded = reference(root / "hf")(**tensors).logits.numpy()
    valid = arrays["attention_mask"] == 1
    ours = lsg_jax.load(root / "model", dtype="float32").logits(**arrays)
    assert np.abs(expected - unrounded)[valid].max() > 100 * TOLERANCE  # rounding shows
    np.testing.assert_allclose(ours[valid], expected[valid], rtol=0, atol=TOLERANCE)


def test_the_layers_take_a_byte_a_weight(folders):
    _, root = folders
    assert verify_base(root / "model") == []
    leaves = read_manifest(root / "model").leaves
    kernels = {name: leaf.dtype for name, leaf in leaves.items() if name.endswith("kernel")}
    of_layers = {name for name in kernels if name.startswith("language_model/layers/")}
    assert len(of_layers) == 7
    assert {name for name, dtype in kernels.items() if dtype == "int8"} == of_layers
    assert {leaf.dtype for name, leaf in leaves.items() if name not in of_layers} == {"bfloat16", "float32"}
    assert {name for name, leaf in leaves.items() if leaf.dtype == "float32"} == {f"{name}_scale" for name in of_layers}


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """A checkpoint, and its model folders `float32` and `int8`."""
    root = tmp_path_factory.mktemp("int8-llava")
    save_tiny(tiny_hf("clip", "llama"), root / "hf")
    for dtype in ("float32", "int8"):
        convert(root / "hf", root / dtype, dtype=dtype)
    return root


def test_gradients_of_gates_equal_those_in_pytorch(llava, tmp_path):
    export(llava / "int8", tmp_path / "back", dtype="float32")
    hf, vlm = reference(tmp_path / "back"), lsg_jax.load(llava / "int8", dtype="float32")
    method, sinks = Gates(GateConfig(layers=(0, 3))), SinkConfig(vit_dims=(3, 7), vit_tau=1.5)
    start = method.initial(vlm.config, vlm.frozen, jax.random.key(0))
    trained = jax.tree.map(lambda leaf: np.asarray(leaf + 0.3 * jax.random.normal(jax.random.key(1), leaf.shape)), start)
    arrays = inputs("llava-llama")
    last = arrays["input_ids"].shape[1] - 2  # two tokens of answer
    labels = np.where(np.arange(last + 2) >= last, arrays["input_ids"], -100)
    tensors = {key: torch.tensor(value) for key, value in arrays.items()}
    with attach(hf, PortableGates(method.gate, sinks, trained), gate_position=torch.full((2,), last - 1)) as handle:
        logits = hf(**tensors).logits[:, last - 1 : -1].flatten(0, 1)
        expected = torch.nn.functional.cross_entropy(logits, tensors["input_ids"][:, last:].flatten())
        expected.backward()
    loss, gradients = vlm.with_method(method, trained, sinks=sinks).loss_and_grads(labels=labels, **arrays)
    assert abs(loss - expected.item()) < TOLERANCE
    for layer, named in gradients.items():
        of = dict(handle.gates[str(layer)].named_parameters())
        assert any(np.abs(gradient).max() > 10 * TOLERANCE for gradient in named.values())
        for tensor, gradient in named.items():
            np.testing.assert_allclose(gradient, of[tensor].grad.numpy(), rtol=0, atol=TOLERANCE)


def test_export_writes_bfloat16_and_says_so(llava, tmp_path):
    export(llava / "int8", tmp_path / "back")
    export(llava / "int8", tmp_path / "exact", dtype="float32")
    carried = read_manifest(llava / "int8").carried  # the model does not use them: as they were
    rounded, exact = (load_file(tmp_path / name / "model.safetensors") for name in ("back", "exact"))
    rounded, exact = ({name: array for name, array in of.items() if name not in carried} for of in (rounded, exact))
    assert {array.dtype.name for array in rounded.values()} == {"bfloat16"}
    assert {array.dtype.name for array in exact.values()} == {"float32"}
    for name, array in exact.items():
        np.testing.assert_array_equal(array.astype(rounded[name].dtype), rounded[name])
    assert json.loads((tmp_path / "back/config.json").read_text())["dtype"] == "bfloat16"


def test_what_8_bit_weights_cannot_do_is_refused_in_words(llava, tmp_path):
    for dtype in ("int8", np.int8, np.dtype("int8")):  # weights that are only cast to int8 would be zeros
        with pytest.raises(InputError, match="float32: holds no 8-bit weights; convert its source with --dtype int8"):
            lsg_jax.load(llava / "float32", dtype=dtype)
    vlm = lsg_jax.load(llava / "int8", dtype=np.int8)
    assert vlm.frozen["language_model"]["embed_tokens"].dtype == "bfloat16"
    with pytest.raises(ConfigError, match="whose weights are 8-bit here"):
        Full().for_model(vlm.config)
    with pytest.raises(ConfigError, match="has 8-bit weights; plant sinks in the same model at bfloat16 or float32"):
        plant(llava / "int8", tmp_path / "planted", PlantSettings(layers=(1,)))


def test_inspect_shows_the_dtypes_and_counts_no_scales(llava):
    found = [describe(llava / name) for name in ("float32", "int8")]
    assert found[0]["parameters"] == found[1]["parameters"]
    assert found[1]["dtype"] == "bfloat16, int8"
