"""LLaVA-NeXT and OneVision against Hugging Face: pixels, ids, logits, gates, answers; images that pad, fill and shrink."""

from functools import cache

import jax
import numpy as np
import pytest
import torch
from hf_models import BOS, IMAGE_TOKEN, PAD, VOCABULARY, save_tiny, state_arrays, tiny_hf
from PIL import Image
from transformers import (
    AutoTokenizer,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
)

import lsg_jax
from converters.convert import convert, tree_from_tensors
from converters.export import export
from converters.hf_config import model_config, read_config
from converters.torch_gate import attach
from lsg_jax.config import Canvas, GateConfig, SinkConfig
from lsg_jax.data.layout import lay_out
from lsg_jax.data.templates import TEMPLATES
from lsg_jax.errors import ConfigError, InputError
from lsg_jax.gating.portable import PortableGates
from lsg_jax.methods.diysink import DiySink
from lsg_jax.methods.gates import Gates
from lsg_jax.methods.sink_front import SinkFront
from lsg_jax.vlm import VLM

TOLERANCE = 1e-4  # absolute; logits are of order 1
SIDE = 42
PINPOINTS = [[42, 84], [84, 42], [84, 84], [126, 42], [42, 126]]
SIZES = [(60, 200), (200, 60), (77, 90), (42, 42), (300, 101), (99, 100), (84, 84)]  # width, height
ONEVISION = {"vision_aspect_ratio": "anyres_max_2", "vision_feature_layer": -1, "video_token_index": VOCABULARY - 1}
FAMILIES = {
    "clip-llama": ("clip", "llama", {}),
    "clip-mistral": ("clip", "mistral", {}),
    "siglip-qwen2": ("siglip", "qwen2", {}),
    "onevision": ("siglip", "qwen2", ONEVISION),
}


@cache
def reference(name):
    torch.set_num_threads(1)
    vision, text, settings = FAMILIES[name]
    settings = {"text_config": {"max_position_embeddings": 512}, **settings}
    return tiny_hf(vision, text, image_grid_pinpoints=PINPOINTS, **settings)


@cache
def pair(name):
    """The HF model, and ours with the same weights."""
    hf = reference(name)
    config = model_config(hf.config.to_diff_dict())
    return hf, VLM(config, tree_from_tensors(config, state_arrays(hf)))


def images(sizes, seed=0):
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)) for width, height in sizes]


def processed(hf, shown):
    """What HF's image processor returns, with its mean and std for the tower."""
    size = hf.config.vision_config.image_size
    settings = {"image_grid_pinpoints": PINPOINTS, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    if hf.config.model_type == "llava_onevision":
        processor = LlavaOnevisionImageProcessorPil(size={"height": size, "width": size}, **settings)
    else:
        crop = {"height": size, "width": size}
        processor = LlavaNextImageProcessorPil(size={"shortest_edge": size}, crop_size=crop, **settings)
    return processor(shown, return_tensors="np")


def inputs(vlm, sizes, side, images_a_row=1):
    """Rows of text of unequal length around their images."""
    rng = np.random.default_rng(1)
    rows = []
    for start in range(0, len(sizes), images_a_row):
        ids = [BOS, *rng.integers(4, VOCABULARY - 1, 2 + start)]
        for size in sizes[start : start + images_a_row]:
            ids += [*lay_out(size, vlm.config, alone=images_a_row == 1).token_ids, *rng.integers(4, VOCABULARY - 1, 3)]
        rows.append(ids)
    length = max(map(len, rows))
    ids, mask = np.full((len(rows), length), PAD), np.zeros((len(rows), length), np.int64)
    for row, tokens in enumerate(rows):
        where = slice(length - len(tokens), None) if side == "left" else slice(len(tokens))
        ids[row, where], mask[row, where] = tokens, 1
    return ids, mask


def both(name, sizes, side, images_a_row=1):
    hf, vlm = pair(name)
    ids, mask = inputs(vlm, sizes, side, images_a_row)
    shown = images(sizes)
    found = processed(hf, [shown[i : i + images_a_row] for i in range(0, len(shown), images_a_row)])
    arrays = {"input_ids": ids, "attention_mask": mask, **found}
    return hf, vlm, arrays, {name: torch.tensor(np.asarray(value)) for name, value in arrays.items()}


@pytest.mark.parametrize(
    ("name", "side", "images_a_row"),
    [
        ("clip-llama", "left", 1),
        ("clip-mistral", "right", 2),
        ("siglip-qwen2", "right", 1),
        ("onevision", "left", 1),
        ("onevision", "right", 2),
    ],
)
def test_logits_equal_hugging_face(name, side, images_a_row):
    sizes = SIZES[: 6 if images_a_row == 2 else 7]
    hf, vlm, arrays, tensors = both(name, sizes, side, images_a_row)
    with torch.no_grad():
        expected = hf(**tensors).logits.numpy()
    ours, valid = vlm.logits(**arrays), arrays["attention_mask"] == 1
    assert np.abs(expected[valid]).max() > 0.3
    np.testing.assert_allclose(ours[valid], expected[valid], rtol=0, atol=TOLERANCE)
    place = vlm.visual_tokens(**arrays)
    assert not place.box[~place.mask].any() and (place.mask <= (arrays["input_ids"] == IMAGE_TOKEN)).all()
    newlines = (arrays["input_ids"] == IMAGE_TOKEN) & ~place.mask
    layouts = [lay_out(size, vlm.config, alone=images_a_row == 1) for size in sizes]
    assert newlines.sum() == sum((layout.source[:, 0] < 0).sum() for layout in layouts)


def test_wrong_images_are_refused():
    _, vlm, arrays, _ = both("clip-llama", SIZES[:2], "left")
    with pytest.raises(InputError, match="image_sizes are needed"):
        vlm.logits(**{**arrays, "image_sizes": None})
    with pytest.raises(InputError, match=r"row 0 has \d+ image tokens"):
        vlm.logits(**{**arrays, "image_sizes": arrays["image_sizes"][::-1]})
    with pytest.raises(InputError, match=r"pixel_values have 1 tiles an image, images of these image_sizes have up to \d"):
        vlm.logits(**{**arrays, "pixel_values": arrays["pixel_values"][:, :1]})
    with pytest.raises(InputError, match=r"pixel_values must be \[images, tiles, 3, 42, 42\]"):
        vlm.logits(**{**arrays, "pixel_values": arrays["pixel_values"][:, 0]})


@pytest.fixture(scope="module", params=["clip-llama", "onevision"])
def folder(request, tmp_path_factory):
    """A checkpoint as on the Hub, and the model folder of it."""
    root = tmp_path_factory.mktemp("tiles") / request.param
    save_tiny(reference(request.param), root / "hf")
    convert(root / "hf", root / "model")
    return root


def hf_processor(folder):
    if folder.parent.name == "clip-llama":
        made = LlavaNextProcessor.__new__(LlavaNextProcessor)
        settings = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        image_processor = LlavaNextImageProcessorPil.from_pretrained(folder)
    else:
        made = LlavaOnevisionProcessor.__new__(LlavaOnevisionProcessor)
        settings = {"num_image_tokens": 9, "vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_2"}
        settings["video_processor"] = None
        image_processor = LlavaOnevisionImageProcessorPil.from_pretrained(folder)
        made.check_argument_for_proper_class = lambda name, argument: None  # no video processor without torchvision
    made.__init__(image_processor, AutoTokenizer.from_pretrained(folder), **settings)
    return made


def test_pixels_and_token_ids_are_those_of_the_processor(folder):
    config = read_config(folder / "hf")
    assert config.image.canvases == tuple(Canvas(*each) for each in PINPOINTS)
    vlm, processor = lsg_jax.load(folder / "model"), hf_processor(folder / "hf")
    shrunk = 0
    for image, size in zip(images(SIZES), SIZES, strict=True):
        theirs = processor(images=image, text="USER: <image>\nWhat? ASSISTANT:", return_tensors="np")
        tiles = vlm.processor.pixels(image)
        ours = (tiles / np.float32(255) - vlm.config.image.mean) / vlm.config.image.std
        np.testing.assert_allclose(ours.transpose(0, 3, 1, 2), theirs["pixel_values"][0], atol=1e-6)
        encoded = vlm.processor.encode_question("What?", image_sizes=[size])
        assert (encoded.ids == IMAGE_TOKEN).sum() == (theirs["input_ids"] == IMAGE_TOKEN).sum()
        shrunk += (lay_out(size, config).source[:, 1:] >= 0).any()
    assert shrunk == 0 if config.image.max_tiles is None else 0 < shrunk < len(SIZES)


def test_pixels_and_token_ids_of_two_images_are_those_of_the_processor(folder):
    """Two images of one prompt. OneVision pads each to a square; LLaVA-NeXT cuts each into tiles."""
    vlm, processor = lsg_jax.load(folder / "model", template="vicuna_v1"), hf_processor(folder / "hf")
    shown = images(SIZES[:2])
    text = TEMPLATES["vicuna_v1"].system + "USER: Is <image> like <image>? ASSISTANT:"
    theirs = processor(images=[shown], text=text, return_tensors="np")
    encoded = vlm.processor.encode_question("Is <image> like <image>?", image_sizes=SIZES[:2])
    assert encoded.ids.tolist() == theirs["input_ids"][0].tolist()
    tiles = vlm.processor.all_pixels(shown)
    ours = (tiles / np.float32(255) - vlm.config.image.mean) / vlm.config.image.std
    assert len(ours) == encoded.num_tiles == (2 if folder.name == "onevision" else 8)
    expected = theirs["pixel_values"].reshape(-1, 3, SIDE, SIDE)
    np.testing.assert_allclose(ours.transpose(0, 3, 1, 2), expected[: len(ours)], atol=1e-6)


def test_text_and_images_to_text(folder):
    """Different sizes in one batch answer as alone, and as PyTorch does."""
    hf, vlm = reference(folder.name), lsg_jax.load(folder / "model")
    processor = hf_processor(folder / "hf").image_processor
    shown = images(SIZES[:4])
    together = vlm.generate(shown, ["What?"] * 4, 8)
    assert together[:1] == vlm.generate(shown[:1], ["What?"], 8)
    for image, text in zip(shown, together, strict=True):
        ids = torch.tensor(vlm.processor.encode_question("What?", image_sizes=[image.size]).ids)[None]
        with torch.no_grad():
            found = processor(image, return_tensors="pt")
            made = hf.generate(input_ids=ids, **found, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        assert vlm.processor.decode(made.numpy()) == text
    question = "Is <image> like <image>?"
    (answer,) = vlm.generate([shown[:2]], [question], 8)
    found = processor([shown[:2]], return_tensors="pt")
    ids = torch.tensor(vlm.processor.encode_question(question, image_sizes=SIZES[:2]).ids)[None]
    with torch.no_grad():
        made = hf.generate(input_ids=ids, **found, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert vlm.processor.decode(made.numpy()) == answer


@pytest.mark.parametrize(("name", "images_a_row"), [("clip-llama", 1), ("onevision", 1), ("onevision", 2)])
def test_gates_equal_those_in_pytorch(name, images_a_row):
    hf, vlm, arrays, tensors = both(name, SIZES[:4], "left", images_a_row)
    sinks = SinkConfig(vit_dims=(3,), vit_tau=1.0)
    method = Gates(GateConfig(layers=(1, 3)))
    trained = method.initial(vlm.config, vlm.frozen, jax.random.key(0))
    trained = jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(jax.random.key(1), leaf.shape), trained)
    gated = vlm.with_method(method, trained, sinks=sinks)
    marked = gated.visual_tokens(**arrays)
    assert 0 < marked.v_sink.sum() < marked.mask.sum()
    with torch.no_grad(), attach(hf, PortableGates(method.gate, sinks, jax.tree.map(np.asarray, trained))):
        expected = hf(**tensors).logits.numpy()
    valid = arrays["attention_mask"] == 1
    ours = gated.logits(**arrays)
    assert np.abs(ours[valid] - vlm.logits(**arrays)[valid]).max() > 0.01
    np.testing.assert_allclose(ours[valid], expected[valid], rtol=0, atol=TOLERANCE)


def test_videos():
    """Frames are pooled 2 x 2 and end with a newline; ungated and gated logits as in PyTorch."""
    hf, vlm = pair("onevision")
    rng, frames, video_token = np.random.default_rng(0), 3, hf.config.video_token_id
    ids = rng.integers(4, VOCABULARY - 1, (2, 4 + 4 * frames + 1 + 3))
    ids[:, 4:-3] = video_token
    pixels = rng.normal(size=(2, frames, 3, SIDE, SIDE)).astype(np.float32)
    arrays = {"input_ids": ids, "attention_mask": np.ones_like(ids), "pixel_values": None, "pixel_values_videos": pixels}
    tensors = {name: torch.tensor(array) for name, array in arrays.items() if array is not None}
    sinks, method = SinkConfig(vit_dims=(3,), vit_tau=1.0), Gates(GateConfig(layers=(1, 3)))
    trained = method.initial(vlm.config, vlm.frozen, jax.random.key(0))
    trained = jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(jax.random.key(1), leaf.shape), trained)
    gated = vlm.with_method(method, trained, sinks=sinks)
    place = gated.visual_tokens(**arrays)
    assert place.mask.sum(1).tolist() == [4 * frames] * 2 and 0 < place.v_sink.sum() < place.mask.sum()
    np.testing.assert_allclose(place.box[0, 4:8], [[x, y, x + 0.5, y + 0.5] for y in (0, 0.5) for x in (0, 0.5)])
    with torch.no_grad():
        np.testing.assert_allclose(vlm.logits(**arrays), hf(**tensors).logits.numpy(), rtol=0, atol=TOLERANCE)
        with attach(hf, PortableGates(method.gate, sinks, jax.tree.map(np.asarray, trained))) as handle:
            expected = hf(**tensors).logits.numpy()
    ratios = gated.gate_ratios(**arrays)
    assert ratios.keys() == {1, 3}
    for layer, found in ratios.items():
        np.testing.assert_allclose(found, handle.ratios[layer].numpy(), rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(gated.logits(**arrays), expected, rtol=0, atol=TOLERANCE)
    with pytest.raises(InputError, match="takes no video"):
        pair("clip-llama")[1].logits(**arrays)


@pytest.mark.parametrize("method", [SinkFront(), DiySink()], ids=lambda method: type(method).__name__)
def test_methods_of_one_square_image_are_refused(method):
    _, vlm = pair("clip-llama")
    with pytest.raises(ConfigError, match="this model cuts images into tiles"):
        vlm.with_method(method, {})


def test_export_gives_back_the_bytes(folder):
    export(folder / "model", folder / "back")
    assert (folder / "back/model.safetensors").read_bytes() == (folder / "hf/model.safetensors").read_bytes()
