"""Known sink dimensions: found by shape, family and name, never guessed, and recorded with their source."""

import copy
import itertools

import pytest
from checkpoints import LLAVA_7B, LLAVA_13B

from converters.families.known_sinks import DECODERS
from converters.hf_config import model_config
from lsg_jax.config import ModelConfig, RopeConfig, SinkConfig, SinkSources, TextConfig, from_dict, to_dict
from lsg_jax.inspection import sink_dimensions

LLAMA_3 = {"vocab_size": 128257, "num_key_value_heads": 8, "intermediate_size": 14336, "rope_theta": 5e5}
MISTRAL = {"model_type": "mistral", "num_key_value_heads": 8, "intermediate_size": 14336}
QWEN_7B = {
    "model_type": "qwen2", "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
    "intermediate_size": 18944, "vocab_size": 152064,
}  # fmt: skip


def llava(name: str = "", **text) -> ModelConfig:
    config = copy.deepcopy(LLAVA_7B)
    del config["vocab_size"]  # a copy of text_config's, which may change
    config["text_config"].update(text)
    return model_config(config, name=name)


@pytest.mark.parametrize(
    ("text", "dims"),
    [
        ({}, (1415, 2533)),
        ({"vocab_size": 32000}, (1415, 2533)),
        ({"_name_or_path": "lmsys/vicuna-7b-v1.5"}, (1415, 2533)),
        ({"_name_or_path": "lmsys/vicuna-7b-v1.1"}, ()),  # of the first Llama
        ({"rms_norm_eps": 1e-6}, ()),  # likewise
        ({"vocab_size": 64000}, ()),  # Yi-6B's
        ({"rope_theta": 5e5}, ()),
        (LLAMA_3, (788, 1384, 4062)),
        (LLAMA_3 | {"vocab_size": 32000}, ()),
        (LLAMA_3 | {"hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24}, (588, 1016, 1731, 3046)),
        (MISTRAL | {"rope_theta": 1e4}, (2070,)),
        (MISTRAL | {"rope_theta": 1e6, "vocab_size": 32768}, (2070,)),
        (MISTRAL | {"rope_theta": 1e6}, ()),  # v0.2
        (QWEN_7B, ()),  # Qwen2-7B, the shape of Qwen2-VL-7B's language model
    ],
)
def test_language_models(text, dims) -> None:
    config = llava(**text)
    assert config.sinks.llm_dims == dims
    assert bool(config.sink_sources.llm) == bool(dims)


def test_names_of_the_checkpoint_count() -> None:
    assert llava("llava-hf/llava-1.5-7b-hf").sinks.llm_dims == (1415, 2533)
    assert llava("openvla/openvla-7b").sinks.llm_dims == ()
    assert model_config(LLAVA_13B).sinks.llm_dims == (2100, 4743)
    other = copy.deepcopy(LLAVA_7B)
    other["vision_config"]["image_size"] = 224
    assert model_config(other).sinks.vit_dims == ()


def _text(row, **fields) -> TextConfig:
    width, layers, heads, kv_heads = row.shape
    shape = {"hidden_size": width, "num_layers": layers, "num_heads": heads, "num_kv_heads": kv_heads, "head_dim": 128}
    rest = {"intermediate_size": 8, "rms_norm_eps": row.eps or 1e-6, "rope": RopeConfig(row.theta or 1e4), "max_positions": 8}
    family = row.text if row.text in ("llama", "mistral", "phi3") else "qwen2"
    return TextConfig(family, row.vocab[1], **shape | rest | fields)


def test_a_row_fits_its_own_model_and_no_other_row_does() -> None:
    for row, other in itertools.product(DECODERS, DECODERS):
        family = row.families[0] if row.families else "llava"
        reachable = row.text in (None, "llama", "mistral", "phi3")  # others await their decoders
        assert other.fits(_text(row), family, ()) == (row is other and reachable), (row.models, other.models)


@pytest.mark.parametrize("row", [row for row in DECODERS if row.families], ids=lambda row: row.models)
def test_a_shape_that_several_models_share_counts_only_in_its_family(row) -> None:
    assert row.fits(_text(row), row.families[-1], ())
    for family in ("llava", "llava_onevision", "llava_next"):
        assert not row.fits(_text(row), family, ())
    assert all(0 <= dim < row.shape[0] for dim in row.dims)


def test_where_dimensions_come_from_is_recorded() -> None:
    config = llava()
    assert config.sink_sources == SinkSources(
        "known of CLIP ViT-L/14-336 (arXiv 2604.03316)",
        "known of Llama-2-7B, Vicuna-7B v1.5 (seilk/VisAttnSink, locuslab/massive-activations)",
    )
    assert sink_dimensions(config)["L-sinks"] == {"dims": [1415, 2533], "from": config.sink_sources.llm}
    stated = model_config(LLAVA_7B | {"lsg_sinks": {"vit_dims": [7]}})
    assert stated.sinks == SinkConfig(vit_dims=(7,))
    assert sink_dimensions(stated) == {
        "V-sinks": {"dims": [7], "from": "stated by the checkpoint (lsg_sinks in config.json)"},
        "L-sinks": {"dims": [], "from": "none known: run `lsg calibrate`"},
    }


def test_a_manifest_of_before_sources_were_recorded_still_opens() -> None:
    tree = to_dict(llava())
    assert from_dict(ModelConfig, tree, where="manifest").sink_sources.vit.startswith("known of CLIP")
    del tree["sink_sources"]
    config = from_dict(ModelConfig, tree, where="manifest")
    assert sink_dimensions(config)["V-sinks"] == {"dims": [650], "from": "not recorded"}
