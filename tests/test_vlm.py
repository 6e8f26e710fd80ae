"""The Python contract: `lsg_jax.load` and the calls of VLM, on a converted folder."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from PIL import Image

import lsg_jax
from lsg_jax.config import GateConfig, SinkConfig
from lsg_jax.errors import CheckpointError, ConfigError, InputError
from lsg_jax.gating.portable import TORCH_NAMES, PortableGates, write_gates
from lsg_jax.opening import load_backbone

LENGTH, PATCHES, IMAGE = 60, 49, 3
SINKS = SinkConfig(criterion="norm", vit_tau=10.0)


def gates(layers=(1, 4), width=64, seed=0):
    """Portable gates far from their start."""
    rng = np.random.default_rng(seed)
    n = len(layers)
    shapes = {
        "norm_scale": (n, width),
        "norm_bias": (n, width),
        "fc1_kernel": (n, width, 8),
        "fc1_bias": (n, 8),
        "fc2_kernel": (n, 8, 2),
        "fc2_bias": (n, 2),
    }
    return PortableGates(
        gate=GateConfig(layers=layers, width=8),
        sinks=SINKS,
        parameters={name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()},
    )


@pytest.fixture(scope="module")
def base(tiny_model):
    return lsg_jax.load(tiny_model, sinks=SINKS)


@pytest.fixture(scope="module")
def gate_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("gates") / "g.safetensors"
    write_gates(path, gates())
    return path


@pytest.fixture(scope="module")
def gated(tiny_model, gate_file):
    return lsg_jax.load(tiny_model, gate_file)


@pytest.fixture(scope="module")
def arrays():
    """Two rows with an image, the second padded on the right."""
    rng = np.random.default_rng(0)
    ids = np.concatenate([np.full((2, 1), 1), np.full((2, PATCHES), IMAGE), rng.integers(4, 260, (2, 10))], axis=1)
    mask = np.ones_like(ids)
    ids[1, -3:], mask[1, -3:] = 0, 0
    return ids, rng.normal(size=(2, 3, 56, 56)).astype(np.float32), mask


def test_logits(base, gated, arrays):
    ids, pixels, mask = arrays
    plain, with_gates = base.logits(ids, pixels, mask), gated.logits(ids, pixels, mask)
    assert plain.shape == (2, LENGTH, 260) and plain.dtype == np.float32
    assert np.abs(plain - with_gates)[mask.astype(bool)].max() > 1e-3
    # the default gate position is the last unpadded token
    np.testing.assert_array_equal(with_gates, gated.logits(ids, pixels, mask, [LENGTH - 1, LENGTH - 4]))
    assert np.abs(with_gates - gated.logits(ids, pixels, mask, [52, 52])).max() > 1e-4
    np.testing.assert_array_equal(gated.plain().logits(ids, pixels, mask), plain)


def test_loss_and_grads_equal_finite_differences(tiny_model, arrays):
    ids, pixels, mask = arrays
    labels = np.where(mask.astype(bool) & (np.arange(LENGTH) >= 54), ids, -100)
    loss_of = lambda source: lsg_jax.load(tiny_model, source).loss_and_grads(ids, pixels, labels, mask)
    loss, gradients = loss_of(gates())
    assert isinstance(loss, float) and set(gradients) == {1, 4}
    assert {name: g.shape for name, g in gradients[4].items()} == {
        "norm.weight": (64,),
        "norm.bias": (64,),
        "fc1.weight": (8, 64),
        "fc1.bias": (8,),
        "fc2.weight": (2, 8),
        "fc2.bias": (2,),
    }
    # the loss by hand, from the logits at the gate position of a training example
    logits = lsg_jax.load(tiny_model, gates()).logits(ids, pixels, mask, [53, 53])
    logp = np.asarray(jax.nn.log_softmax(logits[:, :-1]))
    targets = labels[:, 1:]
    picked = [-logp[b, t, targets[b, t]] for b, t in zip(*np.nonzero(targets != -100), strict=True)]
    np.testing.assert_allclose(loss, np.mean(picked), rtol=1e-5)
    # one direction through all leaves: the slope along the gradient is its norm
    norm, step, moved = np.sqrt(sum((g**2).sum() for layer in gradients.values() for g in layer.values())), 0.01, {}
    for sign in (1, -1):
        parameters = {name: leaf.copy() for name, leaf in gates().parameters.items()}
        for i, layer in enumerate((1, 4)):
            for leaf, name in TORCH_NAMES.items():
                parameters[leaf][i] += sign * step * (gradients[layer][name].T / norm)
        moved[sign] = loss_of(dataclasses.replace(gates(), parameters=parameters))[0]
    np.testing.assert_allclose((moved[1] - moved[-1]) / (2 * step), norm, rtol=0.02)


def test_generate_ids_is_the_argmax_of_logits(gated, arrays):
    ids, pixels, mask = arrays
    tokens = gated.generate_ids(ids, pixels, mask, max_new_tokens=3)
    assert tokens.dtype == np.int32 and tokens.shape[1] <= 3
    logits = gated.logits(ids, pixels, mask)
    np.testing.assert_array_equal(tokens[:, 0], [logits[0, LENGTH - 1].argmax(), logits[1, LENGTH - 4].argmax()])
    # the smallest lead of a chosen token, from the logits of the finished text
    again, _, leads, ratios = gated.generate_in_full(gated.batch(ids, pixels, mask), 3)
    np.testing.assert_array_equal(again, tokens)
    expected = gated.gate_ratios(ids, pixels, mask)
    np.testing.assert_allclose(ratios, [expected[1], expected[4]], atol=1e-6)
    whole = gated.logits(np.concatenate([ids[:1], tokens[:1]], axis=1), pixels[:1], gate_position=[LENGTH - 1])[
        0, LENGTH - 1 : -1
    ]
    best = np.sort(whole, axis=-1)
    np.testing.assert_allclose(leads[0], (best[:, -1] - best[:, -2]).min(), atol=1e-4)


def test_generate_text(gated, tmp_path):
    picture = Image.new("RGB", (80, 60), (200, 30, 30))
    picture.save(tmp_path / "a.png")
    texts = gated.generate([picture, tmp_path / "a.png", None], ["What?", "What?", "What?"], max_new_tokens=4)
    assert texts[0] == texts[1] and all(isinstance(text, str) for text in texts)
    assert gated.generate([[picture], (tmp_path / "a.png",), []], ["What?"] * 3, max_new_tokens=4) == texts
    assert gated.generate([], []) == []
    with pytest.raises(InputError, match="1 entries of images for 2 prompts: give one for each"):
        gated.generate([None], ["a", "b"])


@pytest.mark.parametrize(("images", "prompts"), [("photo.jpg", "hi"), (Image.new("RGB", (8, 8)), ["hi"]), (["a.png"], "hi")])
def test_lists_that_are_none_are_told(gated, images, prompts):
    with pytest.raises(InputError, match=r'must be a list .* generate\(\["photo.jpg"\], \["What is it\?"\]\)'):
        gated.generate(images, prompts)


@pytest.mark.parametrize("ids", ["photo.jpg", [1, 2, 3], [[1, 2], [3]], [Image.new("RGB", (8, 8))], None, [["a", "b"]]])
def test_what_is_no_token_ids_is_told_where_they_come_from(gated, ids):
    with pytest.raises(InputError, match=r"input_ids must be token ids \[B, T\], not .*processor.*vlm.generate takes"):
        gated.logits(ids)


@pytest.mark.parametrize(
    ("shown", "prompt", "message"),
    [
        ([None], "x", "an image is of type NoneType; give a path, bytes or a PIL image"),
        (3, "x", "an image is of type int"),
        (None, 3, "prompt 1 is of type int; give a text"),
        (None, "<image> x", "prompt 1: <image> in the text, but there is no image"),
        (Image.new("RGB", (8, 8)), "Is <image> like <image>?", "prompt 1: 2 <image> tags in the text for 1 image"),
        ([Image.new("RGB", (8, 8))] * 2, "<image> x", "prompt 1: 1 <image> tag in the text for 2 images"),
    ],
)
def test_prompts_that_cannot_be_asked(gated, shown, prompt, message):
    with pytest.raises(InputError, match=re.escape(message)):
        gated.generate([shown], [prompt])


def test_v_sinks_and_ratios(base, gated, arrays, tiny_model):
    ids, pixels, mask = arrays
    found = base.v_sinks(pixels)
    assert found.shape == (2, PATCHES) and found.dtype == bool
    ratios = gated.gate_ratios(ids, pixels, mask)
    assert set(ratios) == {1, 4} and ratios[1].shape == (2, 2)
    np.testing.assert_allclose(ratios[4].sum(-1), 1, rtol=1e-6)
    assert base.gate_ratios(ids, pixels, mask) == {}
    with pytest.raises(ConfigError, match="no V-sink dimensions are known"):
        lsg_jax.load(tiny_model).v_sinks(pixels)


def test_sink_settings_come_from_the_gates_unless_given(tiny_model, gate_file):
    assert lsg_jax.load(tiny_model).config.sinks == SinkConfig()
    assert lsg_jax.load(tiny_model, gate_file).config.sinks == SINKS
    own = SinkConfig(criterion="dim_abs", vit_dims=(7,), vit_tau=1.0)
    assert lsg_jax.load(tiny_model, gate_file, sinks=own).config.sinks == own


def test_text_only_rows(base, gated, arrays):
    ids, pixels, mask = arrays
    text = np.array([[1, 50, 60, 70]])
    np.testing.assert_array_equal(gated.logits(text, None), base.logits(text, None))
    # one image for the one row that has image tokens
    mixed = ids.copy()
    mixed[1][mixed[1] == IMAGE] = 9
    np.testing.assert_array_equal(gated.logits(mixed, pixels[:1], mask), gated.logits(mixed, pixels, mask))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda i, p, m: (i[:, :-11], p, m[:, :-11]), r"row 0 has 48 image tokens, the tokens of its images are \[49\]"),
        (lambda i, p, m: (i, None, m), "row 0 has 49 image tokens, but there is no image"),
        (lambda i, p, m: (i, p[:, :, :50], m), r"pixel_values must be \[images, 3, 56, 56\]"),
        (lambda i, p, m: (i, p[0], m), r"pixel_values must be .*, got \[3, 56, 56\]"),
        (lambda i, p, m: (i, np.concatenate([p, p]), m), "4 images, but the image tokens of all rows are those of 2"),
        (lambda i, p, m: (i[0], p, m), "input_ids must be"),
        (lambda i, p, m: (i, p, m[:, 1:]), "attention_mask is"),
        (lambda i, p, m: (i, p, m * 0), "row 0 is all padding"),
        (lambda i, p, m: (i + 250 * (i > 100), p, m), "is outside the vocabulary of 260"),
    ],
)
def test_wrong_arrays_are_refused(base, arrays, change, message):
    with pytest.raises(InputError, match=message):
        base.logits(*change(*arrays))


def test_wrong_gates_are_refused(tiny_model, base, arrays, tmp_path):
    write_gates(tmp_path / "wide.safetensors", gates(width=32))
    write_gates(tmp_path / "deep.safetensors", gates(layers=(9,)))
    for source, kind, message in [
        (tmp_path / "wide.safetensors", InputError, "the gates read a width of 32, the language model has 64"),
        (tmp_path / "deep.safetensors", InputError, "the gates are for layer 9, the language model has layers 0 to 5"),
        (tmp_path, InputError, "neither a run folder"),
        (tmp_path / "none.safetensors", InputError, "none.safetensors"),
    ]:
        with pytest.raises(kind, match=message):
            lsg_jax.load(tiny_model, source)
    with pytest.raises(InputError, match="needs gates"):
        base.loss_and_grads(*arrays[:2], arrays[0])


def test_wrong_folders_are_refused(tiny_hf_folder, tmp_path):
    with pytest.raises(InputError, match="lsg convert"):
        lsg_jax.load(tiny_hf_folder)
    with pytest.raises(InputError, match="nothing"):
        lsg_jax.load(tmp_path / "nothing")


def test_dtype(tiny_model, base, arrays):
    ids, pixels, mask = arrays
    half = lsg_jax.load(tiny_model, dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half.frozen)} == {"bfloat16"}
    real = mask.astype(bool)
    exact, rounded = base.logits(ids, pixels, mask)[real], half.logits(ids, pixels, mask)[real]
    # bfloat16 keeps 8 bits: the logits agree to a few percent of their spread, and are not the same
    assert 0 < np.abs(exact - rounded).mean() < 0.05 * exact.std()


@pytest.mark.parametrize("dtype", ["half a byte", "uint8", "int4", "float64", int, np.int32])
def test_weights_are_not_opened_in_another_dtype(tiny_model, dtype):
    with pytest.raises(ConfigError, match="weights are opened in float32, bfloat16, float16 or int8"):
        lsg_jax.load(tiny_model, dtype=dtype)


def test_a_run_of_another_backbone_is_refused(tiny_model, tmp_path):
    import json

    from lsg_jax.checkpoint import RunRecord

    run = RunRecord({}, SinkConfig(), "0" * 64, "", 1, model_name="", versions={}, devices="", starts=())
    (tmp_path / "run.json").write_text(json.dumps(run.as_json()))
    with pytest.raises(CheckpointError, match="trained on another backbone"):
        lsg_jax.load(tiny_model, tmp_path)


def test_damaged_backbone_is_named(tiny_model, tmp_path):
    import shutil

    copy = tmp_path / "model"
    shutil.copytree(tiny_model, copy)
    chunk = max((p for p in copy.rglob("*") if p.is_file() and "/c/" in str(p)), key=lambda p: p.stat().st_size)
    data = bytearray(chunk.read_bytes())
    data[100] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(CheckpointError, match="lsg verify"):
        load_backbone(copy)
