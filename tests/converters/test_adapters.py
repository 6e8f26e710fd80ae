"""Adapters and projectors are merged into their base as PEFT and LLaVA's code do it, or refused by name."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import Arrays, all_tensors, edit_config
from hf_models import save_tiny, tiny_hf
from originals import CLIP_REST, LLAMA_LAYER, LLAVA15, PROJECTOR, TEXT, decoder, renamed, vit, write_original
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from converters.byte_tokenizer import write_byte_tokenizer
from converters.convert import convert
from converters.export import export
from lsg_jax.checkpoint import read_manifest
from lsg_jax.data.processor_files import open_tokenizer, read_chat_template
from lsg_jax.errors import ConfigError, InputError, LsgError

Q_PROJ, DOWN_PROJ = "model.layers.{}.self_attn.q_proj", "model.layers.{}.mlp.down_proj"
RANK, ALPHA = 3, 8

LORA = {
    "alpha_pattern": {},
    "auto_mapping": None,
    "base_model_name_or_path": "lmsys/vicuna-7b-v1.5",
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "lora_alpha": ALPHA,
    "lora_dropout": 0.05,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": RANK,
    "rank_pattern": {},
    "revision": None,
    "target_modules": ["q_proj", "down_proj"],
    "task_type": "CAUSAL_LM",
    "use_dora": False,
    "use_rslora": False,
}
"""adapter_config.json as PEFT writes it."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`twin`, a tiny LLaVA; `llava` in LLaVA's layout with the tower inside; `vicuna`, its language model."""
    root = tmp_path_factory.mktemp("bases")
    model = tiny_hf("clip", "llama", image_token_index=260, text_config={"vocab_size": 320, "rms_norm_eps": 1e-5})
    tensors = all_tensors(save_tiny(model, root / "twin"))
    tower = vit("model.vision_tower.vision_tower.vision_model.", 4, CLIP_REST)
    text = renamed(tensors, decoder("", 5, LLAMA_LAYER))
    write_original(root / "vicuna", TEXT | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, text)
    config = LLAVA15 | TEXT | {"mm_vision_tower": "./tower"}
    write_original(root / "llava", config, text | renamed(tensors, PROJECTOR | tower))
    (root / "llava/tower").mkdir()
    vision = json.loads((root / "twin/config.json").read_text())["vision_config"]
    (root / "llava/tower/config.json").write_text(json.dumps({"model_type": "clip", "vision_config": vision}))
    clip = root / "clip-vit-large-patch14-336"
    clip.mkdir()
    (clip / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": vision}))
    save_file(renamed(tensors, vit("vision_model.", 4, CLIP_REST)), clip / "model.safetensors")
    return root


def matrices(modules: list[str], prefix: str = "base_model.model.") -> Arrays:
    """Random lora_A and lora_B of modules of width 40 -> 40 or 56 -> 40."""
    rng = np.random.default_rng(1)
    found = {}
    for module in modules:
        columns = 56 if "down_proj" in module else 40
        found[f"{prefix}{module}.lora_A.weight"] = rng.normal(size=(RANK, columns)).astype(np.float32)
        found[f"{prefix}{module}.lora_B.weight"] = rng.normal(size=(40, RANK)).astype(np.float32)
    return found


def write_adapter(folder: Path, tensors: Arrays, **settings) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(LORA | settings))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def merged(weight: np.ndarray, adapter: Arrays, module: str, scale: float) -> np.ndarray:
    """PEFT's formula: W + scale * B A."""
    down, up = (torch.from_numpy(adapter[f"base_model.model.{module}.lora_{part}.weight"]) for part in "AB")
    return (torch.from_numpy(weight) + scale * (up @ down)).numpy()


def converted(source: Path, base: Path, folder: Path) -> Arrays:
    convert(source, folder / "model", base=base)
    export(folder / "model", folder / "back")
    return all_tensors(folder / "back")


@pytest.mark.parametrize("rslora", [False, True])
def test_lora_on_a_hugging_face_checkpoint(folders: Path, rslora: bool, tmp_path: Path) -> None:
    """Under the names of transformers 4 and 5; only the adapted matrices change."""
    old, new = "language_model." + Q_PROJ.format(0), "model.language_model.layers.1.mlp.down_proj"
    tensors = matrices([old, new])
    found = converted(write_adapter(tmp_path / "a", tensors, use_rslora=rslora), folders / "twin", tmp_path)
    assert read_manifest(tmp_path / "model").source.name == "a on twin"
    expected = all_tensors(folders / "twin")
    scale = ALPHA / (math.sqrt(RANK) if rslora else RANK)
    for module, name in ((old, f"{old}.weight"), (new, "language_model.model.layers.1.mlp.down_proj.weight")):
        expected[name] = merged(expected[name], tensors, module, scale)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-5)
        if "q_proj" not in name and "down_proj" not in name:
            assert found[name].tobytes() == array.tobytes()


def test_modules_to_save_and_biases_replace_those_of_the_base(folders: Path, tmp_path: Path) -> None:
    saved = {
        "base_model.model.multi_modal_projector.linear_1.weight": np.full((40, 40), 0.5, np.float32),
        "base_model.model.multi_modal_projector.linear_1.modules_to_save.bias": np.full(40, 0.25, np.float32),
    }
    tensors = matrices(["language_model." + Q_PROJ.format(0)]) | saved
    adapter = write_adapter(tmp_path / "a", tensors, modules_to_save=["multi_modal_projector"], bias="all")
    found = converted(adapter, folders / "twin", tmp_path)
    assert (found["multi_modal_projector.linear_1.weight"] == 0.5).all()
    assert (found["multi_modal_projector.linear_1.bias"] == 0.25).all()


def test_llavas_lora_on_its_language_model(folders: Path, tmp_path: Path, caplog) -> None:
    """The projector is in `non_lora_trainables.bin`, config.json beside it, the tower by reference."""
    module = Q_PROJ.format(2)
    tensors = matrices([module])
    adapter = folders / "llava-v1.5-7b-lora"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps(LORA))
    torch.save({name: torch.from_numpy(array) for name, array in tensors.items()}, adapter / "adapter_model.bin")
    projector = renamed(all_tensors(folders / "twin"), PROJECTOR)
    others = {f"base_model.model.{name}": torch.from_numpy(array).half() for name, array in projector.items()}
    torch.save(others, adapter / "non_lora_trainables.bin")
    (adapter / "config.json").write_text(json.dumps(LLAVA15 | TEXT))
    own_tokenizer(adapter, folders / "vicuna", model_max_length=77, chat_template="own " + LOOP)
    caplog.set_level("INFO")
    found, expected = converted(adapter, folders / "vicuna", tmp_path), all_tensors(folders / "twin")
    tokenizer = open_tokenizer(tmp_path / "model/hf")
    assert (tokenizer.chat_template, tokenizer.model_max_length) == ("own " + LOOP, 77)
    assert f"tokenizer: of {adapter}; chat template: of {adapter}" in caplog.text
    name = f"language_model.{module}.weight"
    np.testing.assert_allclose(found[name], merged(expected[name], tensors, module, ALPHA / RANK), rtol=1e-5, atol=1e-5)
    for part in ("linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias"):
        key = f"multi_modal_projector.{part}"
        np.testing.assert_array_equal(found[key], expected[key].astype(np.float16).astype(np.float32))
    unchanged = [key for key in expected if "projector" not in key and key != name and "embed" not in key and "head" not in key]
    assert all(found[key].tobytes() == expected[key].tobytes() for key in unchanged)


@pytest.mark.parametrize("base", ["vicuna", "llava"])
def test_a_projector_alone(folders: Path, base: str, tmp_path: Path) -> None:
    """As LLaVA's pretraining writes it, on the language model or on a whole LLaVA."""
    pretrained = folders / f"llava-pretrain-{base}"
    pretrained.mkdir()
    new = {name: torch.full(array.shape, 0.5) for name, array in renamed(all_tensors(folders / "twin"), PROJECTOR).items()}
    torch.save(new, pretrained / "mm_projector.bin")
    settings = {"architectures": ["LlamaForCausalLM"], "tune_mm_mlp_adapter": True}
    (pretrained / "config.json").write_text(json.dumps(LLAVA15 | TEXT | settings))
    found, expected = converted(pretrained, folders / base, tmp_path), all_tensors(folders / "twin")
    assert found.keys() == expected.keys()
    assert all((array == 0.5).all() for name, array in found.items() if "projector" in name)
    name = "language_model.model.layers.4.mlp.up_proj.weight"
    assert found[name].tobytes() == expected[name].tobytes()


def refused(kind: type[LsgError], message: str, source: Path, tmp_path: Path, base: Path | None = None) -> None:
    with pytest.raises(kind, match=message) as error:
        convert(source, tmp_path / "model", base=base)
    assert "\n" not in str(error.value) and not list(tmp_path.glob("model*"))


def test_without_its_base_a_part_is_refused_by_name(folders: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a", matrices([Q_PROJ.format(0)]))
    refused(InputError, r"holds an adapter \(adapter_config.json\), .* --base lmsys/vicuna-7b-v1.5", adapter, tmp_path)
    projector = tmp_path / "p"
    projector.mkdir()
    torch.save({"model.mm_projector.0.weight": torch.zeros(2, 2)}, projector / "mm_projector.bin")
    refused(InputError, r"holds a projector alone \(mm_projector.bin\), .* --base FOLDER_OR_HUB_ID", projector, tmp_path)
    refused(InputError, "holds no adapter .* leave --base out", folders / "twin", tmp_path, folders / "twin")
    refused(InputError, "the base holds an adapter", adapter, tmp_path, adapter)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "cannot be merged: use_dora = True; merge it with PEFT"),
        ({"peft_type": "LOHA"}, "cannot be merged: peft_type = 'LOHA'"),
        ({"init_lora_weights": "pissa"}, "cannot be merged: init_lora_weights = 'pissa'"),
        ({"alpha_pattern": {"q_proj": 4}}, "cannot be merged: alpha_pattern"),
        ({"a_field_of_2027": 3}, "cannot be merged: a_field_of_2027 = 3"),
        ({"lora_alpha": None}, "lora_alpha = None is no number"),
    ],
)
def test_other_adapters_are_refused_by_name(folders: Path, settings: dict, message: str, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a", matrices(["language_model." + Q_PROJ.format(0)]), **settings)
    refused(ConfigError, message, adapter, tmp_path, folders / "twin")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (matrices(["language_model." + Q_PROJ.format(9)]), "which its base does not have; is this the base"),
        (matrices(["language_model." + Q_PROJ.format(0)[:-6] + "k_proj"]), r"shape \[40, 40\], the base's is \[20, 40\]"),
        ({"base_model.model.lm_head.lora_embedding_A": np.zeros((3, 3), np.float32)}, "is no part of LoRA on a matrix"),
        ({"base_model.model.x.lora_A.weight": np.zeros((3, 3), np.float32)}, "has no counterpart"),
    ],
)
def test_adapters_of_another_base(folders: Path, tensors: Arrays, message: str, tmp_path: Path) -> None:
    refused(InputError, message, write_adapter(tmp_path / "a", tensors), tmp_path, folders / "twin")


def test_an_adapter_brings_the_tokenizer_that_its_base_lacks(folders: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        (base / name).write_bytes((folders / "twin" / name).read_bytes())
    edit_config(base, lambda config: config.pop("architectures"))
    adapter = write_adapter(tmp_path / "a", matrices(["language_model." + Q_PROJ.format(0)]))
    (adapter / "tokenizer.json").write_bytes((folders / "twin/tokenizer.json").read_bytes())
    (adapter / "tokenizer_config.json").write_bytes((folders / "twin/tokenizer_config.json").read_bytes())
    convert(adapter, tmp_path / "model", base=base)
    assert (tmp_path / "model/hf/tokenizer.json").is_file()


def own_tokenizer(adapter: Path, twin: Path, **settings) -> Path:
    """Gives an adapter the tokenizer of a folder, with other fields in `tokenizer_config.json`."""
    (adapter / "tokenizer.json").write_bytes((twin / "tokenizer.json").read_bytes())
    fields = json.loads((twin / "tokenizer_config.json").read_text()) | settings
    (adapter / "tokenizer_config.json").write_text(json.dumps(fields))
    return adapter


def small_base(folders: Path, tmp_path: Path) -> Path:
    """A copy of the twin whose template is in its processor's configuration, which comes before all others."""
    base = shutil.copytree(folders / "twin", tmp_path / "base")
    (base / "processor_config.json").write_text(json.dumps({"chat_template": "base " + LOOP, "image_token": "<image>"}))
    return base


LOOP = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.mark.parametrize("where", ["tokenizer_config.json", "chat_template.jinja", "processor_config.json", "nowhere"])
def test_the_tokenizer_and_template_of_an_adapter_are_taken(folders: Path, where: str, tmp_path: Path, caplog) -> None:
    caplog.set_level("INFO")
    base = small_base(folders, tmp_path)
    adapter = write_adapter(tmp_path / "a", matrices(["language_model." + Q_PROJ.format(0)]))
    fields = {"chat_template": "own " + LOOP} if where == "tokenizer_config.json" else {}
    own_tokenizer(adapter, base, model_max_length=77, **fields)
    if where == "chat_template.jinja":
        (adapter / where).write_text("own " + LOOP)
    if where == "processor_config.json":
        (adapter / where).write_text(json.dumps({"chat_template": "own " + LOOP}))
    convert(adapter, tmp_path / "model", base=base)
    hf = tmp_path / "model/hf"
    tokenizer = open_tokenizer(hf)
    expected = "base " if where == "nowhere" else "own "
    assert read_chat_template(hf, tokenizer) == expected + LOOP and tokenizer.model_max_length == 77
    assert json.loads((hf / "processor_config.json").read_text())["image_token"] == "<image>"
    taken = base if where == "nowhere" else adapter
    assert f"tokenizer: of {adapter}; chat template: of {taken}" in caplog.text


def test_a_template_of_the_bases_tokenizer_stays_where_the_adapter_has_none(folders: Path, tmp_path: Path) -> None:
    base = own_tokenizer(shutil.copytree(folders / "twin", tmp_path / "base"), folders / "twin", chat_template="base " + LOOP)
    adapter = write_adapter(tmp_path / "a", matrices(["language_model." + Q_PROJ.format(0)]))
    own_tokenizer(adapter, folders / "twin", model_max_length=77)
    convert(adapter, tmp_path / "model", base=base)
    tokenizer = open_tokenizer(tmp_path / "model/hf")
    assert (tokenizer.chat_template, tokenizer.model_max_length) == ("base " + LOOP, 77)


@pytest.mark.parametrize(
    ("image", "message"), [("<other>", "lacks <image>, the image token"), (None, r"has 1 tokens, .* has 26\d;")]
)
def test_a_tokenizer_that_does_not_fit_the_base_is_refused(folders: Path, image: str, message: str, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a", matrices(["language_model." + Q_PROJ.format(0)]))
    if image:
        write_byte_tokenizer(adapter, image_token=image)
    else:
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))).save_pretrained(adapter)
    refused(InputError, f"a: its tokenizer {message}.*is this the base", adapter, tmp_path, small_base(folders, tmp_path))


def test_a_whole_model_beside_an_adapter_is_refused(folders: Path, tmp_path: Path) -> None:
    """Either may be meant; with a base, the adapter is."""
    both = write_adapter(tmp_path / "both", matrices(["language_model." + Q_PROJ.format(0)]))
    for path in (folders / "twin").iterdir():
        shutil.copyfile(path, both / path.name)
    message = r"both: holds a whole model and an adapter \(adapter_model.safetensors\); move one"
    refused(InputError, f"{message} .*--base lmsys/vicuna-7b-v1.5", both, tmp_path)
    alone = write_adapter(tmp_path / "a", matrices(["language_model." + Q_PROJ.format(0)]))
    refused(InputError, "the base holds a whole model and an adapter .*; move one of them elsewhere$", alone, tmp_path, both)
    convert(both, tmp_path / "model", base=folders / "twin")
    convert(alone, tmp_path / "same", base=folders / "twin")
    assert read_manifest(tmp_path / "model").leaves == read_manifest(tmp_path / "same").leaves
    (both / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"an adapter \(adapter_config.json\); move one"):
        convert(both, tmp_path / "third")


def test_an_adapter_without_tensors_is_refused(folders: Path, tmp_path: Path) -> None:
    empty = write_adapter(tmp_path / "a", {})
    refused(InputError, "adapter_model.safetensors: holds no tensors", empty, tmp_path, folders / "twin")


def test_the_image_token_is_warned_of_in_the_folder_that_was_given(folders: Path, tmp_path: Path, caplog) -> None:
    """The files of an adapter and its base meet in a temporary folder, of which nobody knows."""
    base = small_base(folders, tmp_path)
    edit_config(base, lambda config: config.update(image_token_index=4))
    adapter = write_adapter(tmp_path / "a", matrices(["language_model." + Q_PROJ.format(0)]))
    convert(adapter, tmp_path / "model", base=base)
    assert f"{adapter}: config.json states image token 4" in caplog.text and "lsg-convert-" not in caplog.text
