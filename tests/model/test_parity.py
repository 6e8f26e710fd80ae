"""The ungated stack against Hugging Face, stage by stage, for every family and both padding sides."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hf_models import BOS, EOS, IMAGE_TOKEN, PAD, VOCABULARY, state_arrays, tiny_hf

from converters.convert import tree_from_tensors
from converters.hf_config import model_config
from lsg_jax.model.generate import generate
from lsg_jax.model.llava import abstract_model, assemble
from lsg_jax.types import Batch

TOLERANCE = 1e-4  # absolute; stage outputs are of order 1
LENGTH, NEW_TOKENS = 28, 12
TEXT_LENGTHS = (17, 9, 4)  # of three rows, beside their patches

FAMILIES = {
    "clip-llama": ("clip", "llama", {"text_config": {"num_key_value_heads": 4}}),
    "clip-llama-gqa": ("clip", "llama", {}),
    "clip-llama-biases": ("clip", "llama", {"text_config": {"attention_bias": True, "mlp_bias": True, "head_dim": 12}}),
    "clip-llama-rope3": (
        "clip",
        "llama",
        {
            "text_config": {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 100.0,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                }
            }
        },
    ),
    "clip-llama-linear": (
        "clip",
        "llama",
        {"text_config": {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}}},
    ),
    "clip-mistral": ("clip", "mistral", {}),
    "siglip-qwen2": ("siglip", "qwen2", {}),
    "siglip-qwen2-tied": ("siglip", "qwen2", {"tied": True}),
    "clip-phi3": ("clip", "phi3", {}),
    "clip-llama-last-layer": ("clip", "llama", {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}),
    "siglip-llama-default": ("siglip", "llama", {"vision_feature_layer": 3, "vision_feature_select_strategy": "default"}),
    "clip-llama-two-layers": ("clip", "llama", {"vision_feature_layer": [-2, 1, 0]}),
    "clip-llama-odd-patches": ("clip", "llama", {"vision_config": {"patch_size": 13}, "multimodal_projector_bias": False}),
}


@cache
def pair(name):
    """The HF model and ours, as (HF, config, model, jitted forward)."""
    torch.set_num_threads(1)
    vision, text, settings = FAMILIES[name]
    hf = tiny_hf(vision, text, **{k: dict(v) if isinstance(v, dict) else v for k, v in settings.items()})
    config = model_config(hf.config.to_diff_dict())
    graphdef, _ = abstract_model(config)
    return hf, config, assemble(graphdef, tree_from_tensors(config, state_arrays(hf)))


def inputs(config, side, seed=0):
    """Three rows of unequal length: ids, mask, pixels [B, C, H, W]."""
    rng = np.random.default_rng(seed)
    patches = config.num_image_tokens
    ids = np.full((len(TEXT_LENGTHS), LENGTH), PAD, np.int64)
    mask = np.zeros(ids.shape, np.int64)
    for row, text in enumerate(TEXT_LENGTHS):
        words = rng.integers(4, VOCABULARY, text)
        before = 1 + row
        tokens = np.concatenate([[BOS], words[:before], np.full(patches, IMAGE_TOKEN), words[before:-1]])
        start = LENGTH - len(tokens) if side == "left" else 0
        ids[row, start : start + len(tokens)] = tokens
        mask[row, start : start + len(tokens)] = 1
    side_px = config.vision.image_size
    return ids, mask, rng.normal(size=(len(ids), 3, side_px, side_px)).astype(np.float32)


def as_batch(ids, mask, pixels):
    mask = mask.astype(bool)
    return Batch(
        input_ids=jnp.asarray(ids, jnp.int32),
        attention_mask=jnp.asarray(mask),
        pixels=jnp.asarray(pixels.transpose(0, 2, 3, 1)),
        gate_position=jnp.asarray(ids.shape[1] - 1 - np.argmax(mask[:, ::-1], 1)),
    )


def close(ours, reference):
    ours, reference = np.asarray(ours), np.asarray(reference.detach() if torch.is_tensor(reference) else reference)
    assert ours.shape == reference.shape
    assert np.abs(reference).max() > 0.3  # of order 1, so the tolerance means something
    np.testing.assert_allclose(ours, reference, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_every_stage_equals_hugging_face(name, side):
    hf, config, model = pair(name)
    ids, mask, pixels = inputs(config, side)
    seen = {}
    hooks = [
        hf.model.multi_modal_projector.register_forward_hook(lambda _, i, o: seen.update(features=i[0], projected=o)),
        hf.model.language_model.register_forward_pre_hook(
            lambda _, a, kw: seen.update(merged=kw["inputs_embeds"]), with_kwargs=True
        ),
    ]
    for number, layer in enumerate(hf.model.language_model.layers):
        hooks.append(layer.register_forward_pre_hook(lambda _, a, n=number: seen.update({n: a[0]})))
    with torch.no_grad():
        logits = hf(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), pixel_values=torch.tensor(pixels)).logits
    for hook in hooks:
        hook.remove()

    batch = as_batch(ids, mask, pixels)

    @jax.jit
    def stages(batch):
        features, _ = model.image_features(batch.pixels)
        merged = model.merge(batch)
        out = model(batch, merged=merged, observe=lambda view: view.hidden)
        return features, model.projector(features), merged.x, out.observed, model.language_model.logits(out.hidden)

    features, projected, merged, hidden, ours = stages(batch)
    close(features, seen["features"])
    close(projected, seen["projected"])
    real = mask.astype(bool)
    close(merged[real], seen["merged"][real])
    for number in range(config.text.num_layers):
        close(hidden[number][real], seen[number][real])
    close(ours[real], logits[real])


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_ids_equal_hugging_face(name):
    hf, config, model = pair(name)
    run = jax.jit(lambda batch: generate(model, batch, max_new_tokens=NEW_TOKENS))
    ids, mask, pixels = inputs(config, "left", seed=1)
    with torch.no_grad():
        reference = hf.generate(
            input_ids=torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            pixel_values=torch.tensor(pixels),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
        )[:, LENGTH:].numpy()
    assert len(np.unique(reference)) > 5  # not one token over and over
    tokens, steps = run(as_batch(ids, mask, pixels))
    np.testing.assert_array_equal(np.asarray(tokens)[:, : int(steps)], reference)
    # Hugging Face continues after the padding on the right, so its left-padded answer is the reference for both sides
    right_ids, right_mask, _ = inputs(config, "right", seed=1)
    tokens, steps = run(as_batch(right_ids, right_mask, pixels))
    np.testing.assert_array_equal(np.asarray(tokens)[:, : int(steps)], reference)


def test_generation_stops_at_end_of_sequence_and_pads():
    hf, config, _ = pair("clip-llama-gqa")
    ids, mask, pixels = inputs(config, "left", seed=2)
    arguments = {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor(mask),
        "pixel_values": torch.tensor(pixels),
        "max_new_tokens": NEW_TOKENS,
        "do_sample": False,
    }
    with torch.no_grad():
        free = hf.generate(**arguments)[:, LENGTH:].numpy()
        ends = [int(free[0, 2]), int(free[1, 4]), int(free[2, 3])]  # every row meets one of these, at different steps
        reference = hf.generate(**arguments, eos_token_id=ends, pad_token_id=PAD)[:, LENGTH:].numpy()
    assert reference.shape[1] < NEW_TOKENS and (reference == PAD).any()
    import dataclasses

    config = dataclasses.replace(config, eos_token_ids=tuple(ends))
    graphdef, _ = abstract_model(config)
    model = assemble(graphdef, tree_from_tensors(config, state_arrays(hf)))
    tokens, steps = generate(model, as_batch(ids, mask, pixels), max_new_tokens=NEW_TOKENS)
    assert int(steps) == reference.shape[1]  # the loop ends when all rows have ended
    np.testing.assert_array_equal(np.asarray(tokens)[:, : int(steps)], reference)
    assert (np.asarray(tokens)[:, int(steps) :] == PAD).all()


def test_cache_gives_the_logits_of_the_whole_sequence():
    _, config, model = pair("clip-phi3")
    ids, mask, pixels = inputs(config, "right", seed=3)
    tokens, _ = generate(model, as_batch(ids, mask, pixels), max_new_tokens=4)
    lengths = mask.sum(1)
    for row, length in enumerate(lengths):
        whole = np.concatenate([ids[row, :length], np.asarray(tokens)[row, :3]])[None]
        batch = as_batch(whole, np.ones_like(whole), pixels[row : row + 1])
        picked = model.language_model.logits(model(batch).hidden)[0].argmax(-1)
        np.testing.assert_array_equal(picked[length - 1 :], tokens[row])


def test_sliding_window_is_refused_where_it_would_bite():
    import dataclasses

    hf, config, _ = pair("clip-mistral")
    text = dataclasses.replace(config.text, sliding_window=LENGTH + 2)
    graphdef, _ = abstract_model(dataclasses.replace(config, text=text))
    model = assemble(graphdef, tree_from_tensors(config, state_arrays(hf)))
    batch = as_batch(*inputs(config, "left"))
    model(batch)
    generate(model, batch, max_new_tokens=2)
    with pytest.raises(ValueError, match="sliding window of 30"):
        generate(model, batch, max_new_tokens=3)


def test_uint8_pixels_are_normalised_as_the_processor_does():
    _, config, model = pair("clip-llama")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 42, 42, 3), np.uint8)
    mean, std = np.array(config.image.mean), np.array(config.image.std)
    by_hand = ((pixels / 255 - mean) / std).astype(np.float32)
    close(model.image_features(jnp.asarray(pixels))[0], model.image_features(jnp.asarray(by_hand))[0])


@pytest.mark.parametrize("remat", ["none", "full"])
def test_remat_changes_nothing(remat):
    _, config, model = pair("clip-llama-gqa")
    batch = as_batch(*inputs(config, "left"))
    close(model(batch, remat=remat).hidden[0, -5:], model(batch).hidden[0, -5:])


def test_eos_of_the_byte_tokenizer():
    assert pair("clip-llama")[1].eos_token_ids == (EOS,)
