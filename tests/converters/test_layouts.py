"""Original layouts give the same model as their Hugging Face twins, bit for bit."""

import json
from pathlib import Path

import numpy as np
import pytest
from checkpoints import LLAVA_7B, Arrays, all_tensors, edit_config, rewrite
from hf_models import save_tiny, tiny_hf
from originals import (
    CLIP_REST,
    CONNECTOR,
    LLAMA_LAYER,
    LLAVA15,
    LLAVA16,
    ONEVISION,
    PROJECTOR,
    QWEN2_LAYER,
    ROWS,
    SIGLIP_HEAD,
    SIGLIP_REST,
    TEXT,
    TINYLLAVA,
    decoder,
    renamed,
    vit,
    write_original,
    write_tokenizer,
)
from PIL import Image
from safetensors.numpy import save_file
from transformers import AddedToken, AutoTokenizer, LlavaForConditionalGeneration, LlavaProcessor

from converters.convert import convert
from converters.export import export
from converters.families import rules_of
from converters.hf_config import model_config
from converters.layouts import original_layout
from converters.layouts.tower import KNOWN
from converters.rules import layout
from lsg_jax.checkpoint import read_manifest
from lsg_jax.data.conversation import Turn
from lsg_jax.data.processor import Processor
from lsg_jax.errors import ConfigError, InputError

VOCABULARY, IMAGE = 320, 260  # of the twins: the image token follows the original's 260 rows, which are filled up to 320
TOWER = "model.vision_tower.vision_tower.vision_model."
PINPOINTS = [[42, 84], [84, 42], [84, 84]]
PIXELS = np.random.default_rng(0).integers(0, 256, (30, 70, 3), np.uint8)


def twin(folder: Path, vision: str, text: str, **settings) -> Path:
    """A tiny twin whose image token is where the conversion puts it."""
    aspect = settings.pop("image_processor", {})
    model = tiny_hf(
        vision, text, image_token_index=IMAGE, text_config={"vocab_size": VOCABULARY, "rms_norm_eps": 1e-5}, **settings
    )
    save_tiny(model, folder)
    edit_file(folder / "preprocessor_config.json", **aspect)
    write_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)  # as the conversion scripts of transformers do it
    tokenizer.add_tokens(AddedToken("<image>", special=True, normalized=False), special_tokens=True)
    tokenizer.save_pretrained(folder)
    return folder


def edit_file(path: Path, **fields) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def assert_same_model(original: Path, other: Path, folder: Path) -> None:
    """Both convert to the same configuration, and to the same tensors but for the rows that only the twin has."""
    convert(original, folder / "model")
    convert(other, folder / "twin_model")
    found, expected = (read_manifest(folder / name) for name in ("model", "twin_model"))
    assert found.config == expected.config
    export(folder / "model", folder / "back")
    tensors, wanted = all_tensors(folder / "back"), all_tensors(other)
    assert tensors.keys() == wanted.keys()
    for name, array in wanted.items():
        rows = ROWS if name.endswith(("embed_tokens.weight", "lm_head.weight")) else len(array)
        assert tensors[name].shape == array.shape and tensors[name].dtype == array.dtype, name
        assert tensors[name][:rows].tobytes() == array[:rows].tobytes(), name
        assert (tensors[name][rows:] == tensors[name][:rows].astype(np.float64).mean(0).astype(array.dtype)).all()


@pytest.fixture(scope="module")
def llava15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a twin of LLaVA-1.5, the original `llava`, and its tower beside it."""
    root = tmp_path_factory.mktemp("llava15")
    tensors = all_tensors(twin(root / "twin", "clip", "llama", image_processor={
        "image_processor_type": "LlavaImageProcessor", "do_pad": True,
    }))  # fmt: skip
    write_original(root / "llava", LLAVA15 | TEXT, renamed(tensors, decoder("", 5, LLAMA_LAYER) | PROJECTOR))
    clip = renamed(tensors, vit("vision_model.", 4, CLIP_REST))
    clip |= {"text_model.final_layer_norm.weight": np.ones(4, np.float32), "logit_scale": np.zeros((), np.float32)}
    clip["vision_model.embeddings.position_ids"] = np.arange(10, dtype=np.int64)[None]
    write_tower(root / "clip-vit-large-patch14-336", json.loads((root / "twin/config.json").read_text()), clip)
    return root


def write_tower(folder: Path, config: dict, tensors: Arrays) -> None:
    folder.mkdir()
    kind = config["vision_config"]["model_type"].removesuffix("_vision_model")
    (folder / "config.json").write_text(json.dumps({"model_type": kind, "vision_config": config["vision_config"]}))
    save_file(tensors, folder / "model.safetensors")


def test_llava15_with_its_tower_beside_it(llava15: Path, tmp_path: Path) -> None:
    assert_same_model(llava15 / "llava", llava15 / "twin", tmp_path)
    files = read_manifest(tmp_path / "model").source.files
    assert set(files) == {"model.safetensors", "clip-vit-large-patch14-336/model.safetensors"}
    transformers = LlavaForConditionalGeneration.from_pretrained(tmp_path / "back")
    assert transformers.config.image_token_index == IMAGE and transformers.config.text_config.vocab_size == VOCABULARY


def test_llava15_has_the_ids_and_pixels_of_its_twin(llava15: Path, tmp_path: Path) -> None:
    convert(llava15 / "llava", tmp_path / "model")
    export(tmp_path / "model", tmp_path / "back")
    ours = Processor.from_folder(tmp_path / "model/hf", read_manifest(tmp_path / "model").config)
    assert ours.template == "vicuna_v1"
    theirs = LlavaProcessor.from_pretrained(tmp_path / "back")
    prompt, _ = ours._render([Turn("human", "<image>\nWhat is it?")], None, None)
    expected = theirs(images=Image.fromarray(PIXELS), text=prompt, return_tensors="np")
    assert ours.encode_question("What is it?").ids.tolist() == expected["input_ids"][0].tolist()
    mean, std = (np.array(values, np.float32) for values in (ours.image.mean, ours.image.std))
    pixels = (ours.pixels(Image.fromarray(PIXELS)) / np.float32(255) - mean) / std
    np.testing.assert_allclose(pixels.transpose(0, 3, 1, 2), expected["pixel_values"], atol=1e-5)
    before, after = (AutoTokenizer.from_pretrained(path) for path in (llava15 / "llava", tmp_path / "back"))
    text = "USER: Two  cubes?\nASSISTANT: ja, ü</s>"
    assert before(text).input_ids == after(text).input_ids
    assert (after.convert_tokens_to_ids("<image>"), after.pad_token) == (IMAGE, "<pad>")


def test_a_tower_by_reference_gets_the_dtype_of_the_language_model(llava15: Path, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    tensors = all_tensors(llava15 / "llava")
    write_original(root / "llava", LLAVA15 | TEXT, {name: array.astype(np.float16) for name, array in tensors.items()})
    (root / "clip-vit-large-patch14-336").symlink_to(llava15 / "clip-vit-large-patch14-336")
    twin_root = tmp_path / "twin"
    twin_root.mkdir()
    for path in (llava15 / "twin").iterdir():
        (twin_root / path.name).write_bytes(path.read_bytes())
    rewrite(twin_root, lambda tensors: {name: array.astype(np.float16) for name, array in tensors.items()})
    assert_same_model(root / "llava", twin_root, tmp_path)


def test_llava16_holds_its_tower_and_newline(tmp_path: Path) -> None:
    tiles = {"image_grid_pinpoints": PINPOINTS}
    other = twin(tmp_path / "hf", "clip", "mistral", **tiles)
    names = decoder("", 5, LLAMA_LAYER) | PROJECTOR | vit(TOWER, 4, CLIP_REST) | {"model.image_newline": "image_newline"}
    config = LLAVA16 | TEXT | {"architectures": ["LlavaMistralForCausalLM"], "image_grid_pinpoints": str(PINPOINTS)}
    config |= {"sliding_window": None, "mm_vision_tower": "./tower"}
    original = write_original(tmp_path / "llava", config, renamed(all_tensors(other), names))
    write_tower(original / "tower", json.loads((other / "config.json").read_text()), {"logit_scale": np.zeros(1, np.float32)})
    edit_config(other, lambda config: config["text_config"].update(sliding_window=None))
    assert_same_model(original, other, tmp_path)


def test_tinyllava_drops_the_first_patch_as_its_code_does(tmp_path: Path) -> None:
    other = twin(tmp_path / "hf", "siglip", "qwen2", tied=True, vision_feature_select_strategy="default")
    hf = json.loads((other / "config.json").read_text())
    names = decoder("language_model.", 5, QWEN2_LAYER) | CONNECTOR
    names |= vit("vision_tower._vision_tower.vision_model.", 4, (*SIGLIP_REST, *SIGLIP_HEAD))
    text = {**hf["text_config"], "vocab_size": ROWS, "_name_or_path": "Qwen/Qwen2.5-3B"}
    vision = {**hf["vision_config"], "model_name_or_path": "google/siglip", "model_name_or_path2": ""}
    original = write_original(
        tmp_path / "tiny", TINYLLAVA | {"text_config": text, "vision_config": vision}, renamed(all_tensors(other), names)
    )
    edit_file(original / "tokenizer_config.json", chat_template="{% for m in messages %}{{ m.content }}{% endfor %}")
    assert_same_model(original, other, tmp_path)
    config = read_manifest(tmp_path / "model").config
    assert (config.num_image_tokens, config.feature_select, config.image.aspect) == (8, "default", "squash")
    ours = Processor.from_folder(tmp_path / "model/hf", config)
    turns = [Turn("human", "<image>\nfirst?"), Turn("gpt", "one"), Turn("human", "second?")]
    system = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
        "polite answers to the user's questions. "
    )
    expected = f"{system}USER: <image>\nfirst? ASSISTANT: one</s>USER: second? ASSISTANT:"
    assert ours._render(turns, "two", None) == (expected, " two</s>")


def test_onevision_in_the_terms_of_its_twin() -> None:
    """The same fields as `llava-hf/llava-onevision-qwen2-0.5b-ov-hf`; names of real tensors."""
    grids = [[384 * a, 384 * b] for a in range(1, 7) for b in range(1, 7)]
    for stated in (grids, "(1x1),...,(6x6)"):
        onevision = original_layout(ONEVISION | TEXT | {"image_grid_pinpoints": stated})
        found = onevision.twin(ONEVISION | TEXT | {"image_grid_pinpoints": stated}, "config.json")
        assert (found.model_type, found.unused_layers, found.pad_token) == ("llava_onevision", 1, None)
        assert found.fields == {
            "image_grid_pinpoints": grids,
            "projector_hidden_act": "gelu",
            "tie_word_embeddings": False,
            "vision_aspect_ratio": "anyres_max_9",
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
        }
        assert found.text_config.keys() - TEXT.keys() == {
            "_name_or_path",
            "bos_token_id", "eos_token_id", "hidden_act", "initializer_range", "max_length", "max_window_layers", "model_type",
            "pad_token_id", "pretraining_tp", "rms_norm_eps", "rope_scaling", "sliding_window", "tie_word_embeddings",
            "torch_dtype", "use_cache", "use_sliding_window",
        }  # fmt: skip
        assert found.text_config["model_type"] == "qwen2"
    names = decoder("", 24, QWEN2_LAYER) | PROJECTOR | vit(TOWER, 26, SIGLIP_REST) | {"model.image_newline": "image_newline"}
    assert {name: onevision.hf_name(name) for name in names} == names


def test_onevision_holds_a_tower_without_its_last_layer(tmp_path: Path) -> None:
    other = twin(
        tmp_path / "hf",
        "siglip",
        "qwen2",
        tied=True,
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio="anyres_max_9",
        video_token_index=261,
        vision_feature_layer=-1,
        vision_config={"vision_use_head": False},
        image_processor={"image_processor_type": "LlavaOnevisionImageProcessor"},
    )
    names = decoder("", 5, QWEN2_LAYER) | PROJECTOR | vit(TOWER, 4, SIGLIP_REST) | {"model.image_newline": "image_newline"}
    config = ONEVISION | TEXT | {"image_grid_pinpoints": PINPOINTS, "tie_word_embeddings": True}
    config |= {"mm_vision_tower": "./siglip"}
    original = write_original(tmp_path / "onevision", config, renamed(all_tensors(other), names))
    hf = json.loads((other / "config.json").read_text())
    hf["vision_config"]["num_hidden_layers"] = 5
    write_tower(original / "siglip", hf, {"logit_scale": np.zeros(1, np.float32)})
    assert_same_model(original, other, tmp_path)
    assert read_manifest(tmp_path / "model").config.video_token_id == 261


def test_siglip_in_llavas_layout_loses_its_last_layer_and_head(tmp_path: Path) -> None:
    """`lmms-lab/llava-next-interleave-qwen-0.5b`: one square an image, and a newline that is not used."""
    other = twin(
        tmp_path / "hf",
        "siglip",
        "qwen2",
        vision_feature_layer=-1,
        vision_config={"num_hidden_layers": 3, "vision_use_head": False},
    )
    hf, tensors = json.loads((other / "config.json").read_text()), all_tensors(other)
    whole = tmp_path / "siglip-so400m-patch14-384"
    tower = renamed(tensors, vit("vision_model.", 3, SIGLIP_REST))
    tower |= {name.replace("layers.2.", "layers.3."): array for name, array in tower.items() if "layers.2." in name}
    tower["vision_model.head.probe"] = np.zeros((1, 1, 40), np.float32)
    hf["vision_config"]["num_hidden_layers"] = 4
    write_tower(whole, hf, tower)
    text = renamed(tensors, decoder("", 5, QWEN2_LAYER) | PROJECTOR)
    text["model.image_newline"] = np.zeros(40, np.float32)
    config = ONEVISION | TEXT | {"mm_patch_merge_type": "flat", "image_aspect_ratio": "square"}
    original = write_original(tmp_path / "interleave", config, text)
    assert_same_model(original, other, tmp_path)
    ignored = read_manifest(tmp_path / "model").ignored
    assert ignored.pop("image_newline") == "images are not cut into tiles"
    assert len(ignored) == 17 and all("layers.3." in name or name == "vision_tower.head.probe" for name in ignored)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mm_projector_type": "linear"}, "cannot express mm_projector_type = 'linear'"),
        ({"mm_use_im_start_end": True}, "cannot express mm_use_im_start_end = True"),
        ({"mm_resampler_type": "spatial_pool"}, "cannot express mm_resampler_type = 'spatial_pool'"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio = 'anyres' with mm_patch_merge_type = 'flat'"),
        ({"mm_vision_select_feature": "mean"}, "mm_vision_select_feature = 'mean'"),
        ({"mm_new_thing": 3}, "not understood, so it might change the results: mm_new_thing = 3"),
        ({"mm_vision_tower": None}, "mm_vision_tower = None names no vision tower"),
        ({"architectures": ["LlavaMptForCausalLM"]}, "architecture 'LlavaMptForCausalLM' of LLaVA's layout is not supported"),
        (
            {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad", "image_grid_pinpoints": "[(336,)]"},
            "image_grid_pinpoints = .* is not a list of",
        ),
    ],
)
def test_what_the_twin_cannot_do_is_refused_by_name(fields: dict, message: str) -> None:
    config = LLAVA15 | TEXT | fields
    with pytest.raises(ConfigError, match=message) as error:
        original_layout(config).twin(config, "X/config.json")
    assert str(error.value).startswith("X/config.json: ") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"connector_type": "qformer"}, "cannot express connector_type = 'qformer'"),
        ({"vision_model_name_or_path2": "facebook/dinov2-large"}, "cannot express vision_model_name_or_path2"),
        ({"text_config": None}, "text_config is missing"),
    ],
)
def test_what_tinyllavas_twin_cannot_do_is_refused_by_name(fields: dict, message: str) -> None:
    config = TINYLLAVA | {"text_config": {"model_type": "qwen2"}, "vision_config": {}} | fields
    with pytest.raises(ConfigError, match=message):
        original_layout(config).twin(config, "X/config.json")


def test_a_missing_tower_is_named_with_where_to_put_it(llava15: Path, tmp_path: Path) -> None:
    original = tmp_path / "models/llava"
    write_original(original, LLAVA15 | TEXT, all_tensors(llava15 / "llava"))
    message = f"vision tower is missing; put the folder of openai/clip-vit-large-patch14-336 at {tmp_path}/models/clip-vit"
    with pytest.raises(InputError, match=message) as error:
        convert(original, tmp_path / "model")
    assert "\n" not in str(error.value) and not list(tmp_path.glob("model.tmp"))
    edit_config(original, lambda config: config.update(mm_vision_tower="/nowhere/clip"))
    with pytest.raises(InputError, match="its vision tower /nowhere/clip is not on this machine"):
        convert(original, tmp_path / "model")


def test_hf_configurations_are_no_original_layout() -> None:
    assert original_layout({"model_type": "llava", "text_config": {}, "vision_config": {}}) is None
    assert original_layout({"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}) is None


def test_real_sizes_have_all_tensors_and_no_other() -> None:
    """The names of `liuhaotian/llava-v1.5-7b` with its tower, and of `Zhang199/TinyLLaVA-Qwen2.5-3B-SigLIP`."""
    llava = original_layout(LLAVA15)
    names = [*decoder("", 32, LLAMA_LAYER), *PROJECTOR, *vit(TOWER, 24, CLIP_REST)]
    planned = layout(model_config(LLAVA_7B), rules_of(model_config(LLAVA_7B)))
    carried = {f"vision_tower.post_layernorm.{kind}" for kind in ("weight", "bias")}
    assert {llava.hf_name(name) for name in names} == planned.tensors.keys() | carried
    text = {"model_type": "qwen2", "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36}
    text |= {"num_attention_heads": 16, "num_key_value_heads": 2, "tie_word_embeddings": True, "vocab_size": 151936}
    siglip = {**KNOWN["siglip-so400m-patch14-384"], "model_name_or_path": "google/siglip-so400m-patch14-384"}
    config = TINYLLAVA | {"text_config": text, "vision_config": siglip}
    tiny = original_layout(config)
    found = tiny.twin(config, "config.json")
    twin_config = model_config(
        {"model_type": found.model_type, "text_config": found.text_config, "vision_config": found.vision_config, **found.fields}
    )
    assert (twin_config.num_image_tokens, twin_config.text.num_layers, twin_config.text.tied_embeddings) == (728, 36, True)
    names = [*decoder("language_model.", 36, QWEN2_LAYER), *CONNECTOR]
    names += vit("vision_tower._vision_tower.vision_model.", 27, (*SIGLIP_REST, *SIGLIP_HEAD))
    planned = layout(twin_config, rules_of(twin_config))
    carried |= {f"vision_tower.{name}" for name in SIGLIP_HEAD}
    assert {tiny.hf_name(name) for name in names} == planned.tensors.keys() | carried | {"language_model.lm_head.weight"}
