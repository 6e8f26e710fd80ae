"""Arrays of Hugging Face's processors and our own batches are the same; wrong arrays are named."""

import dataclasses
import importlib

import numpy as np
import pytest
import torch
from PIL import Image

from lsg_jax.data import images
from lsg_jax.data.layout import lay_out
from lsg_jax.data.native import arrange, from_hf_patches
from lsg_jax.data.pixel_arrays import read_images
from lsg_jax.data.placing import rope_positions
from lsg_jax.errors import InputError
from lsg_jax.model_inputs import make_batch
from lsg_jax.types import NO_SOURCE
from tests.data.family_configs import ALL, NATIVE
from tests.data.family_processors import FAMILIES, SIZES, batch_of, called, hf_processor, pair, picture, rendered


@pytest.fixture(params=FAMILIES)
def both(request, monkeypatch):
    """(our processor, Hugging Face's) of one family."""
    return pair(request.param, monkeypatch)


@pytest.mark.parametrize("side", ["left", "right"])
def test_arrays_of_hf_make_the_batch_of_our_processor(both, side):
    """Rows of two images, of none and of one; pixels, sources, positions and blocks are the same from either."""
    ours, theirs = both
    config = ours.model
    sizes = [SIZES[:2], [], SIZES[2:3]]
    shown = [[picture(size, number) for number, size in enumerate(each)] for each in sizes]
    questions = [("Same?", 2), ("What is two?", 0), ("What is this?", 1)]
    encoded = [ours.encode_question(text, image_sizes=each) for (text, _), each in zip(questions, sizes, strict=True)]
    batch = batch_of(ours, encoded, shown, side)
    rows = [0, 2]
    with_images = called(
        theirs, [rendered(theirs, [questions[row]]) for row in rows], [shown[row] for row in rows], padding=True
    )
    fields = {name: value for name, value in with_images.items() if name not in ("input_ids", "attention_mask")}
    if config.image.kind == "split" and side == "left":
        fields["image_sizes"] = [size[::-1] for each in sizes for size in each]
    again, layouts = make_batch(config, batch.input_ids, attention_mask=batch.attention_mask, **fields)
    assert [len(each) for each in layouts] == [2, 0, 1]
    pixels = batch.images.patches / np.float32(255)
    channels = config.vision.patch_values // 3
    pixels = (pixels - np.tile(np.float32(config.image.mean), channels)) / np.tile(np.float32(config.image.std), channels)
    tiles = [sum(lay_out(size, config).tiles for size in each) for each in sizes]
    for row, count in enumerate(tiles):
        used = np.ones(pixels.shape[2], bool) if batch.images.used is None else None
        for tile in range(count):
            here = used if used is not None else batch.images.used[row, tile]
            np.testing.assert_allclose(again.images.patches[row, tile][here], pixels[row, tile][here], atol=2e-6)
        assert not again.images.patches[row, count:].any() and not batch.images.patches[row, count:].any()
    for name in ("source", "weight", "positions", "block"):
        ours_, theirs_ = getattr(batch, name), getattr(again, name)
        assert (ours_ is None) == (theirs_ is None)
        if ours_ is not None:
            np.testing.assert_array_equal(ours_, theirs_)
    for name in ("used", "place", "table", "table_weight"):
        if getattr(batch.images, name) is not None:
            np.testing.assert_array_equal(getattr(batch.images, name), getattr(again.images, name))
    for row, each in enumerate(sizes):
        for size, layout in zip(each, layouts[row], strict=True):
            if config.image.kind == "tiles":
                assert np.isnan(layout.box).all() and layout.tiles == lay_out(size, config).tiles
            else:
                expected = lay_out(size if config.image.kind != "square" else ours.square, config).box
                np.testing.assert_array_equal(layout.box, expected)


def test_every_source_is_a_used_output(both):
    ours, _ = both
    config = ours.model
    encoded = [ours.encode_question("a", image_sizes=SIZES[:2])]
    batch = batch_of(ours, encoded, [[picture(size) for size in SIZES[:2]]], "left")
    source = batch.source[0, batch.source[0, :, 0] != NO_SOURCE, 0]
    assert len(set(source.tolist())) == len(source) == sum(len(lay_out(size, config)) for size in SIZES[:2])
    if batch.images.used is not None:
        groups = batch.images.used[0].reshape(-1, config.merge**2)
        assert groups.all(1).sum() == len(source) and groups[source].all()
    else:
        assert source.tolist() == list(range(len(source)))


def test_boxes_of_tiles_come_with_the_sizes_of_images(monkeypatch):
    ours, theirs = pair("internvl", monkeypatch)
    fields = called(theirs, rendered(theirs, [("a", 2)]), [picture(size) for size in SIZES[:2]])
    sizes = [size[::-1] for size in SIZES[:2]]
    _, ((first, second),) = make_batch(ours.model, **fields, image_sizes=sizes)
    for layout, size in zip((first, second), SIZES, strict=False):
        np.testing.assert_array_equal(layout.box, lay_out(size, ours.model).box)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_are_those_of_hf(name, side, monkeypatch):
    ours, _ = pair(name, monkeypatch)
    sizes = [SIZES[:2], SIZES[2:3], []]
    encoded = [ours.encode_question("What is it?", image_sizes=each) for each in sizes]
    batch = batch_of(ours, encoded, [[picture(size) for size in each] for each in sizes], side)
    grids = torch.tensor([[1, *lay_out(size, ours.model).grid] for each in sizes for size in each])
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    model = getattr(module, "Qwen2_5_VLModel" if name == "qwen2_5_vl" else "Qwen3VLModel")
    patch = ours.model.vision.patch_size
    vision = type("Vision", (), {"spatial_merge_size": 2, "tokens_per_second": 4, "patch_size": patch})
    bare = object.__new__(model)
    torch.nn.Module.__init__(bare)
    bare.config = type("Config", (), {"vision_config": vision})
    ids = torch.tensor(batch.input_ids).long()
    expected, _ = model.get_rope_index(
        bare,
        ids,
        mm_token_type_ids=(ids == ours.model.image_token_id).int(),
        image_grid_thw=grids,
        attention_mask=torch.tensor(batch.attention_mask).int(),
    )
    np.testing.assert_array_equal(batch.positions, expected.permute(1, 2, 0).numpy())


def test_rows_of_a_model_that_counts_tokens_have_no_positions(monkeypatch):
    for name in ("internvl", "gemma3", "smolvlm"):
        ours, _ = pair(name, monkeypatch)
        batch = batch_of(ours, [ours.encode_question("a", image_sizes=[SIZES[0]])], [[picture(SIZES[0])]], "right")
        assert batch.positions is None
        assert (batch.block is None) == (name != "gemma3")


def test_text_alone_has_positions_too():
    config = ALL["qwen2_vl"]
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    batch, _ = make_batch(config, np.full((2, 5), 9), attention_mask=mask)
    assert batch.images is None and batch.positions[..., 1].tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 0]]


def test_an_image_without_text_around_it():
    layout = lay_out((28 * 3, 28 * 2), ALL["qwen2_vl"])
    assert len(layout) == 6
    valid = np.ones(12, bool)
    positions = rope_positions(valid, valid, [layout, layout])
    assert positions[:, 2].tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]
    assert positions[:, 1].tolist() == [0, 0, 0, 1, 1, 1, 3, 3, 3, 4, 4, 4]


def arrays(name, monkeypatch):
    ours, theirs = pair(name, monkeypatch)
    return ours.model, dict(called(theirs, rendered(theirs, [("a", 1)]), [picture(SIZES[0])]))


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        ("qwen2_vl", {"image_grid_thw": None}, "image_grid_thw is needed"),
        ("qwen2_vl", {"image_grid_thw": [[2, 4, 4]]}, "videos are not supported"),
        ("qwen2_vl", {"image_grid_thw": [[1, 3, 4]]}, "multiples of 2"),
        ("qwen2_vl", {"image_grid_thw": [[1, 4, 4], [1, 4, 4]]}, "pixel_values have .* patches, image_grid_thw 32"),
        ("qwen2_vl", {"pixel_values": np.zeros((16, 7))}, r"must be \[patches, 1176\]"),
        ("qwen2_vl", {"video_grid_thw": [[1, 4, 4]]}, "takes no video"),
        ("qwen2_vl", {"pixel_values_videos": np.zeros((16, 1176))}, "takes no video"),
        ("internvl", {"pixel_values": np.zeros((2, 3, 28, 28))}, "pixel_values have 2 tiles, the images of all rows have"),
        ("internvl", {"pixel_values": np.zeros((2, 3, 27, 28))}, r"must be \[tiles, 3, 28, 28\]"),
        ("internvl", {"image_sizes": [[45]]}, r"image_sizes must be \[1, 2\]"),
        ("internvl", {"image_grid_thw": [[1, 4, 4]]}, "takes images without it"),
        ("internvl", {"pixel_values_videos": np.zeros((1, 3, 28, 28))}, "takes no video"),
        ("gemma3", {"pixel_values": np.zeros((2, 3, 32, 32))}, "2 images, but"),
        ("gemma3", {"num_crops": [2]}, "pan-and-scan"),
        ("smolvlm", {"pixel_values": np.ones((1, 4, 3, 32, 32)), "pixel_attention_mask": None}, "pixel_values have 4 tiles"),
        ("smolvlm", {"pixel_attention_mask": np.ones((1, 4))}, "pixel_attention_mask is"),
        ("gemma3", {"pixel_attention_mask": np.ones((1, 4))}, "takes images without it"),
    ],
)
def test_arrays_that_do_not_fit_are_named(name, change, problem, monkeypatch):
    config, fields = arrays(name, monkeypatch)
    with pytest.raises(InputError, match=problem) as caught:
        make_batch(config, **(fields | change))
    assert "\n" not in str(caught.value)


def test_padding_within_a_tile_is_refused(monkeypatch):
    config, fields = arrays("smolvlm", monkeypatch)
    fields["pixel_attention_mask"] = fields["pixel_attention_mask"].copy()
    fields["pixel_attention_mask"][0, 0, 3:] = 0
    with pytest.raises(InputError, match="padding within a tile"):
        make_batch(config, **fields)


def test_rows_of_tiles_are_read_from_the_separators(monkeypatch):
    """Grids of one row or column, an image that is not split, and images that follow each other directly."""
    ours, theirs = pair("smolvlm", monkeypatch)
    config = ours.model
    for sizes in [[(128, 20)], [(20, 128)], [(128, 20), (20, 128), (128, 128)], [(90, 128), (90, 128)]]:
        text = rendered(theirs, [("a", len(sizes))])
        fields = called(theirs, text, [picture(size) for size in sizes])
        _, (layouts,) = make_batch(config, **fields)
        for layout, size in zip(layouts, sizes, strict=True):
            np.testing.assert_array_equal(layout.box, lay_out(size, config).box)
    single = dataclasses.replace(config, image=dataclasses.replace(config.image, longest_edge=32))
    tokens = lay_out((20, 30), single)
    ids = np.full((1, len(tokens) + 4), 9)
    ids[0, 2 : 2 + len(tokens)] = config.image_token_id
    found = read_images(single, ids, ids == config.image_token_id, np.ones((1, 1, 3, 32, 32)))
    np.testing.assert_array_equal(found.layouts[0].box, tokens.box)


@pytest.mark.parametrize("name", NATIVE)
def test_native_pixels_are_given_in_the_order_of_the_tower(name):
    config = ALL[name]
    image = picture(SIZES[1])
    fields = hf_processor(config)(images=image, return_tensors="np")
    layout = lay_out(SIZES[1], config)
    ids = np.full((1, len(layout)), config.image_token_id)
    batch, _ = make_batch(config, ids, fields["pixel_values"], image_grid_thw=fields["image_grid_thw"])
    index = arrange(layout.grid, config).index
    expected = from_hf_patches(fields["pixel_values"], config)
    np.testing.assert_array_equal(batch.images.patches[0, 0, index], expected)
    assert images.prepare_native(Image.new("RGB", SIZES[1]), config).shape[0] == layout.grid[0] * config.vision.patch_size
