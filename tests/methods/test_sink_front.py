"""Sink-to-the-front against Hugging Face, which is given the reordered patches as embeddings."""

from functools import cache

import jax
import numpy as np
import pytest
import torch
from hf_models import BOS, IMAGE_TOKEN, PAD, VOCABULARY, state_arrays, tiny_hf

from converters.convert import tree_from_tensors
from converters.hf_config import model_config
from lsg_jax.config import SinkConfig
from lsg_jax.errors import ConfigError
from lsg_jax.methods.method import BASE
from lsg_jax.methods.method_model import assemble
from lsg_jax.methods.sink_front import SinkFront, SinkFrontConfig, sinks_first
from lsg_jax.vlm import VLM

TOLERANCE = 1e-4  # of the largest absolute value of the reference array
PATCHES, LENGTH = 9, 26
NOBODY, EVERYBODY = 1e6, 1e-6  # norms


@cache
def pair():
    """The Hugging Face model, and ours with the same weights."""
    torch.set_num_threads(1)
    hf = tiny_hf("clip", "llama")
    config = model_config(hf.config.to_diff_dict())
    return hf, VLM(config, tree_from_tensors(config, state_arrays(hf)))


def inputs():
    """Three left-padded rows, the second without an image: ids, pixels of the rows with one, mask."""
    rng = np.random.default_rng(0)
    words = lambda n: rng.integers(4, VOCABULARY, size=n).tolist()
    image = [IMAGE_TOKEN] * PATCHES
    ids, mask = np.full((3, LENGTH), PAD), np.zeros((3, LENGTH), int)
    for i, row in enumerate([[BOS, *words(3), *image, *words(9)], [BOS, *words(12)], [BOS, *image, *words(16)]]):
        ids[i, -len(row) :], mask[i, -len(row) :] = row, 1
    return ids, rng.normal(size=(2, 3, 42, 42)).astype(np.float32), mask


@cache
def features():
    """Of the two images, before the projector: [2, P, Dv]."""
    with torch.no_grad():
        return pair()[0].model.vision_tower(torch.tensor(inputs()[1]), output_hidden_states=True).hidden_states[-2][:, 1:]


def middle_norm():
    """A threshold between norms that leaves sinks and others in both images."""
    norms = np.sort(features().norm(dim=-1).numpy().ravel())
    return float(norms[9:11].mean())


def embeddings(tau):
    """What the decoder is to be given: float [3, T, D], with the patches of each image in their new order, and the positions
    int [3, T] that they bring along."""
    hf, ids = pair()[0], torch.tensor(inputs()[0])
    positions = torch.tensor(inputs()[2]).cumsum(1) - 1
    with torch.no_grad():
        x = hf.get_input_embeddings()(ids)
        for row, patches in zip((0, 2), features(), strict=True):
            large = patches.norm(dim=-1) >= tau
            assert large.any() and not large.all() and not large[: int(large.sum())].all()  # the order does change
            x[row, ids[row] == IMAGE_TOKEN] = hf.model.multi_modal_projector(torch.cat([patches[large], patches[~large]]))
            there = positions[row, ids[row] == IMAGE_TOKEN]
            positions[row, ids[row] == IMAGE_TOKEN] = torch.cat([there[large], there[~large]])
    return x, positions.clamp(min=0)


@pytest.mark.parametrize("places", ["kept", "new"])
def test_logits_equal_hugging_face_and_v_sinks_move_along(places):
    hf, base = pair()
    sinks = SinkConfig(criterion="norm", vit_tau=middle_norm())
    front = base.with_method(SinkFront(SinkFrontConfig(tau=middle_norm(), positions=places)), sinks=sinks)
    ids, pixels, mask = inputs()
    x, kept = embeddings(middle_norm())
    with torch.no_grad():
        both = [hf(inputs_embeds=x, attention_mask=torch.tensor(mask), position_ids=p).logits.numpy() for p in (kept, None)]
        reference, other = both if places == "kept" else both[::-1]
        plain = hf(torch.tensor(ids), torch.tensor(pixels), torch.tensor(mask)).logits.numpy()
    largest, real = np.abs(reference).max(), mask.astype(bool)
    # the order matters where there is an image, and only there
    assert np.abs(reference - plain)[[0, 2], -1].max() > 0.05 * largest
    np.testing.assert_allclose(reference[1], plain[1], atol=1e-5 * largest)
    assert np.abs(reference - other)[[0, 2], -1].max() > 0.01 * largest  # and so do the positions

    @jax.jit
    def logits_and_sinks(params, batch):
        model = assemble(front.graphdef, params)
        sequence = model.sequence(batch)
        return model.language_model.logits(model(batch, sequence=sequence).hidden), sequence.visual.v_sink

    logits, in_sequence = jax.tree.map(np.asarray, logits_and_sinks(front.params, front.batch(ids, pixels, mask)))
    assert np.abs(logits - reference)[real].max() <= TOLERANCE * largest
    in_image = front.v_sinks(pixels)
    np.testing.assert_array_equal(in_image, features().norm(dim=-1) >= middle_norm())  # in the image they stay where they are
    in_sequence = in_sequence[[0, 2]][ids[[0, 2]] == IMAGE_TOKEN].reshape(in_image.shape)
    np.testing.assert_array_equal(in_sequence, np.sort(in_image, axis=1)[:, ::-1])


def test_the_next_token_follows_on_the_whole_prompt():
    """Decoding on the cache, against our own pass over the text that it wrote: the next position is the same as ever."""
    front = pair()[1].with_method(SinkFront(SinkFrontConfig(tau=middle_norm())))
    ids, pixels, mask = inputs()
    tokens = front.generate_ids(ids, pixels, mask, 5)
    longer = np.concatenate([ids, tokens], axis=1)
    logits = front.logits(longer, pixels, np.pad(mask, ((0, 0), (0, tokens.shape[1])), constant_values=1))
    np.testing.assert_array_equal(logits[:, LENGTH - 1 : -1].argmax(-1), tokens)


def test_one_group_changes_nothing():
    """No sink, or nothing but sinks: the patches go on as they are, to the bit."""
    for tau in (NOBODY, EVERYBODY):
        order = sinks_first(features().numpy(), tau)
        np.testing.assert_array_equal(order, np.broadcast_to(np.arange(PATCHES), (2, PATCHES)))


def test_groups_keep_their_order():
    norms = np.array([[1.0, 5, 2, 7, 5], [1, 1, 1, 1, 9], [6, 6, 6, 6, 6]], np.float32)
    order = sinks_first(norms[..., None], 5.0)
    np.testing.assert_array_equal(order, [[1, 3, 4, 0, 2], [4, 0, 1, 2, 3], [0, 1, 2, 3, 4]])


def test_boxes_of_visual_tokens_move_with_the_patches():
    _, base = pair()
    sinks = SinkConfig(criterion="norm", vit_tau=middle_norm())
    front = base.with_method(SinkFront(SinkFrontConfig(tau=middle_norm())), sinks=sinks)
    ids, pixels, mask = inputs()
    plain = base.with_method(BASE, sinks=sinks).visual_tokens(ids, pixels, mask)
    moved = front.visual_tokens(ids, pixels, mask)
    for row in (0, 2):
        where = ids[row] == IMAGE_TOKEN
        assert not np.array_equal(moved.box[row], plain.box[row])
        sinks_of = lambda tokens, row=row, where=where: set(map(tuple, tokens.box[row, where][tokens.v_sink[row, where]]))
        assert sinks_of(moved) == sinks_of(plain) and len(sinks_of(plain)) not in (0, PATCHES)


@pytest.mark.parametrize("tau", [0.0, -3.0, float("nan"), float("inf")])
def test_a_threshold_that_is_no_norm_is_refused(tau):
    with pytest.raises(ConfigError, match=rf"sink_front.tau is {tau}: it must lie in \(0, 1e9\]"):
        pair()[1].with_method(SinkFront(SinkFrontConfig(tau=tau)))


def test_sinks_go_before_the_patches_of_their_own_image():
    vlm, config = pair()[1], SinkFrontConfig(middle_norm())
    ids = np.array([[BOS, *[IMAGE_TOKEN] * PATCHES, 5, *[IMAGE_TOKEN] * PATCHES, 6]])
    sequence = jax.jit(lambda params, batch, graphdef: assemble(graphdef, params).sequence(batch).x, static_argnums=2)
    plain, moved = (
        np.asarray(sequence(model.params, model.batch(ids, inputs()[1]), model.graphdef))[0]
        for model in (vlm, vlm.with_method(SinkFront(config)))
    )
    for start, order in zip((1, 2 + PATCHES), sinks_first(features().numpy(), config.tau), strict=True):
        where = slice(start, start + PATCHES)
        assert not np.array_equal(moved[where], plain[where])
        np.testing.assert_allclose(moved[where], plain[where][np.asarray(order)], atol=1e-5)
