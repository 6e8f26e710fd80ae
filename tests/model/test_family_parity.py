"""Qwen-VL, InternVL, Gemma 3 and SmolVLM against Hugging Face: logits, gates, answers, bytes; images of any size."""

from functools import cache

import jax
import numpy as np
import pytest
import torch
from family_models import CONFIGS, IMAGE, family_inputs, preprocessor, save_family, tiny_family
from hf_models import state_arrays
from PIL import Image

import lsg_jax
from converters.convert import convert, tree_from_tensors
from converters.export import export
from converters.hf_config import model_config
from converters.torch_gate import attach
from lsg_jax.config import GateConfig, SinkConfig
from lsg_jax.gating.portable import PortableGates
from lsg_jax.methods.gates import Gates
from lsg_jax.vlm import VLM

TOLERANCE = 1e-4  # absolute; logits are of order 1
SIZES = [(60, 200), (77, 90), (300, 101), (42, 42), (99, 100), (200, 60)]  # width, height
TWO = [SIZES[:2], SIZES[2:3], SIZES[3:5], []]  # images of each row
ONE = [[size] for size in SIZES[:4]]


def sinks_of(name):
    """A threshold that some of the patches reach."""
    return SinkConfig(vit_dims=(3, 7), vit_tau=4.0 if name == "qwen2_vl" else 1.5)


@cache
def pair(name):
    """The HF model, and ours with the same weights."""
    torch.set_num_threads(1)
    hf = tiny_family(name)
    config = model_config(hf.config.to_diff_dict(), preprocessor=preprocessor(name))
    return hf, VLM(config, tree_from_tensors(config, state_arrays(hf)))


def images(rows, seed=0):
    rng = np.random.default_rng(seed)
    return [[Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)) for width, height in row] for row in rows]


def both(name, rows, side):
    """Our arrays and the same as tensors."""
    arrays = family_inputs(name, images(rows), side)
    return arrays, {key: torch.tensor(np.asarray(value)) for key, value in arrays.items()}


def moved(vlm, method):
    """Gates away from their initial values."""
    start = method.initial(vlm.config, vlm.frozen, jax.random.key(0))
    return jax.tree.map(lambda leaf: np.asarray(leaf + 0.3 * jax.random.normal(jax.random.key(1), leaf.shape)), start)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    ("rows", "side"), [pytest.param(ONE, "left", marks=pytest.mark.soak), (TWO, "right")], ids=["left", "right"]
)
def test_logits_equal_hugging_face(name, rows, side):
    """Rows with none to two images and padding on the right; with it on the left the gates and answers below are compared."""
    hf, vlm = pair(name)
    arrays, tensors = both(name, rows, side)
    with torch.no_grad():
        expected = hf(**tensors).logits.numpy()
    ours, valid = vlm.logits(**arrays), arrays["attention_mask"] == 1
    assert np.abs(expected[valid]).max() > 0.3
    np.testing.assert_allclose(ours[valid], expected[valid], rtol=0, atol=TOLERANCE)


OTHER_DECODERS = ("internvl-qwen2", "internvl-llama")
"""Of decoders whose gates test_gated_parity has."""
GATED = [pytest.param(name, marks=[pytest.mark.soak] * (name in OTHER_DECODERS)) for name in CONFIGS]


@pytest.mark.parametrize("name", GATED)
def test_gates_and_their_gradients_equal_those_in_pytorch(name):
    """Keys are scaled after their norm, in local and global layers, and in layers that deepstack adds to."""
    hf, vlm = pair(name)
    arrays, tensors = both(name, TWO[:3], "left")
    method, sinks = Gates(GateConfig(layers=(0, 1, 3))), sinks_of(name)
    trained = moved(vlm, method)
    gated = vlm.with_method(method, trained, sinks=sinks)
    place = gated.visual_tokens(**arrays)
    np.testing.assert_array_equal(place.mask, arrays["input_ids"] == IMAGE)
    assert 0 < place.v_sink.sum() < place.mask.sum()
    last = arrays["input_ids"].shape[1] - 2  # two tokens of answer
    labels = np.where(np.arange(last + 2) >= last, arrays["input_ids"], -100)
    gates = PortableGates(method.gate, sinks, trained)
    with attach(hf, gates, gate_position=torch.full((len(labels),), last - 1)) as handle:
        logits = hf(**tensors).logits
        answers = logits[:, last - 1 : -1].flatten(0, 1), tensors["input_ids"][:, last:].flatten()
        expected = torch.nn.functional.cross_entropy(*answers)
        expected.backward()
    with torch.no_grad():
        assert (hf(**tensors).logits - logits).abs()[:, last - 1].max() > 0.01
    loss, gradients = gated.loss_and_grads(labels=labels, **arrays)
    assert abs(loss - expected.item()) < TOLERANCE
    for layer, named in gradients.items():
        reference = dict(handle.gates[str(layer)].named_parameters())
        for tensor, gradient in named.items():
            np.testing.assert_allclose(gradient, reference[tensor].grad.numpy(), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", GATED)
def test_gated_answers_equal_hugging_face(name):
    hf, vlm = pair(name)
    method = Gates(GateConfig(layers=(1, 3)))
    trained = moved(vlm, method)
    gated = vlm.with_method(method, trained, sinks=sinks_of(name))
    arrays, tensors = both(name, TWO, "left")
    with torch.no_grad(), attach(hf, PortableGates(method.gate, sinks_of(name), trained)) as handle:
        made = hf.generate(**tensors, max_new_tokens=10, do_sample=False)
    expected = made[:, arrays["input_ids"].shape[1] :].numpy()
    np.testing.assert_array_equal(gated.generate_ids(**arrays, max_new_tokens=10), expected)
    assert handle.ratios.keys() == {1, 3}


@pytest.fixture(scope="module", params=[name for name in CONFIGS if name not in OTHER_DECODERS])
def folder(request, tmp_path_factory):
    """A checkpoint as on the Hub, and the model folder of it."""
    root = tmp_path_factory.mktemp("family") / request.param
    save_family(request.param, tiny_family(request.param), root / "hf")
    convert(root / "hf", root / "model")
    return root


def test_export_gives_back_the_bytes(folder):
    export(folder / "model", folder / "back")
    assert (folder / "back/model.safetensors").read_bytes() == (folder / "hf/model.safetensors").read_bytes()
    for path in (folder / "hf").iterdir():
        assert (folder / "back" / path.name).read_bytes() == path.read_bytes()


def test_text_and_images_to_text(folder):
    """A prompt with two images beside one with another and one with none, and alone."""
    vlm = lsg_jax.load(folder / "model")
    shown, prompts = images(TWO)[1:], ["What?", "Is <image> like <image>?", "Hello"]
    together = vlm.generate(shown, prompts, 6)
    assert together[1:2] == vlm.generate(shown[1:2], prompts[1:2], 6)
    assert len(set(together)) == 3
