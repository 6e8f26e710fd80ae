"""A decoder with every setting at once: the ways through it agree, and its attention is the one written down here."""

import dataclasses
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import LENGTH, WINDOW, assemble, close, everything, image_places, random_parameters, rows, sequence_of

from lsg_jax.config import GateConfig, RopeConfig, SinkConfig
from lsg_jax.errors import ConfigError
from lsg_jax.gating.gate import KeyScaling
from lsg_jax.model import attention
from lsg_jax.model.attention import SHORTEST_BLOCK, attend_causally, attention_path
from lsg_jax.model.cudnn_attention import cudnn_attention
from lsg_jax.model.generate import cache_of, last_token
from lsg_jax.model.scope import Scope, causal_mask, layer_kinds
from lsg_jax.model.splash_attention import splash_attention, why_plain
from lsg_jax.sharding import param_spec
from lsg_jax.types import Batch, VisualTokens

CONFIG = everything()
TPU = SimpleNamespace(devices=np.array([SimpleNamespace(platform="tpu")]))


def inputs(config, side="left"):
    """ids, mask, and the fields of Sequence beside them."""
    ids, mask = rows(side, vocabulary=config.vocab_size)
    block, places = image_places(mask)
    drawn = np.random.default_rng(5).normal(size=(2, *ids.shape, config.hidden_size))
    added = np.where((block >= 0)[..., None], drawn, 0.0).astype(np.float32)
    return ids, mask, {"positions": places, "block": block, "added": added}


def scaling(coefficients, ids, mask, block, layers):
    """Fixed key scales [L, 2]: of every third visual token, and of the others."""
    visual = jnp.asarray(block >= 0)
    tokens = VisualTokens(mask=visual, v_sink=visual & (jnp.arange(mask.shape[1]) % 3 == 0))
    batch = Batch(input_ids=ids, attention_mask=mask, gate_position=last_token(jnp.asarray(mask)))
    enabled = jnp.ones(len(coefficients), bool)
    gate = GateConfig(layers=layers, grouping="v_sink_rest")
    return KeyScaling.for_batch(batch, tokens, gate, SinkConfig(), source=coefficients, enabled=enabled)


@partial(jax.jit, static_argnames=("config", "remat", "dense", "layers", "mesh"))
def loss_and_gradients(params, coefficients, ids, mask, fields, config, remat="none", dense=False, layers=(1,), mesh=None):
    """A loss of all valid states, and its gradient by the key scales [L, 2]."""

    def loss(coefficients):
        model = assemble(config, params, mesh)
        change = scaling(coefficients, ids, mask, fields["block"], layers)
        out = model(sequence_of(model, ids, mask, **fields), change, remat=remat, observe_attention=dense)
        states = model.norm(out.hidden)
        wanted = jnp.sin(jnp.arange(states.size)).reshape(states.shape)
        return jnp.where(mask[..., None], states * wanted, 0).sum(), states

    (_, states), gradients = jax.value_and_grad(loss, has_aux=True)(coefficients)
    return states, gradients


@pytest.fixture(scope="module")
def params():
    return random_parameters(CONFIG)


COEFFICIENTS = np.random.default_rng(1).uniform(0.2, 1.5, (CONFIG.num_layers, 2)).astype(np.float32)


def test_remat_and_dense_attention_give_the_same_gradients(params):
    ids, mask, fields = inputs(CONFIG)
    run = partial(loss_and_gradients, params, COEFFICIENTS, ids, mask, fields, CONFIG)
    states, gradients = map(np.asarray, run())
    assert not gradients[0].any() and (np.abs(gradients[1:]).max(1) > 0.1).all()
    for other in ({"remat": "full"}, {"dense": True}):  # tests/train/test_step.py has every policy
        other_states, other_gradients = run(**other)
        close(np.asarray(other_states)[mask], states[mask])
        close(other_gradients, gradients)


def test_resumed_from_every_layer_as_a_whole_pass(params):
    @jax.jit
    def whole(params):
        model = assemble(CONFIG, params)
        sequence = sequence_of(model, ids, mask, **fields)
        change = scaling(COEFFICIENTS, ids, mask, fields["block"], (0,))
        at = last_token(sequence.valid)[:, None]
        out = model(sequence, change, rows=at, keep_kv=True, observe=lambda view: view.hidden)
        return out.hidden, cache_of(sequence, out), out.observed

    @jax.jit
    def resumed(params, cache, entering, layer):
        model = assemble(CONFIG, params)
        sequence = sequence_of(model, ids, mask, x=entering, **fields)
        change = scaling(COEFFICIENTS, ids, mask, fields["block"], (0,))
        return model.resume(sequence, cache, change, layer, rows=last_token(sequence.valid)[:, None])

    for side in ("left", "right"):
        ids, mask, fields = inputs(CONFIG, side)
        whole.clear_cache(), resumed.clear_cache()
        hidden, cache, entering = whole(params)
        assert (np.asarray(cache.offset) < 0).all()
        start = np.arange(CONFIG.num_layers)
        for layer in start:
            below = (start < layer)[:, None, None, None, None]
            emptied = cache.replace(key=jnp.where(below, cache.key, 0), value=jnp.where(below, cache.value, 0))
            again, kept = resumed(params, emptied, entering[layer], jnp.int32(layer))
            close(again, hidden, 1e-5)
            close(kept.key, cache.key, 1e-5)
            close(kept.value, cache.value, 1e-5)
        assert resumed._cache_size() == 1


def by_definition(query, key, value, valid, block, window, scale):
    """Attention token by token: what a query may see is said in words of single tokens."""
    seen = np.zeros((*valid.shape, valid.shape[1]), bool)
    for row in range(len(valid)):
        tokens = valid[row].nonzero()[0]
        for number, q in enumerate(tokens):
            for other, k in enumerate(tokens):
                same = block[row, q] == block[row, k] >= 0
                seen[row, q, k] = (k <= q or same) and (window is None or other > number - window)
    key, value = (jnp.repeat(x, query.shape[2] // key.shape[1], axis=1) for x in (key, value))
    logits = jnp.where(seen[:, None], scale * jnp.einsum("BTNH,BNSH->BNTS", query, key), -1e9)
    return jnp.einsum("BNTS,BNSH->BTNH", jax.nn.softmax(logits), value)


@pytest.mark.parametrize("window", [None, 11])
def test_attention_and_its_gradient_are_those_of_the_definition(window):
    length = 2 * SHORTEST_BLOCK + 5  # three blocks of queries
    rng = np.random.default_rng(0)
    query = rng.normal(size=(2, length, 4, 10)).astype(np.float32)
    key, value = rng.normal(size=(2, 2, 2, length, 10)).astype(np.float32)
    valid = (np.arange(length) >= np.array([[0], [7]])) & (np.arange(length) % 9 != 4)  # gaps too
    block = np.where((np.arange(length) // 20) % 2, np.arange(length) // 20, -1) + np.zeros((2, 1), int)
    scope = Scope(None, causal_mask(jnp.asarray(valid), block=block, window=window), causal=False, gaps=True)
    factors = rng.uniform(0.3, 1.5, (2, 1, length, 1)).astype(np.float32)

    def loss(factors, attend):
        return (jnp.where(valid[..., None, None], attend(query, key * factors, value), 0) ** 3).sum()

    ours = lambda *qkv: attend_causally(*qkv, scope, scale=0.3)
    exact = lambda *qkv: by_definition(*qkv, valid, block, window, 0.3)
    close(np.asarray(ours(query, key, value))[valid], np.asarray(exact(query, key, value))[valid], 1e-5)
    close(jax.grad(loss)(factors, ours), jax.grad(loss)(factors, exact))


@pytest.mark.parametrize("window", [None, 40])
def test_the_kernel_equals_the_plain_path(window):
    length, width = 150, 128
    rng = np.random.default_rng(0)
    query = rng.normal(size=(2, length, 2, width)).astype(np.float32)
    key, value = rng.normal(size=(2, 2, 2, length, width)).astype(np.float32)
    valid = np.arange(length) >= np.array([[0], [23]])
    mask = causal_mask(jnp.asarray(valid), window=window)

    def loss(key, attend):
        out = jnp.where(valid[..., None, None], attend(query, key, value), 0)
        return (out**2).sum(), out

    kernel = lambda *qkv: splash_attention(*qkv, mask, window=window, scale=0.1, interpret=True)
    plain = lambda *qkv: attend_causally(*qkv, Scope(None, mask), scale=0.1)
    (_, ours), gradient = jax.value_and_grad(loss, has_aux=True)(key, kernel)
    (_, want), wanted = jax.value_and_grad(loss, has_aux=True)(key, plain)
    close(ours, want)
    close(gradient, wanted)


def test_layers_choose_their_kernel(monkeypatch):
    """Local and global layers, as on a TPU, with the program of the kernel run without one."""
    config = dataclasses.replace(
        CONFIG, head_dim=128, num_layers=3, sliding_layers=(0, 2), rope=RopeConfig(theta=300.0), sliding_rope=None
    )
    run = scaled_pass(config, "left")
    plain, taken = run("full"), []

    def kernel(*arguments, window, **settings):
        taken.append(window)
        return splash_attention(*arguments, window=window, **settings, interpret=True)

    monkeypatch.setattr(attention, "why_plain", lambda *_, **__: None)
    monkeypatch.setattr(attention, "splash_attention", kernel)
    for ours, want in zip(run("dots"), plain, strict=True):  # which keeps what the kernel returns
        close(ours, want)
    assert set(taken) == {None, WINDOW}


def scaled_pass(config, side):
    """remat -> states of all valid tokens under key scales, and gradients by the scales."""
    params, coefficients = random_parameters(config), COEFFICIENTS[:3]
    ids, mask = rows(side, vocabulary=config.vocab_size)
    block, _ = image_places(mask)

    def run(remat):
        def loss(coefficients):
            model = assemble(config, params)
            change = scaling(coefficients, ids, mask, block, (0,))
            states = model(sequence_of(model, ids, mask), change, remat=remat).hidden
            return jnp.where(mask[..., None], jnp.sin(states), 0).sum() / 40, states

        (_, states), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(coefficients)
        return np.asarray(states)[mask], gradients

    return run


@pytest.mark.parametrize("side", ["left", "right"])
def test_layers_take_the_kernel_of_cudnn(monkeypatch, side):
    """As on an NVIDIA GPU, with XLA in the place of cuDNN: states, and gradients by the key scales."""
    no_windows = {"sliding_window": None, "sliding_layers": None, "sliding_rope": None}
    config = dataclasses.replace(CONFIG, num_layers=3, rope=RopeConfig(theta=300.0), **no_windows)
    run = scaled_pass(config, side)
    plain, taken = run("full"), []

    def through_xla(*arguments, **settings):
        taken.append(settings)
        return cudnn_attention(*arguments, **settings, implementation="xla")

    monkeypatch.setattr(attention, "why_not_cudnn", lambda *_, **__: None)
    monkeypatch.setattr(attention, "cudnn_attention", through_xla)
    for remat in ("none", "dots"):
        for ours, want in zip(run(remat), plain, strict=True):
            close(ours, want)
    assert taken


def test_which_way_is_taken_and_why():
    text = dataclasses.replace(CONFIG, head_dim=256, rope=RopeConfig(theta=1.0), sliding_rope=None)
    assert attention_path(dataclasses.replace(text, images_see_themselves=False), TPU) == "kernel"
    assert "in both directions" in attention_path(text, TPU)
    assert "width 12 are no multiple of 128" in attention_path(CONFIG, TPU)
    assert "for TPUs, this is a cpu" in attention_path(text, None)
    assert "left out" in why_plain(128, TPU, window_with_gaps=True) and why_plain(128, TPU) is None


def test_kinds_of_layers():
    rope, local = CONFIG.rope, CONFIG.sliding_rope
    assert layer_kinds(CONFIG, WINDOW + 1) == ((WINDOW, local), (WINDOW, local), (None, rope), (WINDOW, local), (None, rope))
    assert layer_kinds(CONFIG, WINDOW)[:3] == ((None, local), (None, local), (None, rope))
    everywhere = dataclasses.replace(CONFIG, sliding_layers=None, sliding_rope=None)
    assert set(layer_kinds(everywhere, 100)) == {(WINDOW, rope)} and set(layer_kinds(everywhere, 3)) == {(None, rope)}


def test_layers_of_one_kind_choose_nothing():
    """A decoder without windows has no mask of two kinds, and slices nothing but its weights."""
    plain = dataclasses.replace(CONFIG, sliding_window=None, sliding_layers=None, sliding_rope=None)
    params = random_parameters(plain)
    ids, mask, fields = inputs(plain)
    model = assemble(plain, params)
    scope = model.runner(sequence_of(model, ids, mask, **fields)).scope
    assert scope.kinds is None and scope.of_layer(jnp.int32(3)) is scope and scope.mask.shape == (3, LENGTH, LENGTH)


def test_settings_that_do_not_fit():
    with pytest.raises(ConfigError, match=r"text.rope.sections \[2, 2\] sum to 4: there are 6 frequencies"):
        dataclasses.replace(CONFIG, rope=RopeConfig(theta=1.0, sections=(2, 2)))
    with pytest.raises(ConfigError, match=r"text.sliding_layers has 5: there are layers 0 to 4"):
        dataclasses.replace(CONFIG, sliding_layers=(5,))


SHARDED = """
import sys
import jax, numpy as np
from jax.sharding import NamedSharding
from test_decoder_paths import COEFFICIENTS, CONFIG, inputs, loss_and_gradients, random_parameters
from lsg_jax.config import MeshConfig
from lsg_jax.sharding import make_mesh, param_spec

assert jax.device_count() == 4
mesh, params = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2)), random_parameters(CONFIG)
path = lambda keys: "language_model/" + "/".join(key.key for key in keys)
put = lambda keys, leaf: jax.device_put(leaf, NamedSharding(mesh, param_spec(path(keys), leaf.shape, mesh)))
ids, mask, fields = inputs(CONFIG)
rows = lambda x, axis: np.concatenate([x, x.take([0], axis)], axis)  # four rows, for two devices along fsdp
ids, mask = rows(ids, 0), rows(mask, 0)
fields = {name: rows(x, 1 if name == "added" else 0) for name, x in fields.items()}
one = loss_and_gradients(params, COEFFICIENTS, ids, mask, fields, CONFIG)
many = loss_and_gradients(jax.tree.map_with_path(put, params), COEFFICIENTS, ids, mask, fields, CONFIG, mesh=mesh)
np.testing.assert_allclose(np.asarray(many[0])[mask], np.asarray(one[0])[mask], rtol=0, atol=1e-4)
np.testing.assert_allclose(many[1], one[1], rtol=0, atol=1e-4)
"""


def test_sharded_equals_unsharded():
    here = Path(__file__).parent
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=4"
    path = os.pathsep.join([str(here), str(here.parent), str(here.parent.parent)])
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", SHARDED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_leaf_has_one_rule(params):
    mesh = SimpleNamespace(shape={"data": 1, "fsdp": 1, "tensor": 1})
    path = lambda keys: "language_model/" + "/".join(key.key for key in keys)
    jax.tree.map_with_path(lambda keys, leaf: param_spec(path(keys), leaf.shape, mesh), params)
