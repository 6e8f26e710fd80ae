"""Layouts of Qwen-VL, InternVL, Gemma 3 and SmolVLM against Hugging Face's image processors and vision utilities."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.vision_utils import (
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from lsg_jax.data import images, native
from lsg_jax.data.grids import best_grid, split_grid, split_sizes
from lsg_jax.data.layout import lay_out, longest_layout, most_patches, most_tiles
from lsg_jax.data.rows import patches_of, shown_patches, visual_fields
from lsg_jax.errors import ConfigError, InputError
from tests.data.family_configs import ALL, NATIVE, gemma3, internvl, qwen, smolvlm
from tests.data.family_processors import hf_processor, picture


def sizes(count, largest=3000):
    """Sizes of images, thin and small ones among them."""
    rng = np.random.default_rng(count)
    any_size = rng.integers(1, largest, (count, 2))
    logarithmic = np.exp(rng.uniform(0, math.log(largest), (count, 2))).astype(int)
    round_sizes = rng.integers(1, 9, (count, 2)) * 224
    return [tuple(size) for size in np.concatenate([any_size, logarithmic, round_sizes]).tolist()]


# ------------------------------------------------------------------------------------------------------------ hundreds of sizes


@pytest.mark.parametrize("version", NATIVE)
@pytest.mark.parametrize("limits", [(56 * 56, 200 * 28 * 28), (1, 10**9), (300 * 28 * 28, 400 * 28 * 28)])
def test_native_sizes_are_those_of_hf(version, limits):
    config = qwen(version, min_pixels=limits[0], max_pixels=limits[1])
    unit = config.vision.patch_size * 2
    refused = 0
    for width, height in sizes(200):
        try:
            theirs = smart_resize(height, width, unit, *limits)
        except ValueError:
            refused += 1
            with pytest.raises(InputError, match="too thin"):
                native.native_size((width, height), config)
            continue
        assert native.native_size((width, height), config) == theirs[::-1]
        if limits[1] < 10**9:
            layout = lay_out((width, height), config)
            assert layout.grid == (theirs[0] // (unit // 2), theirs[1] // (unit // 2))
            assert len(layout) == theirs[0] * theirs[1] // unit**2
    assert refused > 5


@pytest.mark.parametrize("counts", [(1, 12), (1, 1), (1, 6), (3, 7), (2, 12)])
def test_grids_of_tiles_are_those_of_hf(counts):
    config = internvl(size=448, patch=28, fewest=counts[0], most=counts[1])
    processor = hf_processor(config)
    for width, height in sizes(200):
        layout = lay_out((width, height), config)
        assert layout.tiles == processor.get_number_of_image_patches(height, width)
        assert len(layout) == layout.tiles * config.tokens_per_tile
        across, down = best_grid((width, height), config.image)
        assert layout.tiles == across * down + (across * down > 1)


@pytest.mark.parametrize(("size", "longest"), [(512, 2048), (384, 1536), (512, 512), (512, 5000), (364, 1456)])
def test_splits_are_those_of_hf(size, longest):
    """Against the steps of the processor itself: its own count of patches rounds differently."""
    config = smolvlm(size=size, patch=size // 9, longest=longest)
    processor = hf_processor(config)

    resized = lambda self, image, size, **_: np.broadcast_to(np.uint8(0), (3, size.height, size.width))
    base = type(processor).__mro__[1]
    kept, base.resize = base.resize, resized
    try:
        for width, height in sizes(200):
            first, second = split_sizes((width, height), config.image)
            image = processor.resize(np.broadcast_to(np.uint8(0), (3, height, width)), _longest_edge(longest))
            assert image.shape[1:] == first[::-1]
            image = processor.resize_for_vision_encoder(image, size)
            assert image.shape[1:] == second[::-1]
            tiles, rows, columns = processor.split_images(image, {"longest_edge": size})
            layout = lay_out((width, height), config)
            assert layout.tiles == len(tiles)
            assert split_grid((width, height), config.image) == ((columns, rows) if rows else (1, 1))
    finally:
        base.resize = kept


def _longest_edge(pixels):
    from transformers.image_utils import SizeDict

    return SizeDict(longest_edge=pixels)


# ----------------------------------------------------------------------------------------------------------------------- pixels

SHAPES = [(61, 45), (45, 61), (300, 40), (31, 200), (129, 128), (5, 7), (1, 1), (90, 1)]


@pytest.mark.parametrize("name", ["internvl", "gemma3", "smolvlm"])
@pytest.mark.parametrize("size", SHAPES)
def test_tiles_are_those_of_hf(name, size):
    config = ALL[name]
    image = picture(size)
    ours = images.normalise(images.prepare_tiles(image, config.image), config.image)
    theirs = np.asarray(hf_processor(config)(images=image, return_tensors="np")["pixel_values"])
    theirs = theirs.reshape(-1, *theirs.shape[-3:])
    assert len(ours) == lay_out(size, config).tiles
    np.testing.assert_allclose(np.moveaxis(ours, -1, 1), theirs, atol=1e-6)


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("size", SHAPES)
def test_native_patches_are_those_of_hf(name, size):
    config = ALL[name]
    image = picture(size)
    theirs = hf_processor(config)(images=image, return_tensors="np")
    layout = lay_out(size, config)
    assert theirs["image_grid_thw"].tolist() == [[1, *layout.grid]]
    pixels = images.normalise(images.prepare_native(image, config), config.image)
    np.testing.assert_allclose(
        native.native_patches(pixels, config), native.from_hf_patches(theirs["pixel_values"], config), atol=1e-6
    )


# ----------------------------------------------------------------------------------------------------- patches of native images


@pytest.mark.parametrize("name", NATIVE)
def test_places_windows_and_interpolation_are_those_of_hf(name):
    config = ALL[name]
    for grid in [(2, 2), (8, 8), (10, 4), (6, 22), (18, 16), (2, 40), (16, 16)]:
        thw = torch.tensor([[1, *grid]])
        arranged = native.arrange(grid, config)
        place = get_vision_position_ids(thw, 2).numpy()
        np.testing.assert_array_equal(arranged.place, place)
        length = native.patch_bucket(arranged.length, config)
        fields = native.native_fields([grid], 3, length, config)
        used = fields["used"][0]
        assert used.sum() == grid[0] * grid[1] and not fields["used"][1:].any()
        np.testing.assert_array_equal(fields["place"][0, arranged.index], place)
        # which patches, in the order of pixel_values, stand at the used positions
        order = np.full(length, -1)
        order[arranged.index] = np.arange(len(place))
        if name == "qwen2_5_vl":
            index, borders = get_vision_window_index(thw, 2, 112, 14)
            expected = (index.numpy()[:, None] * 4 + np.arange(4)).ravel()
            np.testing.assert_array_equal(order[used], expected)
            assert arranged.length % 64 == length % 64 == 0
            counts = used.reshape(-1, 64).sum(1)
            assert counts[counts > 0].tolist() == np.diff(borders.numpy()).tolist()
        else:
            np.testing.assert_array_equal(order[used], np.arange(len(place)))
        if name == "qwen3_vl":
            table, weight = get_vision_interpolation_indices_and_weights(
                thw, 6, mode="bilinear", align_corners=True, spatial_merge_size=2
            )
            np.testing.assert_array_equal(fields["table"][0, arranged.index], table.numpy())
            np.testing.assert_allclose(fields["table_weight"][0, arranged.index], weight.numpy(), atol=1e-7)
        else:
            assert "table" not in fields


@pytest.mark.parametrize("name", NATIVE)
def test_a_token_lies_where_its_patches_are(name):
    """What is painted into a token's box is in the patches of its connector output, and nowhere else."""
    config = ALL[name]
    size = (14 * 26, 14 * 10) if name != "qwen3_vl" else (16 * 26, 16 * 10)  # not resized
    layout = lay_out(size, config)
    length = patches_of(native.arrange(layout.grid, config).length, config)
    for token in range(0, len(layout), 7):
        values = np.zeros((size[1], size[0], 3), np.uint8)
        x0, y0, x1, y1 = np.round(layout.box[token] * np.tile(size, 2)).astype(int)
        values[y0:y1, x0:x1] = 255
        shown = shown_patches([values], [layout], config)
        patches = visual_fields(shown, [layout], config, tiles=1, patches=length)["patches"]
        by_group = patches.reshape(length // 4, -1).min(1)
        assert np.flatnonzero(by_group == 255).tolist() == [layout.source[token, 0]]
        assert patches.astype(int).sum() == 255 * (x1 - x0) * (y1 - y0) * 3 * 2


@pytest.mark.parametrize("name", ["internvl", "gemma3", "smolvlm"])
def test_a_token_of_a_tile_lies_where_its_patches_are(name):
    """The brightest square of patches of a tile is that of the token in whose box the image was painted."""
    config = dataclasses.replace(ALL[name], image=dataclasses.replace(ALL[name].image, resample="bilinear"))
    tile, merge, patch = config.image.size, config.merge, config.vision.patch_size
    size = (4 * tile, 3 * tile) if name != "gemma3" else (tile, tile)  # resized as a whole or not at all
    layout = lay_out(size, config)
    grid = tile // patch // merge
    assert layout.tiles == (1 if name == "gemma3" else 13)
    for token in range(0, len(layout), 5):
        values = np.zeros((size[1], size[0], 3), np.uint8)
        x0, y0, x1, y1 = np.round(layout.box[token] * np.tile(size, 2)).astype(int)
        values[y0:y1, x0:x1] = 255
        tiles = images.prepare_tiles(Image.fromarray(values), config.image)
        cut = grid * merge * patch
        cells = (
            tiles[:, :cut, :cut].reshape(-1, grid, merge * patch, grid, merge * patch, 3).mean((2, 4, 5)).reshape(-1, grid**2)
        )
        number, cell = divmod(token, grid**2)
        assert layout.source[token, 0] == token
        assert cells[number].argmax() == cell and cells[number].max() > 200


# ----------------------------------------------------------------------------------------------------------- what programs need


def test_patches_come_in_few_sizes():
    for config in (qwen("qwen2_vl"), qwen()):
        buckets = [native.patch_bucket(count, config) for count in range(4, 20_000, 4)]
        assert sorted(set(buckets))[:6] == [64, 128, 192, 256, 384, 512] and len(set(buckets)) < 20
        assert all(0 <= bucket - count < max(64, count / 2) for bucket, count in zip(buckets, range(4, 20_000, 4), strict=True))
        assert all(bucket % 64 == 0 for bucket in buckets)


def test_the_largest_images():
    assert most_tiles(internvl()) == 13 and len(longest_layout(internvl())) == 13 * 4
    assert most_tiles(internvl(most=1)) == 1
    assert most_tiles(smolvlm()) == 17 and len(longest_layout(smolvlm())) == 17 * 4
    assert most_tiles(gemma3()) == 1 and len(longest_layout(gemma3())) == 16
    config = qwen(max_pixels=200 * 28 * 28)
    assert most_tiles(config) == 1 and len(longest_layout(config)) == 200  # 8 x 25: aspects of up to 4:1 are tried
    assert most_patches(config) == 1536  # filled up from 4 x 5 windows
    assert most_patches(internvl()) == 16
    assert all(len(lay_out(size, config)) <= 200 for size in sizes(50) if max(size) < 200 * min(size))


def test_a_tile_that_makes_no_whole_squares_is_refused():
    with pytest.raises(ConfigError, match="merge is 3, but an image has 8 x 8 patches"):
        smolvlm(size=40, patch=5)
