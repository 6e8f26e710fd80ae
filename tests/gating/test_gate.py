"""The gate, its signals and groupings, and key scaling, against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lsg_jax.config import GateConfig, RopeConfig, SinkConfig
from lsg_jax.gating.gate import GateParam, KeyScaling, SinkGate, gate_signal
from lsg_jax.gating.keys import GROUPS, group_members, key_scale, scale_keys
from lsg_jax.model.rotary import apply_rope, rope_angles
from lsg_jax.sinks.criteria import group_visual_tokens
from lsg_jax.types import VisualTokens

GROUPINGS = tuple(GROUPS)


def test_parameter_count_of_the_paper():
    gate = nnx.eval_shape(lambda: SinkGate(4096, GateConfig(), rngs=nnx.Rngs(0)))
    counts = {path[0]: leaf.size for path, leaf in nnx.to_flat_state(nnx.state(gate, GateParam))}
    assert counts["fc1_kernel"] == 262_144
    assert sum(counts.values()) == 262_144 + 64 + 128 + 2 + 8_192


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_initial_ratios_are_equal(grouping):
    gate = SinkGate(24, GateConfig(grouping=grouping), rngs=nnx.Rngs(1))
    ratios = gate(jnp.asarray(np.random.default_rng(0).normal(size=(5, 24))))
    np.testing.assert_array_equal(ratios, np.float32(1) / np.float32(len(GROUPS[grouping])))


def test_gate_against_a_plain_computation():
    rng = np.random.default_rng(2)
    gate = SinkGate(12, GateConfig(width=7, activation="relu"), rngs=nnx.Rngs(0))
    arrays = {
        name: rng.normal(size=getattr(gate, name).shape) for name in ("norm_scale", "norm_bias", "fc2_kernel", "fc2_bias")
    }
    for name, array in arrays.items():
        getattr(gate, name)[...] = jnp.asarray(array, jnp.float32)
    x = rng.normal(3.0, 2.0, size=(4, 12))
    y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * arrays["norm_scale"] + arrays["norm_bias"]
    y = np.maximum(y @ np.asarray(gate.fc1_kernel[...]), 0) @ arrays["fc2_kernel"] + arrays["fc2_bias"]
    expected = np.exp(y) / np.exp(y).sum(-1, keepdims=True)
    np.testing.assert_allclose(gate(jnp.asarray(x)), expected, atol=1e-5)


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_config_key_scale_multiplies_the_coefficients_exactly(factor):
    scaling, hidden, visual = _scaling(GateConfig(layers=(0,), key_scale=factor))
    change = scaling.layer(jax.tree.map(lambda leaf: leaf[0], scaling.per_layer(0, 1)), hidden)
    scale, ratios = change.key_scale, change.ratios
    np.testing.assert_array_equal(ratios, 0.5)
    np.testing.assert_array_equal(np.asarray(scale)[np.asarray(visual.mask)], 0.5 * factor)
    np.testing.assert_array_equal(np.asarray(scale)[~np.asarray(visual.mask)], 1.0)


def test_a_layer_that_is_not_enabled_scales_nothing():
    scaling, hidden, _ = _scaling(GateConfig(layers=(0,)))
    source, _ = scaling.per_layer(0, 1)
    scale = scaling.layer((jax.tree.map(lambda leaf: leaf[0], source), jnp.array(False)), hidden).key_scale
    np.testing.assert_array_equal(scale, 1.0)


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("seed", range(5))
def test_groups_are_disjoint_and_cover_the_visual_tokens(grouping, seed):
    rng = np.random.default_rng(seed)
    visual = rng.random((3, 17)) < 0.6
    tokens = VisualTokens(mask=jnp.asarray(visual), v_sink=jnp.asarray(visual & (rng.random((3, 17)) < 0.3)))
    l_sink = jnp.asarray(rng.random((3, 17)) < 0.4)  # text tokens among them, and V-sinks
    masks = group_visual_tokens(tokens, l_sink)
    members = np.asarray(group_members(masks, grouping))
    np.testing.assert_array_equal(members.sum(-1), visual)
    for group, of_group in zip(GROUPS[grouping], members.transpose(2, 0, 1), strict=True):
        if group != "rest":
            np.testing.assert_array_equal(of_group, getattr(masks, group))
    coefficients = rng.random((3, members.shape[-1])).astype(np.float32)
    scale = np.asarray(key_scale(jnp.asarray(coefficients), jnp.asarray(members)))
    assert (scale[~visual] == 1.0).all()
    for row, position in zip(*np.nonzero(visual), strict=True):
        assert scale[row, position] == coefficients[row, members[row, position].argmax()]


def test_an_unknown_grouping_is_an_error():
    tokens = VisualTokens(mask=jnp.ones((1, 2), bool), v_sink=jnp.zeros((1, 2), bool))
    with pytest.raises(ValueError, match="unknown grouping"):
        group_members(group_visual_tokens(tokens, tokens.v_sink), "two")


def test_signals_with_padding_on_either_side():
    hidden = jnp.arange(2 * 6 * 3, dtype=jnp.float32).reshape(2, 6, 3)
    valid = jnp.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]], bool)
    visual = jnp.array([[0, 0, 1, 1, 0, 0], [0, 1, 0, 0, 0, 0]], bool)
    at = dict(gate_position=jnp.array([4, 2]), valid=valid, visual=visual)  # later positions hold the answer
    np.testing.assert_array_equal(gate_signal(hidden, "last", **at), hidden[jnp.arange(2), jnp.array([4, 2])])
    rows = np.asarray(hidden)
    np.testing.assert_allclose(gate_signal(hidden, "mean_all", **at), [rows[0, 2:5].mean(0), rows[1, :3].mean(0)], rtol=1e-6)
    np.testing.assert_allclose(gate_signal(hidden, "mean_visual", **at), [rows[0, 2:4].mean(0), rows[1, 1]], rtol=1e-6)


def test_biases_that_are_switched_off_get_no_gradient():
    signal = jax.random.normal(jax.random.key(0), (3, 8))
    for biases in (True, False):
        graphdef, state = nnx.split(SinkGate(8, GateConfig(layers=(0,), biases=biases), rngs=nnx.Rngs(0)))
        state["fc2_kernel"] = state["fc2_kernel"].replace(jax.random.normal(jax.random.key(1), (64, 2)))
        moved = jax.grad(lambda s, g=graphdef: nnx.merge(g, s)(signal)[:, 0].sum())(state)
        moved = {name: bool(np.any(leaf)) for name, leaf in nnx.to_pure_dict(moved).items()}
        assert moved.pop("fc1_bias") == moved.pop("fc2_bias") == biases
        assert all(moved.values())


def test_the_visual_mean_of_a_row_without_an_image_is_zero():
    hidden, nowhere = jnp.ones((1, 4, 3)), jnp.zeros((1, 4), bool)
    signal = gate_signal(hidden, "mean_visual", gate_position=jnp.array([3]), valid=~nowhere, visual=nowhere)
    np.testing.assert_array_equal(signal, 0.0)


def test_an_unknown_signal_is_an_error():
    ones = jnp.ones((1, 1), bool)
    with pytest.raises(ValueError, match="unknown gate signal"):
        gate_signal(jnp.ones((1, 1, 2)), "first", gate_position=jnp.array([0]), valid=ones, visual=ones)


def test_key_scaling_commutes_with_rotary_embedding():
    rng = np.random.default_rng(4)
    key = jnp.asarray(rng.normal(size=(2, 9, 3, 8)), jnp.float32)
    scale = jnp.asarray(rng.random((2, 9)), jnp.float32)
    rope = rope_angles(jnp.tile(jnp.arange(9), (2, 1)), RopeConfig(theta=10_000.0), 8)
    np.testing.assert_allclose(apply_rope(scale_keys(key, scale), rope), scale_keys(apply_rope(key, rope), scale), atol=1e-6)


def test_scaled_keys_keep_their_dtype():
    assert scale_keys(jnp.ones((1, 2, 1, 4), jnp.bfloat16), jnp.full((1, 2), 0.3)).dtype == jnp.bfloat16


def _scaling(config: GateConfig) -> tuple[KeyScaling, jax.Array, VisualTokens]:
    """A fresh gate over one row of two text, three image and two text tokens, width 8."""
    graphdef, state = nnx.split(SinkGate(8, config, rngs=nnx.Rngs(0)))
    mask = jnp.array([[0, 0, 1, 1, 1, 0, 0]], bool)
    visual = VisualTokens(mask=mask, v_sink=jnp.zeros_like(mask).at[0, 3].set(True))
    scaling = KeyScaling(
        source=jax.tree.map(lambda leaf: leaf[None], state),
        enabled=jnp.array([True]),
        visual=visual,
        gate_position=jnp.array([6]),
        valid=jnp.ones_like(mask),
        first_layer=0,
        config=config,
        sinks=SinkConfig(),
        gate=graphdef,
    )
    return scaling, jax.random.normal(jax.random.key(0), (1, 7, 8)), visual
