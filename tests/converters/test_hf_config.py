"""config.json -> ModelConfig: defaults of transformers, both spellings of rope, fields that are ignored or refused by name."""

import copy
import json
from pathlib import Path

import pytest
from checkpoints import LLAVA_7B, edit_config
from hf_models import save_tiny, tiny_hf
from transformers import CONFIG_MAPPING

from converters.hf_config import ignored_fields, model_config, read_config
from lsg_jax.config import ModelConfig, RopeConfig, SinkConfig, from_dict, to_dict
from lsg_jax.errors import ConfigError, InputError
from lsg_jax.json_files import read_object


def changed(part: str | None = None, base: dict = LLAVA_7B, **fields) -> dict:
    """The configuration with other fields at the top or in one part."""
    config = copy.deepcopy(base)
    (config if part is None else config[part]).update(fields)
    return config


def text(**fields) -> dict:
    return changed("text_config", **fields)


def test_llava_7b_with_its_defaults_filled_in() -> None:
    config = model_config(LLAVA_7B)
    assert (config.text.hidden_size, config.text.intermediate_size, config.text.num_layers) == (4096, 11008, 32)
    assert (config.text.num_kv_heads, config.text.head_dim, config.text.rms_norm_eps) == (32, 128, 1e-5)
    assert config.text.rope == RopeConfig(theta=10000.0)
    assert not (config.text.qkv_bias or config.text.tied_embeddings or config.text.sliding_window)
    assert (config.vision.hidden_act, config.vision.layer_norm_eps, config.vision.num_patches) == ("quick_gelu", 1e-5, 576)
    assert (config.feature_layers, config.feature_select, config.num_image_tokens) == ((-2,), "default", 576)
    assert (config.image_token_id, config.eos_token_ids, config.pad_token_id) == (32000, (2,), 32001)
    assert (config.projector_hidden_act, config.image.size) == ("gelu_exact", 336)
    assert config.sinks == SinkConfig(vit_dims=(650,), vit_tau=70.0, llm_dims=(1415, 2533))
    assert from_dict(ModelConfig, to_dict(config), where="manifest") == config


def test_rope_in_both_spellings() -> None:
    rope = lambda **fields: model_config(text(**fields)).text.rope
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    expected = RopeConfig(theta=5e5, kind="llama3", factor=8.0)
    assert rope(rope_theta=5e5, rope_scaling={"rope_type": "llama3", **llama3}) == expected
    assert rope(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **llama3}) == expected
    assert rope(rope_scaling={"type": "linear", "factor": 2}) == RopeConfig(theta=1e4, kind="linear", factor=2.0)
    assert rope(rope_scaling=None, rope_theta=1e6) == RopeConfig(theta=1e6)


def test_partial_rotation_of_phi3() -> None:
    fields = {"model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192, "partial_rotary_factor": 0.75}
    assert model_config(text(**fields)).text.rope.rotary_dim == 72
    with pytest.raises(ConfigError, match=r"partial_rotary_factor = 0.75 is not supported for llama"):
        model_config(text(partial_rotary_factor=0.75))


def test_what_differs_between_families() -> None:
    llama = model_config(text(attention_bias=True, mlp_bias=True, head_dim=64, num_key_value_heads=8)).text
    assert (llama.qkv_bias, llama.out_bias, llama.mlp_bias, llama.head_dim, llama.num_kv_heads) == (True, True, True, 64, 8)
    qwen2 = model_config(text(model_type="qwen2", num_key_value_heads=4, tie_word_embeddings=True)).text
    assert (qwen2.qkv_bias, qwen2.out_bias, qwen2.tied_embeddings, qwen2.sliding_window) == (True, False, True, None)
    assert model_config(text(model_type="qwen2", use_sliding_window=True, max_window_layers=30)).text.sliding_window == 4096
    assert model_config(text(model_type="qwen2", use_sliding_window=True, max_window_layers=32)).text.sliding_window is None
    assert model_config(text(model_type="mistral", sliding_window=1024)).text.sliding_window == 1024
    assert model_config(text(model_type="mistral", sliding_window=None)).text.sliding_window is None
    assert model_config(changed(tie_word_embeddings=True)).text.tied_embeddings


def test_phi3_in_the_form_of_llama_has_no_window_as_in_transformers() -> None:
    config = model_config(text(sliding_window=2047, original_max_position_embeddings=4096, rope_scaling=None))
    assert (config.text.family, config.text.sliding_window) == ("llama", None)


def test_activations_and_feature_layers() -> None:
    config = model_config(changed(vision_feature_layer=[-2, -5], projector_hidden_act="gelu_new", image_token_index=7))
    assert (config.feature_layers, config.projector_hidden_act, config.image_token_id) == ((-2, -5), "gelu", 7)
    assert model_config(changed("vision_config", hidden_act="gelu")).vision.hidden_act == "gelu_exact"
    with pytest.raises(ConfigError, match="vision_feature_layer -26 does not exist, the tower has hidden states 0 to 24"):
        model_config(changed(vision_feature_layer=-26))
    with pytest.raises(ConfigError, match="hidden_act = 'mish' is not supported"):
        model_config(text(hidden_act="mish"))


def test_token_ids() -> None:
    assert model_config(LLAVA_7B, generation={"eos_token_id": [2, 32007]}).eos_token_ids == (2, 32007)
    assert model_config(text(eos_token_id=[5, 6])).eos_token_ids == (5, 6)
    config = {key: value for key, value in LLAVA_7B.items() if key != "pad_token_id"}
    assert model_config(config).pad_token_id == 2
    with pytest.raises(ConfigError, match="eos_token_id = '</s>' is neither a token id nor a list of them"):
        model_config(LLAVA_7B, generation={"eos_token_id": "</s>"})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (changed(model_type="blip-2"), "model_type 'blip-2' is not supported; supported: 'llava'"),
        (changed(model_type=None), "model_type None is not supported"),
        (changed(model_type="qwen3_5"), "model_type 'qwen3_5' gates its own attention, which leaves no sinks to gate"),
        (text(model_type="qwen3_5_text"), "model_type 'qwen3_5_text' gates its own attention, which leaves no sinks to gate"),
        (text(model_type="gemma2"), "text_config is of model_type 'gemma2', which is not supported; supported: llama, mistral"),
        (changed("vision_config", model_type="dinov2"), "vision_config is of model_type 'dinov2', which is not supported"),
        (changed(vision_config=None), "vision_config is missing"),
        (
            changed(chunk_size_feed_forward=2),
            "config.json: not understood, so it might change the results: chunk_size_feed",
        ),
        (text(is_causal=False), "text_config: not understood, so it might change the results: is_causal = False"),
        (text(per_layer_config={"0": {"head_dim": 2}}), "per_layer_config = {'0': {'head_dim': 2}}"),
        (changed("vision_config", chunk_size_feed_forward=2), "vision_config: .* chunk_size_feed_forward = 2"),
        (changed(quantization_config={"bits": 4}), "quantization_config = {'bits': 4}"),
        (text(model_type="mistral", attention_bias=True), "attention_bias = True"),
        (changed("vision_config", tie_last_hidden_states=True), "tie_last_hidden_states = True"),
        (text(rope_scaling={"type": "yarn", "factor": 4.0}), "rope type 'yarn' is not supported; supported: default, linear"),
        (
            text(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0, "mscale": 1}),
            "not understood: mscale",
        ),
        (changed("vision_config", image_size=[336, 224]), r"image_size = \[336, 224\] is not the side of a square"),
        (changed("vision_config", num_channels=4), "num_channels = 4"),
        (text(num_key_value_heads=5), "32 attention heads are no multiple of 5 key-value heads"),
        (text(hidden_size="4096"), "transformers refuses it"),
        (changed(vision_feature_select_strategy="cls"), "transformers refuses it"),
    ],
)
def test_refusals_are_one_line_that_names_it(config: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        model_config(config, where="X/config.json")
    assert str(error.value).startswith("X/config.json: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("part", [None, "text_config", "vision_config"])
def test_fields_that_transformers_does_not_define_are_listed_and_ignored(part: str | None, caplog) -> None:
    prefix = f"{part}." if part else ""
    with caplog.at_level("WARNING", logger="converters"):
        assert model_config(changed(part, qk_norm=True, mup=2), where="X/config.json") == model_config(LLAVA_7B)
    listed = f"{prefix}qk_norm = True, {prefix}mup = 2"
    message = f"X/config.json: ignored, since transformers does not define them for this model: {listed}"
    assert [record.getMessage() for record in caplog.records] == [message]
    assert ignored_fields(changed(part, qk_norm=True, mup=2)) == {f"{prefix}qk_norm": True, f"{prefix}mup": 2}


@pytest.mark.parametrize(("part", "kind"), [(None, "llava"), ("text_config", "llama"), ("vision_config", "clip_vision_model")])
def test_a_field_that_a_newer_transformers_defines_must_have_its_default(part, kind, monkeypatch) -> None:
    class Newer(CONFIG_MAPPING[kind]):
        logit_cap: float | None = None
        use_gate: bool = False

    monkeypatch.setitem(CONFIG_MAPPING._extra_content, kind, Newer)
    assert model_config(changed(part, logit_cap=None, use_gate=False)) == model_config(LLAVA_7B)
    with pytest.raises(ConfigError, match=r"not understood, so it might change .*: logit_cap = 30\.0, use_gate = True"):
        model_config(changed(part, logit_cap=30.0, use_gate=True))


def test_every_field_that_transformers_writes_is_known(tmp_path: Path, caplog) -> None:
    for vision, kind in (("clip", "llama"), ("clip", "mistral"), ("siglip", "qwen2"), ("clip", "phi3")):
        model = tiny_hf(vision, kind)
        folder = save_tiny(model, tmp_path / kind)
        assert read_config(folder) == model_config(
            model.config.to_dict(),
            generation=json.loads((folder / "generation_config.json").read_text()),
            preprocessor=json.loads((folder / "preprocessor_config.json").read_text()),
        )
    assert read_config(folder).image.aspect == "crop" and not caplog.records


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": ' * 100 + b"1" + b"}" * 100, "nested deeper than 64 levels"),
        (b"[" * 200_000 + b"]" * 200_000, "nested deeper than 64 levels"),
        (b'{"a": 1, "a": 2}', "a key occurs twice"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": 1', "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[1]", "expected a JSON object, got an array"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "a Git LFS pointer"),
        (b" " * (65 << 20), "larger than 64 MiB"),
    ],
)
def test_hostile_json(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_config(tmp_path)
    assert "\n" not in str(error.value)


def test_a_checkpoint_may_state_its_sinks() -> None:
    stated = changed(lsg_sinks={"criterion": "dim_abs", "vit_dims": [40], "vit_tau": 33.0})
    assert model_config(stated).sinks == SinkConfig(vit_dims=(40,), vit_tau=33.0)
    with pytest.raises(ConfigError, match="lsg_sinks: unknown field vit_dim; did you mean vit_dims"):
        model_config(changed(lsg_sinks={"vit_dim": [40]}))


def test_copies_of_fields_of_the_language_model_must_agree(caplog) -> None:
    """Trainers leave them at the top; transformers reads those of text_config, defaults included."""
    copied = changed(vocab_size=32064, hidden_size=4096, num_hidden_layers=32, rms_norm_eps=1e-5)
    assert model_config(copied) == model_config(LLAVA_7B) and not caplog.records
    for fields, message in (
        ({"vocab_size": 32000}, "vocab_size = 32000, but text_config has 32064; remove or correct the wrong one"),
        ({"hidden_size": 5120}, "hidden_size = 5120, but text_config has 4096"),
    ):
        with pytest.raises(ConfigError, match=message):
            model_config(changed(**fields), where="X/config.json")


def test_minus_one_is_no_token(tmp_path: Path) -> None:
    config = {key: value for key, value in LLAVA_7B.items() if key != "pad_token_id"}
    without = model_config(config)
    assert model_config(config | {"pad_token_id": -1}) == without
    assert model_config(changed("text_config", base=config, pad_token_id=-1)) == without
    assert model_config(LLAVA_7B, generation={"eos_token_id": -1}).eos_token_ids == (2,)
    save_tiny(tiny_hf("clip", "llama"), tmp_path / "hf")
    expected = read_config(tmp_path / "hf")
    edit_config(tmp_path / "hf", lambda config: config.update(image_token_index=-1))
    assert read_config(tmp_path / "hf") == expected
    (tmp_path / "hf/tokenizer.json").write_text('{"added_tokens": [{"id": 3, "content": "<img>"}]}')
    with pytest.raises(ConfigError, match=r"image_token_index = -1 is no token, and tokenizer.json has no <image>"):
        read_config(tmp_path / "hf")


def test_missing_config(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_object(tmp_path / "config.json")
