"""Decoders against those of transformers: norms, sliding windows, M-RoPE, deepstack, images that see themselves."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from decoders import KINDS, LENGTH, WINDOW, assemble, close, continue_greedily, image_places, pair, rows, sequence_of
from hf_models import PAD
from transformers.models.gemma3.modeling_gemma3 import create_masks_for_vision_model, get_block_sequence_ids_for_mask

from lsg_jax.config import RopeConfig
from lsg_jax.model.rotary import frequency_axes

SIDES = ("left", "right")
CAUSAL = [name for name, (_, head, _) in KINDS.items() if head == "ForCausalLM"]
NEW_TOKENS = 9  # past the window


@partial(jax.jit, static_argnames="config")
def logits(params, ids, mask, config):
    model = assemble(config, params)
    return model.logits(model(sequence_of(model, ids, mask)).hidden)


@pytest.mark.parametrize("kind", CAUSAL)
def test_logits_equal_transformers(kind):
    hf, config, params = pair(kind)
    assert (config.sliding_window or 0) < LENGTH
    for side in SIDES:
        ids, mask = rows(side)
        with torch.no_grad():
            reference = hf(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask).long()).logits
        close(np.asarray(logits(params, ids, mask, config))[mask], reference[mask])


@partial(jax.jit, static_argnames="config")
def greedy(params, ids, mask, config, **fields):
    model = assemble(config, params)
    return continue_greedily(model, sequence_of(model, ids, mask, **fields), NEW_TOKENS)


@pytest.mark.parametrize("kind", CAUSAL)
def test_greedy_ids_equal_transformers(kind):
    hf, config, params = pair(kind)
    ids, mask = rows("left", seed=1)
    with torch.no_grad():
        settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": PAD}
        made = hf.generate(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask).long(), **settings)
    reference = made[:, LENGTH:].numpy()
    assert reference.shape[1] > WINDOW and len(np.unique(reference)) > 5
    for side in SIDES:
        ids, mask = rows(side, seed=1)
        np.testing.assert_array_equal(greedy(params, ids, mask, config), reference)


def vision_text(kind, side):
    """A text model of Qwen-VL on rows with images: ids, mask, block, positions, what deepstack adds."""
    _, config, _ = pair(kind)
    ids, mask = rows(side, seed=2)
    block, places = image_places(mask)
    added = None
    if kind == "qwen3-vl":
        drawn = np.random.default_rng(3).normal(size=(2, *ids.shape, config.hidden_size)).astype(np.float32)
        added = np.where((block >= 0)[..., None], drawn, 0.0).astype(np.float32)
    return ids, mask, block, places, added


@partial(jax.jit, static_argnames=("config", "apart"))
def last_states(params, ids, mask, config, places, added, apart=False):
    model = assemble(config, params)
    at = jnp.tile(jnp.arange(LENGTH)[None, ::5], (len(ids), 1)) if apart else None
    return model.norm(model(sequence_of(model, ids, mask, positions=places, added=added), rows=at).hidden)


@pytest.mark.parametrize("kind", ["qwen2-vl", "qwen2.5-vl", "qwen3-vl"])
def test_states_with_images_equal_transformers(kind):
    hf, config, params = pair(kind)
    for side in SIDES:
        ids, mask, block, places, added = vision_text(kind, side)
        extra = {}
        if added is not None:
            extra = {"visual_pos_masks": torch.tensor(block >= 0)}
            extra["deepstack_visual_embeds"] = [torch.tensor(one[block >= 0]) for one in added]
        with torch.no_grad():
            reference = hf(
                input_ids=torch.tensor(ids),
                attention_mask=torch.tensor(mask).long(),
                position_ids=torch.tensor(places).permute(2, 0, 1).long(),
                **extra,
            ).last_hidden_state
        ours = np.asarray(last_states(params, ids, mask, config, places, added))
        close(ours[mask], reference[mask])
        if added is not None:  # it matters, and the last layer that is run apart adds it too
            without = last_states(params, ids, mask, config, places, None)
            assert np.abs(ours - without)[mask].max() > 0.1
            close(last_states(params, ids, mask, config, places, added, apart=True), ours[:, ::5])


@pytest.mark.parametrize("kind", ["qwen2.5-vl", "qwen3-vl"])
def test_answers_go_on_from_the_highest_position(kind):
    """Over the cache, and as one sequence in which the answer's positions follow the highest of the prompt."""
    _, config, params = pair(kind)
    ids, mask, _, places, added = vision_text(kind, "right")
    made = np.asarray(greedy(params, ids, mask, config, positions=places, added=added))
    assert len(np.unique(made)) > 5
    room = ((0, 0), (0, NEW_TOKENS))
    ids, longer, places = np.pad(ids, room), np.pad(mask, room), np.pad(places, (*room, (0, 0)))
    for row, count in enumerate(mask.sum(1)):
        ids[row, count : count + NEW_TOKENS], longer[row, count : count + NEW_TOKENS] = made[row], True
        highest = places[row][mask[row].nonzero()].max()
        assert highest < count - 1
        places[row, count : count + NEW_TOKENS] = highest + 1 + np.arange(NEW_TOKENS)[:, None]
    added = None if added is None else np.pad(added, ((0, 0), *room, (0, 0)))
    model = assemble(config, params)
    out = jax.jit(lambda ids: model.logits(model(sequence_of(model, ids, longer, positions=places, added=added)).hidden))(ids)
    for row, count in enumerate(mask.sum(1)):
        np.testing.assert_array_equal(out[row, count - 1 : count - 1 + NEW_TOKENS].argmax(-1), made[row])


@partial(jax.jit, static_argnames="config")
def states_of_images(params, x, mask, block, config):
    model = assemble(config, params)
    return model.norm(model(sequence_of(model, jnp.zeros(mask.shape, int), mask, x=x, block=block)).hidden)


def test_images_that_see_themselves_equal_transformers():
    """An image of six tokens in a window of four: the window ends at the query, and not in front of it."""
    hf, config, params = pair("gemma3")
    config = dataclasses.replace(config, sliding_window=4)
    hf.config.sliding_window = 4
    try:
        for side in SIDES:
            ids, mask = rows(side)
            block, _ = image_places(mask)
            x = np.random.default_rng(0).normal(size=(*ids.shape, config.hidden_size)).astype(np.float32)
            x_hf, mask_hf = torch.tensor(x), torch.tensor(mask).long()
            masks = create_masks_for_vision_model(
                config=hf.config,
                inputs_embeds=x_hf,
                attention_mask=mask_hf,
                cache=None,
                position_ids=None,
                block_sequence_ids=get_block_sequence_ids_for_mask(torch.tensor(block >= 0).long()),
            )
            with torch.no_grad():
                reference = hf.model(inputs_embeds=x_hf, attention_mask=masks).last_hidden_state
            ours = np.asarray(states_of_images(params, x, mask, block, config))
            close(ours[mask], reference[mask])
            assert np.abs(ours - states_of_images(params, x, mask, None, config))[mask].max() > 0.1
    finally:
        hf.config.sliding_window = WINDOW


def test_axes_of_frequencies():
    one_after_the_other = RopeConfig(theta=1.0, sections=(2, 1, 3))
    np.testing.assert_array_equal(frequency_axes(one_after_the_other, 12), [0, 0, 1, 2, 2, 2])
    taking_turns = RopeConfig(theta=1.0, sections=(5, 2, 1), interleaved=True)
    np.testing.assert_array_equal(frequency_axes(taking_turns, 16), [0, 1, 2, 0, 1, 0, 0, 0])
