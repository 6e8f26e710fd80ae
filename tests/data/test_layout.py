import dataclasses

import numpy as np
import pytest
from PIL import Image

from lsg_jax.config import ImageConfig, ModelConfig, RopeConfig, TextConfig, VisionConfig
from lsg_jax.data.images import prepare_pixels, to_patches
from lsg_jax.data.layout import lay_out, num_tokens
from lsg_jax.errors import InputError

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
    dtypes = [getattr(layout, f.name).dtype for f in dataclasses.fields(layout)]
    assert dtypes == [np.int32, np.int32, np.float32, np.float32]


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
    assert len(layout) == num_tokens((40, 30), config) == config.num_image_tokens == count
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
