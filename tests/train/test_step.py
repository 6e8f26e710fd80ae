"""One training step, computed in other ways: in parts, with other remat policies, several gates at once."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lsg_jax
from lsg_jax.config import GateConfig, SinkConfig
from lsg_jax.methods.gates import Gates
from lsg_jax.methods.method_model import abstract_model
from lsg_jax.model.language_model import REMAT
from lsg_jax.model.loss import answer_slots, chunked_cross_entropy
from lsg_jax.train.independent import losses_and_gradients
from lsg_jax.train.step import _loss_and_gradients, in_parts

SINKS = SinkConfig(criterion="norm", vit_tau=10.0)


def close(a, b):
    scale = float(np.abs(b).max()) if np.size(b) else 1.0
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * max(scale, 1e-3))


@pytest.fixture(scope="module")
def model(tiny_model):
    return lsg_jax.load(tiny_model, sinks=SINKS)


@pytest.fixture(scope="module")
def batch(model):
    """Four rows: two with an image and left padding, one without, one without answers."""
    rng = np.random.default_rng(0)
    patches = model.config.num_image_tokens
    ids = rng.integers(4, 260, (4, patches + 12)).astype(np.int32)
    ids[[0, 1, 3], 2 : 2 + patches] = model.config.image_token_id
    mask = np.ones(ids.shape, bool)
    mask[1, :2] = False
    labels = np.where(np.arange(ids.shape[1]) >= ids.shape[1] - np.array([[3], [5], [2], [0]]), ids, -100)
    index, target = answer_slots(labels)
    side = model.config.vision.image_size
    pixels = rng.normal(size=(4, 3, side, side)).astype(np.float32)
    made = model.batch(ids, pixels, mask, np.full(4, patches + 4))
    return jax.tree.map(jnp.asarray, made.replace(answer_index=index, answer_target=target))


def graph_and_gates(model, layers, independent=False):
    gate = GateConfig(layers=layers, independent=independent)
    gates = Gates(gate).initial(model.config, model.frozen, jax.random.key(0))
    gates["fc2_kernel"] = 0.3 * jax.random.normal(jax.random.key(1), gates["fc2_kernel"].shape)
    return abstract_model(model.config, Gates(gate))[0], gates


def test_remat_policies_and_parts_of_a_batch_change_nothing(model, batch):
    graphdef, gates = graph_and_gates(model, (1, 3))
    run = lambda remat, parts: jax.jit(
        lambda gates: in_parts(
            lambda *a: _loss_and_gradients(*a, remat=remat), graphdef, model.frozen, gates, batch, parts=parts
        )
    )(gates)
    expected = run("none", 1)
    assert all(np.abs(leaf).max() > 0 for name, leaf in expected[2].items() if name != "fc2_bias")
    parts = {"full": 2, "dots": 4}  # together with a policy, since each pair has to be compiled
    for remat in REMAT.keys() - {"none"}:
        jax.tree.map(close, run(remat, parts.get(remat, 1)), expected)


def test_independent_gates_below_the_top_are_what_single_gates_give(model, batch):
    layers = (1, 3)
    graphdef, gates = graph_and_gates(model, layers, independent=True)
    together = jax.jit(lambda g: in_parts(losses_and_gradients, graphdef, model.frozen, g, batch, parts=2))(gates)
    for slot, layer in enumerate(layers):
        own = jax.tree.map(lambda leaf, slot=slot: leaf[slot : slot + 1], gates)
        alone, _ = graph_and_gates(model, (layer,))
        loss, told, gradients = jax.jit(lambda g, d=alone: _loss_and_gradients(d, model.frozen, g, batch, remat="none"))(own)
        close(together[0][slot], loss)
        assert (together[1]["correct"][slot], together[1]["tokens"]) == (told["correct"], told["tokens"])
        close(together[1]["ratios"][slot], told["ratios"][0])
        jax.tree.map(lambda a, b, slot=slot: close(a[slot], b[0]), together[2], gradients)


@pytest.mark.parametrize("chunk", [4, 7, 21, 100])
def test_cross_entropy_in_chunks_is_that_of_all_words(chunk):
    keys = jax.random.split(jax.random.key(0), 2)
    hidden, head = jax.random.normal(keys[0], (3, 7, 8)), jax.random.normal(keys[1], (8, 21))
    target = jnp.arange(21).reshape(3, 7)  # each word once: those in two chunks too
    whole = lambda hidden, head: optax.softmax_cross_entropy_with_integer_labels(hidden @ head, target).sum()
    ours = lambda hidden, head: chunked_cross_entropy(hidden, head, target, chunk=chunk)[0].sum()
    jax.tree.map(close, jax.value_and_grad(ours, (0, 1))(hidden, head), jax.value_and_grad(whole, (0, 1))(hidden, head))
    np.testing.assert_array_equal(chunked_cross_entropy(hidden, head, target, chunk=chunk)[1], (hidden @ head).argmax(-1))


def test_a_gradient_in_bfloat16_is_as_good_in_chunks_as_at_once():
    """The parts of its sum over chunks are large and cancel; rounding each of these sums would lose much of it."""
    keys = jax.random.split(jax.random.key(0), 4)
    words, dtype = 2432, jnp.bfloat16
    hidden = jax.random.normal(keys[0], (3, 7, 16), dtype)
    head = (0.5 * jax.random.normal(keys[1], (16, words)) + jax.random.normal(keys[2], (16, 1))).astype(dtype)
    target = jax.random.randint(keys[3], (3, 7), 0, words)
    gradient = jax.grad(lambda hidden, head, chunk: chunked_cross_entropy(hidden, head, target, chunk=chunk)[0].sum())
    exact = gradient(hidden.astype(jnp.float32), head.astype(jnp.float32), words)

    def error(chunk):
        found = gradient(hidden, head, chunk)
        assert found.dtype == dtype
        return jnp.linalg.norm(found.astype(jnp.float32) - exact) / jnp.linalg.norm(exact)

    assert error(128) < 3 * error(words)
