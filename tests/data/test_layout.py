import dataclasses
import math

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.llava_next.modeling_llava_next import unpad_image

from lsg_jax.config import Canvas, ImageConfig, ModelConfig, RopeConfig, TextConfig, VisionConfig
from lsg_jax.data.images import prepare_pixels, prepare_tiles, to_patches
from lsg_jax.data.layout import best_canvas, lay_out, longest_layout, tile_bucket
from lsg_jax.data.placing import place_sources
from lsg_jax.errors import InputError
from lsg_jax.types import NEWLINE

PATCH = 14
ASPECTS = ["pad", "crop", "squash"]
SIZES = [(101, 67), (67, 101), (90, 89), (89, 90), (77, 77), (150, 99), (98, 151)]
IMAGE_TOKEN = 31


def model(aspect, *, size=60, family="clip", feature_select="default"):
    """A tower of 4 x 4 patches that drops the last 4 pixels; padding is black."""
    return ModelConfig(
        vision=VisionConfig(family, size, PATCH, 8, 8, 1, 1, 1e-5, "gelu"),
        text=TextConfig("llama", 32, 8, 8, 1, 1, 1, 8, 1e-5, RopeConfig(1e4), 64),
        feature_layers=(-1,),
        feature_select=feature_select,
        image_token_id=IMAGE_TOKEN,
        eos_token_ids=(2,),
        pad_token_id=0,
        image=ImageConfig(size, aspect, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    )


def brightness(values, config):
    """uint8 [height, width] -> [patches], the mean of each patch of the prepared image."""
    image = Image.fromarray(np.repeat(values[:, :, None], 3, axis=2))
    return to_patches(prepare_pixels(image, config.image), PATCH).mean(1)


@pytest.mark.parametrize("aspect", ASPECTS)
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_what_is_painted_into_a_box_lands_in_its_patch(aspect, width, height):
    config = model(aspect)
    painted = 0
    for token, box in enumerate(lay_out((width, height), config).box):
        x0, y0, x1, y1 = box * (width, height, width, height)
        left, top, right, bottom = max(0, round(x0)), max(0, round(y0)), min(width, round(x1)), min(height, round(y1))
        if left >= right or top >= bottom:
            assert aspect == "pad"  # wholly in the padding
            continue
        values = np.zeros((height, width), np.uint8)
        values[top:bottom, left:right] = 255
        assert brightness(values, config).argmax() == token
        painted += 1
    assert painted == 16 or (aspect == "pad" and painted >= 4)


@pytest.mark.parametrize("aspect", ASPECTS)
@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("axis", [0, 1])
def test_box_centres_to_the_pixel(aspect, width, height, axis):
    """A ramp of one level a pixel stays a ramp when it is resized: the mean of a patch is the place of its centre."""
    config = model(aspect)
    ramp = np.arange(width)[None, :] if axis == 0 else np.arange(height)[:, None]
    box = lay_out((width, height), config).box
    inside = ((box >= 0) & (box <= 1)).all(1)
    centre = (box[:, axis] + box[:, axis + 2]) / 2 * (width, height)[axis] - 0.5
    found = brightness(np.broadcast_to(ramp, (height, width)).astype(np.uint8), config)
    assert inside.any()
    np.testing.assert_allclose(found[inside], centre[inside], atol=0.35)


@pytest.mark.parametrize("aspect", ASPECTS)
@pytest.mark.parametrize("size", [*SIZES, (199, 61), (1, 500), (3, 1)])
def test_boxes_tile_without_gaps(aspect, size):
    box = lay_out(size, model(aspect)).box.reshape(4, 4, 4)
    np.testing.assert_array_equal(box[:, 1:, 0], box[:, :-1, 2])
    np.testing.assert_array_equal(box[1:, :, 1], box[:-1, :, 3])
    assert (box[..., 2] > box[..., 0]).all() and (box[..., 3] > box[..., 1]).all()


@pytest.mark.parametrize("aspect", ASPECTS)
@pytest.mark.parametrize("side", [1, 56, 333])
def test_square_image_is_a_plain_grid(aspect, side):
    layout = lay_out((side, side), model(aspect, size=56))
    row, column = np.divmod(np.arange(16), 4)
    np.testing.assert_allclose(layout.box, np.stack([column, row, column + 1, row + 1], 1) / 4, atol=1e-6)
    assert layout.token_ids.tolist() == [IMAGE_TOKEN] * 16
    assert layout.source.tolist() == [[i] for i in range(16)] and (layout.weight == 1).all()
    dtypes = [array.dtype for array in (layout.token_ids, layout.source, layout.weight, layout.box)]
    assert dtypes == [np.int32, np.int32, np.float32, np.float32] and layout.tiles == 1


def test_padding_lies_outside_the_image():
    box = lay_out((112, 56), model("pad", size=56)).box  # 28 rows of padding above and below: a row of patches each
    np.testing.assert_allclose(box[0], [0, -0.5, 0.25, 0])
    np.testing.assert_allclose(box[-1], [0.75, 1, 1, 1.5])


@pytest.mark.parametrize(
    ("family", "feature_select", "count", "first"),
    [
        ("clip", "default", 16, [0, 0, 0.25, 0.25]),
        ("clip", "full", 17, [0, 0, 1, 1]),
        ("siglip", "full", 16, [0, 0, 0.25, 0.25]),
        ("siglip", "default", 15, [0.25, 0, 0.5, 0.25]),  # the first token is dropped, which is a patch
    ],
)
def test_class_token(family, feature_select, count, first):
    config = model("squash", size=56, family=family, feature_select=feature_select)
    layout = lay_out((40, 30), config)
    assert len(layout) == config.num_image_tokens == count
    np.testing.assert_allclose(layout.box[0], first)
    np.testing.assert_allclose(layout.box[-1], [0.75, 0.75, 1, 1])


def test_image_without_area():
    with pytest.raises(InputError, match="0 x 5"):
        lay_out((0, 5), model("pad"))


def test_patches_are_row_major():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    patches = to_patches(pixels, 2)
    assert patches.shape == (6, 12) and patches.dtype == np.uint8
    for place, patch in enumerate(patches):
        row, column = divmod(place, 3)
        np.testing.assert_array_equal(patch.reshape(2, 2, 3), pixels[2 * row : 2 * row + 2, 2 * column : 2 * column + 2])


SIDE = 56  # 4 x 4 patches a tile
CANVASES = tuple(Canvas(height * SIDE, width * SIDE) for height, width in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)))


def tiled():
    config = model("squash", size=SIDE)
    return dataclasses.replace(config, image=dataclasses.replace(config.image, canvases=CANVASES))


@pytest.mark.parametrize(("width", "height"), [*SIZES, (56, 56), (300, 90), (90, 300), (112, 112), (400, 60)])
def test_what_is_painted_into_a_box_lands_in_its_patch_of_the_tiles(width, height):
    config = tiled()
    layout = lay_out((width, height), config)
    for token in range(16, len(layout)):
        x0, y0, x1, y1 = layout.box[token] * (width, height, width, height)
        left, top, right, bottom = max(0, round(x0)), max(0, round(y0)), min(width, round(x1)), min(height, round(y1))
        if layout.source[token, 0] < 0:
            assert not layout.box[token].any()
            continue
        values = np.zeros((height, width), np.uint8)
        values[top:bottom, left:right] = 255
        image = Image.fromarray(np.repeat(values[:, :, None], 3, axis=2))
        tiles = to_patches(prepare_tiles(image, config.image), PATCH).mean(-1)
        assert len(tiles) == layout.tiles
        tiles[0] = 0  # the whole image shows it too
        assert left >= right or top >= bottom or tiles.argmax() == layout.source[token, 0]


@pytest.mark.parametrize("size", [*SIZES, (56, 56), (300, 90), (25, 160), (400, 60)])
def test_rows_of_the_canvas_end_with_a_newline_and_cover_the_image(size):
    layout = lay_out(size, tiled())
    ends = np.flatnonzero(layout.source[16:, 0] < 0)
    assert len(layout) <= len(longest_layout(tiled())) and layout.tiles <= tile_bucket(layout.tiles) <= 5
    (columns,) = set(np.diff(ends, prepend=-1))
    box = layout.box[16:].reshape(len(ends), columns, 4)[:, :-1]
    np.testing.assert_allclose(box[:, 1:, 0], box[:, :-1, 2], atol=1e-6)
    np.testing.assert_allclose(box[1:, :, 1], box[:-1, :, 3], atol=1e-6)
    # unpadding removes whole patches, so at most a part of one lies outside
    width, height = box[0, 0, 2] - box[0, 0, 0], box[0, 0, 3] - box[0, 0, 1]
    assert (box[..., 2] > -width).all() and (box[..., 0] < 1 + width).all() and (box[..., 3] > -height).all()
    assert (box[..., 1] < 1 + height).all() and np.unique(layout.source[layout.source >= 0]).size == (layout.source >= 0).sum()


@pytest.mark.parametrize("size", [*SIZES, (1, 60), (60, 1), (3, 500), (500, 3), (1, 1), (113, 112)])
def test_unpadding_is_that_of_transformers(size):
    """Of an image that is thinner than a patch no row, or no column, may be left."""
    config, layout = tiled(), lay_out(size, tiled())
    width, height = best_canvas(size, config.image.canvases)
    row, column = np.meshgrid(np.arange(height // PATCH), np.arange(width // PATCH), indexing="ij")
    outputs = (1 + row // 4 * (width // SIDE) + column // 4) * 16 + row % 4 * 4 + column % 4
    left = unpad_image(torch.tensor(outputs)[None], size[::-1])[0].numpy()
    ended = np.pad(left, ((0, 0), (0, 1)), constant_values=NEWLINE)
    assert layout.source[16:, 0].tolist() == ended.ravel().tolist() and len(layout.box) == len(layout)


def shrinking(max_tiles):
    config = tiled()
    return dataclasses.replace(config, image=dataclasses.replace(config.image, max_tiles=max_tiles))


@pytest.mark.parametrize("size", [*SIZES, (56, 56), (300, 90), (90, 300), (112, 112), (400, 60)])
@pytest.mark.parametrize("max_tiles", [1, 2, 9])
def test_shrunk_rows_are_what_pytorch_interpolates(size, max_tiles):
    """A map over the rows and columns of the canvas, gathered by the layout: that of PyTorch, and still in its place."""
    wide, layout = lay_out(size, tiled()), lay_out(size, shrinking(max_tiles))
    columns = np.flatnonzero(wide.source[16:, 0] < 0)[0]
    rows = len(wide.source[16:]) // (columns + 1)
    outputs = np.random.default_rng(0).normal(size=(16 * layout.tiles,)).astype(np.float32)
    grid = outputs[wide.source[16:, 0].reshape(rows, -1)[:, :-1]]
    ratio = math.sqrt(rows * columns / (max_tiles * 16))
    new = (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else (rows, columns)
    expected = torch.nn.functional.interpolate(torch.tensor(grid)[None, None], new, mode="bilinear")[0, 0].numpy()
    found = (outputs[np.maximum(layout.source, 0)] * layout.weight).sum(1)
    tokens = found[16:].reshape(new[0], new[1] + 1)[:, :-1]
    np.testing.assert_allclose(tokens, expected, atol=1e-6)
    np.testing.assert_array_equal(found[:16], outputs[:16])
    assert ((layout.source >= 0) == (layout.weight > 0))[layout.source[:, 0] >= 0].all()
    box = layout.box[16:].reshape(new[0], new[1] + 1, 4)[:, :-1]
    np.testing.assert_allclose(box[:, 1:, 0], box[:, :-1, 2], atol=1e-6)
    np.testing.assert_allclose(box[1:, :, 1], box[:-1, :, 3], atol=1e-6)
    whole = wide.box[16:].reshape(rows, columns + 1, 4)[:, :-1]
    for corner, place in (((0, 0), slice(0, 2)), ((-1, -1), slice(2, 4))):
        np.testing.assert_allclose(box[corner][place], whole[corner][place], atol=1e-6)


def test_several_images_are_a_square_each():
    """OneVision; LLaVA-NeXT cuts each of them into tiles."""
    config = shrinking(9)
    layout, square = lay_out((150, 99), config, alone=False), lay_out((150, 99), model("pad", size=SIDE))
    assert layout.tiles == 1 and layout.source[:, 0].tolist() == [*range(16), NEWLINE]
    np.testing.assert_array_equal(layout.box, [*square.box, [0, 0, 0, 0]])
    np.testing.assert_array_equal(lay_out((150, 99), tiled(), alone=False).source, lay_out((150, 99), tiled()).source)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (99, 150, 3), np.uint8))
    expected = prepare_pixels(image, dataclasses.replace(config.image, aspect="pad"))
    np.testing.assert_array_equal(prepare_tiles(image, config.image, alone=False), expected[None])


def test_images_of_a_row_follow_each_other():
    config, sizes = tiled(), [(100, 30), (60, 60)]
    layouts = [lay_out(size, config) for size in sizes]
    is_image = np.zeros(4 + sum(map(len, layouts)), bool)
    is_image[2:-2] = True
    source = place_sources(is_image, layouts, config)["source"][:, 0]
    assert (source[~is_image] == -1).all() and source.max() < 16 * sum(layout.tiles for layout in layouts)
    shown = source[is_image] >= 0
    boxes = np.concatenate([layout.box for layout in layouts])[shown]
    assert len(np.unique(source[is_image][shown])) == len(boxes)
