"""Dimensions that do not stand out are warned of, by name."""

import jax.numpy as jnp
import numpy as np
import pytest

from lsg_jax.analysis.sink_warnings import run_warnings, verdicts
from lsg_jax.config import SinkConfig
from lsg_jax.sinks.criteria import PROMINENT, prominence, side_by_side

DIMS = (3, 7)


def test_prominence_is_a_multiple_of_the_tokens_own_median():
    x = np.random.default_rng(0).normal(size=(2, 5, 33)).astype(np.float32)
    x[1, 2, 7] = -400.0
    expected = np.abs(x[..., DIMS]) / np.median(np.abs(x), axis=-1, keepdims=True)
    np.testing.assert_allclose(prominence(jnp.asarray(x), DIMS), expected, rtol=1e-6)
    assert not prominence(jnp.zeros((4, 33)), DIMS).any() and prominence(jnp.asarray(x), ()).shape == (2, 5, 0)


def test_no_dimension_of_noise_stands_out_and_a_massive_one_does():
    x = np.random.default_rng(0).normal(size=(20_000, 64)).astype(np.float32) * np.geomspace(1, 1e3, 20_000)[:, None]
    x[77, 7] = 100 * np.abs(x[77]).max()
    low, high = np.asarray(prominence(jnp.asarray(x), DIMS)).max(0)
    assert low < PROMINENT < high


def _seen(vit, llm):
    masks = np.zeros((5, 4), bool)  # [criteria, patches]
    return {
        "vit": {"masks": masks | (np.arange(4) == 2), "prominence": np.array(vit, np.float32)},
        "llm": {"masks": np.stack([masks] * len(llm)), "prominence": np.array(llm, np.float32)},
    }


@pytest.mark.parametrize("criterion", ["dim_abs", "dim_rms", "norm"])
def test_dimensions_that_stand_out_in_no_image_are_named(criterion):
    sinks = SinkConfig(criterion=criterion, vit_dims=DIMS, llm_criterion=criterion, llm_dims=DIMS)
    # the largest of all images and layers counts: 3 in the features of one, 7 in one layer of the other
    seen = [_seen([25.0, 4.0], [[3.0, 2.0], [1.0, 1.0]]), _seen([1.0, 5.5], [[2.0, 1.0], [1.0, 90.0]])]
    found = run_warnings(seen, side_by_side(sinks, "vit"), side_by_side(sinks, "llm"))
    rest = "do not reach 20 times the median of a token anywhere in these images: they may be of another model; "
    rest += "`lsg calibrate` finds this model's"
    named = [f"V-sink dimensions 7 (5.5 times) {rest}", f"L-sink dimensions 3 (3.0 times) {rest}"]
    assert found == ([] if criterion == "norm" else named)


def test_verdicts_and_nothing_to_gate():
    """Shares are the means over images in the layer with most; half of the patches is too many."""
    sinks = SinkConfig(criterion="norm", llm_criterion="massive")
    seen = [_seen([25.0, 30.0], [[30.0, 30.0]] * 2) for _ in range(2)]
    names = [reading.criterion for reading in side_by_side(sinks, "vit")]
    seen[0]["llm"]["masks"][1, names.index("norm")] = True
    found = dict(zip(names, verdicts(seen, "llm", side_by_side(sinks, "llm")), strict=True))
    assert found["norm"] == {"share": 0.5, "verdict": "flags too many"}
    assert found["massive"] == {"share": 0.0, "verdict": "flags none"}
    assert found["dim_abs"] == {"share": None, "verdict": "unknown"}
    assert verdicts(seen, "vit", side_by_side(sinks, "vit"))[names.index("norm")] == {"share": 0.25, "verdict": "applies"}
    readings = side_by_side(sinks, "vit"), side_by_side(sinks, "llm")
    assert not any("nothing to gate" in warning for warning in run_warnings(seen, *readings))
    for each in seen:
        each["vit"]["masks"][:] = False
    (line,) = (warning for warning in run_warnings(seen, *readings) if "nothing to gate" in warning)
    assert line.startswith("no V-sinks in these images by norm at 70, so there is nothing to gate; `lsg calibrate`")
