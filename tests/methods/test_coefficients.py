"""Coefficients by layer, as parameters: equal to `Fixed` at the same layers, and to the base model where all are 1."""

import numpy as np
import pytest

import lsg_jax
from lsg_jax.config import SinkConfig
from lsg_jax.errors import ConfigError
from lsg_jax.methods.coefficients import Coefficients
from lsg_jax.methods.fixed import Fixed, FixedConfig

PATCHES, IMAGE = 49, 3


def test_as_fixed_and_as_the_base_model(tiny_model):
    vlm = lsg_jax.load(tiny_model, sinks=SinkConfig(criterion="norm", vit_tau=10.0))
    rng, layers = np.random.default_rng(0), vlm.config.text.num_layers
    ids = rng.integers(5, 200, (1, PATCHES + 8))
    ids[:, 2 : PATCHES + 2] = IMAGE
    size = vlm.config.image.size
    pixels = rng.normal(size=(1, 3, size, size)).astype(np.float32)
    by_layer = np.ones((layers, 2), np.float32)
    under = lambda values: vlm.with_method(Coefficients(), {"by_layer": values}).logits(ids, pixels)
    base = vlm.logits(ids, pixels)
    np.testing.assert_allclose(under(by_layer), base, atol=1e-5)
    by_layer[[1, 3]] = 0.25, 1.5
    fixed = vlm.with_method(Fixed(FixedConfig((1, 3), (0.25, 1.5)))).logits(ids, pixels)
    np.testing.assert_allclose(under(by_layer), fixed, atol=1e-5)
    assert np.abs(fixed - base).max() > 1e-2


def test_v_sinks_must_be_known(tiny_model):
    with pytest.raises(ConfigError, match="no V-sink dimensions are known"):
        lsg_jax.load(tiny_model).with_method(Coefficients(), {})
