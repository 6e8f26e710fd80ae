"""GIFT against a PyTorch rendering of the authors' equations, row by row and query by query, and its choice of words."""

from contextlib import contextmanager

import jax
import numpy as np
import pytest
import torch
from hf_models import IMAGE_TOKEN
from hooked import NEW_TOKENS, check_close, check_logits_and_answers, inputs, pair, tensors
from transformers.models.llama import modeling_llama

from lsg_jax.config import EvalConfig
from lsg_jax.data.conversation import question_turn
from lsg_jax.data.images import opened_images
from lsg_jax.errors import ConfigError
from lsg_jax.eval.benchmark import Item
from lsg_jax.eval.likelihood import log_likelihoods
from lsg_jax.look.answered import with_answer
from lsg_jax.methods.gift import Gift, GiftConfig, boost, larger_half, rise_of, saliency_map
from lsg_jax.methods.method_model import assemble
from lsg_jax.opening import load_backbone
from lsg_jax.types import CONTENT, QUESTION, Sequence
from lsg_jax.vlm import _logits

CONFIG = GiftConfig(saliency_layer=1, first_layer=2, last_layer=3, alpha=2.0)


@contextmanager
def rendered(hf, last, words=None):
    """`hf` under GIFT. The saliency that a pass over the prompts finds is kept for the tokens that follow.

    Args:
        last: [B], the last token of each prompt.
        words: [B, T], as `Batch.words`; None: everything from the image to the end of the prompt is content.
    """
    seen = {}

    def see(_, args, kwargs):
        if kwargs["input_ids"].shape[1] > 1:
            seen["visual"] = kwargs["input_ids"] == IMAGE_TOKEN

    def attention(module, query, key, value, attention_mask, scaling, **_):
        repeated = lambda x: x.repeat_interleave(module.num_key_value_groups, dim=1)
        weights = torch.softmax(query @ repeated(key).transpose(2, 3) * scaling + attention_mask, dim=-1)
        whole = weights.shape[2] > 1
        for row, visual in enumerate(seen["visual"]):
            if not visual.any():
                continue
            image = visual.nonzero()[:, 0]
            kinds = words[row] if words is not None else CONTENT * (np.arange(len(visual)) <= last[row])
            kinds = torch.tensor(kinds) * (torch.arange(len(visual)) > image[-1])
            if module.layer_idx == CONFIG.saliency_layer and whole:
                seen[row] = saliency(weights[row], image, (kinds == CONTENT).nonzero()[:, 0])
            if CONFIG.first_layer <= module.layer_idx <= CONFIG.last_layer:
                for t in range(last[row], len(visual)) if whole else [0]:
                    weights[row, :, t] = enhanced(weights[row, :, t], seen[row], image, (kinds > 0).nonzero()[:, 0])
        return (weights @ repeated(value)).transpose(1, 2), weights

    hook, own = hf.register_forward_pre_hook(see, with_kwargs=True), modeling_llama.eager_attention_forward
    modeling_llama.eager_attention_forward = attention
    try:
        yield
    finally:
        hook.remove()
        modeling_llama.eager_attention_forward = own


def saliency(weights, image, content):
    """Of the visual tokens at `image`, from attention [N, T, T]."""
    rise = (weights[:, content] - weights[:, content - 1])[..., image].clamp(min=0)
    heads = rise.sum((1, 2)).topk(len(rise) // 2).indices
    heat = rise[heads].mean((0, 1))
    heat = heat.clamp(heat.mean() - 3 * heat.std(), heat.mean() + 3 * heat.std())
    return torch.exp((heat - heat.min()) / (heat.max() - heat.min()) * CONFIG.alpha)


def enhanced(weights, saliency, image, question):
    """The attention [N, S] of one query."""
    looking = weights[:, image].sum(-1).topk(len(weights) // 2).indices
    reading = weights[:, question].sum(-1).topk(len(weights) // 2).indices
    before = weights[looking][:, image]
    after, out = before * saliency, weights.clone()
    out[looking[:, None], image] = after
    out[reading[:, None], question] *= after.sum() / before.sum()
    return out / out.sum(-1, keepdim=True)


def ours(config=CONFIG):
    return pair()[1].with_method(Gift(config))


def test_logits_and_answers_equal_pytorch():
    hf = pair()[0]
    check_logits_and_answers(ours(), hf, lambda last: rendered(hf, last))


def test_logits_and_answers_equal_pytorch_with_the_words_of_the_question():
    hf, gift = pair()[0], ours()
    given = inputs("left", answers=False)
    rng = np.random.default_rng(1)
    words = rng.integers(0, 3, size=given[0].shape).astype(np.int8)
    batch = gift.batch(*given).replace(words=words)
    with torch.no_grad(), rendered(hf, given[3], words):
        expected = hf.generate(**tensors(*given), max_new_tokens=NEW_TOKENS, do_sample=False)[:, given[0].shape[1] :].numpy()
        reference = hf(**tensors(*given)).logits.numpy()
    logits = np.asarray(_logits(gift.params, batch, gift.graphdef))
    check_close(logits[given[2].astype(bool)], reference[given[2].astype(bool)])
    assert np.abs(logits - gift.logits(*given))[[0, 2], -1].max() > 0.01 * np.abs(reference).max()  # other words, other logits
    found = gift.generate_in_full(batch, NEW_TOKENS).tokens
    np.testing.assert_array_equal(found[:, : expected.shape[1]], expected)


def test_alpha_of_zero_is_the_base_model_to_the_bit():
    given = inputs("left")
    idle = ours(GiftConfig(saliency_layer=1, first_layer=2, last_layer=3, alpha=0.0))
    np.testing.assert_array_equal(idle.logits(*given), pair()[1].logits(*given))


def test_text_alone_is_the_base_model():
    gift = ours()
    batch = gift.batch([[1, 50, 60, 70]])
    sequence = Sequence(x=None, valid=batch.attention_mask)
    assert assemble(gift.graphdef, gift.params).intervention(batch, sequence) is None


def test_saliency_by_hand():
    """Two heads of which one counts, three visual tokens, a question of two content words around another word."""
    weights = np.zeros((2, 2, 7, 7), np.float32)
    weights[0, 0, 3:6, :3] = [[0.1, 0.1, 0.1], [0.3, 0.1, 0.0], [0.9, 0.9, 0.9]]  # rises 0.2, 0, 0 at token 4; 5 is no content
    weights[0, 0, 6, :3] = [0.9, 1.0, 0.7]  # and 0, 0.1, 0 at token 6
    weights[0, 1, 4, 0] = 0.1
    visual = np.array([[1, 1, 1, 0, 0, 0, 0]] * 2, bool)
    content = np.array([[0, 0, 0, 0, 1, 0, 1]] * 2, bool)
    rise = rise_of(weights, content[:, 1:])
    np.testing.assert_allclose(rise[0, 0, :3], [0.2, 0.1, 0], rtol=1e-6)
    found = saliency_map(rise, visual=visual, words=content.sum(1), alpha=3.0)
    np.testing.assert_allclose(found[0], np.exp([3.0, 1.5, 0, 0, 0, 0, 0]), rtol=1e-6)
    np.testing.assert_array_equal(found[1], 1)  # no rise at all


def test_an_outlier_is_clipped_at_three_deviations():
    heat = np.linspace(0.0, 0.01, 30)
    heat[7] = 1.0
    clipped = np.minimum(heat, heat.mean() + 3 * heat.std(ddof=1))
    assert clipped[7] < heat[7]
    rise = np.zeros((1, 2, 32), np.float32)
    rise[0, 0, :30] = heat
    found = saliency_map(rise, visual=np.arange(32)[None] < 30, words=np.array([1]), alpha=1.0)
    np.testing.assert_allclose(found[0, :30], np.exp((clipped - clipped.min()) / np.ptp(clipped)), rtol=1e-5)


def test_boosted_weights_stay_weights():
    rng = np.random.default_rng(0)
    weights = rng.dirichlet(np.full(12, 0.3), size=(20, 4, 6)).astype(np.float32)
    visual = np.broadcast_to(np.arange(12) < 5, (20, 12)).copy()
    visual[3] = False  # nothing to look at
    question, queries = np.broadcast_to(np.arange(12) > 8, (20, 12)), rng.random((20, 6)) < 0.5
    out = np.asarray(boost(weights, saliency=np.exp(rng.random((20, 12))), visual=visual, question=question, queries=queries))
    np.testing.assert_allclose(out.sum(-1), 1, rtol=1e-5)
    np.testing.assert_array_equal(out.transpose(0, 2, 1, 3)[~queries], weights.transpose(0, 2, 1, 3)[~queries])
    np.testing.assert_allclose(out[3], weights[3], rtol=1e-5)
    assert (np.abs(out - weights).max((1, 3))[np.arange(20) != 3][queries[np.arange(20) != 3]] > 1e-3).all()
    assert larger_half(np.array([[[1.0], [4.0], [3.0]]]))[0, :, 0].tolist() == [False, True, False]


def test_words_of_a_question_are_those_of_its_text(tiny_model, scenes):
    """Through the chat template, from the text to the batch: its tokens are bytes, so each letter is one."""
    base = load_backbone(tiny_model)
    gift = base.with_method(Gift(CONFIG))
    image, prompt = scenes / "images/0.png", "How many red boxes aren't in it?"
    pictures = [opened_images(image)]
    batch = gift.questions(pictures, [prompt])
    assert base.questions(pictures, [prompt]).words is None
    text = lambda kinds: base.processor.tokenizer.decode(batch.input_ids[0][kinds])
    assert text(batch.words[0] >= QUESTION) == prompt
    assert text(batch.words[0] == CONTENT) == "manyredboxes"
    whole, _, answer = with_answer(gift, batch, 4)
    assert whole.words.shape == whole.input_ids.shape and not whole.words[:, -4:].any()
    np.testing.assert_array_equal(whole.words[:, :-4], batch.words)
    assert gift.generate([image], [prompt], 4) == [gift.processor.decode(answer)]

    class File:
        read = image.read_bytes

    asked = Item("0", prompt, (), images=(File(),))
    ((nats, _),) = log_likelihoods(gift, [asked], [prompt], ["ab"], EvalConfig(batch_size=1))
    encoded = gift.processor.encode([question_turn(prompt, 1)], "ab", image_sizes=[pictures[0][0].size])
    ids = encoded.ids[encoded.num_prompt : -1]  # without the end marker
    whole, *_ = with_answer(gift, batch, 4, answer=ids)
    logits = _logits(gift.params, whole, gift.graphdef)[0, batch.input_ids.shape[1] - 1 :][: len(ids)]
    expected = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), ids[:, None], axis=1).sum()
    assert nats == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"last_layer": 5}, r"gift\.last_layer: layer 5 does not exist, the model has layers 0 to 4"),
        ({"saliency_layer": 9}, r"gift\.saliency_layer: layer 9 does not exist"),
        ({"first_layer": 4}, r"gift\.first_layer is 4, behind gift\.last_layer 3"),
        ({"alpha": -1.0}, r"gift\.alpha is -1\.0: it must lie in \[0, 50\]"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        ours(GiftConfig(**{"saliency_layer": 1, "first_layer": 2, "last_layer": 3, **settings}))
