"""Attention on NVIDIA GPUs: the call equals the plain path, is lowered for a GPU, and is chosen where cuDNN can compute it."""

import os
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import close

from lsg_jax import memory
from lsg_jax.model.attention import attend_causally
from lsg_jax.model.cudnn_attention import cudnn_attention, why_not_cudnn
from lsg_jax.model.scope import Scope, causal_mask
from lsg_jax.train.remat import fastest_that_fits

LENGTH = 45
PADDED = {
    "none": np.ones((2, LENGTH), bool),
    "left": np.arange(LENGTH) >= np.array([[0], [17]]),
    "right": np.arange(LENGTH) < np.array([[LENGTH], [20]]),
    "both": (np.arange(LENGTH) >= np.array([[3], [17]])) & (np.arange(LENGTH) < 40),
}


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("padding", PADDED)
def test_it_equals_the_plain_path(padding, kv_heads):
    """With `implementation="xla"` of the same call: outputs, and gradients by queries, keys, values and key scales."""
    rng = np.random.default_rng(0)
    query = rng.normal(size=(2, LENGTH, 4, 16)).astype(np.float32)
    key, value = rng.normal(size=(2, 2, kv_heads, LENGTH, 16)).astype(np.float32)
    factors = rng.uniform(0.3, 1.5, (2, 1, LENGTH, 1)).astype(np.float32)
    valid = PADDED[padding]
    mask = causal_mask(jnp.asarray(valid))

    def run(attend):
        def loss(query, key, value, factors):
            out = jnp.where(valid[..., None, None], attend(query, key * factors, value), 0)
            return (out**3).sum(), out

        (_, out), gradients = jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True)(query, key, value, factors)
        return out, *gradients

    ours = run(lambda *qkv: cudnn_attention(*qkv, mask, scale=0.3, implementation="xla"))
    plain = run(lambda *qkv: attend_causally(*qkv, Scope(None, mask), scale=0.3))
    close(ours[0], plain[0], 1e-5)
    for mine, want in zip(ours[1:], plain[1:], strict=True):
        close(mine, want)


def test_a_row_of_padding_alone_gives_zeros():
    query, key = jnp.ones((1, 8, 2, 8)), jnp.ones((1, 2, 8, 8))
    mask = jnp.zeros((1, 8, 8), bool)
    assert (cudnn_attention(query, key, key, mask, implementation="xla") == 0).all()


def gpu(capability="9.0", version="PJRT C API\ncuda 12090"):
    client = SimpleNamespace(platform_version=version)
    device = SimpleNamespace(platform="gpu", client=client, compute_capability=capability)
    return SimpleNamespace(devices=np.array([device]))


@pytest.mark.parametrize(
    ("reason", "arguments", "settings"),
    [
        (None, (jnp.bfloat16, 128, gpu()), {}),
        (None, (jnp.float16, 96, gpu("8.0")), {}),
        (None, (jnp.bfloat16, 256, gpu()), {}),
        ("this is a cpu", (jnp.bfloat16, 128, None), {}),
        ("for NVIDIA GPUs", (jnp.bfloat16, 128, gpu("gfx942", "PJRT C API\nrocm 60300")), {}),
        ("not in float32", (jnp.float32, 128, gpu()), {}),
        ("compute capability 8.0 on, this GPU has 7.5", (jnp.bfloat16, 128, gpu("7.5")), {}),
        ("width 256 are no multiple of 8 up to 128", (jnp.bfloat16, 256, gpu("8.9")), {}),
        ("width 12 are no multiple of 8", (jnp.bfloat16, 12, gpu()), {}),
        ("in both directions", (jnp.bfloat16, 128, gpu()), {"causal": False}),
        ("sliding window", (jnp.bfloat16, 128, gpu()), {"window": True}),
        ("left out between others", (jnp.bfloat16, 128, gpu()), {"gaps": True}),
    ],
)
def test_where_it_is_taken_and_why_not(reason, arguments, settings):
    found = why_not_cudnn(*arguments, **settings)
    assert found is None if reason is None else reason in found


LOWERED = """
import jax, jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as cudnn
cudnn.check_cudnn_version = lambda: 91000  # of the library, which is not here
cudnn.check_compute_capability = lambda capability: True
from lsg_jax.config import MeshConfig
from lsg_jax.model.attention import by_heads
from lsg_jax.model.cudnn_attention import cudnn_attention
from lsg_jax.sharding import make_mesh
query, key = jnp.zeros((4, 64, 8, 128), jnp.bfloat16), jnp.zeros((4, 4, 64, 128), jnp.bfloat16)
mask = jnp.ones((4, 64, 64), bool)
for mesh in (None, make_mesh(MeshConfig(data=1, fsdp=2, tensor=2))):
    loss = lambda *qkv: by_heads(cudnn_attention, *qkv, mask, mesh).astype(jnp.float32).sum()
    lowered = jax.jit(jax.grad(loss, (0, 1, 2))).trace(query, key, key).lower(lowering_platforms=("cuda",)).as_text()
    assert lowered.count("@__cudnn$fmhaSoftmax(") == lowered.count("@__cudnn$fmhaSoftmaxBackward(") == 1, lowered
"""


def test_it_is_lowered_for_one_gpu_and_for_several():
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    subprocess.run([sys.executable, "-c", LOWERED], env={**os.environ, "XLA_FLAGS": flags}, check=True, timeout=120)


def test_remat_auto_goes_by_the_memory_of_a_gpu(monkeypatch):
    """`bytes_limit` is what XLA's allocator may take, by default three quarters of the GPU."""
    device = SimpleNamespace(platform="gpu", memory_stats=lambda: {"bytes_limit": 60 << 30, "bytes_in_use": 1 << 30})
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert memory.device_memory() == 60 << 30
    needs = {"none": 90 << 30, "dots": 61 << 30, "mlp": 59 << 30, "full": 20 << 30}

    def compile_with(policy):
        sizes = SimpleNamespace(
            argument_size_in_bytes=14 << 30,
            output_size_in_bytes=1 << 20,
            alias_size_in_bytes=1 << 20,
            temp_size_in_bytes=needs[policy] - (14 << 30),
        )
        return SimpleNamespace(memory_analysis=lambda: sizes)

    assert fastest_that_fits(compile_with, memory.device_memory())[0] == "mlp"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    fits = partial(memory.check_fits, what="x", remedy="y")
    fits(60 << 30)
    with pytest.raises(memory.ConfigError, match=r"61\.0 GiB or more, and there are 60\.0 GiB"):
        fits(61 << 30)
