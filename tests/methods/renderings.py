"""Methods of decoding in PyTorch: one row at a time, without padding, token by token over the cache of Hugging Face."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from hf_models import BOS, IMAGE_TOKEN, PAD, VOCABULARY, state_arrays, tiny_hf
from transformers.models.llama import modeling_llama

from converters.convert import tree_from_tensors
from converters.hf_config import model_config
from lsg_jax.vlm import VLM

PATCHES, LAYERS, LENGTH, NEW_TOKENS = 9, 5, 48, 8  # 48 tokens are two blocks of queries


@cache
def pair():
    """A tiny LLaVA with grouped keys and eager attention, and ours with its weights."""
    torch.set_num_threads(1)
    hf = tiny_hf("clip", "llama")
    hf.set_attn_implementation("eager")
    config = model_config(hf.config.to_diff_dict())
    return hf, VLM(config, tree_from_tensors(config, state_arrays(hf)))


class Row(NamedTuple):
    """A prompt: ids [P] and pixels [images, 3, 42, 42]."""

    ids: np.ndarray
    pixels: np.ndarray


@cache
def rows():
    """Text around an image, text alone, an image at once, two images."""
    rng = np.random.default_rng(2)
    words, image = (lambda n: rng.integers(4, VOCABULARY, size=n).tolist()), [IMAGE_TOKEN] * PATCHES
    made = [
        [BOS, *words(3), *image, *words(20)],
        [BOS, *words(21)],
        [BOS, *image, *words(25)],
        [BOS, *words(2), *image, *words(4), *image, *words(12)],
    ]
    pixels = lambda ids: rng.normal(size=(ids.count(IMAGE_TOKEN) // PATCHES, 3, 42, 42)).astype(np.float32)
    return [Row(np.array(ids), pixels(ids)) for ids in made]


def padded(side, answers=None):
    """All rows as arrays for ours, with room for answers: ids, pixels and mask, and the last token of each prompt.

    Args:
        answers: ids [rows, A] that follow the prompts.
    """
    behind = 0 if answers is None else answers.shape[1]
    ids, mask = np.full((len(rows()), LENGTH + behind), PAD), np.zeros((len(rows()), LENGTH + behind), int)
    last = []
    for i, row in enumerate(rows()):
        whole = row.ids if answers is None else np.concatenate([row.ids, answers[i]])
        start = LENGTH + behind - len(whole) if side == "left" else 0
        ids[i, start : start + len(whole)], mask[i, start : start + len(whole)] = whole, 1
        last.append(start + len(row.ids) - 1)
    return (ids, np.concatenate([row.pixels for row in rows()]), mask), np.array(last)


class Rendering:
    """A method that does nothing. Subclasses write its equations for one prompt."""

    visual: torch.Tensor  # bool [P], of the prompt in work

    def scores(self, layer, scores, first):
        """Attention scores [N, T, S] of the queries from position `first` on."""
        return scores

    def weights(self, layer, weights, first):
        """The same for weights after the softmax."""
        return weights

    def contrast(self, hf, row):
        """Embeddings [T', D] that the unchanged model reads besides; None for nothing."""
        return None

    def logits(self, logits, others):
        """Those that a token is chosen by, [V]; -inf where it may not be chosen."""
        raise NotImplementedError


class Chosen(NamedTuple):
    """Greedy tokens [A], and the logits [A, V] that they are the best of."""

    tokens: np.ndarray
    logits: np.ndarray


@torch.no_grad()
def greedy(rendering, row, monkeypatch):
    """The answer to one row."""
    hf = pair()[0]
    rendering.visual = torch.tensor(row.ids == IMAGE_TOKEN)
    edited = [False]

    def attention(module, query, key, value, attention_mask, scaling, **_):
        repeated = lambda x: x.repeat_interleave(module.num_key_value_groups, dim=1)
        scores = query @ repeated(key).transpose(2, 3) * scaling
        first = scores.shape[3] - scores.shape[2]
        if edited[0]:
            scores = rendering.scores(module.layer_idx, scores[0], first)[None]
        later = torch.arange(scores.shape[3]) > first + torch.arange(scores.shape[2])[:, None]
        weights = torch.softmax(scores.masked_fill(later, -torch.inf), dim=-1)
        if edited[0]:
            weights = rendering.weights(module.layer_idx, weights[0], first)[None]
        return (weights @ repeated(value)).transpose(1, 2), weights

    def run(edits, **inputs):
        edited[0] = edits
        out = hf.model.language_model(**inputs, use_cache=True)
        return hf.lm_head(out.last_hidden_state[0, -1]), out.past_key_values

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", attention)
    has_image = bool(len(row.pixels))
    embeddings = embed(hf, row.ids, features_of(hf, row.pixels)[0] if has_image else None)
    other = rendering.contrast(hf, row) if has_image else None
    logits, past = run(has_image, inputs_embeds=embeddings[None])
    beside = None if other is None else run(False, inputs_embeds=other[None])
    tokens, chosen = [], []
    for step in range(NEW_TOKENS):
        chosen.append(logits if beside is None else rendering.logits(logits, beside[0]))
        tokens.append(int(chosen[-1].argmax()))
        if step < NEW_TOKENS - 1:
            ids = torch.tensor([[tokens[-1]]])
            logits, past = run(has_image, input_ids=ids, past_key_values=past)
            beside = None if beside is None else run(False, input_ids=ids, past_key_values=beside[1])
    monkeypatch.undo()
    return Chosen(np.array(tokens), torch.stack(chosen).numpy())


def features_of(hf, pixels):
    """Features [images, P, Dv] of the patches, and [images, P] how much the class token attends to each, heads as one."""
    seen, tower = {}, hf.model.vision_tower
    layer = tower.vision_model.encoder.layers[-2] if hasattr(tower, "vision_model") else tower.encoder.layers[-2]
    kept = [
        getattr(layer.self_attn, name).register_forward_hook(lambda _, __, out, name=name: seen.update({name: out}))
        for name in ("q_proj", "k_proj")
    ]
    states = tower(torch.tensor(pixels), output_hidden_states=True).hidden_states
    for hook in kept:
        hook.remove()
    scores = torch.einsum("bd,btd->bt", seen["q_proj"][:, 0], seen["k_proj"])
    return states[-2][:, 1:], scores[:, 1:]


def embed(hf, ids, features):
    """Embeddings [T, D] of ids [T], whose image tokens are the patches [images, n, Dv] in their order."""
    ids = torch.tensor(ids)
    x = hf.model.language_model.embed_tokens(ids)
    if features is not None:
        x[ids == IMAGE_TOKEN] = hf.model.multi_modal_projector(features).flatten(0, 1)
    return x
