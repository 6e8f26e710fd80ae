"""A tiny gated model behind `lsg serve`."""

import jax
import numpy as np
import pytest
from serving import served

import lsg_jax
from lsg_jax.config import GateConfig, SinkConfig
from lsg_jax.methods.gates import Gates


@pytest.fixture(scope="session")
def gated(tiny_model):
    """Random weights, which answer at length, with random gates that change the answers."""
    vlm = lsg_jax.load(tiny_model, sinks=SinkConfig(criterion="norm", vit_tau=10.0))
    gates = Gates(GateConfig(layers=(1, 3)))
    initial = gates.initial(vlm.config, vlm.frozen, jax.random.key(0))
    rng = np.random.default_rng(0)
    return vlm.with_method(gates, jax.tree.map(lambda leaf: rng.normal(0, 1, leaf.shape).astype(np.float32), initial))


@pytest.fixture(scope="session")
def tiny(gated):
    """It, served."""
    with served(gated, batch_size=2) as found:
        yield found
