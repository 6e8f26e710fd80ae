"""Tokenizer files of a twin: old text keeps its ids, the image token is one id, and it stays so when it is read again."""

import json
import shutil
from pathlib import Path

import pytest
from hf_models import save_tiny, tiny_hf
from tokenizers_for_tests import byte_level_tokenizer, llama_tokenizer
from transformers import AutoTokenizer

from converters.convert import convert
from converters.layouts.layout import Twin
from converters.layouts.tokens import Tokens, complete_tokenizer

SAMPLES = ("What  is\nthe ball?", " It is red.</s>USER: two", "naturally,\n\n cubes", "ü ∑")


@pytest.mark.parametrize("kind", ["LlamaTokenizer", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("pad", [None, "<pad>"])
def test_text_keeps_its_ids(kind: str, pad: str | None, tmp_path: Path) -> None:
    (llama_tokenizer("first") if kind == "LlamaTokenizer" else byte_level_tokenizer()).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings = {name: value for name, value in settings.items() if name not in ("image_token", "extra_special_tokens")}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": kind, "legacy": False}))
    take_out_the_image_token(tmp_path / "tokenizer.json")
    shutil.copytree(tmp_path, tmp_path / "before")
    before = AutoTokenizer.from_pretrained(tmp_path / "before")
    assert "<image>" not in before.get_vocab()
    twin = Twin("llava", {}, None, {}, "tower", video_token=True, pad_token=pad)
    tokens = complete_tokenizer(tmp_path, twin, tmp_path)
    after = AutoTokenizer.from_pretrained(tmp_path)
    assert [after(text).input_ids for text in SAMPLES] == [before(text).input_ids for text in SAMPLES]
    assert after("a<image>b").input_ids.count(tokens.image) == 1
    assert (after.convert_tokens_to_ids("<image>"), after.convert_tokens_to_ids("<video>")) == (tokens.image, tokens.video)
    assert (after.pad_token, after.pad_token_id) == (pad or before.pad_token, tokens.pad)
    assert {tokens.image, tokens.video}.isdisjoint(before.get_vocab().values())
    assert complete_tokenizer(tmp_path, twin, tmp_path) == tokens


def take_out_the_image_token(path: Path) -> None:
    """As the tokenizers of originals: the id of `<image>` stays with another name."""
    path.write_text(path.read_text().replace("<image>", "<unused>"))


def test_rows_are_added_only_where_the_tokens_have_none() -> None:
    assert Tokens(32000, None, 32001).rows(32000) == 32064  # LLaVA-1.5, as llava-hf/llava-1.5-7b-hf
    assert Tokens(64000, None, 64001).rows(64000) == 64064  # Yi-34B, as llava-hf/llava-v1.6-34b-hf
    assert Tokens(128256, None, 128257).rows(128256) == 128320  # Llama-3, as llava-hf/llama3-llava-next-8b-hf
    assert Tokens(151646, 151647, 151643).rows(151936) == 151936  # Qwen2 has rows to spare


def test_tokenizer_model_alone_is_stored_as_tokenizer_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With SentencePiece, transformers reads `tokenizer.model`; the model folder holds what was read."""
    source = save_tiny(tiny_hf("clip", "llama"), tmp_path / "hf")
    read, whole = AutoTokenizer.from_pretrained, tmp_path / "whole"
    shutil.copytree(source, whole)
    (source / "tokenizer.json").rename(source / "tokenizer.model")
    fake = lambda folder, **options: read(folder if (Path(folder) / "tokenizer.json").is_file() else whole, **options)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", fake)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    convert(source, tmp_path / "model")
    stored = read(tmp_path / "model/hf")
    assert [stored(text).input_ids for text in SAMPLES] == [read(whole)(text).input_ids for text in SAMPLES]
    assert (tmp_path / "model/hf/tokenizer.model").is_file() and not (source / "tokenizer.json").exists()
