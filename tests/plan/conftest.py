"""`lsg plan` turns the cache of compiled programs off for its process, which here goes on to other tests."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache


@pytest.fixture(autouse=True)
def cache_on():
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()
