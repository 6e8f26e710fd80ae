"""The gather of visual tokens against matrix products, and what `VLM.visual_tokens` says of a sequence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import lsg_jax
from lsg_jax.config import GateConfig, SinkConfig
from lsg_jax.data.layout import lay_out
from lsg_jax.errors import InputError
from lsg_jax.methods.gates import Gates
from lsg_jax.methods.method_model import abstract_model, assemble
from lsg_jax.model.loss import answer_loss
from lsg_jax.model.multimodal import gather, gather_any


@pytest.mark.parametrize("seed", range(3))
def test_gather_is_a_product_with_the_weights(seed):
    """Against dense matrices [T, N]: with one source or four, repeated sources, and sources that are missing."""
    rng = np.random.default_rng(seed)
    tokens, marked = rng.normal(size=(2, 7, 5)).astype(np.float32), rng.random((2, 7)) < 0.3
    for k in (1, 4):
        source = rng.integers(-1, 7, (2, 9, k)).astype(np.int32)
        weight = np.where(source >= 0, rng.random(source.shape), 0.0).astype(np.float32)
        matrix = np.zeros((2, 9, 7), np.float32)
        np.add.at(matrix, (*np.indices(source.shape)[:2], np.maximum(source, 0)), weight)
        np.testing.assert_allclose(gather(jnp.asarray(tokens), source, weight), matrix @ tokens, atol=1e-5)
        connected = (source[..., None] == np.arange(7)).any(2)
        np.testing.assert_array_equal(gather_any(jnp.asarray(marked), source), (connected & marked[:, None]).any(-1))
        ones = gather(jnp.asarray(tokens), np.maximum(source, 0), None)
        np.testing.assert_array_equal(ones, gather(jnp.asarray(tokens), np.maximum(source, 0), np.ones_like(weight)))


def test_weights_are_not_saved_for_each_layer(tiny_model):
    """Without rematerialisation the forward pass saves activations of the gated layers only, and no slices of the weights."""
    vlm = lsg_jax.load(tiny_model, sinks=SinkConfig(criterion="norm", vit_tau=10.0))
    method, config = Gates(GateConfig(layers=(2,))), vlm.config.text
    graphdef, _ = abstract_model(vlm.config, method)
    trained = method.initial(vlm.config, vlm.frozen, jax.random.key(0))
    encoded = vlm.processor.encode_question("What?")
    batch = vlm.pad_questions([encoded], [vlm.processor.blank])
    loss = lambda trained: answer_loss(assemble(graphdef, vlm.frozen, trained), batch)[0]
    saved = {leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(lambda trained: jax.vjp(loss, trained)[1], trained))}
    # the last layer is compiled apart
    gated, length = config.num_layers - 1 - 2, batch.input_ids.shape[1]
    assert (gated, 1, length, config.hidden_size) in saved
    assert not [shape for shape in saved if shape[:1] == (config.num_layers - 1,)]
    kernels = {leaf.shape[1:] for leaf in jax.tree.leaves(vlm.frozen["language_model"]["layers"]) if leaf.ndim > 2}
    assert not [shape for shape in saved if shape[:1] == (gated,) and shape[1:] in kernels]


def test_visual_tokens(tiny_model):
    vlm = lsg_jax.load(tiny_model, sinks=SinkConfig(criterion="norm", vit_tau=15.0))
    rng, image_token = np.random.default_rng(0), vlm.config.image_token_id
    ids = np.full((3, 60), vlm.config.pad_token_id)
    ids[0, 3:52] = ids[2, 11:60] = image_token
    mask = ids != vlm.config.pad_token_id
    mask[1, :5] = True
    pixels = rng.normal(size=(2, 3, 56, 56)).astype(np.float32)
    inputs = {"input_ids": ids, "pixel_values": pixels, "attention_mask": mask}
    found = vlm.visual_tokens(**inputs)
    np.testing.assert_array_equal(found.mask, ids == image_token)
    np.testing.assert_array_equal(found.v_sink[found.mask].reshape(2, 49), vlm.v_sinks(pixels))
    assert found.v_sink.any() and not found.v_sink[~found.mask].any() and not found.box[~found.mask].any()
    corners = np.arange(8) / 7
    np.testing.assert_allclose(found.box[0, 3], [0, 0, 1 / 7, 1 / 7], atol=1e-6)
    np.testing.assert_allclose(np.unique(found.box[found.mask][:, 0]), corners[:-1], atol=1e-6)

    sizes = [(100, 200), (300, 50)]  # height and width, as image processors return them
    boxes = vlm.visual_tokens(**inputs, image_sizes=sizes).box
    for row, (height, width) in zip((0, 2), sizes, strict=True):
        np.testing.assert_array_equal(boxes[row, ids[row] == image_token], lay_out((width, height), vlm.config).box)
    with pytest.raises(InputError, match=r"image_sizes must be \[2, 2\]"):
        vlm.visual_tokens(**inputs, image_sizes=[(3, 4)])
    text = vlm.visual_tokens(np.full((1, 4), 9), None)
    assert not text.mask.any() and text.box.shape == (1, 4, 4)


def test_a_bright_place_is_in_the_box_of_its_token(tiny_model):
    """From an image file to boxes: the token whose patch holds the bright place has a box that holds it in the original."""
    vlm = lsg_jax.load(tiny_model)
    original = np.zeros((90, 160, 3), np.uint8)
    original[30:40, 70:80] = 255
    pixels = vlm.processor.pixels(Image.fromarray(original))
    normal = (pixels / 255 - np.array(vlm.config.image.mean)) / np.array(vlm.config.image.std)
    ids = np.full((1, 50), vlm.config.image_token_id)
    ids[0, 0] = 9
    found = vlm.visual_tokens(ids, normal.transpose(0, 3, 1, 2), image_sizes=[(90, 160)])
    brightness = pixels.reshape(7, 8, 7, 8, 3).mean((1, 3, 4)).ravel()
    x0, y0, x1, y1 = found.box[0, 1:][brightness.argmax()]
    assert x0 < 75 / 160 < x1 and y0 < 35 / 90 < y1
