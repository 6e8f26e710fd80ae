"""Layers that are differentiated from one of them on, against layers one by one; within a jit, and around one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsg_jax.model.language_model import REMAT
from lsg_jax.model.layer_scan import differentiated_from

LAYERS, FIRST, WIDTH = 5, 2, 6


def inputs():
    keys = jax.random.split(jax.random.key(0), 3)
    weights = jax.random.normal(keys[0], (LAYERS, WIDTH, WIDTH))
    walked = {"factor": jax.random.normal(keys[1], (LAYERS, WIDTH)), "on": jnp.arange(LAYERS) >= FIRST}
    return weights, walked, jax.random.normal(keys[2], (3, WIDTH))


def layer(weights, part, x, index):
    scale = jnp.where(part["on"], jnp.tanh(part["factor"]), 1.0)
    y = jnp.sin(x @ jax.lax.dynamic_index_in_dim(weights, index, keepdims=False)) * scale
    return x + y, (scale * x).sum(0)


def one_by_one(weights, walked, x):
    out = []
    for index in range(LAYERS):
        x, of_layer = layer(weights, jax.tree.map(lambda leaf, i=index: leaf[i], walked), x, index)
        out.append(of_layer)
    return x, jnp.stack(out[FIRST:])


@pytest.mark.parametrize("remat", ["none", "full"])
def test_results_and_gradients_are_those_of_layers_one_by_one(remat):
    weights, walked, x = inputs()

    def scanned(weights, walked, x):
        step = jax.checkpoint(lambda part, x, index: layer(weights, part, x, index), policy=REMAT[remat])
        return differentiated_from(FIRST, lambda w, x: one_by_one(weights, w, x), step, walked, x)

    def differentiated(run):
        @jax.jit
        def loss(factor, weights, on, x):
            x, out = run(weights, {"factor": factor, "on": on}, x)
            return (x**2).sum() + jnp.cos(out).sum(), (x, out)

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(walked["factor"], weights, walked["on"], x)

    ours, theirs = differentiated(scanned), differentiated(one_by_one)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), ours, theirs)
    assert np.abs(ours[1][FIRST:]).min() > 0 and not np.any(ours[1][:FIRST])


def test_weights_are_not_kept_once_for_each_layer():
    weights, walked, x = inputs()
    step = jax.checkpoint(lambda part, x, index: layer(weights, part, x, index), policy=REMAT["none"])
    run = lambda factor: differentiated_from(
        FIRST, lambda w, x: one_by_one(weights, w, x), step, {**walked, "factor": factor}, x
    )
    kept = jax.tree.leaves(jax.vjp(run, walked["factor"])[1])
    assert {leaf.shape for leaf in kept if leaf.ndim == 3} >= {(LAYERS, WIDTH, WIDTH), (LAYERS - FIRST, *x.shape)}
    assert (LAYERS - FIRST, WIDTH, WIDTH) not in {leaf.shape for leaf in kept}
