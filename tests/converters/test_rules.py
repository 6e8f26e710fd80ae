"""Rules and plans: operations are inverted, every leaf has one rule, real sizes fit; no tensor is read."""

import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from checkpoints import LLAVA_7B, LLAVA_13B, to_hub_names
from hf_models import state_arrays, tiny_hf
from transformers import LlavaConfig, LlavaForConditionalGeneration

from converters.convert import tree_from_tensors
from converters.families import rules_of
from converters.families.decoders import EMBEDDING, HEAD
from converters.families.llava import canonical_name
from converters.hf_config import model_config
from converters.ops import Conv, Copy, Flat, Linear, Rule, Unsqueezed
from converters.reader import canonical_names
from converters.rules import layout, leaf_shapes, plan
from lsg_jax.config import ModelConfig
from lsg_jax.errors import InputError


@pytest.mark.parametrize(
    ("op", "shape"),
    [
        (Copy(), (6, 5)),
        (Copy(), (7,)),
        (Flat(), (3, 4)),
        (Linear(), (6, 3, 4)),
        (Linear(in_axes=2), (3, 4, 6)),
        (Linear(), (300, 170)),
        (Conv(), (2, 2, 3, 5)),
        (Conv(), (2, 4, 3, 1, 5)),
        (Unsqueezed(), (4, 5)),
        (Unsqueezed(2), (7,)),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_op_undoes_itself(op, shape, dtype) -> None:
    source = np.arange(np.prod(shape)).reshape(op.source_shape(shape)).astype(dtype)
    block = np.zeros(shape, dtype)
    for row in range(0, len(source), 2):
        op.fill(block, 0, source[row : row + 2], row)
    matrix, row, column = op.invert(block, 0)
    assert (row, column) == (0, 0)
    assert matrix.tobytes() == source.tobytes()


@pytest.mark.parametrize(
    ("op", "shape"),
    [(Copy(), (6, 5)), (Flat(), (6, 4)), (Linear(), (6, 8)), (Linear(in_axes=2), (6, 4, 8)), (Unsqueezed(), (6, 5))],
)
def test_op_on_a_part_of_a_leaf(op, shape) -> None:
    source = np.arange(np.prod(shape), dtype=np.float32).reshape(op.source_shape(shape))
    whole = np.zeros(shape, np.float32)
    op.fill(whole, 0, source, 0)
    first, last = op.source_rows(shape, 2, 5)
    block = np.zeros((3, *shape[1:]), np.float32)
    op.fill(block, 2, source[first:last], first)
    np.testing.assert_array_equal(block, whole[2:5])
    back = np.full((len(source), source[0].size), -1.0, np.float32)
    matrix, row, column = op.invert(block, 2)
    back[row : row + matrix.shape[0], column : column + matrix.shape[1]] = matrix
    written = back >= 0
    assert written.sum() == block.size
    np.testing.assert_array_equal(back[written], source.reshape(back.shape)[written])


def test_linear_is_torch_linear() -> None:
    x, weight = np.random.default_rng(0).standard_normal((2, 5)), np.random.default_rng(1).standard_normal((12, 5))
    kernel = np.empty((5, 3, 4))
    Linear().fill(kernel, 0, weight, 0)
    np.testing.assert_allclose(np.einsum("bd,dnh->bnh", x, kernel).reshape(2, 12), x @ weight.T)


def test_every_leaf_has_exactly_one_rule() -> None:
    config = tiny_config("clip", "llama")
    rules = rules_of(config)
    with pytest.raises(ValueError, match="language_model/embed_tokens has two rules"):
        layout(config, [*rules, Rule("language_model/embed_tokens", "x", Copy())])
    with pytest.raises(ValueError, match="no rule for language_model/norm/scale"):
        layout(config, [rule for rule in rules if rule.leaf != "language_model/norm/scale"])


def tiny_config(vision: str, text: str, **kwargs) -> ModelConfig:
    return model_config(tiny_hf(vision, text, **kwargs).config.to_dict())


def meta_model(config: dict) -> LlavaForConditionalGeneration:
    with torch.device("meta"):
        return LlavaForConditionalGeneration(LlavaConfig(**config))


@pytest.mark.parametrize(("config", "billions"), [(LLAVA_7B, 7.06), (LLAVA_13B, 13.35)])
def test_plan_of_the_real_sizes(config: dict, billions: float) -> None:
    """Compares with the shapes of the Hugging Face model; neither model is allocated."""
    tensors = {name: tuple(t.shape) for name, t in meta_model(config).state_dict().items()}
    source = {name: (tensors[key], "float16") for name, key in canonical_names(tensors, canonical_name).items()}
    planned = plan(model_config(config), source)
    assert planned.dtype == "float16" and not planned.ignored and not planned.repeats
    assert set(planned.carried) == {"vision_tower.post_layernorm.weight", "vision_tower.post_layernorm.bias"}
    count = lambda shapes: sum(int(np.prod(shape)) for shape in shapes)
    assert count(planned.layout.leaves.values()) == count(tensors.values()) - 2 * 1024
    assert count(tensors.values()) == pytest.approx(billions * 1e9, rel=2e-3)
    assert not jax.live_arrays() or max(a.size for a in jax.live_arrays()) < 1_000_000


def test_plan_of_the_phi3_and_onevision_style_sizes() -> None:
    phi3 = LLAVA_7B | {
        "text_config": {
            "model_type": "phi3",
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "vocab_size": 32064,
            "sliding_window": 2047,
            "rope_scaling": None,
        }
    }
    qwen2 = LLAVA_7B | {
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_attention_heads": 16,
            "num_hidden_layers": 26,
            "image_size": 384,
            "patch_size": 14,
            "vision_use_head": False,
        },
        "text_config": {
            "model_type": "qwen2",
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_attention_heads": 14,
            "num_hidden_layers": 24,
            "num_key_value_heads": 2,
            "rope_theta": 1e6,
            "tie_word_embeddings": True,
            "vocab_size": 152000,
        },
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "image_token_index": 151646,
        "vocab_size": 152000,
    }
    for config, repeats in ((phi3, {}), (qwen2, {HEAD: EMBEDDING})):
        tensors = {name: tuple(t.shape) for name, t in meta_model(config).state_dict().items()}
        source = {name: (tensors[key], "bfloat16") for name, key in canonical_names(tensors, canonical_name).items()}
        assert plan(model_config(config), source).repeats == repeats


FAMILIES = [
    ("clip", "llama", False),
    ("clip", "mistral", False),
    ("siglip", "qwen2", True),
    ("siglip", "qwen2", False),
    ("clip", "phi3", False),
]


@pytest.mark.parametrize(("vision", "text", "tied"), FAMILIES)
def test_tree_from_tensors(vision: str, text: str, tied: bool) -> None:
    model = tiny_hf(vision, text, tied=tied)
    config = model_config(model.config.to_dict())
    tree = tree_from_tensors(config, state_arrays(model))
    shapes = {
        jax.tree_util.keystr(p, simple=True, separator="/"): v.shape for p, v in jax.tree_util.tree_leaves_with_path(tree)
    }
    assert shapes == leaf_shapes(config)
    layer = model.model.language_model.layers[3]
    if text == "phi3":
        query, key = layer.self_attn.qkv_proj.weight[:40], layer.self_attn.qkv_proj.weight[40:60]
        up = layer.mlp.gate_up_proj.weight[56:]
    else:
        query, key, up = layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight, layer.mlp.up_proj.weight
    layers = tree["language_model"]["layers"]
    np.testing.assert_array_equal(layers["attention"]["q_proj"]["kernel"][3].reshape(40, 40), query.detach().numpy().T)
    np.testing.assert_array_equal(layers["attention"]["k_proj"]["kernel"][3].reshape(40, 20), key.detach().numpy().T)
    np.testing.assert_array_equal(layers["mlp"]["up_proj"]["kernel"][3], up.detach().numpy().T)
    patch = model.model.vision_tower.embeddings.patch_embedding.weight.detach().numpy()
    assert tree["vision_tower"]["patch_embedding"]["kernel"][5, 7, 2, 11] == patch[11, 2, 5, 7]


def test_names_of_all_layouts_mean_the_same() -> None:
    arrays = state_arrays(tiny_hf("clip", "llama"))
    config = tiny_config("clip", "llama")
    first = tree_from_tensors(config, arrays)
    canonical = {name: arrays[key] for name, key in canonical_names(arrays, canonical_name).items()}
    for names in (canonical, {to_hub_names(name): array for name, array in canonical.items()}):
        jax.tree.map(np.testing.assert_array_equal, tree_from_tensors(config, names), first)


def test_all_problems_are_listed_at_once() -> None:
    config = tiny_config("clip", "llama")
    tensors = {name: (shape, "float32") for name, shape in layout(config, rules_of(config)).tensors.items()}
    for layer in (0, 1, 2, 4):
        del tensors[f"language_model.model.layers.{layer}.mlp.up_proj.weight"]
    tensors["language_model.model.norm.bias"] = ((40,), "float32")
    tensors[f"model.layers.{'9' * 5000}.bias"] = ((40,), "float32")
    tensors["multi_modal_projector.linear_1.weight"] = ((41, 40), "float32")
    tensors["multi_modal_projector.linear_2.weight"] = ((40, 40), "int8")
    tensors["multi_modal_projector.linear_2.bias"] = ((40,), "bfloat16")
    with pytest.raises(InputError) as error:
        plan(config, tensors)
    text = str(error.value)
    assert "\n" not in text
    for expected in (
        "missing: language_model.model.layers.[0-2,4].mlp.up_proj.weight",
        "not understood: language_model.model.norm.bias, model.layers.999",
        "multi_modal_projector.linear_1.weight has shape [41, 40], expected [40, 40]",
        "of dtype int8, expected one of float32, bfloat16, float16: multi_modal_projector.linear_2.weight",
        "of dtype bfloat16 among float32 (choose one with --dtype): multi_modal_projector.linear_2.bias",
    ):
        assert expected in text
    with pytest.raises(InputError) as error:
        plan(config, tensors, any_float=True)
    assert "among" not in str(error.value)


def test_tied_head() -> None:
    model = tiny_hf("siglip", "qwen2", tied=True)
    config, arrays = model_config(model.config.to_dict()), state_arrays(model)
    assert config.text.tied_embeddings
    tree = tree_from_tensors(config, arrays)
    only_head = {name: array for name, array in arrays.items() if "embed_tokens" not in name}
    np.testing.assert_array_equal(
        tree_from_tensors(config, only_head)["language_model"]["embed_tokens"], tree["language_model"]["embed_tokens"]
    )
    with pytest.raises(InputError, match=r"lm_head.weight differs from .*embed_tokens.weight, but the configuration ties them"):
        tree_from_tensors(config, arrays | {"lm_head.weight": arrays["lm_head.weight"] + 1})
    untied = dataclasses.replace(config, text=dataclasses.replace(config.text, tied_embeddings=False))
    assert "lm_head" in tree_from_tensors(untied, arrays)["language_model"]


def test_buffers_are_ignored_with_a_reason_and_heads_carried() -> None:
    config = tiny_config("clip", "llama")
    tensors = {name: (shape, "float32") for name, shape in layout(config, rules_of(config)).tensors.items()}
    tensors["vision_tower.embeddings.position_ids"] = ((1, 10), "int64")
    tensors["language_model.model.layers.2.self_attn.rotary_emb.inv_freq"] = ((5,), "float32")
    tensors["vision_tower.post_layernorm.weight"] = ((40,), "float32")
    planned = plan(config, tensors)
    assert planned.carried == ("vision_tower.post_layernorm.weight",)
    assert list(planned.ignored) == list(tensors)[-3:-1] and all(planned.ignored.values())
