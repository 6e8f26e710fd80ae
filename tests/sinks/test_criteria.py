"""Each sink criterion against closed forms and planted sinks."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from lsg_jax.sinks.attention import group_mass, received_attention
from lsg_jax.sinks.criteria import (
    attention_share,
    dim_abs,
    dim_rms,
    group_visual_tokens,
    has_massive_activations,
    low_sink_scores,
    massive,
    norm,
    persistence_adjusted,
    sink_heads,
    sink_mask,
    sink_value,
)
from lsg_jax.types import VisualTokens

WIDTH, PLANTED = 64, (3, 11)


@pytest.fixture
def features() -> np.ndarray:
    """float32 [2, 12, 64], values below 0.1 but for a spike of -200 in dimension 7 at token 3 of row 0 and 11 of row 1."""
    x = np.random.default_rng(0).uniform(-0.1, 0.1, size=(2, 12, WIDTH)).astype(np.float32)
    for row, token in enumerate(PLANTED):
        x[row, token, 7] = -200.0
    return x


def planted() -> np.ndarray:
    mask = np.zeros((2, 12), bool)
    mask[np.arange(2), PLANTED] = True
    return mask


def test_dim_abs_takes_the_largest_of_its_dimensions_whatever_the_sign(features):
    np.testing.assert_array_equal(dim_abs(features, (2, 7), 100.0), planted())
    np.testing.assert_array_equal(dim_abs(features, (2,), 100.0), False)
    np.testing.assert_array_equal(dim_abs(features, (7,), 200.0), planted())  # the threshold itself is in
    np.testing.assert_array_equal(dim_abs(features, (7,), 200.1), False)


def test_dim_rms_finds_planted_sinks_and_cannot_exceed_the_root_of_the_width(features):
    ratio = 200.0 / np.sqrt((features[0, 3].astype(np.float64) ** 2).mean())
    np.testing.assert_array_equal(dim_rms(features, (7,), 0.999 * ratio)[0], planted()[0])
    np.testing.assert_array_equal(dim_rms(features, (7,), 1.001 * ratio)[0], False)
    one_hot = np.zeros((1, 2, WIDTH), np.float32)
    one_hot[0, 0, 7] = 1e4  # the extreme case, and a token of zeros
    np.testing.assert_array_equal(dim_rms(one_hot, (7,), 0.999 * np.sqrt(WIDTH)), [[True, False]])
    np.testing.assert_array_equal(dim_rms(one_hot, (7,), 1.001 * np.sqrt(WIDTH)), False)
    np.testing.assert_array_equal(dim_rms(one_hot, (7,), 0.0), [[True, False]])


def test_norm_is_euclidean():
    x = np.zeros((1, 3, WIDTH), np.float32)
    x[0, 1, :2] = 60.0, 80.0
    np.testing.assert_array_equal(norm(x, 100.0), [[False, True, False]])
    np.testing.assert_array_equal(norm(x, 100.1), False)


def test_massive_needs_both_the_absolute_value_and_the_multiple_of_the_median(features):
    np.testing.assert_array_equal(massive(features, 100.0, 1000.0), planted())
    np.testing.assert_array_equal(massive(features, 201.0, 1000.0), False)
    medians = np.median(np.abs(features), axis=(1, 2))
    np.testing.assert_array_equal(massive(features, 100.0, 1.001 * 200.0 / medians.min()), False)


def test_the_median_ignores_padding(features):
    padded = features.copy()
    padded[:, 5:10] = 150.0  # would lift the median above 200 / 1000
    valid = np.ones((2, 12), bool)
    valid[:, 5:10] = False
    np.testing.assert_array_equal(massive(padded, 190.0, 1000.0, valid=jnp.asarray(valid)), planted())
    more = np.concatenate([features, np.full((2, 30, WIDTH), 150.0, np.float32)], axis=1)
    valid = np.arange(42) < 12
    found = massive(more, 190.0, 1000.0, valid=jnp.asarray(np.tile(valid, (2, 1))))
    np.testing.assert_array_equal(found[:, :12], planted())
    np.testing.assert_array_equal(massive(more, 190.0, 1000.0), False)


def test_attention_share_counts_only_the_competing_tokens():
    received = jnp.array([[0.5, 0.2, 0.1, 0.1, 0.1], [0.9, 0.0, 0.0, 0.0, 0.1]])
    among = jnp.array([[0, 1, 1, 1, 0], [0, 1, 1, 1, 0]], bool)
    # shares of row 0: 0.5, 0.25, 0.25; row 1 receives nothing among them
    np.testing.assert_array_equal(attention_share(received, among, 0.3), [[0, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(attention_share(received, among, 0.2), [[0, 1, 1, 1, 0], [0, 0, 0, 0, 0]])


@pytest.mark.parametrize(
    ("criterion", "tau"), [("dim_abs", 100.0), ("dim_rms", 7.0), ("norm", 100.0), ("massive", 100.0), ("attention_share", 0.3)]
)
def test_every_criterion_by_name_and_nothing_outside_the_valid_tokens(criterion, tau, features):
    settings = dict(dims=(7,), tau=tau, massive_ratio=1000.0, received=jnp.asarray(planted() + 0.01))
    everywhere = jnp.ones((2, 12), bool)
    np.testing.assert_array_equal(sink_mask(criterion, features, valid=everywhere, **settings), planted())
    without = everywhere.at[0, 3].set(False)
    found = np.asarray(sink_mask(criterion, features, valid=without, **settings))
    assert not found[0, 3] and found[1, 11]


def test_bad_dimensions_are_errors(features):
    for criterion in (dim_abs, dim_rms):
        for dims, message in [((), "no sink dimensions"), ((WIDTH,), "outside the model width"), ((-1,), "outside the model")]:
            with pytest.raises(ValueError, match=message):
                criterion(features, dims, 1.0)


def test_what_a_criterion_needs_is_asked_for(features):
    settings = dict(dims=(7,), tau=1.0, massive_ratio=1.0, valid=jnp.ones((2, 12), bool))
    with pytest.raises(ValueError, match="attention that each token receives"):
        sink_mask("attention_share", features, **settings)
    with pytest.raises(ValueError, match="unknown sink criterion"):
        sink_mask("l2", features, **settings)


@pytest.mark.parametrize("seed", range(5))
def test_the_groups_partition_the_visual_tokens(seed):
    rng = np.random.default_rng(seed)
    visual, raised = rng.random((2, 20)) < 0.7, rng.random((2, 20)) < 0.3
    v_sink = visual & (rng.random((2, 20)) < 0.3)
    masks = group_visual_tokens(VisualTokens(mask=jnp.asarray(visual), v_sink=jnp.asarray(v_sink)), jnp.asarray(raised))
    groups = np.stack([masks.v_sink, masks.l_sink, masks.ordinary])
    np.testing.assert_array_equal(groups.sum(0), visual)
    np.testing.assert_array_equal(groups[0], v_sink)  # raised or not
    np.testing.assert_array_equal(groups[1], visual & raised & ~v_sink)


def test_received_attention_and_group_mass_in_closed_form():
    weights = jnp.array(
        [[[[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.2, 0.3, 0.5]], [[1.0, 0.0, 0.0], [0.1, 0.9, 0.0], [0.0, 0.4, 0.6]]]]
    )
    queries = jnp.array([[False, True, True]])
    np.testing.assert_allclose(received_attention(weights, queries), [[0.2, 0.525, 0.275]], atol=1e-6)
    groups = jnp.array([[[True, False], [False, True], [False, True]]])
    np.testing.assert_allclose(group_mass(weights, queries, groups), [[[0.35, 0.65], [0.05, 0.95]]], atol=1e-6)
    np.testing.assert_array_equal(received_attention(weights, jnp.zeros((1, 3), bool)), 0.0)


def test_sinks_of_heads_equal_those_of_the_published_rule():
    """Gu et al. divide column k of T tokens by T - k; so does this rendering, row by row without the padding."""
    rng = np.random.default_rng(0)
    length, valid = 9, np.ones((2, 9), bool)
    valid[0, :3] = valid[1, 7:] = False
    logits = rng.normal(size=(2, 4, length, length)) * 3
    seen = np.tril(np.ones((length, length), bool)) & valid[:, None, None, :]
    weights = np.asarray(jnp.where(seen, jnp.exp(logits), 0.0))
    weights = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-30)
    found = np.asarray(sink_heads(jnp.asarray(weights), jnp.asarray(valid), 0.3))
    for row in range(2):
        scores = torch.tensor(weights[row][:, valid[row]][:, :, valid[row]])
        count = scores.shape[-1]
        published = (scores / torch.arange(count, 0, -1)[None, None]).sum(-2) > 0.3
        np.testing.assert_array_equal(found[row][:, valid[row]], published)
        assert published.any() and not published.all()
        assert not found[row][:, ~valid[row]].any()


def test_attention_of_earlier_queries_makes_no_sink_head():
    """As among the tokens of an image in Gemma 3: all look at the last one, which looks at the first."""
    weights = np.zeros((1, 1, 5, 5), np.float32)
    weights[..., :4, 4] = weights[..., 4, 0] = 1.0
    found = sink_heads(jnp.asarray(weights), jnp.ones((1, 5), bool), 0.1)
    np.testing.assert_array_equal(found[0, 0], [True, False, False, False, False])


def test_a_model_has_massive_activations_where_both_thresholds_are_reached():
    largest, median = np.array([99.0, 100.0, 150.0, 900.0]), np.array([0.01, 0.1, 0.16, 0.5])
    np.testing.assert_array_equal(has_massive_activations(largest, median), [False, True, False, True])


def test_lot_keeps_the_quarter_with_the_lowest_scores():
    """Scores from their definition in PyTorch, threshold from numpy; none of the values is at the threshold."""
    states = np.random.default_rng(0).normal(size=(3, 10, WIDTH)).astype(np.float32)
    states[:, (2, 5), 7] = 40.0
    nothing = jnp.zeros((3, 10))
    values = sink_value("dim_rms", states, dims=(2, 7), received=nothing, among=nothing)
    score, kept = low_sink_scores(values)
    h = torch.tensor(states)
    expected = (h[..., [2, 7]].abs().amax(-1) / (h.pow(2).mean(-1).sqrt() + 1e-6)).mean(0).numpy()
    np.testing.assert_allclose(score, expected, rtol=1e-5)
    np.testing.assert_array_equal(kept, expected < np.percentile(expected, 25))
    assert kept.sum() == 3 and not kept[np.array([2, 5])].any()
    assert low_sink_scores(jnp.ones((2, 4)))[1].all()


def test_attention_of_persistent_places_is_lowered():
    frames = torch.rand(4, 12, generator=torch.Generator().manual_seed(0))
    frames[:, 3] += 2
    power, mu = 1.1, 0.4
    persistent = frames.mean(0).repeat(4, 1) ** power
    low, high = persistent.amin(1, keepdim=True), persistent.amax(1, keepdim=True)
    expected = frames - mu * (persistent - low) / (high - low)
    np.testing.assert_allclose(persistence_adjusted(jnp.asarray(frames.numpy()), mu, power), expected, rtol=1e-5)
    even = jnp.full((2, 3), 0.2)
    np.testing.assert_array_equal(persistence_adjusted(even, mu), even)
