"""`vlm.look` against eager attentions of Hugging Face, gated and not; its maps in closed form, and their place on pictures."""

import dataclasses
import json
import re
from functools import cache

import jax
import numpy as np
import pytest
import torch
from family_models import image_processor, save_family, tiny_family
from hf_models import save_tiny, tiny_hf
from PIL import Image, ImageDraw
from transformers import CLIPImageProcessorPil, LlavaNextImageProcessorPil

import lsg_jax
from converters.convert import convert
from converters.torch_gate import attach
from lsg_jax.config import GateConfig, SinkConfig
from lsg_jax.errors import ConfigError, InputError
from lsg_jax.gating.portable import PortableGates
from lsg_jax.look import Look
from lsg_jax.look.answered import patches_behind, with_answer
from lsg_jax.look.compute import boxes, in_words
from lsg_jax.look.look import without_sinks
from lsg_jax.look.page import page_html
from lsg_jax.methods.fixed import Fixed, FixedConfig
from lsg_jax.methods.gates import Gates
from lsg_jax.methods.method import BASE

TOLERANCE = 1e-5  # absolute, of attention weights
PINPOINTS = [[42, 84], [84, 42], [84, 84], [126, 42], [42, 126]]
RUN = ["llava", "llava_next", "qwen2_5_vl", "gemma3"]
PLACED = [*RUN, "internvl-qwen3", "smolvlm"]
SINKS = SinkConfig(vit_dims=(3, 7), vit_tau=1.9, llm_dims=(5,), llm_tau=2.4)
TAUS = {"gemma3": 2.75}  # of V-sinks, where 1.9 is reached by all tokens
PROMPT = "What?"


def sinks_of(name):
    return dataclasses.replace(SINKS, vit_tau=TAUS.get(name, SINKS.vit_tau))


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Name of a family -> a tiny HF model with eager attention, and ours."""

    @cache
    def of(name):
        torch.set_num_threads(1)
        folder = tmp_path_factory.mktemp(name)
        if name.startswith("llava"):
            more = {"image_grid_pinpoints": PINPOINTS} if name == "llava_next" else {}
            hf = tiny_hf("clip", "llama", text_config={"max_position_embeddings": 512}, **more)
            save_tiny(hf, folder / "hf")
        else:
            hf = tiny_family(name)
            save_family(name, hf, folder / "hf")
        hf.set_attn_implementation("eager")
        convert(folder / "hf", folder / "model")
        return hf, lsg_jax.load(folder / "model", sinks=sinks_of(name))

    return of


def pictures(name):
    """Two images of odd sizes where a prompt may hold them; LLaVA-NeXT is looked at with one."""
    rng = np.random.default_rng(0)
    sizes = [(60, 200), (99, 77)][: 1 if name == "llava_next" else 2]
    return [Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)) for width, height in sizes]


def hf_pixels(name, hf, shown):
    """What Hugging Face's own image processor makes of the images of one prompt."""
    if not name.startswith("llava"):
        found = dict(image_processor(name)([shown] if name == "smolvlm" else shown, return_tensors="pt"))
        return {key: found[key] for key in found if key not in ("num_crops", "num_patches", "rows", "cols")}
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    settings = {"size": {"shortest_edge": 42}, "crop_size": {"height": 42, "width": 42}, "image_mean": mean, "image_std": std}
    if name == "llava":
        return dict(CLIPImageProcessorPil(**settings)(shown, return_tensors="pt"))
    return dict(LlavaNextImageProcessorPil(**settings, image_grid_pinpoints=PINPOINTS)(shown, return_tensors="pt"))


def hf_attentions(name, hf, vlm, shown, look):
    """[A, L, N, V] of Hugging Face on the same ids, and the positions of the visual tokens."""
    batch, _, answer = with_answer(vlm, vlm.questions([shown], [PROMPT]), 6)
    ids = np.asarray(batch.input_ids)[:, np.asarray(batch.attention_mask)[0]]
    is_image = ids[0] == vlm.config.image_token_id
    more = {"gemma3": "token_type_ids", "qwen2_5_vl": "mm_token_type_ids"}
    types = {more[name]: torch.tensor(is_image[None].astype(np.int64))} if name in more else {}
    with torch.no_grad():
        out = hf(
            input_ids=torch.tensor(ids),
            **types,
            **hf_pixels(name, hf, shown),
            output_attentions=True,
            output_hidden_states=True,
        )
    start = ids.shape[1] - len(answer)
    weights = np.stack([layer[0].numpy() for layer in out.attentions])  # [L, N, T, T]
    own = np.asarray(batch.source)[0][np.asarray(batch.attention_mask)[0], 0] >= 0  # newlines are image tokens there
    np.testing.assert_array_equal(np.flatnonzero(own), look.visual)
    return weights[:, :, start - 1 : start - 1 + len(answer)][..., own].transpose(2, 0, 1, 3), weights, out.hidden_states


@pytest.mark.parametrize("name", RUN)
def test_raw_maps_equal_hugging_face(name, opened):
    hf, vlm = opened(name)
    shown = pictures(name)
    look = vlm.look(shown, PROMPT, 6, maps=("raw", "no_sinks", "relative"), layers=(3, 1))
    raw, whole, hidden = hf_attentions(name, hf, vlm, shown, look)
    assert len(look.tokens) == len(raw) > 0 and "".join(look.tokens).strip() == look.answer
    np.testing.assert_allclose(look.maps["raw"], raw, rtol=0, atol=TOLERANCE)
    for layer in (1, 3):
        np.testing.assert_allclose(look.attention[layer], whole[layer], rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(look.hidden[layer], hidden[layer][0].numpy(), rtol=0, atol=1e-4)
    # without sinks: the rest, divided by its sum, or nothing (a local layer of Gemma sees no image far behind it)
    rest = raw * ~(look.v_sink | look.l_sink)[None, :, None]
    assert 0 < look.v_sink.sum() < len(look.v_sink) and look.l_sink.any()
    total = rest.sum(-1, keepdims=True)
    np.testing.assert_allclose(look.maps["no_sinks"], np.where(total, rest / np.where(total, total, 1), 0), rtol=0, atol=1e-4)
    # sinks by their values
    np.testing.assert_array_equal(look.v_sink, look.v_value >= sinks_of(name).vit_tau)
    np.testing.assert_array_equal(look.l_sink, (look.l_value >= SINKS.llm_tau) & ~look.v_sink)
    # over the neutral prompt
    neutral = vlm.look(shown, "Write a general description of the image.", 6).maps["raw"][0]
    np.testing.assert_allclose(look.maps["relative"], look.maps["raw"] / np.maximum(neutral, 1e-6), rtol=1e-4)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_gated_maps_equal_the_gated_pytorch_model(name, opened):
    hf, vlm = opened(name)
    method, shown = Gates(GateConfig(layers=(0, 3))), pictures(name)
    start = method.initial(vlm.config, vlm.frozen, jax.random.key(0))
    trained = jax.tree.map(lambda leaf: np.asarray(leaf + 0.3 * jax.random.normal(jax.random.key(1), leaf.shape)), start)
    gated = vlm.with_method(method, trained)
    look = gated.look(shown, PROMPT, 6)
    batch = vlm.questions([shown], [PROMPT])
    last = int(np.asarray(batch.attention_mask).sum()) - 1
    with attach(hf, PortableGates(method.gate, sinks_of(name), trained), gate_position=torch.tensor([last])):
        raw, *_ = hf_attentions(name, hf, gated, shown, look)
    np.testing.assert_allclose(look.maps["raw"], raw, rtol=0, atol=TOLERANCE)
    plain, *_ = hf_attentions(name, hf, gated, shown, look)
    assert np.abs(plain - raw).max() > 1e-3


@pytest.mark.parametrize("name", PLACED)
def test_a_mark_in_a_corner_lies_in_the_boxes_of_its_tokens(name, opened):
    """Tokens whose pixels a mark changes are those whose boxes touch it, a resampling filter's width apart."""
    _, vlm = opened(name)
    plain = Image.new("RGB", (600, 200), (90, 120, 60))
    marked = plain.copy()
    ImageDraw.Draw(marked).rectangle((560, 2, 597, 36), fill=(255, 255, 255))
    batches = [vlm.questions([[picture]], [PROMPT]) for picture in (plain, marked)]
    before, after = (np.asarray(batch.images.patches)[0].astype(int) for batch in batches)
    changed = np.abs(before - after).max(-1).reshape(-1) > 40  # of every patch of the row; a filter's ripples are weaker
    places = np.flatnonzero(np.asarray(batches[1].source)[0, :, 0] >= 0)
    behind = np.asarray(patches_behind(batches[1].source, places, changed.size, vlm.config))
    box, image = boxes(vlm, [marked])
    assert not image.any() and len(box) == len(places)
    touched = (changed[behind] & (behind >= 0)).any(1)
    x0, y0, x1, y1 = box.T * np.array([600, 200, 600, 200])[:, None]
    inside = (x0 < 597) & (x1 > 560) & (y0 < 36) & (y1 > 2)
    centre = (x0 <= 578) & (x1 > 579) & (y0 <= 19) & (y1 > 20)
    assert centre.any() or name == "llava"  # LLaVA-1.5's centre crop has no corner
    assert touched[centre].all()
    assert not touched[~inside].any()


def scripted(**fields):
    """A look at one picture of 40 x 20 pixels, two tokens side by side and one over the whole."""
    box = np.array([[0, 0, 0.5, 1], [0.5, 0, 1, 1], [0, 0, 1, 1], [-0.5, 0, 0, 1]], np.float32)
    raw = np.arange(1, 1 + 1 * 2 * 2 * 4, dtype=np.float32).reshape(1, 2, 2, 4) / 100
    v_sink, l_sink = np.array([True, False, False, False]), np.array([[False, True, False, False], [False] * 4])
    given = {
        "prompt": "?", "answer": "yes", "tokens": ["yes"], "box": box, "image": np.zeros(4, np.int32), "v_sink": v_sink,
        "l_sink": l_sink, "v_value": np.zeros(4, np.float32), "l_value": np.full((2, 4), np.nan, np.float32), "criteria": {},
        "pictures": [Image.new("RGB", (40, 20))], "visual": np.arange(4, dtype=np.int32),
        "maps": {"raw": raw, "no_sinks": without_sinks(raw, v_sink | l_sink)},
    }  # fmt: skip
    return Look(**(given | fields))


def test_maps_on_the_picture_keep_what_lies_inside():
    look = scripted()
    values = np.array([0.2, 0.3, 0.4, 0.5], np.float32)
    drawn = look.on_picture(values, side=41)  # a side that cuts a pixel in two
    assert drawn.shape == (20, 41)  # 40 x 20 pixels at this side
    assert drawn.mean() == pytest.approx(0.9, abs=1e-6)  # the last token lies in the padding
    np.testing.assert_allclose(drawn[:, :20], 0.2 / 0.5 + 0.4, atol=1e-6)
    np.testing.assert_allclose(drawn[:, 21:], 0.3 / 0.5 + 0.4, atol=1e-6)


def test_means_over_heads_are_of_attention_and_then_without_sinks():
    look = scripted()
    np.testing.assert_allclose(look.over_heads("raw"), look.maps["raw"].mean(2))
    np.testing.assert_allclose(look.over_heads("no_sinks").sum(-1), 1, rtol=1e-6)
    mean = look.maps["raw"][0, 1].mean(0)
    np.testing.assert_allclose(look.values("no_sinks", 0, 1), [0, *(mean[1:] / mean[1:].sum())], rtol=1e-6)
    np.testing.assert_array_equal(look.values("raw", 0, 1, head=1), look.maps["raw"][0, 1, 1])
    for where in ((1, 0, None), (0, 2, None), (0, 0, 2), (0, -1, None)):
        with pytest.raises(InputError, match="is not in"):
            look.values("raw", *where)
    with pytest.raises(InputError, match="no map relative"):
        look.values("relative", 0, 0)


def test_no_map_where_all_is_sink():
    raw = np.ones((1, 1, 3), np.float32)
    np.testing.assert_array_equal(without_sinks(raw, np.ones((1, 3), bool)), np.zeros((1, 1, 3)))


def test_unusable_calls_are_refused(tiny_model):
    vlm = lsg_jax.load(tiny_model)
    image = Image.new("RGB", (50, 20))
    for call, message in (
        (lambda: vlm.look([], "?"), "no image"),
        (lambda: vlm.look(image, None), "prompt is of type"),
        (lambda: vlm.look(image, "?", 0), "max_new_tokens is 0"),
        (lambda: vlm.look(image, "?", maps=("best",)), "no map best"),
        (lambda: vlm.look(image, "?", layers=(99,)), "a layer is 99"),
        (lambda: vlm.look(image, "?", layers=(1.5,)), "a layer: expected int, got 1.5"),
        (lambda: vlm.look(image, "?", layers=3), "maps and layers: give lists"),
        (lambda: vlm.look(image, "?", maps="raw"), "maps and layers: give lists"),
        (lambda: vlm.look(image, "?", 2.5), "max_new_tokens: expected int, got 2.5"),
        (lambda: scripted().on_picture(np.zeros(4, np.float32), -1), "image -1 is not in"),
        (lambda: scripted().on_picture(np.zeros(4, np.float32), side=0), "side is 0"),
        (lambda: scripted().values("raw", 0.5, 0), "token 0.5 is not in"),
    ):
        with pytest.raises((ConfigError, InputError), match=message):
            call()


def test_a_page_says_what_answered(tmp_path):
    assert in_words(BASE) == ""
    assert in_words(Gates(GateConfig(layers=(3, 6)))) == "gates at layers 3, 6"
    assert in_words(Fixed(FixedConfig(layers=(1,), coefficients=(0.5, 1.0)))) == "fixed layers=[1] coefficients=[0.5, 1.0]"
    model = {"name": "tiny <1>", "backbone": "0", "trained": None, "method": "gates at layer 3"}
    look = dataclasses.replace(scripted(), model=model)
    look.save(tmp_path / "out")
    assert json.loads((tmp_path / "out/look.json").read_text())["model"] == model
    line = re.compile("<p class=.faint.>tiny &lt;1&gt;(.*?)</p>")
    assert line.search((tmp_path / "out/look.html").read_text())[1] == ", gates at layer 3"
    assert line.search(page_html(look, look))[1] == ""  # each has a title of its own


def test_a_saved_folder_holds_the_numbers_and_nothing_stale(tmp_path):
    two, one = scripted(), scripted()
    two = dataclasses.replace(two, pictures=[Image.new("L", (40, 20)), Image.new("RGBA", (20, 40))])
    two = dataclasses.replace(two, neutral=two.maps["raw"][0], maps={"raw": two.maps["raw"], "relative": two.maps["raw"]})
    two.save(tmp_path / "out")
    assert {"1.raw.png", "2.relative.png", "2.sinks.png", "2.layers.svg", "look.html"} <= {
        p.name for p in (tmp_path / "out").iterdir()
    }
    one.save(tmp_path / "out")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert not any(name.startswith("2.") or "relative" in name for name in names)
    numbers = json.loads((tmp_path / "out/look.json").read_text())
    np.testing.assert_allclose(numbers["maps"]["raw"], one.over_heads("raw"), rtol=1e-4)
    assert numbers["tokens"] == one.tokens and numbers["v_sinks"] == np.flatnonzero(one.v_sink).tolist()
    assert numbers["l_values"][0][0] is None  # no dimensions of L-sinks are known
    with np.load(tmp_path / "out/maps.npz") as maps:
        np.testing.assert_array_equal(maps["no_sinks"], one.maps["no_sinks"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/photo.jpg").write_bytes(b"")
    with pytest.raises(InputError, match=r"photo\.jpg"):
        one.save(tmp_path / "mine")
