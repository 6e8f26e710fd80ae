"""Conversion and export of tiny checkpoints: round trips to the bit, manifests, damaged input."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from checkpoints import (
    all_tensors,
    assert_same_bytes,
    edit_config,
    files_below,
    rewrite,
    to_hub_names,
    to_memory_names,
)
from flax import nnx
from hf_models import save_tiny, state_arrays, tiny_hf
from transformers import LlavaForConditionalGeneration

from converters.byte_tokenizer import IMAGE
from converters.convert import convert, tree_from_tensors
from converters.export import export
from converters.hf_config import model_config
from lsg_jax.checkpoint import ModelSource, load_base, read_manifest, verify_base
from lsg_jax.errors import CheckpointError, ConfigError, InputError
from lsg_jax.model.multimodal import VisionLanguageModel

FAMILIES = [
    ("clip", "llama", False),
    ("clip", "mistral", False),
    ("siglip", "qwen2", True),
    ("siglip", "qwen2", False),
    ("clip", "phi3", False),
]


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tiny_hf("clip", "llama"), tmp_path_factory.mktemp("tiny") / "hf")


@pytest.fixture
def source(saved: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may break."""
    return Path(shutil.copytree(saved, tmp_path / "hf"))


def load(model: Path) -> dict:
    config = read_manifest(model).config
    dtype = read_manifest(model).leaves["language_model/embed_tokens"].dtype
    abstract = nnx.eval_shape(lambda: VisionLanguageModel(config, rngs=nnx.Rngs(0), dtype=jnp.dtype(dtype)))
    return load_base(model, nnx.to_pure_dict(nnx.state(abstract)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("vision", "text", "tied"), FAMILIES)
def test_round_trip_is_bit_equal(vision: str, text: str, tied: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_hf(vision, text, tied=tied).to(dtype)
    hf = save_tiny(model, tmp_path / "hf")
    convert(hf, tmp_path / "model")
    expected = tree_from_tensors(model_config(model.config.to_dict()), state_arrays(model))
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "model"), expected)
    assert verify_base(tmp_path / "model") == []
    export(tmp_path / "model", tmp_path / "back")
    assert_same_bytes(all_tensors(tmp_path / "back"), all_tensors(hf))
    for name in ("config.json", "tokenizer.json", "preprocessor_config.json", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (hf / name).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "hf", "model"]


@pytest.mark.parametrize("change", [to_hub_names, to_memory_names])
def test_all_name_layouts(source: Path, change: Callable[[str], str], tmp_path: Path) -> None:
    convert(source, tmp_path / "first")
    rewrite(source, lambda tensors: {change(name): array for name, array in tensors.items()})
    convert(source, tmp_path / "second")
    assert read_manifest(tmp_path / "first").digest == read_manifest(tmp_path / "second").digest
    export(tmp_path / "second", tmp_path / "back")
    assert_same_bytes(all_tensors(tmp_path / "back"), all_tensors(source))


def test_transformers_loads_an_export_in_shards(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "model")
    export(tmp_path / "model", tmp_path / "back", shard_bytes=100_000)
    shards = sorted(path.name for path in (tmp_path / "back").glob("model-*.safetensors"))
    assert len(shards) > 3 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert_same_bytes(all_tensors(tmp_path / "back"), all_tensors(source))
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "back")
    assert_same_bytes(state_arrays(model), state_arrays(LlavaForConditionalGeneration.from_pretrained(source)))
    convert(tmp_path / "back", tmp_path / "again")
    assert read_manifest(tmp_path / "again").digest == read_manifest(tmp_path / "model").digest


def test_cast(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "model", dtype="bfloat16")
    export(tmp_path / "model", tmp_path / "back")
    assert json.loads((tmp_path / "back/config.json").read_text())["dtype"] == "bfloat16"
    carried = set(read_manifest(tmp_path / "model").carried)
    assert len(carried) == 2
    before, after = all_tensors(source), all_tensors(tmp_path / "back")
    for name, array in before.items():
        expected = array if name in carried else array.astype(ml_dtypes.bfloat16)
        assert after[name].tobytes() == expected.tobytes()
    convert(tmp_path / "back", tmp_path / "up", dtype="float32")
    export(tmp_path / "up", tmp_path / "up_back")
    assert all(array.dtype == np.float32 for array in all_tensors(tmp_path / "up_back").values())


def test_float16_is_kept_and_said(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rewrite(source, lambda tensors: {name: array.astype(np.float16) for name, array in tensors.items()})
    convert(source, tmp_path / "model")
    assert "the weights stay float16" in caplog.text
    export(tmp_path / "model", tmp_path / "back")
    assert_same_bytes(all_tensors(tmp_path / "back"), all_tensors(source))


def test_mixed_dtypes_need_a_choice(source: Path, tmp_path: Path) -> None:
    name = "language_model.model.norm.weight"
    rewrite(source, lambda tensors: tensors | {name: tensors[name].astype(np.float16)})
    with pytest.raises(InputError, match=r"of dtype float16 among float32 \(choose one with --dtype\)"):
        convert(source, tmp_path / "model")
    convert(source, tmp_path / "model", dtype="float32")
    assert load(tmp_path / "model")["language_model"]["norm"]["scale"].dtype == np.float32


def test_bin_gives_the_same_model(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "first")
    tensors = {name: torch.from_numpy(array) for name, array in all_tensors(source).items()}
    torch.save(tensors, source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    convert(source, tmp_path / "second")
    assert read_manifest(tmp_path / "first").digest == read_manifest(tmp_path / "second").digest


def test_a_tied_model_whose_head_is_stored(tmp_path: Path) -> None:
    """An equal head is given back from the embeddings; for one that differs, the tie is undone as transformers does."""
    source = save_tiny(tiny_hf("siglip", "qwen2", tied=True), tmp_path / "hf")
    embedding, head = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
    rewrite(source, lambda tensors: tensors | {head: tensors[embedding].copy()})
    convert(source, tmp_path / "equal")
    assert read_manifest(tmp_path / "equal").config.text.tied_embeddings
    rewrite(source, lambda tensors: tensors | {head: tensors[embedding] * 2})
    convert(source, tmp_path / "other")
    assert not read_manifest(tmp_path / "other").config.text.tied_embeddings
    for name in ("equal", "other"):
        export(tmp_path / name, tmp_path / f"{name}_back")
        back = all_tensors(tmp_path / f"{name}_back")
        assert (back[head] == back[embedding] * (1 if name == "equal" else 2)).all()
    loaded = LlavaForConditionalGeneration.from_pretrained(source)
    assert not torch.equal(loaded.lm_head.weight, loaded.model.language_model.embed_tokens.weight)
    rewrite(source, lambda tensors: {name: array for name, array in tensors.items() if name != embedding})
    convert(source, tmp_path / "head_only")
    export(tmp_path / "head_only", tmp_path / "head_only_back")
    assert_same_bytes(all_tensors(tmp_path / "head_only_back"), all_tensors(source))


def test_manifest_and_files(source: Path, tmp_path: Path) -> None:
    (source / "modeling_hostile.py").write_text("raise SystemExit")
    (source / "tokenizer.py").write_text("raise SystemExit")
    (source / "training_args.bin").write_bytes(b"\x80")
    edit_config(source, lambda config: config["text_config"].update(mup=2))
    ids = np.arange(10, dtype=np.int64)[None]
    rewrite(source, lambda tensors: tensors | {"vision_tower.vision_model.embeddings.position_ids": ids})
    seen: list[tuple[int, int]] = []
    convert(source, tmp_path / "model", progress=lambda done, total, what: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] and len(seen) > 50
    manifest = read_manifest(tmp_path / "model")
    assert set(manifest.ignored) == {"vision_tower.vision_model.embeddings.position_ids", "config.json: text_config.mup"}
    assert manifest.source == ModelSource("hf", None, {"model.safetensors": (source / "model.safetensors").stat().st_size})
    assert manifest.names["language_model.lm_head.weight"] == "language_model.lm_head.weight"
    files = {path.name for path in (tmp_path / "model/hf").iterdir()}
    assert files == set(manifest.hf)
    assert {"config.json", "tokenizer.json", "carried.safetensors"} <= files
    assert not any(name.endswith((".py", ".bin")) for name in files)
    (tmp_path / "model/hf/carried.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"damaged: hf/carried.safetensors: is missing"):
        export(tmp_path / "model", tmp_path / "back")


def test_the_image_token_is_the_processors_and_templates_come_back(source: Path, tmp_path: Path, caplog) -> None:
    """config.json names the token of the letter `!`, but the processor writes `<image>`; the folder has every template file."""
    edit_config(source, lambda config: config.update(image_token_index=4))
    named = json.loads((source / "tokenizer_config.json").read_text())
    named["chat_template"] = [{"name": "default", "template": "own {{ messages[0]['content'] }}"}]
    (source / "tokenizer_config.json").write_text(json.dumps(named))
    (source / "chat_template.json").write_text(
        json.dumps({"chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}"})
    )
    (source / "chat_template.jinja").write_text("new\n")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates/tool_use.jinja").write_text("tools")
    (source / "additional_chat_templates/notes.md").write_text("no template")
    convert(source, tmp_path / "model")
    manifest = read_manifest(tmp_path / "model")
    assert manifest.config.image_token_id == IMAGE
    assert "config.json states image token 4, but the processor writes <image>, which is token 3" in caplog.text
    assert files_below(tmp_path / "model/hf").keys() == manifest.hf.keys()
    export(tmp_path / "model", tmp_path / "back")
    back, given = files_below(tmp_path / "back"), files_below(source)
    names = {name for name in given if "template" in name or name.endswith("json")} - {"additional_chat_templates/notes.md"}
    assert len(names) == 8 and {name: back[name] for name in names} == {name: given[name] for name in names}
    assert "additional_chat_templates/notes.md" not in back


def set_nan(tensors: dict[str, np.ndarray]) -> None:
    tensors["language_model.model.layers.3.mlp.down_proj.weight"][2, 5] = np.nan


def set_infinity(tensors: dict[str, np.ndarray]) -> None:
    tensors["vision_tower.post_layernorm.weight"][3] = np.inf


def drop(tensors: dict[str, np.ndarray]) -> None:
    del tensors["language_model.model.layers.3.mlp.down_proj.weight"]


def transpose(tensors: dict[str, np.ndarray]) -> None:
    name = "language_model.model.layers.3.mlp.down_proj.weight"
    tensors[name] = np.ascontiguousarray(tensors[name].T)


def duplicate(tensors: dict[str, np.ndarray]) -> None:
    tensors["lm_head.weight"] = tensors["language_model.lm_head.weight"]


def integers(tensors: dict[str, np.ndarray]) -> None:
    tensors["multi_modal_projector.linear_1.weight"] = np.zeros((40, 40), np.int8)


def too_much(tensors: dict[str, np.ndarray]) -> None:
    tensors["language_model.model.layers.5.mlp.down_proj.weight"] = np.zeros((40, 56), np.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, "missing: language_model.model.layers.3.mlp.down_proj.weight"),
        (too_much, "not understood: language_model.model.layers.5.mlp.down_proj.weight"),
        (duplicate, "same tensor by two names"),
        (transpose, r"down_proj.weight has shape \[56, 40\], expected \[40, 56\]"),
        (integers, "of dtype int8, expected one of float32"),
        (set_nan, "tensor language_model.model.layers.3.mlp.down_proj.weight holds NaN or infinity"),
        (set_infinity, "tensor vision_tower.post_layernorm.weight holds NaN or infinity"),
    ],
)
def test_tensors_that_do_not_fit(source: Path, change, message: str, tmp_path: Path) -> None:
    rewrite(source, lambda tensors: change(tensors))
    refused(source, tmp_path, InputError, message)


def refused(source: Path, tmp_path: Path, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message) as error:
        convert(source, tmp_path / "model")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "model").exists() and not (tmp_path / "model.tmp").exists()


def test_files_that_are_damaged(source: Path, tmp_path: Path) -> None:
    weights = source / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 100)
    refused(source, tmp_path, InputError, "truncated")
    weights.write_text("version https://git-lfs.github.com/spec/v1\n")
    refused(source, tmp_path, InputError, "Git LFS pointer")
    weights.unlink()
    refused(source, tmp_path, InputError, "no weights")
    (source / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    refused(source, tmp_path, InputError, "no such file; is the download complete")
    edit_config(source, lambda config: config["text_config"].update(is_causal=False))
    refused(source, tmp_path, ConfigError, "not understood")
    edit_config(source, lambda config: config.update(model_type="blip-2"))
    refused(source, tmp_path, ConfigError, "model_type 'blip-2' is not supported")
    refused(tmp_path / "nowhere", tmp_path, InputError, "no such folder, and not a Hub id")
    refused(source / "config.json", tmp_path, InputError, "is a file; give the folder")
    with pytest.raises(InputError, match=r"owner/name: no such folder, and it could not be fetched from the Hugging Face Hub"):
        convert("owner/name", tmp_path / "model")
    with pytest.raises(ConfigError, match="dtype 'int4' is not one of bfloat16, float32, int8"):
        convert(source, tmp_path / "model", dtype="int4")


def test_output_in_the_way(source: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    convert(source, tmp_path / "model")  # an empty folder is fine
    before = files_below(tmp_path / "model")
    for call in (convert, export):
        with pytest.raises(InputError, match="exists already; choose another output or remove it"):
            call(source if call is convert else tmp_path / "model", tmp_path / "model")
    assert files_below(tmp_path / "model") == before
    (tmp_path / "other.tmp").mkdir()
    (tmp_path / "other.tmp/thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="exists and is not an interrupted conversion"):
        convert(source, tmp_path / "other")
    export(tmp_path / "model", tmp_path / "other")
    assert (tmp_path / "other.tmp/thesis.txt").exists()
    with pytest.raises(InputError, match="a Hugging Face folder, not a converted model"):
        export(source, tmp_path / "back")


def test_an_output_that_cannot_be_a_folder(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for name in (".", "..", "/"):
        with pytest.raises(InputError, match="no name for a new folder; choose one, such as"):
            convert(source, name)
    (tmp_path / "notes.txt").write_text("mine")
    for call in (convert, export):
        with pytest.raises(InputError, match=r"notes.txt: is a file; choose another output"):
            call(source, tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "mine" and not list((tmp_path / "empty").iterdir())


def test_tokenizer_and_template_are_opened_before_weights_are_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "{% for m in %}"}))
    convert(source, tmp_path / "with_another_template")
    assert f"{source}: the checkpoint's chat template cannot be used" in caplog.text
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    monkeypatch.setattr("converters.convert._write_base", lambda *arguments: pytest.fail("weights were written"))
    (source / "chat_template.json").write_text('{"template": "of another name"}')
    refused(source, tmp_path, InputError, f"{source}/chat_template.json: no chat template in it")
    (source / "chat_template.json").unlink()
    whole = (source / "tokenizer.json").read_bytes()
    (source / "tokenizer.json").write_bytes(whole[:-1000])
    refused(source, tmp_path, InputError, f"{source}: no usable tokenizer")
    (source / "tokenizer.json").rename(source / "tokenizer.model")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(source, tmp_path, InputError, r"tokenizer.model and no tokenizer.json; run `pip install sentencepiece protobuf`")


def test_a_checkpoint_without_a_tokenizer_converts_with_a_warning(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for path in source.glob("tokenizer*"):
        path.unlink()
    convert(source, tmp_path / "model")
    assert "no tokenizer, so the model will take token ids only" in caplog.text


def test_export_of_a_damaged_model_leaves_nothing(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "model")
    chunk = next((tmp_path / "model/base").rglob("c/3/0/0"))
    data = bytearray(chunk.read_bytes())
    data[7] ^= 1
    chunk.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="damaged: leaf "):
        export(tmp_path / "model", tmp_path / "back")
    assert not list(tmp_path.glob("back*"))


def test_hub_id(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what is needed is asked for, `.bin` files only where there is nothing else, and never code."""
    snapshot = tmp_path / "cache/snapshots/abc123"
    asked: list[list[str]] = []

    def download(repository: str, *, revision: None, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        assert repository == "owner/name" and revision is None and ignore_patterns == ["*.py"]
        asked.append(allow_patterns)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    shutil.copytree(source, snapshot)
    convert("owner/name", tmp_path / "model")
    manifest = read_manifest(tmp_path / "model")
    assert manifest.source is not None and (manifest.source.name, manifest.source.revision) == ("owner/name", "abc123")
    assert len(asked) == 1 and "*.safetensors" not in asked[0] and "model-*.safetensors" in asked[0]
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(InputError, match="no weights"):
        convert("owner/name", tmp_path / "other")
    assert "pytorch_model-*.bin" in asked[2]
