"""Contrasted logits: the second pass in every kind of sequence, the margin, ended rows, and the commands that meet them."""

import dataclasses
from functools import cache

import numpy as np
import pytest
import torch
from family_models import IMAGE, family_inputs, preprocessor, tiny_family
from hf_models import BOS, IMAGE_TOKEN, PAD, VOCABULARY, state_arrays, tiny_hf
from PIL import Image
from renderings import NEW_TOKENS, embed, features_of, padded, pair, rows
from transformers import LlavaNextImageProcessorPil

import lsg_jax
from converters.convert import tree_from_tensors
from converters.hf_config import model_config
from lsg_jax.config import EvalConfig, ImageConfig
from lsg_jax.data.layout import lay_out
from lsg_jax.errors import ConfigError
from lsg_jax.eval.answering import answer
from lsg_jax.eval.likelihood import log_likelihoods
from lsg_jax.eval.registry import find_benchmark
from lsg_jax.memory import shard_bytes
from lsg_jax.methods.damro import Damro, DamroConfig
from lsg_jax.methods.eah import Eah, EahConfig
from lsg_jax.methods.pai import Pai, PaiConfig
from lsg_jax.methods.vaf import Vaf, VafConfig
from lsg_jax.model.contrast import CUT, Contrasted, contrast
from lsg_jax.plan.programs import eval_answers, eval_prompts
from lsg_jax.plan.traced import traced_flops
from lsg_jax.run_config import RunConfig
from lsg_jax.sharding import answering_mesh
from lsg_jax.vlm import VLM

BOTH_PARTS = Pai(PaiConfig(alpha=50, gamma=3))
TEXT_ALONE = Pai(PaiConfig(alpha=0, gamma=2, cutoff=0))
SIZES = [[(60, 200), (77, 90)], [(300, 101)], []]  # width and height of the images of each row
PINPOINTS = [[42, 84], [84, 42], [84, 84], [126, 42], [42, 126]]


@cache
def model(name):
    hf = tiny_hf("clip", "llama", image_grid_pinpoints=PINPOINTS) if name == "llava_next" else tiny_family(name)
    config = model_config(hf.config.to_diff_dict(), preprocessor=None if name == "llava_next" else preprocessor(name))
    return VLM(config, tree_from_tensors(config, state_arrays(hf)))


def arrays(name):
    """Rows with two images, one and none, as the family's processor returns them, with room behind; and the image token."""
    rng = np.random.default_rng(0)
    shown = [[Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)) for w, h in row] for row in SIZES]
    if name != "llava_next":
        found = family_inputs(name, shown, "right")
        longer = lambda x: np.pad(x, ((0, 0), (0, NEW_TOKENS)))
        return {key: longer(x) if x.shape == found["input_ids"].shape else x for key, x in found.items()}, IMAGE
    ids = [[BOS, *rng.integers(4, VOCABULARY, 3)] for _ in shown]
    for row, sizes in zip(ids, SIZES, strict=True):
        for size in sizes:
            row += [*lay_out(size, model(name).config).token_ids, *rng.integers(4, VOCABULARY, 3)]
    crop = {"height": 42, "width": 42}
    processor = LlavaNextImageProcessorPil(size={"shortest_edge": 42}, crop_size=crop, image_grid_pinpoints=PINPOINTS)
    found = dict(processor([image for row in shown for image in row], return_tensors="np"))
    ids, mask = right_padded(ids, max(map(len, ids)))
    return {"input_ids": ids, "attention_mask": mask, **found}, IMAGE_TOKEN


def right_padded(rows, length):
    """Ids and mask of rows of unequal length."""
    ids = np.array([[*row, *[PAD] * (length - len(row))] for row in rows])
    return ids, np.arange(length) < np.array([[len(row)] for row in rows])


@pytest.mark.parametrize("name", ["qwen3_vl", "gemma3", "llava_next"])
def test_the_second_pass_reads_the_text_alone(name):
    """Under M-RoPE with deepstack, with images that see themselves in windows, and between newlines."""
    base, (inputs, image) = model(name), arrays(name)
    ids, valid = inputs["input_ids"], inputs["attention_mask"].astype(bool)
    is_text = valid & (ids != image)
    plain = base.logits(**inputs)
    texts, mask = right_padded([row[kept] for row, kept in zip(ids, is_text, strict=True)], ids.shape[1])
    alone = base.logits(texts, None, mask)
    expected = plain.copy()
    for row in (0, 1):
        expected[row, is_text[row]] = 2 * plain[row, is_text[row]] - alone[row, mask[row]]
    assert np.abs(expected - plain)[:2].max() > 0.05
    vlm = base.with_method(TEXT_ALONE)
    np.testing.assert_allclose(vlm.logits(**inputs)[valid], expected[valid], rtol=0, atol=1e-4)
    if name == "llava_next":  # it decodes as LLaVA-1.5 does
        return
    tokens = vlm.generate_ids(**inputs, max_new_tokens=NEW_TOKENS)
    for row, length in enumerate(valid.sum(1)):  # the answers go where there is room
        ids[row, length : length + NEW_TOKENS] = tokens[row]
        inputs["attention_mask"][row, : length + NEW_TOKENS] = 1
    logits = vlm.logits(**inputs)
    for row, length in enumerate(valid.sum(1)):
        np.testing.assert_array_equal(logits[row, length - 1 : length - 1 + NEW_TOKENS].argmax(-1), tokens[row])


def test_damro_of_tiles_contrasts_the_whole_image():
    """As its code for LLaVA-NeXT: the best patches of the first tile, one newline. Row 0 has two images side by side."""
    hf, base = tiny_hf("clip", "llama", image_grid_pinpoints=PINPOINTS), model("llava_next")
    inputs, image = arrays("llava_next")
    first = len(lay_out(SIZES[0][0], base.config).token_ids)
    row = inputs["input_ids"][0]
    end = 4 + first  # of the first image; three tokens of text follow it
    inputs["input_ids"][0] = np.concatenate([row[:end], row[end + 3 :], row[end : end + 3]])
    ids, valid = inputs["input_ids"], inputs["attention_mask"].astype(bool)
    plain = base.logits(**inputs)
    found = base.with_method(Damro(DamroConfig(patches=4, cutoff=0))).logits(**inputs)
    np.testing.assert_allclose(found[2], plain[2], atol=1e-6)
    shown = iter(inputs["pixel_values"])
    for row in (0, 1):
        pieces, at = [], 0
        for size in SIZES[row]:
            begins = at + int(np.argmax(ids[row, at:] == image))
            features, attention = features_of(hf, next(shown)[:1])
            best = features[0][attention[0].argsort(descending=True)[:4]]
            projected = hf.model.multi_modal_projector(best)
            pieces += [embed(hf, ids[row, at:begins], None), projected, hf.model.image_newline[None]]
            at = begins + len(lay_out(size, base.config).token_ids)
        behind = valid[row].sum() - at
        pieces.append(embed(hf, ids[row, at : at + behind], None))
        with torch.no_grad():
            few = hf(inputs_embeds=torch.cat(pieces)[None]).logits[0, -behind:].numpy()
        expected = 3 * plain[row, at : at + behind] - 2 * few
        assert np.abs(expected - plain[row, at : at + behind]).max() > 0.05
        np.testing.assert_allclose(found[row, at : at + behind], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "case, free, above, margin",
    [
        ("no token is near the cut-off", [5.0, 3.0, 1.0], [4.0, 4.0, 4.0], 2.0),
        ("a cut token would win by far", [5.0, 9.0, 1.0], [4.0, -0.5, 4.0], 0.5),
        ("a cut token would have to win too", [5.0, 3.0, 1.0], [4.0, -0.5, 4.0], 2.0),
        ("the chosen one is nearly cut", [5.0, 3.0, 1.0], [0.25, 4.0, 4.0], 0.25),
        ("rows that are not contrasted", [5.0, 3.0, 1.0], [np.inf] * 3, 2.0),
    ],
)
def test_the_margin_by_hand(case, free, above, margin):
    both = Contrasted(np.array(free, np.float32), np.array(above, np.float32))
    assert both.logits.argmax() == 0
    assert both.margin(np.array(0)) == margin


def test_no_smaller_error_than_the_margin_changes_the_choice():
    """Every other token is helped, and the chosen one hindered, by a little less and a little more than the margin."""
    rng = np.random.default_rng(0)
    logits, others = (rng.normal(scale=2, size=(200, 12)).astype(np.float32) for _ in range(2))
    both = contrast(logits, others, weight=3.0, cutoff=0.3)
    chosen = np.asarray(both.logits.argmax(-1))
    assert (np.asarray(both.free).argmax(-1) != chosen).mean() > 0.1  # the cut-off matters

    def changes(error):
        found = np.zeros(len(chosen), bool)
        for token in np.eye(12, dtype=np.float32):
            helped = token * error
            moved = Contrasted(both.free + helped, both.above + helped - np.eye(12, dtype=np.float32)[chosen] * error)
            found |= np.asarray(moved.logits.argmax(-1)) != chosen
        return found

    margin = np.asarray(both.margin(chosen))[:, None]
    assert not changes(0.99 * margin).any()
    assert changes(1.01 * margin).mean() > 0.9  # not where the first pass's best is chosen, which is never cut


def test_a_row_that_has_ended_leaves_the_others():
    base = pair()[1].with_method(Pai(PaiConfig(alpha=0.7, gamma=2.5, first_layer=1)))
    inputs = padded("left")[0]
    answers = base.generate_ids(*inputs, NEW_TOKENS)
    end = int(answers[0, 2])
    stopping = VLM(dataclasses.replace(base.config, eos_token_ids=(end,)), base.frozen, method=base.method)
    made = stopping.generate_in_full(stopping.batch(*inputs), NEW_TOKENS)
    for row, whole in enumerate(answers):
        length = int(np.argmax(whole == end)) + 1 if (whole == end).any() else NEW_TOKENS
        np.testing.assert_array_equal(made.tokens[row], [*whole[:length], *[base.config.pad_token_id] * (NEW_TOKENS - length)])
    assert len(rows()) == len(made.margin) and np.isfinite(made.margin).all()


@pytest.fixture(scope="module")
def base(tiny_model):
    return lsg_jax.load(tiny_model)


@pytest.fixture(scope="module")
def asked(scenes):
    """Four questions about images, and one without."""
    benchmark = find_benchmark("mine", str(scenes / "questions.jsonl"))
    items = benchmark.read(str(scenes / "questions.jsonl"))[:4]
    items.append(dataclasses.replace(items[0], id="text", images=()))
    return items, [benchmark.prompt(item, "paper") for item in items]


def test_near_ties_are_answered_alone(base, asked):
    vlm, (items, prompts) = base.with_method(BOTH_PARTS), asked

    def ask(**settings):
        return [found.text for found in answer(vlm, items, prompts, EvalConfig(batch_size=5, **settings), max_new_tokens=4)]

    assert ask(near_tie=0.0) == ask(near_tie=1e9)


def test_likelihoods_are_finite_though_tokens_are_cut(base, asked):
    vlm, (items, prompts) = base.with_method(BOTH_PARTS), asked
    found = log_likelihoods(vlm, items, prompts, ["two"] * 5, EvalConfig(batch_size=5))
    of_images, of_text = [nats for nats, _ in found[:4]], found[4][0]
    assert np.isfinite(of_images).all() and min(of_images) < -CUT / 2 and -50 < of_text < 0


def test_where_it_looks_and_what_it_says(base, scenes):
    """The attention of answer tokens is raised from the first layer on; the answer of `look` is that of `generate`."""
    vlm, image = base.with_method(BOTH_PARTS), scenes / "images/0.png"
    look = vlm.look(image, "How many?", 4)
    assert look.answer == vlm.generate([image], ["How many?"], 4)[0]
    on_image = look.maps["raw"].sum(-1)  # [A, L, N]
    assert on_image[:, :2].mean() < 0.8 < 0.99 < on_image[:, 2:].mean()


def test_a_plan_counts_the_second_pass(base, tiny_model):
    """Its cache, which goes from the prompts to the answers, and its work."""
    config = RunConfig(model=str(tiny_model), output="run", eval=EvalConfig(batch_size=2))
    mesh, found = answering_mesh(None, base.config.text, weights=0, memory=1), {}
    for name in ("base", "damro"):
        method = dataclasses.replace(config, method=name)
        prompts = eval_prompts(method, base.config, mesh, max_new_tokens=3, dtype=np.float32)
        answers = eval_answers(prompts, prompts.compile())
        caches = shard_bytes(answers.arguments[2]) + shard_bytes(answers.arguments[3])
        work = traced_flops(lambda *a, p=answers: p.function(*a, *p.static), *answers.arguments, trips=answers.trips)
        found[name] = caches, work
    assert [b / a for a, b in zip(*found.values(), strict=True)] == pytest.approx([2, 2], rel=0.05)


@pytest.mark.parametrize(
    "method, changes, message",
    [
        (Pai(PaiConfig(first_layer=5)), {}, "pai.first_layer: layer 5 does not exist, the model has layers 0 to 4"),
        (Pai(PaiConfig(last_layer=31)), {}, "pai.last_layer: layer 31 does not exist"),
        (Pai(PaiConfig(first_layer=3, last_layer=2)), {}, "pai.first_layer is 3, behind pai.last_layer 2"),
        (Vaf(), {}, "vaf.first_layer: layer 9 does not exist, the model has layers 0 to 4"),
        (Vaf(VafConfig(first_layer=1)), {}, "vaf.last_layer: layer 14 does not exist"),
        (Eah(EahConfig(layer=5)), {}, "eah.layer: layer 5 does not exist"),
        (Damro(), {}, "damro.patches is 10: an image has 9"),
        (Damro(), {"feature_select": "full"}, "damro takes a token a patch, but this model sees the class token too"),
        (Damro(), {"feature_layers": (0,)}, "but this model sees its embeddings alone"),
        (Damro(), {"image": ImageConfig(42, "pad", (0.5,) * 3, (0.5,) * 3, layout="tiles")}, "cuts images into tiles"),
    ],
)
def test_what_a_model_cannot_carry_is_refused_by_name(method, changes, message):
    with pytest.raises(ConfigError, match=message):
        method.for_model(dataclasses.replace(pair()[1].config, **changes))


@pytest.mark.parametrize("name, reason", [("gemma3", "merges 4 x 4 patches"), ("qwen3_vl", "takes images of any size")])
def test_models_without_a_token_a_patch_are_refused(name, reason):
    with pytest.raises(ConfigError, match=f"damro .*{reason}"):
        model(name).with_method(Damro())


def test_a_tower_without_a_class_token_is_refused():
    config = model_config(tiny_hf("siglip", "llama").config.to_diff_dict())
    with pytest.raises(ConfigError, match="the vision tower's class token, and this tower has none"):
        Damro().for_model(config)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: PaiConfig(gamma=0.9), r"pai.gamma is 0.9: it must lie in \[1, 100\]"),
        (lambda: PaiConfig(alpha=-0.1), "pai.alpha is -0.1"),
        (lambda: VafConfig(visual=float("nan")), "vaf.visual is nan"),
        (lambda: EahConfig(threshold=1.1), "eah.threshold is 1.1"),
        (lambda: DamroConfig(patches=0), "damro.patches is 0"),
        (lambda: DamroConfig(cutoff=1.5), "damro.cutoff is 1.5"),
    ],
)
def test_settings_that_mean_nothing_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
