"""A tiny gated model behind `lsg serve`, and a server whose answers are made up."""

import jax
import numpy as np
import pytest
from made_server import MadeEngine, MadeModels
from serving import LIMITS, NAME, served
from starlette.testclient import TestClient

import lsg_jax
from lsg_jax.checkpoint import read_manifest
from lsg_jax.config import GateConfig, SinkConfig
from lsg_jax.data.processor import Processor
from lsg_jax.methods.gates import Gates
from lsg_jax.serve.metrics import Metrics
from lsg_jax.serve.pictures import Pictures
from lsg_jax.serve.question import Limits
from lsg_jax.serve.server import ChatServer, make_app


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


@pytest.fixture(scope="module")
def processor(tiny_model):
    return Processor.from_folder(tiny_model / "hf", read_manifest(tiny_model).config)


@pytest.fixture
def server(processor):
    metrics = Metrics()
    limits = Limits(LIMITS.max_length, LIMITS.max_new_tokens, max_images=3, max_pixels=10_000, max_body=200_000)
    pictures = Pictures(max_pixels=limits.max_pixels)
    return ChatServer(MadeModels(processor), MadeEngine(metrics), pictures, metrics, limits, name=NAME, fingerprint="none")


@pytest.fixture
def client(server):
    with TestClient(make_app(server, None), base_url="http://127.0.0.1", raise_server_exceptions=False) as found:
        yield found
