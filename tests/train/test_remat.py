"""`train.remat = "auto"`: which policy it takes, and that the run is the same."""

from types import SimpleNamespace

import jax
import pytest

from lsg_jax.errors import ConfigError
from lsg_jax.memory import device_bytes
from lsg_jax.train.remat import fastest_that_fits

SIZES = {"none": 24, "dots": 13, "mlp": 9, "full": 4, "offload": 3}


def compiled(policy):
    if SIZES[policy] > 20:  # as a TPU's compiler says it
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory on HBM")
    sizes = {"argument": 1, "output": 1, "alias": 1, "temp": SIZES[policy] - 1}
    return SimpleNamespace(memory_analysis=lambda: SimpleNamespace(**{f"{k}_size_in_bytes": v for k, v in sizes.items()}))


@pytest.mark.parametrize("memory, policy", [(15, "dots"), (13, "dots"), (12, "mlp"), (4, "full"), (3, "offload")])
def test_the_fastest_policy_that_fits(memory, policy):
    found, step = fastest_that_fits(compiled, memory)
    assert found == policy and device_bytes(step) == SIZES[policy]


def test_nothing_fits():
    with pytest.raises(ConfigError, match=r"no policy fits .* lower train\.batch_size"):
        fastest_that_fits(compiled, 2)


def test_other_failures_are_not_taken_for_a_lack_of_memory():
    def broken(policy):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        fastest_that_fits(broken, 100)
