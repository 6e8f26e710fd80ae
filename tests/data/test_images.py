import io
from functools import partial

import numpy as np
import pytest
from image_files import encoded, png_header
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from converters.image_processor import CLIP_MEAN, CLIP_STD, SIGLIP_MEAN, image_config
from lsg_jax.config import Canvas, ImageConfig
from lsg_jax.data import images
from lsg_jax.data.images import normalise, open_image, prepare_pixels
from lsg_jax.errors import ConfigError, InputError

SIZE = 56
SIZES = [(56, 56), (100, 37), (37, 101), (1, 1), (1, 90), (333, 7), (55, 57), (29, 23)]
MODES = ["RGB", "L", "RGBA", "LA", "P", "CMYK", "1"]


def picture(width, height, mode="RGB", seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    return image.convert("L").convert("LA") if mode == "LA" else image.convert(mode)


def references(size=SIZE):
    square = {"height": size, "width": size}
    return {
        "pad": LlavaImageProcessorPil(do_pad=True, size={"shortest_edge": size}, crop_size=square),
        "crop": CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=square),
        "squash": SiglipImageProcessorPil(size=square),
    }


def config(aspect, size=SIZE):
    return image_config(references(size)[aspect].to_dict(), size=size, tower="siglip" if aspect == "squash" else "clip")


@pytest.mark.parametrize("aspect", ["pad", "crop", "squash"])
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_pixels_equal_hugging_face(aspect, width, height):
    reference = references()[aspect]
    setting = config(aspect)
    assert setting.aspect == aspect
    for mode in MODES:
        image = picture(width, height, mode)
        kind = "TIFF" if mode == "CMYK" else "PNG"
        pixels = prepare_pixels(open_image(encoded(image, kind)), setting)
        assert pixels.shape == (SIZE, SIZE, 3) and pixels.dtype == np.uint8
        expected = reference(Image.open(io.BytesIO(encoded(image, kind))), return_tensors="np")["pixel_values"][0]
        np.testing.assert_allclose(normalise(pixels, setting).transpose(2, 0, 1), expected, atol=1e-5, rtol=0, err_msg=mode)


def test_llava_at_its_real_size():
    reference, setting = references(336)["pad"], config("pad", 336)
    image = picture(640, 427)
    expected = reference(image, return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(
        normalise(prepare_pixels(image, setting), setting).transpose(2, 0, 1), expected, atol=1e-5, rtol=0
    )


def test_padding_colour_and_offset():
    pixels = prepare_pixels(Image.new("RGB", (SIZE, SIZE - 7), "white"), ImageConfig(SIZE, "pad", CLIP_MEAN, CLIP_STD))
    assert pixels[0, 0].tolist() == [122, 116, 104]
    assert (pixels[:, 0, 0] != 255).nonzero()[0].tolist() == [0, 1, 2, SIZE - 4, SIZE - 3, SIZE - 2, SIZE - 1]


def test_exif_orientation_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = picture(8, 4)
    assert open_image(encoded(image, "PNG", exif=exif)).size == (8, 4)


def test_sixteen_bit_grey_is_scaled():
    grey = Image.fromarray(np.array([[0, 0x0100, 0x8000, 0xFFFF]], np.uint16))
    assert np.array(open_image(encoded(grey)))[0, :, 0].tolist() == [0, 1, 0x80, 0xFF]


def test_gif_gives_its_first_frame():
    frames = [Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert open_image(data).getpixel((0, 0)) == (255, 0, 0)


PNG, JPEG = encoded(picture(40, 40)), encoded(picture(40, 40), "JPEG")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>404</html>", "HTML page"),
        (b"\n  <html>", "HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "Git LFS pointer"),
        (PNG[: len(PNG) // 2], "broken image file"),
        (JPEG[: len(JPEG) // 2], "broken image file"),
        (PNG[:60] + b"\xff" * 200 + PNG[260:], "broken image file"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", "not an image of a known format"),
        (b"hello, this is text", "not an image of a known format"),
    ],
)
def test_bad_file_says_what_it_is(data, message, tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(data)
    for source in (data, path):
        with pytest.raises(InputError, match=message) as caught:
            open_image(source)
        assert "\n" not in str(caught.value)
    assert "x.png" in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        open_image(tmp_path / "x.png")


@pytest.mark.parametrize("side", [10_000, 20_000])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_image_bomb_is_refused_before_decoding(side):
    with pytest.raises(InputError, match="image bomb"):
        open_image(png_header(side, side))


@pytest.mark.parametrize(
    ("width", "height", "tolerance"), [(1000, 90, 0), (701, 2, 0), (400, 400, 0), (90, 1000, 1), (3, 700, 1)]
)
def test_padding_in_little_memory(width, height, tolerance, monkeypatch):
    image = picture(width, height)
    plain = prepare_pixels(image, config("pad")).astype(int)
    monkeypatch.setattr(images, "MAX_PIXELS", 30_000)
    assert abs(prepare_pixels(image, config("pad")) - plain).max() <= tolerance


@pytest.mark.parametrize("size", [(132, images.MAX_SIDE), (images.MAX_SIDE, 132), (1, images.MAX_ASPECT)])
def test_most_extreme_aspect(size):
    image = open_image(encoded(Image.new("RGB", size, (122, 116, 104)), compress_level=1))
    for aspect in ("pad", "crop", "squash"):
        assert (prepare_pixels(image, config(aspect)) == (122, 116, 104)).all(), aspect


@pytest.mark.parametrize("size", [(1, images.MAX_ASPECT + 1), (images.MAX_SIDE + 1, 1000)])
def test_beyond_the_most_extreme_aspect(size):
    with pytest.raises(InputError, match="too extreme"):
        open_image(png_header(*size))


# ------------------------------------------------------------------------------------- reading a checkpoint's image processor


@pytest.mark.parametrize(
    ("settings", "family", "aspect"),
    [
        (None, "clip", "crop"),
        (None, "siglip", "squash"),
        (
            {"size": 336, "crop_size": 336, "do_center_crop": True, "feature_extractor_type": "CLIPFeatureExtractor"},
            "clip",
            "crop",
        ),
        ({"size": 336, "resample": 3, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}, "siglip", "squash"),
        ({"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}, "do_pad": True}, "clip", "pad"),
        ({"size": {"height": 336, "width": 336}, "image_processor_type": "SiglipImageProcessorFast"}, "siglip", "squash"),
        ({"size": {"height": 336, "width": 336}, "do_center_crop": False}, "clip", "squash"),
        (
            {
                "processor_class": "LlavaProcessor",
                "image_processor": {"image_processor_type": "LlavaImageProcessorFast", "size": {"shortest_edge": 336}},
            },
            "clip",
            "crop",
        ),
    ],
)
def test_settings_are_read(settings, family, aspect):
    setting = image_config(settings, size=336, tower=family)
    assert (setting.aspect, setting.size) == (aspect, 336)
    assert setting.mean == (CLIP_MEAN if family == "clip" else SIGLIP_MEAN)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_grid_pinpoints": [[336, 672]]}, "are not those of config.json"),
        ({"image_processor_type": "LlavaNextImageProcessor"}, "does not go with a config.json without tiles"),
        ({"image_processor_type": "LlavaOnevisionImageProcessor"}, "LlavaOnevisionImageProcessor"),
        ({"resample": 2}, "not bicubic"),
        ({"rescale_factor": 1 / 127.5}, "not 1/255"),
        ({"do_normalize": False}, "do_normalize"),
        ({"do_resize": False}, "do_resize"),
        ({"size": 224}, "size 224 differs"),
        ({"size": {"shortest_edge": 384}, "crop_size": 336}, "size 384 differs"),
        ({"crop_size": 224}, "crop_size 224 differs"),
        ({"size": {"height": 336, "width": 300}}, "not supported"),
        ({"size": {"longest_edge": 336}}, "not supported"),
        ({"do_center_crop": False}, "no squares"),
        ({"image_mean": 0.5}, "three numbers"),
        ({"image_std": [1, 2]}, "three numbers"),
    ],
)
def test_settings_that_change_pixels_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        image_config(settings, size=336, tower="clip")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"aspect_ratio_setting": "pad"}, "'pad' is not anyres"),
        ({"crop_size": 384}, "crop_size 384 differs"),
        ({"size": {"shortest_edge": 384}}, "size 384 differs"),
        ({"image_grid_pinpoints": [[672, 336]]}, "are not those of config.json"),
        ({"image_processor_type": "CLIPImageProcessor"}, "does not go with a config.json with tiles"),
    ],
)
def test_settings_of_tiles(settings, message):
    stated = {"image_processor_type": "LlavaNextImageProcessor", "do_pad": True, "aspect_ratio_setting": "anyres"}
    read = partial(image_config, size=336, tower="clip", pinpoints=[[336, 672]])
    assert read(stated).canvases == (Canvas(336, 672),) and read(stated).aspect == "squash"
    with pytest.raises(ConfigError, match=message):
        read(stated | settings)
