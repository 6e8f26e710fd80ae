"""What tests of methods share: a tiny model in PyTorch, ours with its weights, inputs, and the comparison of the two."""

from contextlib import contextmanager
from functools import cache

import numpy as np
import torch
from hf_models import BOS, IMAGE_TOKEN, PAD, VOCABULARY, state_arrays, tiny_hf

from converters.convert import tree_from_tensors
from converters.hf_config import model_config
from lsg_jax.vlm import VLM

TOLERANCE = 1e-5  # of the largest absolute value of the reference array
PATCHES, LENGTH, NEW_TOKENS = 9, 40, 6  # 40 tokens are two blocks of queries
PROMPTS = (33, 22, 33)  # tokens; what follows in `inputs` is the answer


@cache
def pair(vision="clip"):
    """The Hugging Face model with eager attention and grouped keys, and ours with the same weights."""
    torch.set_num_threads(1)
    hf = tiny_hf(vision, "llama")
    hf.set_attn_implementation("eager")
    config = model_config(hf.config.to_diff_dict())
    return hf, VLM(config, tree_from_tensors(config, state_arrays(hf)))


def inputs(side, *, answers=True):
    """Three rows, the second without an image, padded on one side: ids, pixels of the rows with one, mask, gate position."""
    rng = np.random.default_rng(2)
    words = lambda n: rng.integers(4, VOCABULARY, size=n).tolist()
    image = [IMAGE_TOKEN] * PATCHES
    rows = [[BOS, *words(3), *image, *words(23)], [BOS, *words(25)], [BOS, *image, *words(28)]]
    ids, mask, last = np.full((3, LENGTH), PAD), np.zeros((3, LENGTH), int), np.zeros(3, int)
    for i, (row, prompt) in enumerate(zip(rows, PROMPTS, strict=True)):
        row = row if answers else row[:prompt]
        start = LENGTH - len(row) if side == "left" else 0
        ids[i, start : start + len(row)], mask[i, start : start + len(row)] = row, 1
        last[i] = start + prompt - 1
    return ids, rng.normal(size=(2, 3, 42, 42)).astype(np.float32), mask, last


def tensors(ids, pixels, mask, *_):
    return {"input_ids": torch.tensor(ids), "pixel_values": torch.tensor(pixels), "attention_mask": torch.tensor(mask)}


@contextmanager
def removed_after(hooks):
    """Removes the hooks at the end."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def check_close(ours, reference):
    error = np.abs(ours - reference).max() / np.abs(reference).max()
    assert error <= TOLERANCE, f"relative error {error:.2e}"


def check_logits_and_answers(vlm, hf, rendered, *, unchanged=(1,)):
    """Logits of prompt and answer, and greedy answers with a cache, are those of the rendering, which changes the other rows.

    Args:
        rendered: the gate positions [3] -> a context in which `hf` computes the method.
        unchanged: rows that have the logits of the plain model.
    """
    for side in ("left", "right"):
        given = inputs(side)
        real = given[2].astype(bool)
        with torch.no_grad():
            plain = hf(**tensors(*given)).logits.numpy()
            with rendered(given[3]):
                reference = hf(**tensors(*given)).logits.numpy()
        logits = vlm.logits(*given)
        check_close(logits[real], reference[real])
        moved = [np.abs(reference - plain)[row][real[row]].max() > 0.01 * np.abs(plain).max() for row in range(3)]
        assert moved == [row not in unchanged for row in range(3)]
        for row in unchanged:
            check_close(logits[row][real[row]], plain[row][real[row]])
    prompts = inputs("left", answers=False)
    with torch.no_grad(), rendered(prompts[3]):
        expected = hf.generate(**tensors(*prompts), max_new_tokens=NEW_TOKENS, do_sample=False)[:, LENGTH:].numpy()
    for side in ("left", "right"):
        found = vlm.generate_ids(*inputs(side, answers=False)[:3], NEW_TOKENS)
        np.testing.assert_array_equal(found[:, : expected.shape[1]], expected)
