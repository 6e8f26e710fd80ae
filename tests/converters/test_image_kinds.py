"""Image processor settings of the later families, as checkpoints state them and as transformers writes them."""

import dataclasses

import pytest

from converters.image_kinds import gemma_image_config, native_image_config, split_image_config, tiles_image_config
from lsg_jax.errors import ConfigError
from tests.data.family_configs import ALL
from tests.data.family_processors import hf_processor

READ = {"native": native_image_config, "tiles": tiles_image_config, "split": split_image_config, "square": gemma_image_config}


def read(name, settings, **more):
    config = ALL[name]
    if config.image.kind == "native":
        more = {"patch": config.vision.patch_size, "merge": 2, "frames": 2} | more
    return READ[config.image.kind](settings, **({"size": config.image.size} | more))


@pytest.mark.parametrize("name", ALL)
def test_what_transformers_writes_is_read_back(name):
    settings = hf_processor(ALL[name]).to_dict()
    assert read(name, settings) == ALL[name].image
    assert read(name, {"processor_class": "X", "image_processor": settings}) == ALL[name].image
    fast = settings | {"image_processor_type": settings["image_processor_type"].removesuffix("Pil") + "Fast"}
    assert read(name, fast) == ALL[name].image


def test_limits_of_qwen_in_all_spellings():
    """min_pixels and max_pixels win over `size`, as in transformers."""
    pixels = lambda settings: (lambda image: (image.min_pixels, image.max_pixels))(read("qwen2_vl", settings))
    assert pixels(None) == (3136, 28 * 28 * 1280)
    assert pixels({"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14}) == (3136, 12845056)
    assert pixels({"size": {"shortest_edge": 65536, "longest_edge": 16777216}}) == (65536, 16777216)
    both = {"size": {"shortest_edge": 1, "longest_edge": 2, "min_pixels": 3, "max_pixels": 4}, "min_pixels": 3136}
    assert pixels({**both, "max_pixels": 9000}) == (3136, 9000)
    kind = type(hf_processor(ALL["qwen2_vl"]))
    size = kind(size={"shortest_edge": 1, "longest_edge": 2}, min_pixels=3136, max_pixels=9000).size
    assert (size.shortest_edge, size.longest_edge) == (3136, 9000)


def test_defaults():
    assert read("smolvlm", None) == ALL["smolvlm"].image
    assert read("gemma3", None) == ALL["gemma3"].image
    assert read("internvl", {"crop_to_patches": False}) == ALL["internvl"].image  # the processor asks for tiles
    few = read("internvl", {"min_patches": 2, "max_patches": 6})
    assert few == dataclasses.replace(ALL["internvl"].image, min_grid=2, max_grid=6)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("qwen2_vl", {"patch_size": 16}, "patch_size = 16 is not that of config.json, 14"),
        ("qwen3_vl", {}, "patch_size = 14 is not that of config.json, 16"),
        ("qwen2_vl", {"merge_size": 4}, "merge_size"),
        ("qwen2_vl", {"temporal_patch_size": 1}, "temporal_patch_size"),
        ("qwen2_vl", {"size": {"height": 224, "width": 224}}, "shortest_edge and longest_edge"),
        ("qwen2_vl", {"size": {"shortest_edge": 10}}, "max_pixels = None"),
        ("qwen2_vl", {"min_pixels": 9000, "max_pixels": 3136}, "min_pixels 9000 is above"),
        ("qwen2_vl", {"min_pixels": "many"}, "no positive whole number"),
        ("qwen2_vl", {"image_processor_type": "CLIPImageProcessor"}, "not supported for this family"),
        ("qwen2_vl", {"do_center_crop": True}, "do_center_crop"),
        ("qwen2_vl", {"fps": 2}, "not understood: fps=2"),
        ("internvl", {"size": {"height": 336, "width": 336}}, "differs from the vision tower's image size 28"),
        ("internvl", {"min_patches": 4, "max_patches": 2}, "min_patches 4 is above"),
        ("internvl", {"resample": 0}, "resample = 0"),
        ("internvl", {"do_normalize": False}, "do_normalize"),
        ("internvl", {"rescale_factor": 1}, "not 1/255"),
        ("gemma3", {"do_pan_and_scan": True}, "do_pan_and_scan"),
        ("gemma3", {"image_mean": 0.5}, "three numbers"),
        ("smolvlm", {"do_image_splitting": False}, "do_image_splitting"),
        ("smolvlm", {"max_image_size": {"longest_edge": 364}}, "max_image_size"),
        ("smolvlm", {"size": {"height": 512, "width": 512}}, "state longest_edge"),
    ],
)
def test_settings_that_change_pixels_are_refused(name, settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        read(name, settings)
    assert "\n" not in str(caught.value)
