"""The ungated stack against Hugging Face, stage by stage, for every family and both padding sides."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hf_models import BOS, IMAGE_TOKEN, PAD, VOCABULARY, state_arrays, tiny_hf

from converters.convert import tree_from_tensors
from converters.hf_config import model_config
from converters.torch_gate import attach
from lsg_jax.config import GateConfig, SinkConfig
from lsg_jax.data.images import to_patches
from lsg_jax.gating.portable import PortableGates
from lsg_jax.methods.gates import Gates
from lsg_jax.methods.method_model import assemble
from lsg_jax.model.attention import SHORTEST_BLOCK, attend, attend_causally
from lsg_jax.model.scope import Scope, causal_mask
from lsg_jax.types import Batch, VisualInput
from lsg_jax.vlm import VLM

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
    "siglip-qwen2-tied": ("siglip", "qwen2", {"tied": True, "vision_feature_layer": -1}),  # as LLaVA-Interleave
    "clip-phi3": ("clip", "phi3", {}),
    "clip-llama-last-layer": ("clip", "llama", {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}),
    "siglip-llama-default": ("siglip", "llama", {"vision_feature_layer": 3, "vision_feature_select_strategy": "default"}),
    "vipllava": ("clip", "llama", {"vision_feature_layer": [-2, 1, 0], "projector_layernorm_eps": 1e-3}),
    "clip-llama-odd-patches": ("clip", "llama", {"vision_config": {"patch_size": 13}, "multimodal_projector_bias": False}),
}


@cache
def pair(name):
    """The HF model, and ours with the same weights."""
    torch.set_num_threads(1)
    vision, text, settings = FAMILIES[name]
    hf = tiny_hf(vision, text, **{k: dict(v) if isinstance(v, dict) else v for k, v in settings.items()})
    config = model_config(hf.config.to_diff_dict())
    return hf, VLM(config, tree_from_tensors(config, state_arrays(hf)))


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


def close(ours, reference):
    ours, reference = np.asarray(ours), np.asarray(reference.detach() if torch.is_tensor(reference) else reference)
    assert ours.shape == reference.shape
    assert np.abs(reference).max() > 0.3  # of order 1, so the tolerance means something
    np.testing.assert_allclose(ours, reference, rtol=0, atol=TOLERANCE)


@partial(jax.jit, static_argnums=(2, 3))
def stages(params, batch: Batch, graphdef, remat="none"):
    """Image features, projected features, merged sequence, what enters each layer, logits."""
    model = assemble(graphdef, params)
    features, _ = model.image_features(batch.images)
    sequence = model.sequence(batch)
    out = model(batch, sequence=sequence, observe=lambda view: view.hidden, remat=remat)
    return features, model.projector(features), sequence.x, out.observed, model.language_model.logits(out.hidden)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_stage_equals_hugging_face(name):
    hf, vlm = pair(name)
    seen = {}
    for side in ("left", "right"):
        ids, mask, pixels = inputs(vlm.config, side)
        seen.clear()
        hooks = [
            hf.model.multi_modal_projector.register_forward_hook(lambda _, i, o: seen.update(features=i[0], projected=o)),
            hf.model.language_model.register_forward_pre_hook(
                lambda _, a, kw: seen.update(merged=kw["inputs_embeds"]), with_kwargs=True
            ),
        ]
        for number, layer in enumerate(hf.model.language_model.layers):
            hooks.append(layer.register_forward_pre_hook(lambda _, a, n=number: seen.update({n: a[0]})))
        with torch.no_grad():
            logits = hf(
                input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), pixel_values=torch.tensor(pixels)
            ).logits
        for hook in hooks:
            hook.remove()

        features, projected, merged, hidden, ours = stages(vlm.params, vlm.batch(ids, pixels, mask), vlm.graphdef)
        close(features, seen["features"])
        close(projected, seen["projected"])
        real = mask.astype(bool)
        close(np.asarray(merged)[real], seen["merged"][real])
        for number in range(vlm.config.text.num_layers):
            close(np.asarray(hidden)[number][real], seen[number][real])
        close(np.asarray(ours)[real], logits[real])


def hf_generate(hf, ids, mask, pixels, **settings):
    with torch.no_grad():
        return hf.generate(
            input_ids=torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            pixel_values=torch.tensor(pixels),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            **settings,
        )[:, LENGTH:].numpy()


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_ids_equal_hugging_face(name):
    hf, vlm = pair(name)
    ids, mask, pixels = inputs(vlm.config, "left", seed=1)
    reference = hf_generate(hf, ids, mask, pixels)
    assert len(np.unique(reference)) > 5  # not one token over and over
    np.testing.assert_array_equal(vlm.generate_ids(ids, pixels, mask, NEW_TOKENS), reference)
    # Hugging Face continues after the padding on the right, so its left-padded answer is the reference for both sides
    ids, mask, _ = inputs(vlm.config, "right", seed=1)
    np.testing.assert_array_equal(vlm.generate_ids(ids, pixels, mask, NEW_TOKENS), reference)


def test_generation_stops_at_end_of_sequence_and_pads():
    hf, vlm = pair("clip-llama-gqa")
    ids, mask, pixels = inputs(vlm.config, "left", seed=2)
    free = hf_generate(hf, ids, mask, pixels)
    ends = [int(free[0, 2]), int(free[1, 4]), int(free[2, 3])]  # every row meets one of these, at different steps
    reference = hf_generate(hf, ids, mask, pixels, eos_token_id=ends, pad_token_id=PAD)
    assert reference.shape[1] < NEW_TOKENS and (reference == PAD).any()
    stopping = VLM(dataclasses.replace(vlm.config, eos_token_ids=tuple(ends)), vlm.frozen)
    # as wide as the longest row: the loop ends when all rows have ended
    np.testing.assert_array_equal(stopping.generate_ids(ids, pixels, mask, NEW_TOKENS), reference)


def test_cache_gives_the_logits_of_the_whole_sequence():
    _, vlm = pair("clip-phi3")
    ids, mask, pixels = inputs(vlm.config, "right", seed=3)
    tokens = vlm.generate_ids(ids, pixels, mask, 4)
    # the answers spliced in behind each prompt, where the padding was
    whole, whole_mask = np.pad(ids, ((0, 0), (0, 3))), np.pad(mask, ((0, 0), (0, 3)))
    for row, length in enumerate(mask.sum(1)):
        whole[row, length : length + 3] = tokens[row, :3]
        whole_mask[row, length : length + 3] = 1
    best = vlm.logits(whole, pixels, whole_mask).argmax(-1)
    for row, length in enumerate(mask.sum(1)):
        np.testing.assert_array_equal(best[row, length - 1 : length + 3], tokens[row])


def test_uint8_pixels_are_normalised_as_the_processor_does():
    _, vlm = pair("clip-llama")
    image = vlm.config.image
    pixels = np.random.default_rng(0).integers(0, 256, (2, 42, 42, 3), np.uint8)
    by_hand = ((pixels / 255 - np.array(image.mean)) / np.array(image.std)).astype(np.float32)
    model = assemble(vlm.graphdef, vlm.params)
    features = lambda pixels: model.image_features(VisualInput(np.stack([to_patches(image, 14)[None] for image in pixels])))[0]
    close(features(pixels), features(by_hand))


def test_attention_by_query_blocks_equals_attention():
    rng = np.random.default_rng(0)
    length = 3 * SHORTEST_BLOCK + 5  # four blocks, the last one short
    query = rng.normal(size=(2, length, 4, 10)).astype(np.float32)
    key, value = rng.normal(size=(2, 2, 2, length, 10)).astype(np.float32)
    valid = np.arange(length) >= np.array([[0], [7]])
    mask = causal_mask(jnp.asarray(valid))
    whole, weights = attend(query, key, value, mask, return_weights=True)
    blocks = attend_causally(query, key, value, Scope(rope=None, mask=mask))
    close(np.asarray(blocks)[valid], np.asarray(whole)[valid])
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    # and by the definition
    repeated = np.repeat(key, 2, axis=1), np.repeat(value, 2, axis=1)
    logits = np.einsum("BTNH,BNSH->BNTS", query, repeated[0]) / np.sqrt(10)
    exact = np.exp(np.where(np.asarray(mask)[:, None], logits, -np.inf))
    with np.errstate(invalid="ignore"):
        exact = np.einsum("BNTS,BNSH->BTNH", exact / exact.sum(-1, keepdims=True), repeated[1])
    close(np.asarray(whole)[valid], exact[valid])


def test_rows_of_the_last_layer_equal_those_of_a_whole_run():
    _, vlm = pair("clip-llama-gqa")
    ids, mask, pixels = inputs(vlm.config, "right")
    model, batch = assemble(vlm.graphdef, vlm.params), vlm.batch(ids, pixels, mask)
    rows = jnp.array([[3, 9, 12], [0, 1, 18], [12, 12, 2]])
    some, whole = model(batch, rows=rows, keep_kv=True), model(batch, keep_kv=True)
    close(some.hidden, np.take_along_axis(np.asarray(whole.hidden), np.asarray(rows)[..., None], 1))
    close(some.key, whole.key)
    close(some.value, whole.value)


def test_remat_changes_nothing():
    _, vlm = pair("clip-llama-gqa")
    batch = vlm.batch(*(inputs(vlm.config, "left")[i] for i in (0, 2, 1)))
    plain, remat = (stages(vlm.params, batch, vlm.graphdef, name)[-1] for name in ("none", "full"))
    close(remat, plain)


def test_gates_of_vipllava_equal_those_in_pytorch():
    """V-sinks are judged on the concatenated features, before the norm of the projector."""
    hf, vlm = pair("vipllava")
    ids, mask, pixels = inputs(vlm.config, "left")
    sinks, method = SinkConfig(vit_dims=(43,), vit_tau=1.0), Gates(GateConfig(layers=(1, 3)))
    trained = method.initial(vlm.config, vlm.frozen, jax.random.key(0))
    trained = jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(jax.random.key(1), leaf.shape), trained)
    gated = vlm.with_method(method, trained, sinks=sinks)
    v_sink = gated.visual_tokens(ids, pixels, mask).v_sink
    assert 0 < v_sink.sum() < (ids == IMAGE_TOKEN).sum()
    tensors = {"input_ids": ids, "pixel_values": pixels, "attention_mask": mask}
    with torch.no_grad(), attach(hf, PortableGates(method.gate, sinks, jax.tree.map(np.asarray, trained))):
        expected = hf(**{name: torch.tensor(array) for name, array in tensors.items()}).logits.numpy()
    ours = gated.logits(ids, pixels, mask)
    assert np.abs(ours - vlm.logits(ids, pixels, mask))[mask == 1].max() > 0.01
    np.testing.assert_allclose(ours[mask == 1], expected[mask == 1], rtol=0, atol=TOLERANCE)
