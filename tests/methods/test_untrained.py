"""PAI, VAF, EAH and DAMRO against PyTorch renderings of their equations, and where they change nothing."""

from functools import cache

import numpy as np
import pytest
import torch
from renderings import IMAGE_TOKEN, NEW_TOKENS, PATCHES, Rendering, Row, embed, features_of, greedy, padded, pair, rows

from lsg_jax.methods.damro import Damro, DamroConfig
from lsg_jax.methods.eah import Eah, EahConfig
from lsg_jax.methods.pai import Pai, PaiConfig
from lsg_jax.methods.vaf import Vaf, VafConfig

TOLERANCE = 1e-5  # of the largest absolute logit
TEXT = 1  # the row without an image


def plausible(contrasted, logits):
    """-inf for tokens less than a tenth as probable as the best."""
    probabilities = torch.softmax(logits, -1)
    return contrasted.masked_fill(probabilities < 0.1 * probabilities.max(), -torch.inf)


class PaiRendering(Rendering):
    def scores(self, layer, scores, first):
        if layer >= 1:
            last = scores[:, -1, : len(self.visual)]
            last[:, self.visual] += 0.7 * last[:, self.visual].abs()
        return scores

    def contrast(self, hf, row):
        return embed(hf, row.ids[row.ids != IMAGE_TOKEN], None)

    def logits(self, logits, others):
        return plausible(2.5 * logits - 1.5 * others, logits)


class VafRendering(Rendering):
    def scores(self, layer, scores, first):
        places = self.visual.nonzero()[:, 0]
        begins, ends = int(places.min()), int(places.max()) + 1
        if 1 <= layer <= 3:
            behind = scores[:, max(ends - first, 0) :]
            behind[:, :, : len(self.visual)][:, :, self.visual] *= 1.9
            behind[:, :, :begins] *= 0.4
        return scores


class EahRendering(Rendering):
    edited = 1

    def weights(self, layer, weights, first):
        if layer != self.edited or first:
            return weights
        length, counts = weights.shape[1], []
        for head in weights:
            means = [head[k + 1 :, k].mean() for k in range(length) if self.visual[k]]
            counts.append(sum(float(mean) > 0.021 for mean in means))
        return weights[int(np.argmax(counts))].expand_as(weights) if max(counts) else weights


class EahInTheLastLayer(EahRendering):
    edited = 4


class DamroRendering(Rendering):
    def contrast(self, hf, row):
        features, attention = features_of(hf, row.pixels)
        ranked = attention.argsort(dim=1, descending=True)[:, :4]
        few = torch.stack([image[order] for image, order in zip(features, ranked, strict=True)])
        number = np.cumsum(row.ids == IMAGE_TOKEN) - 1  # of a patch in the row
        kept = (row.ids != IMAGE_TOKEN) | (number % PATCHES < 4)
        return embed(hf, row.ids[kept], few)

    def logits(self, logits, others):
        return plausible(3.0 * logits - 2.0 * others, logits)


METHODS = {
    "pai": (Pai(PaiConfig(alpha=0.7, gamma=2.5, first_layer=1)), PaiRendering),
    "vaf": (Vaf(VafConfig(visual=1.9, system=0.4, first_layer=1, last_layer=3)), VafRendering),
    "eah": (Eah(EahConfig(threshold=0.021)), EahRendering),
    "damro": (Damro(DamroConfig(patches=4)), DamroRendering),
}
LAST = Eah(EahConfig(threshold=0.021, layer=4))
NOTHING = {
    "pai": Pai(PaiConfig(alpha=0, gamma=1)),
    "vaf": Vaf(VafConfig(visual=1, system=1, first_layer=1, last_layer=3)),
    "eah": Eah(EahConfig(threshold=1)),
    "damro": Damro(DamroConfig(alpha=0, patches=4)),
}


@cache
def plain():
    """Logits of the base model on the prompts alone, left-padded."""
    return pair()[1].logits(*padded("left")[0])


@cache
def unchanged():
    """Answers of the base model in PyTorch, row by row."""
    with pytest.MonkeyPatch.context() as patch:
        return [greedy(Rendering(), row, patch) for row in rows()]


def close(ours, reference):
    """Equal within the tolerance, and cut where the reference is -inf."""
    cut = np.isneginf(reference)
    assert (ours[cut] < -1e3).all()
    error = np.abs(ours - reference)[~cut].max() / np.abs(reference[~cut]).max()
    assert error <= TOLERANCE, f"relative error {error:.2e}"


@pytest.mark.parametrize("name", METHODS)
def test_answers_and_logits_equal_pytorch(name, monkeypatch):
    method, rendering = METHODS[name]
    vlm = pair()[1].with_method(method)
    expected = [greedy(rendering(), row, monkeypatch) for row in rows()]
    base = unchanged()
    tokens = np.stack([answer.tokens for answer in expected])
    changed = [bool((a.tokens != b.tokens).any()) for a, b in zip(expected, base, strict=True)]
    assert sum(changed) >= 2 and not changed[TEXT]
    for side in ("left", "right"):
        np.testing.assert_array_equal(vlm.generate_ids(*padded(side)[0], NEW_TOKENS), tokens)
        inputs, last = padded(side, tokens[:, :-1])
        logits = vlm.logits(*inputs, last)
        for i, answer in enumerate(expected):
            close(logits[i, last[i] : last[i] + NEW_TOKENS], answer.logits)
            if i != TEXT:  # by much more than the tolerance, from the first token on
                finite = np.isfinite(answer.logits[0])
                assert np.abs(answer.logits - base[i].logits)[0, finite].max() > 0.02


def test_the_last_layer_that_runs_for_one_query_is_edited_alike(monkeypatch):
    """By the margin of the first token, the only one whose logits the last layer changes."""
    gap = lambda answer: np.diff(np.sort(answer.logits[0])[-2:])[0]
    expected = [gap(greedy(EahInTheLastLayer(), row, monkeypatch)) for row in rows()]
    plain = [gap(answer) for answer in unchanged()]
    vlm = pair()[1].with_method(LAST)
    margin = vlm.generate_in_full(vlm.batch(*padded("left")[0]), 1).margin
    np.testing.assert_allclose(margin, expected, rtol=0, atol=1e-4)
    assert (np.abs(np.subtract(expected, plain)) > 0.01).tolist() == [True, False, True, True]


@pytest.mark.parametrize("name", METHODS)
def test_a_prompt_that_ends_in_its_image(name, monkeypatch):
    """Its next token is contrasted with what follows the last token that the second pass has."""
    method, rendering = METHODS[name]
    vlm, ends_in_image = pair()[1].with_method(method), Row(rows()[0].ids[: 4 + PATCHES], rows()[0].pixels)
    expected = greedy(rendering(), ends_in_image, monkeypatch)
    for room in (0, 3):  # of padding
        ids = np.pad(ends_in_image.ids, (room, 0))[None]
        mask = np.pad(np.ones_like(ends_in_image.ids), (room, 0))[None]
        np.testing.assert_array_equal(vlm.generate_ids(ids, ends_in_image.pixels, mask, NEW_TOKENS)[0], expected.tokens)
        whole = np.concatenate([ids, expected.tokens[None, :-1]], axis=1)
        mask, last = np.pad(mask, ((0, 0), (0, NEW_TOKENS - 1)), constant_values=1), np.array([ids.shape[1] - 1])
        close(vlm.logits(whole, ends_in_image.pixels, mask, last)[0, last[0] :], expected.logits)


@pytest.mark.parametrize("name", NOTHING)
def test_without_strength_it_is_the_base_model(name):
    vlm = pair()[1].with_method(NOTHING[name])
    np.testing.assert_array_equal(vlm.logits(*padded("left")[0]), plain())
    assert not vlm.method.contrasts
