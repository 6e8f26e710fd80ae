"""Towers and connectors of InternVL, SmolVLM, Gemma 3 and Qwen-VL against transformers, float32, absolute 1e-4."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_towers
import torch
from flax import nnx
from tiny_towers import NAMES, NATIVE, SQUARE, arranged, native_image

from converters.families import towers
from converters.families.fields import undefined_fields
from lsg_jax.config import MeshConfig, SinkConfig
from lsg_jax.data.images import to_patches
from lsg_jax.errors import ConfigError
from lsg_jax.methods.method_model import abstract_model
from lsg_jax.model import vision_layers
from lsg_jax.model.attention import attend
from lsg_jax.model.projector import any_member, by_token, members
from lsg_jax.sharding import abstract_batch, make_mesh, shard_params
from lsg_jax.sinks.attention import received_attention
from lsg_jax.types import Batch, VisualInput

pair = functools.cache(tiny_towers.pair)
encode = nnx.jit(lambda model, images, sinks=None: model.encode_images(images, sinks=sinks), static_argnums=2)
close = functools.partial(np.testing.assert_allclose, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", SQUARE)
def test_tiles_give_the_features_and_tokens_of_transformers(name):
    both = pair(name)
    side = both.config.vision.image_size
    pixels = np.random.default_rng(0).normal(size=(4, 3, side, side)).astype(np.float32)
    tiles = to_patches(pixels.transpose(0, 2, 3, 1), both.config.vision.patch_size)
    encoded = encode(both.model, VisualInput(tiles.reshape(2, 2, *tiles.shape[1:])))
    with torch.no_grad():
        # one prompt with all images is the form that SmolVLM takes
        inputs = torch.tensor(pixels)[None] if name == "smolvlm" else torch.tensor(pixels)
        found = both.hf.model.get_image_features(inputs, return_dict=True, output_hidden_states=True)
    states = found.last_hidden_state if name != "internvl_plain" else found.hidden_states[-2]
    states = states[:, 1:] if both.config.vision.has_class_token else states
    close(encoded.features, states.reshape(2, -1, states.shape[-1]))
    tokens = found.pooler_output
    tokens = torch.cat(tuple(tokens)) if isinstance(tokens, (list, tuple)) else tokens
    close(both.model.projector(encoded.features), tokens.reshape(2, -1, tokens.shape[-1]))


def native_batch(name: str, patches: int = 128):
    both = pair(name)
    grids = [[(4, 6), (10, 2)], [(6, 10)]]
    rows = [[native_image(grid, both.config, 10 * i + s) for s, grid in enumerate(row)] for i, row in enumerate(grids)]
    return both, rows, arranged(rows, patches, both.config)


@pytest.mark.parametrize("name", NATIVE)
def test_native_images_give_the_features_and_tokens_of_transformers(name):
    both, rows, images = native_batch(name)
    encoded = encode(both.model, images)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(encoded))
    tokens = {"pooler": both.model.projector(encoded.features)}
    if encoded.deepstack:
        tokens |= {"deepstack": both.model.projector.deepstack_tokens(encoded.deepstack)}
    flat = list(itertools.chain(*rows))
    grids = torch.tensor([[1, *image.grid] for image in flat])
    with torch.no_grad():
        found = both.hf.model.visual(torch.tensor(np.concatenate([image.flat for image in flat])), grid_thw=grids)
    per_image = images.patches.shape[2]
    done, merge = 0, both.config.merge
    for i, row in enumerate(rows):
        for s, image in enumerate(row):
            count, start = len(image.flat), s * per_image
            features = encoded.features[i, start : start + per_image][images.used[i, s]]
            close(features, found.last_hidden_state[done : done + count])
            # windows are undone after the connector
            own = np.flatnonzero(image.squares >= 0)
            own = start // merge**2 + own[np.argsort(image.squares[own])]
            here = slice(done // merge**2, (done + count) // merge**2)
            close(tokens["pooler"][i, own], found.pooler_output[here])
            for ours, theirs in zip(tokens.get("deepstack", []), found.get("deepstack_features", []), strict=True):
                close(ours[i, own], theirs[here])
            done += count


def test_an_image_does_not_depend_on_filling_or_on_its_neighbours():
    both, rows, images = native_batch("qwen2_5_vl")
    alone = encode(both.model, arranged([[rows[0][1]]], 96, both.config))
    together = encode(both.model, images)
    used = images.used[0, 1]
    close(together.features[0, 128:][used], alone.features[0][used[:96]])
    changed = images.replace(patches=np.where(images.used[..., None], images.patches, 7.0))
    np.testing.assert_array_equal(encode(both.model, changed).features[0, 128:][used], together.features[0, 128:][used])


def test_blocks_of_queries_change_nothing(monkeypatch):
    both, _, images = native_batch("qwen2_5_vl")
    whole = encode(both.model, images).features
    monkeypatch.setattr(vision_layers, "MOST_QUERIES", 50)
    assert vision_layers._blocks(128) == 4 and vision_layers._blocks(16) == 1
    close(both.model.encode_images(images).features, whole, atol=1e-5)


def test_patches_that_are_not_used_are_no_sinks():
    both, _, images = native_batch("qwen3_vl")
    encoded = encode(both.model, images)
    large = np.linalg.norm(encoded.features, axis=-1) >= both.config.sinks.vit_tau
    used = images.used.reshape(large.shape)
    assert (large & ~used).any() and (large & used).any() and not (large & used).all()
    np.testing.assert_array_equal(encoded.v_sink, large & used)


@pytest.mark.parametrize("windowed", [False, True])
def test_received_attention_of_windows_is_that_of_a_block_diagonal_mask(windowed):
    both, _, images = native_batch("qwen2_5_vl")
    config = dataclasses.replace(both.config.vision, full_layers=() if windowed else tuple(range(4)))
    rng = np.random.default_rng(0)
    x, used = rng.normal(size=(4, 128, config.hidden_size)).astype(np.float32), images.used.reshape(4, 128)
    attention = vision_layers.VisionAttention(config, rngs=nnx.Rngs(3), dtype=jnp.float32)
    around = vision_layers.Surroundings(used=jnp.asarray(used))
    _, received = attention(jnp.asarray(x), around, windowed=windowed, receive=True)
    window = np.arange(128) // 16 if windowed else np.zeros(128)
    mask = (window[:, None] == window)[None] & used[:, None]
    heads = lambda project: project(x).swapaxes(1, 2)
    _, weights = attend(attention.q_proj(x), heads(attention.k_proj), heads(attention.v_proj), mask, return_weights=True)
    close(received.mean, received_attention(weights, used), atol=1e-6)
    close(received.mean.sum(-1), used.any(-1), atol=1e-5)
    sinks = SinkConfig(criterion="attention_share", vit_tau=0.05)
    chosen = encode(both.model, images, sinks).v_sink
    assert chosen.any() and not chosen[~images.used.reshape(chosen.shape)].any()


@pytest.mark.parametrize("name", ["smolvlm", "qwen2_vl"])
def test_a_token_is_a_sink_if_any_patch_behind_it_is(name):
    config = pair(name).config
    merge = config.merge
    side = config.vision.image_size // config.vision.patch_size
    count = 2 * (side**2 if name == "smolvlm" else 24)
    marked = np.random.default_rng(0).random((3, count)) < 0.1
    expected = np.zeros((3, count // merge**2), bool)
    behind = [[] for _ in expected[0]]
    for patch in range(count):
        if config.vision.native:
            token = patch // merge**2
        else:
            tile, row, column = np.unravel_index(patch, (2, side, side))
            token = np.ravel_multi_index((tile, row // merge, column // merge), (2, side // merge, side // merge))
        expected[:, token] |= marked[:, patch]
        behind[token].append(patch)
    np.testing.assert_array_equal(any_member(jnp.asarray(marked), config), expected)
    np.testing.assert_array_equal(members(count, config), behind)
    one = dataclasses.replace(config, merge=1)
    np.testing.assert_array_equal(any_member(jnp.asarray(marked), one), marked)
    np.testing.assert_array_equal(by_token(jnp.asarray(marked), one)[..., 0], marked)


def test_sequence_takes_positions_and_gathers_deepstack_tokens():
    both, _, images = native_batch("qwen3_vl")
    rng = np.random.default_rng(0)
    ids = np.full((2, 9), 5)
    source = np.full((2, 9, 1), -1)
    source[0, 2:6, 0], source[1, 1:8, 0] = [3, 40, 1, 5], rng.permutation(15)[:7]
    positions = rng.integers(0, 20, (2, 9, 3)).astype(np.int32)
    block = np.where(source[..., 0] >= 0, 0, -1)
    batch = Batch(ids, np.ones((2, 9), bool), np.array([8, 8]), images, source, positions=positions, block=block)
    sequence = both.model.sequence(batch)
    encoded = encode(both.model, images)
    np.testing.assert_array_equal(sequence.positions, positions)
    assert sequence.block is None and sequence.added.shape == (2, 2, 9, tiny_towers.WIDTH)
    np.testing.assert_array_equal(both.model.sequence(batch.without_images()).positions, positions)
    visual = source[..., 0] >= 0
    assert not sequence.added[:, ~visual].any()
    row = np.nonzero(visual)[0]
    for added, tokens in zip(sequence.added, both.model.projector.deepstack_tokens(encoded.deepstack), strict=True):
        close(added[visual], tokens[row, source[visual][:, 0]], atol=1e-6)
    close(sequence.x[visual], both.model.projector(encoded.features)[row, source[visual][:, 0]], atol=1e-6)
    sinks = any_member(encoded.v_sink, both.config)[row, source[visual][:, 0]]
    np.testing.assert_array_equal(sequence.visual.v_sink[visual], sinks)
    text = dataclasses.replace(both.config.text, images_see_themselves=True)
    both.model.config = dataclasses.replace(both.config, text=text)
    np.testing.assert_array_equal(both.model.sequence(batch).block, block)
    both.model.config = both.config


@pytest.mark.parametrize("name", NAMES)
def test_export_gives_back_every_byte(name):
    both = pair(name)
    leaves = nnx.to_pure_dict(nnx.state(both.model))
    rebuilt = {key: np.full_like(array, np.nan).reshape(len(array), -1) for key, array in both.tensors.items()}
    for part in both.layout.parts:
        if part.leaf.startswith("language_model"):
            continue
        leaf = functools.reduce(lambda tree, key: tree[key], part.leaf.split("/"), leaves)
        block = np.asarray(leaf if part.layer is None else leaf[part.layer])
        matrix, row, column = part.op.invert(block, 0)
        row += part.first_row
        rebuilt[part.source][row : row + len(matrix), column : column + matrix.shape[1]] = matrix
    unused = {key for key in both.tensors if ".head." in key} if name == "gemma3" else set()
    for key in both.tensors.keys() - unused:
        assert both.tensors[key].tobytes() == rebuilt[key].tobytes(), key
        assert both.layout.tensors[key] == both.tensors[key].shape, key


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_and_array_has_a_sharding(name):
    both, mesh = pair(name), make_mesh(MeshConfig(), jax.devices()[:1])
    config = both.config
    assert shard_params(abstract_model(config)[1], mesh).keys() == {"vision_tower", "projector", "language_model"}
    batch = abstract_batch(config, mesh, 2, 16, tiles=2, patches=128)
    graphdef, state = nnx.split(both.model)
    encoded = jax.eval_shape(lambda state, images: nnx.merge(graphdef, state).encode_images(images), state, batch.images)
    patches = 128 if config.vision.native else config.vision.num_patches
    assert encoded.features.shape == (2, 2 * patches, config.vision.hidden_size)
    if config.vision.native:
        images = native_batch(name)[2]
        images = images.replace(patches=images.patches.astype(np.uint8))
        of = lambda array: (array.shape, array.dtype)
        assert jax.tree.map(of, batch.images) == jax.tree.map(of, images)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("internvl", {"norm_type": "batch_norm"}, "norm_type = 'batch_norm' is not supported; supported: layer_norm, rms_norm"),
        ("internvl", {"patch_size": (4, 2)}, r"patch_size = \(4, 2\) is not the side of a square"),
        ("qwen2_vl", {"in_channels": 1}, "in_channels = 1, only 3 is supported"),
        ("qwen2_vl", {"num_heads": 4}, "24 is not the width of 4 heads that turn with rows and columns"),
        ("qwen2_vl", {"rope_parameters": {"rope_type": "axial", "rope_theta": 1.0, "factor": 2}}, "only type axial"),
        ("qwen2_5_vl", {"window_size": 20}, "window_size = 20 is no multiple of 2 patches of 4 pixels"),
        ("qwen2_5_vl", {"fullatt_block_indexes": [4]}, "layer 4 does not exist, the tower has 4"),
        ("qwen3_vl", {"num_position_embeddings": 26}, "num_position_embeddings = 26 is no square"),
        ("qwen3_vl", {"deepstack_visual_indexes": [2, 0]}, "are not ascending layers"),
        ("qwen3_vl", {"deepstack_visual_indexes": [4]}, "are not ascending layers"),
        ("qwen3_vl", {"head_dim": 8}, "head_dim = 8, only 24 / 2 heads is supported"),
    ],
)
def test_what_is_not_supported_is_refused(name, change, message):
    hf = tiny_towers.hf_model(name).config
    for field, value in change.items():
        setattr(hf.vision_config, field, value)
    with pytest.raises(ConfigError, match=message):
        tiny_towers.model_config(name, hf)


@pytest.mark.parametrize("field", ["use_mask_token", "use_mean_pooling", "use_absolute_position_embeddings"])
def test_parts_that_the_tower_lacks_are_refused(field):
    kind, (handled,) = "internvl_vision", towers.part("internvl_vision").fields.values()
    default = getattr(tiny_towers.hf_model("internvl").config.vision_config, field)
    assert not undefined_fields({field: default}, handled, kind, "config.json")
    with pytest.raises(ConfigError, match=f"not understood, so it might change the results: {field}"):
        undefined_fields({field: not default}, handled, kind, "config.json")


def test_a_merge_that_does_not_fit_is_refused():
    config = pair("smolvlm").config
    with pytest.raises(ConfigError, match="merge is 4, but an image has 6 x 6 patches"):
        dataclasses.replace(config, merge=4)
    with pytest.raises(ConfigError, match="merge is 2, which needs one feature a patch"):
        dataclasses.replace(pair("internvl").config, feature_select="full")
    config = pair("qwen2_5_vl").config
    with pytest.raises(ConfigError, match="merge is 8, but windows are 16 pixels wide"):
        dataclasses.replace(config, merge=8)


def test_real_qwen_configurations():
    import transformers

    # as on the Hub: the older names of model types, fields that transformers does not define
    published = {
        "depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "in_chans": 3,
        "out_hidden_size": 3584, "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14, "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2, "temporal_patch_size": 2,
    }  # fmt: skip
    hf = transformers.Qwen2_5_VLConfig(
        vision_config=published | {"model_type": "qwen2_5_vl"}, text_config={"hidden_size": 3584}
    )
    vision = towers.vision_config(hf.vision_config, "config.json")
    assert (vision.image_size, vision.num_patches, vision.window_patches, vision.rotary_theta) == (448, 1024, 64, 10000.0)
    assert [layer for layer in range(32) if not vision.is_windowed(layer)] == [7, 15, 23, 31]
    assert towers.merger(hf.vision_config)["projector_width"] == 5120
    hf = transformers.Qwen3VLConfig(text_config={"hidden_size": 3584})
    vision = towers.vision_config(hf.vision_config, "config.json")
    assert (vision.image_size, vision.table_side, vision.patch_values) == (512, 48, 2 * 16 * 16 * 3)
    assert towers.merger(hf.vision_config)["deepstack"] == (9, 17, 25)
