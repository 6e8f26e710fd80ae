"""VAR against a PyTorch rendering of its equations, head by head and query by query, and its edge cases."""

import itertools
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hf_models import BOS, IMAGE_TOKEN, PAD, VOCABULARY, state_arrays, tiny_hf
from transformers.models.llama import modeling_llama

from converters.convert import tree_from_tensors
from converters.hf_config import model_config
from lsg_jax.config import SinkConfig
from lsg_jax.errors import ConfigError
from lsg_jax.methods.method_model import assemble
from lsg_jax.methods.var import Var, VarConfig, attention_redistribution, redistribute
from lsg_jax.types import Sequence
from lsg_jax.vlm import VLM

TOLERANCE = 1e-4  # of the largest absolute value of the reference array
PATCHES, LENGTH, LAYERS, NEW_TOKENS = 9, 40, 5, 8  # 40 tokens are two blocks of queries
DIMS = (5, 30)
CONFIG = VarConfig(tau=2.0, rho=0.45, min_visual=0.2, kept=0.1, first_layer=1)
MODELS = {"heads": 4, "grouped heads": 2}  # key-value heads of 4


@cache
def pair(name):
    """The Hugging Face model, and ours with the same weights. BOS is a sink, as in trained models, and some patches are."""
    torch.set_num_threads(1)
    hf = tiny_hf("clip", "llama", text_config={"num_hidden_layers": LAYERS, "num_key_value_heads": MODELS[name]})
    hf.set_attn_implementation("eager")
    with torch.no_grad():
        hf.model.language_model.embed_tokens.weight[BOS, DIMS[0]] = 20.0
        hf.model.multi_modal_projector.linear_2.weight[DIMS[0]] *= 2.0
    config = model_config(hf.config.to_diff_dict())
    return hf, VLM(config, tree_from_tensors(config, state_arrays(hf)))


def ours(name):
    return pair(name)[1].with_method(Var(CONFIG), sinks=SinkConfig(llm_dims=DIMS))


def inputs(side):
    """Three rows, the second without an image: ids, pixels of the rows with one, mask. There is room for answers."""
    rng = np.random.default_rng(2)
    words = lambda n: rng.integers(4, VOCABULARY, size=n).tolist()
    image = [IMAGE_TOKEN] * PATCHES
    rows = [[BOS, *words(3), *image, *words(20)], [BOS, *words(21)], [BOS, *image, *words(23)]]
    ids, mask = np.full((3, LENGTH), PAD), np.zeros((3, LENGTH), int)
    for i, row in enumerate(rows):
        start = LENGTH - len(row) if side == "left" else 0
        ids[i, start : start + len(row)], mask[i, start : start + len(row)] = row, 1
    return ids, rng.normal(size=(2, 3, 42, 42)).astype(np.float32), mask


def tensors(ids, pixels, mask):
    return {"input_ids": torch.tensor(ids), "pixel_values": torch.tensor(pixels), "attention_mask": torch.tensor(mask)}


class Rendering:
    """VAR in a Hugging Face model while it is entered, without a cache.

    Attributes:
        edited: layer -> bool [B, N, T], what the last forward pass edited.
        sinks: layer -> bool [B, T].
    """

    def __init__(self, hf, monkeypatch):
        self.edited, self.sinks, self.ids = {}, {}, None
        self.hooks = [hf.register_forward_pre_hook(self.see_ids, with_kwargs=True)]
        for number, layer in enumerate(hf.model.language_model.layers):
            self.hooks.append(layer.register_forward_pre_hook(lambda _, args, n=number: self.see_hidden(n, args[0])))
        monkeypatch.setattr(modeling_llama, "eager_attention_forward", self.attention)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()

    def see_ids(self, _, args, kwargs):
        self.ids = kwargs["input_ids"]

    def see_hidden(self, layer, hidden):
        root_mean_square = hidden.pow(2).mean(-1).sqrt()
        self.sinks[layer] = torch.stack([hidden[..., d].abs() / root_mean_square for d in DIMS]).amax(0) >= CONFIG.tau

    def attention(self, module, query, key, value, attention_mask, scaling, **_):
        repeated = lambda x: x.repeat_interleave(module.num_key_value_groups, dim=1)
        weights = torch.softmax(query @ repeated(key).transpose(2, 3) * scaling + attention_mask, dim=-1)
        layer, (batch, heads, length) = module.layer_idx, weights.shape[:3]
        self.edited[layer] = torch.zeros(batch, heads, length, dtype=bool)
        for b in range(batch) if CONFIG.first_layer <= layer < LAYERS - 1 else ():
            visual = self.ids[b] == IMAGE_TOKEN
            after_image = range(int(visual.nonzero().max()) + 1, length) if visual.any() else ()
            for n, t in itertools.product(range(heads), after_image):
                self.edited[layer][b, n, t] = edit(weights[b, n, t], self.sinks[layer][b], visual)
        return (weights @ repeated(value)).transpose(1, 2), weights


def edit(row, sinks, visual):
    """VAR on the attention [S] of one query in one head, in place; whether there was anything to do."""
    total, on_sinks = row[visual].sum(), row[visual & sinks].sum()
    others = visual & ~sinks
    if total < CONFIG.min_visual or on_sinks / total > CONFIG.rho or row[others].sum() == 0:
        return False
    freed = (1 - CONFIG.kept) * row[sinks].sum()
    row[sinks] *= CONFIG.kept
    row[others] += freed * row[others] / row[others].sum()
    return True


def assert_close(ours, reference):
    error = np.abs(ours - reference).max() / np.abs(reference).max()
    assert error <= TOLERANCE, f"relative error {error:.2e}"


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_pytorch(name, monkeypatch):
    hf, var = pair(name)[0], ours(name)
    for side in ("left", "right"):
        ids, pixels, mask = inputs(side)
        with Rendering(hf, monkeypatch) as rendering, torch.no_grad():
            reference = hf(**tensors(ids, pixels, mask), use_cache=False).logits.numpy()
        monkeypatch.undo()
        with torch.no_grad():
            plain = hf(**tensors(ids, pixels, mask)).logits.numpy()
        real, image = mask.astype(bool), ids == IMAGE_TOKEN
        after = real & (np.cumsum(image[:, ::-1], 1)[:, ::-1] == 0) & image.any(1, keepdims=True)
        for layer in range(CONFIG.first_layer, LAYERS - 1):  # in every layer some heads and queries, and not all
            edited, sinks = rendering.edited[layer].numpy(), rendering.sinks[layer].numpy()
            among = edited.transpose(0, 2, 1)[after]
            assert among.any(0).sum() >= 2 and (~among).any(0).sum() >= 2 and 0.05 < among.mean() < 0.95
            assert sinks[image].any() and not sinks[image].all() and sinks[ids == BOS].all()
        logits = var.logits(ids, pixels, mask)
        assert_close(logits[real], reference[real])
        assert_close(logits[real & ~after], plain[real & ~after])  # rows without an image, and what comes before it ends
        assert np.abs(logits - plain)[after].max() > 0.05 * np.abs(plain).max()


def test_generation_equals_pytorch_without_a_cache(monkeypatch):
    hf, var = pair("grouped heads")[0], ours("grouped heads")
    ids, pixels, mask = inputs("left")
    with Rendering(hf, monkeypatch) as rendering, torch.no_grad():
        expected = hf.generate(**tensors(ids, pixels, mask), max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=False)
    monkeypatch.undo()
    with torch.no_grad():
        plain = hf.generate(**tensors(ids, pixels, mask), max_new_tokens=NEW_TOKENS, do_sample=False)
    assert (plain[[0, 2]] != expected[[0, 2]]).any(1).all() and (plain[1] == expected[1]).all()
    inner = range(CONFIG.first_layer, LAYERS - 1)
    edited = torch.stack([rendering.edited[layer][..., LENGTH:] for layer in inner])
    assert edited[:, 0].any() and edited[:, 2].any() and not edited[:, 1].any() and not edited[:, 0].all()
    assert any(rendering.sinks[layer][[0, 2], LENGTH:].any() for layer in inner)  # generated tokens are sinks as well
    for side in ("left", "right"):
        np.testing.assert_array_equal(var.generate_ids(*inputs(side), NEW_TOKENS), expected[:, LENGTH:].numpy())


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, rules="released")], ids=["paper", "released"])
def test_cache_gives_the_logits_of_the_whole_sequence(config):
    """Our decoding against our own run over the text that it wrote, and not by its tokens alone."""
    var = pair("grouped heads")[1].with_method(Var(config), sinks=SinkConfig(llm_dims=DIMS))
    ids, pixels, mask = inputs("right")
    written = var.generate_in_full(var.batch(ids, pixels, mask), NEW_TOKENS)
    tokens, lengths = written.tokens, mask.sum(1)
    for row, length in enumerate(lengths):  # the answers go where the padding was
        ids[row, length : length + NEW_TOKENS - 1], mask[row, : length + NEW_TOKENS - 1] = tokens[row, :-1], 1
    logits = var.logits(ids, pixels, mask, lengths - 1)
    for row, length in enumerate(lengths):
        chosen = logits[row, length - 1 : length - 1 + NEW_TOKENS]
        np.testing.assert_array_equal(chosen.argmax(-1), tokens[row])
        best = np.sort(chosen, axis=-1)
        np.testing.assert_allclose(written.margin[row], (best[:, -1] - best[:, -2]).min(), atol=1e-4)


def moved(weights, sinks, visual, **settings):
    """`redistribute` for one query of one head."""
    array = lambda x, dtype: np.asarray(x, dtype)[None]
    config = VarConfig(**{"rho": 0.5, "min_visual": 0.2, "kept": 0.6, **settings})
    out = redistribute(
        array(weights, np.float32)[:, None, None],
        sinks=array(sinks, bool),
        visual=array(visual, bool),
        queries=np.ones((1, 1), bool),
        config=config,
    )
    return np.asarray(out)[0, 0, 0]


@pytest.mark.parametrize(
    "case, weights, sinks, visual, settings, expected",
    [
        # text sink, visual sink, two other patches, text
        ("by hand", [0.4, 0.1, 0.1, 0.2, 0.2], [1, 1, 0, 0, 0], [0, 1, 1, 1, 0], {}, [0.24, 0.06, 1 / 6, 1 / 3, 0.2]),
        ("all kept", [0.4, 0.1, 0.1, 0.2, 0.2], [1, 1, 0, 0, 0], [0, 1, 1, 1, 0], {"kept": 1.0}, None),
        ("none kept", [0.4, 0.1, 0.1, 0.2, 0.2], [1, 1, 0, 0, 0], [0, 1, 1, 1, 0], {"kept": 0.0}, [0, 0, 4 / 15, 8 / 15, 0.2]),
        ("no sink", [0.4, 0.1, 0.1, 0.2, 0.2], [0, 0, 0, 0, 0], [0, 1, 1, 1, 0], {}, None),
        ("no visual sink", [0.5, 0.25, 0.25, 0.0, 0.0], [1, 0, 0, 0, 0], [0, 1, 1, 1, 0], {}, [0.3, 0.35, 0.35, 0, 0]),
        ("little of it visual", [0.8, 0.05, 0.1, 0.0, 0.05], [1, 1, 0, 0, 0], [0, 1, 1, 1, 0], {}, None),
        ("at both thresholds", [0.5, 0.125, 0.125, 0, 0.25], [1, 1, 0, 0, 0], [0, 1, 1, 1, 0], {"min_visual": 0.25}, "edited"),
        ("mostly on sinks", [0.4, 0.3, 0.1, 0.0, 0.2], [1, 1, 0, 0, 0], [0, 1, 1, 1, 0], {}, None),
        ("every patch a sink", [0.4, 0.1, 0.1, 0.2, 0.2], [1, 1, 1, 1, 0], [0, 1, 1, 1, 0], {"rho": 1.0}, None),
        ("nothing on the others", [0.4, 0.4, 0.0, 0.0, 0.2], [1, 1, 0, 0, 0], [0, 1, 1, 1, 0], {"rho": 1.0}, None),
        ("hardly anything on them", [0.4, 0.4, 1e-39, 0.0, 0.2], [1, 1, 0, 0, 0], [0, 1, 1, 1, 0], {"rho": 1.0}, None),
        ("very little on them", [0.4, 0.4, 1e-37, 0.0, 0.2], [1, 1, 0, 0, 0], [0, 1, 1, 1, 0], {"rho": 1.0}, "edited"),
        ("nothing visual", [0.8, 0.0, 0.0, 0.0, 0.2], [1, 1, 0, 0, 0], [0, 1, 1, 1, 0], {"min_visual": 0.0}, None),
        ("no image", [0.8, 0.0, 0.0, 0.0, 0.2], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0], {"min_visual": 0.0}, None),
    ],
)
def test_edges(case, weights, sinks, visual, settings, expected):
    out = moved(weights, sinks, visual, **settings)
    assert np.isfinite(out).all() and (out >= 0).all()
    np.testing.assert_allclose(out.sum(), np.sum(weights), rtol=1e-6)
    if expected is None:
        np.testing.assert_array_equal(out, np.asarray(weights, np.float32) + np.float32(0))
    elif expected == "edited":
        np.testing.assert_allclose(out[0], 0.6 * weights[0], rtol=1e-6)
    else:
        np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-7)


def test_any_weights_stay_weights():
    rng = np.random.default_rng(0)
    weights = rng.dirichlet(np.full(12, 0.3), size=(50, 4, 6)).astype(np.float32)
    sinks, visual, queries = (rng.random((50, n)) < 0.4 for n in (12, 12, 6))
    out = np.asarray(redistribute(weights, sinks=sinks, visual=visual, queries=queries, config=VarConfig()))
    np.testing.assert_allclose(out.sum(-1), 1, rtol=1e-5)
    assert (out >= 0).all() and (out != weights).any(-1).mean() > 0.1
    untouched = ~(out != weights).any(-1)
    np.testing.assert_array_equal(out[untouched], weights[untouched])
    assert untouched.transpose(0, 2, 1)[~queries].all()
    text = ~sinks & ~visual  # other text keeps what it has
    np.testing.assert_array_equal(out.transpose(0, 3, 1, 2)[text], weights.transpose(0, 3, 1, 2)[text])


def test_queries_and_layers():
    """Valid tokens after the last patch of a row, whose images may be two; layers from the first to the last but one."""
    visual = np.array([[0, 0, 1, 1, 0, 0], [0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0], [1, 1, 0, 1, 0, 0]], bool)
    valid = np.array([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]], bool)
    var = attention_redistribution(CONFIG, visual=visual, valid=valid, dims=DIMS, num_layers=LAYERS)
    np.testing.assert_array_equal(var.queries, [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 0, 0], [0] * 6, [0, 0, 0, 0, 1, 1]])
    np.testing.assert_array_equal(var.enabled, [0, 1, 1, 1, 0])


def test_text_alone_is_the_base_model():
    var = ours("heads")
    batch = var.batch([[BOS, 50, 60, 70]], None)
    merged = Sequence(x=None, valid=batch.attention_mask, visual=None)
    assert assemble(var.graphdef, var.params).intervention(batch, merged) is None


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"rho": 1.5}, r"var.rho is 1.5: it must lie in \[0, 1\]"),
        ({"kept": -0.1}, "var.kept is -0.1"),
        ({"min_visual": float("nan")}, "var.min_visual is nan"),
        ({"tau": 0.0}, r"var.tau is 0.0: it must lie in \(0, 1e6\]"),
        ({"tau": float("inf")}, "var.tau is inf"),
        ({"first_layer": 4}, 'var.first_layer is 4: with var.rules = "paper" it must be one of the layers 0 to 3'),
        ({"first_layer": -1}, "var.first_layer is -1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    _, base = pair("heads")
    with pytest.raises(ConfigError, match=message):
        base.with_method(Var(VarConfig(**settings)), sinks=SinkConfig(llm_dims=DIMS))


def test_unknown_sink_dimensions_are_refused():
    with pytest.raises(ConfigError, match=r"none are known: set sinks\.llm_dims"):
        pair("heads")[1].with_method(Var())


def test_sinks_that_keep_all_leave_the_base_model_to_the_bit():
    vlm, given = pair("heads")[1], inputs("left")
    idle = vlm.with_method(Var(replace(CONFIG, kept=1.0)), sinks=SinkConfig(llm_dims=DIMS))
    np.testing.assert_array_equal(idle.logits(*given), vlm.logits(*given))
