"""LLaVA-NeXT against Hugging Face: pixels, token ids, logits, gates and answers, for images that pad and fill a canvas."""

from functools import cache

import jax
import numpy as np
import pytest
import torch
from hf_models import BOS, IMAGE_TOKEN, PAD, VOCABULARY, save_tiny, state_arrays, tiny_hf
from PIL import Image
from transformers import AutoTokenizer, LlavaNextImageProcessorPil, LlavaNextProcessor

import lsg_jax
from converters.convert import convert, tree_from_tensors
from converters.export import export
from converters.hf_config import model_config, read_config
from converters.torch_gate import attach
from lsg_jax.config import Canvas, GateConfig, SinkConfig
from lsg_jax.data.layout import lay_out, longest_layout
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
FAMILIES = {
    "clip-llama": ("clip", "llama", {}),
    "clip-mistral": ("clip", "mistral", {}),
    "siglip-qwen2": ("siglip", "qwen2", {}),
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
    processor = LlavaNextImageProcessorPil(
        image_grid_pinpoints=PINPOINTS,
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return processor(shown, return_tensors="np")


def inputs(vlm, sizes, side, images_a_row=1):
    """Rows of text of unequal length around their images."""
    rng = np.random.default_rng(1)
    rows = []
    for start in range(0, len(sizes), images_a_row):
        ids = [BOS, *rng.integers(4, VOCABULARY, 2 + start)]
        for size in sizes[start : start + images_a_row]:
            ids += [*lay_out(size, vlm.config).token_ids, *rng.integers(4, VOCABULARY, 3)]
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
    found = processed(hf, images(sizes))
    arrays = {"input_ids": ids, "attention_mask": mask, **found}
    return hf, vlm, arrays, {name: torch.tensor(np.asarray(value)) for name, value in arrays.items()}


@pytest.mark.parametrize(
    ("name", "side", "images_a_row"),
    [("clip-llama", "left", 1), ("clip-mistral", "right", 2), ("siglip-qwen2", "right", 1)],
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
    assert newlines.sum() == sum((lay_out(size, vlm.config).source < 0).sum() for size in sizes)


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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint as on the Hub, and the model folder of it."""
    root = tmp_path_factory.mktemp("next")
    save_tiny(reference("clip-llama"), root / "hf")
    convert(root / "hf", root / "model")
    return root


def test_pixels_and_token_ids_are_those_of_the_processor(folder):
    config = read_config(folder / "hf")
    assert config.image.canvases == tuple(Canvas(*each) for each in PINPOINTS) and config.family == "llava_next"
    vlm = lsg_jax.load(folder / "model")
    processor = LlavaNextProcessor(
        LlavaNextImageProcessorPil.from_pretrained(folder / "hf"),
        AutoTokenizer.from_pretrained(folder / "hf"),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    for image, size in zip(images(SIZES), SIZES, strict=True):
        theirs = processor(images=image, text="USER: <image>\nWhat? ASSISTANT:", return_tensors="np")
        tiles = vlm.processor.pixels(image)
        ours = (tiles / np.float32(255) - vlm.config.image.mean) / vlm.config.image.std
        np.testing.assert_allclose(ours.transpose(0, 3, 1, 2), theirs["pixel_values"][0], atol=1e-6)
        encoded = vlm.processor.encode_question("What?", image_size=size)
        count = (theirs["input_ids"] == IMAGE_TOKEN).sum()
        assert (encoded.ids == IMAGE_TOKEN).sum() == count <= len(longest_layout(vlm.config))


def test_text_and_images_to_text(folder):
    """Different sizes in one batch answer as each alone, and as PyTorch does."""
    hf, vlm = reference("clip-llama"), lsg_jax.load(folder / "model")
    shown = images(SIZES[:4])
    together = vlm.generate(shown, ["What?"] * 4, 8)
    assert together == [vlm.generate([image], ["What?"], 8)[0] for image in shown]
    for image, text in zip(shown, together, strict=True):
        found = LlavaNextImageProcessorPil.from_pretrained(folder / "hf")(image, return_tensors="pt")
        ids = torch.tensor(vlm.processor.encode_question("What?", image_size=image.size).ids)[None]
        with torch.no_grad():
            made = hf.generate(input_ids=ids, **found, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        assert vlm.processor.decode(made.numpy()) == text


def test_gates_equal_those_in_pytorch():
    hf, vlm, arrays, tensors = both("clip-llama", SIZES[:4], "left")
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


@pytest.mark.parametrize("method", [SinkFront(), DiySink()], ids=lambda method: type(method).__name__)
def test_methods_of_one_square_image_are_refused(method):
    _, vlm = pair("clip-llama")
    with pytest.raises(ConfigError, match="this model cuts images into tiles"):
        vlm.with_method(method, {})


def test_export_gives_back_the_bytes(folder):
    export(folder / "model", folder / "back")
    assert (folder / "back/model.safetensors").read_bytes() == (folder / "hf/model.safetensors").read_bytes()
