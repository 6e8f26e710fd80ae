"""VAR by the rules of its published code, against what that code made of the same arrays (golden/record_var.py)."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from lsg_jax.config import from_dict
from lsg_jax.errors import ConfigError
from lsg_jax.eval.registry import BENCHMARKS
from lsg_jax.methods.var import Var, VarConfig, attention_redistribution
from lsg_jax.types import KVCache

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "var.json").read_text(encoding="utf-8"))
TAU = GOLDEN["settings"]["tau"]


def edited(case, **settings):
    """Our edit of the recorded weights, float32 [1, N, T, S] each: of the prompt, and of the next token after it."""
    hidden, patches = np.array(case["hidden"], np.float32)[None], GOLDEN["patches"]
    place = np.arange(hidden.shape[1])[None]
    visual = (place >= GOLDEN["first_patch"]) & (place < GOLDEN["first_patch"] + patches)
    config, dims, layer = VarConfig(tau=TAU, **settings), tuple(GOLDEN["dims"]), GOLDEN["layer"]
    var = attention_redistribution(config, visual=visual, valid=np.ones_like(visual), dims=dims, num_layers=4)
    slice_of = lambda inputs: tuple(None if leaf is None else leaf[0] for leaf in inputs)
    change = var.layer(slice_of(var.per_layer(layer, layer + 1)), hidden)
    prompt = change.edit(np.array(case["prompt"]["weights"], np.float32)[None], None)
    room = lambda mask: jnp.pad(jnp.asarray(mask), ((0, 0), (0, 1)))
    kept = jnp.stack([room(change.kept)] * 4)
    after = var.while_decoding(KVCache(key=None, value=None, valid=room(visual), kept=kept), jnp.int32(hidden.shape[1]))
    token = hidden[:, :1]  # a sink, as a token of the answer may be
    change = after.layer(slice_of(after.per_layer(layer, layer + 1)), token)
    return prompt, change.edit(np.array(case["next"]["weights"], np.float32)[None], None)


@pytest.mark.parametrize("number", [0, 1], ids=["visual sinks", "no visual sink"])
def test_released_rules_equal_the_published_code(number):
    case = GOLDEN["cases"][number]
    recorded = [np.array(case[name]["edited"], np.float32) for name in ("prompt", "next")]
    before = [np.array(case[name]["weights"], np.float32) for name in ("prompt", "next")]
    for ours, reference, weights in zip(edited(case, rules="released"), recorded, before, strict=True):
        np.testing.assert_allclose(ours[0], reference, rtol=0, atol=1e-6)
        changed = (reference != weights).any(-1)
        assert not changed.any() if number else changed.any() and not changed.all()
    by_paper = edited(case, rules="paper", rho=0.5, kept=0.6)  # text sinks give to the image in a layer without visual ones
    assert np.abs(by_paper[0][0] - recorded[0]).max() > 0.05 if number else np.allclose(by_paper[0][0], recorded[0], atol=1e-6)


def test_each_set_of_rules_has_its_own_values_and_layers():
    paper, released = VarConfig().filled(), VarConfig(rules="released").filled()
    assert (paper.rho, paper.kept) == (0.8, 0.4) and (released.rho, released.kept) == (0.5, 0.6)
    by_kind = {
        kind: Var(VarConfig()).for_benchmark(kind).settings.rho for kind in ("general", "hallucination", "vision_centric")
    }
    assert by_kind == {"general": 0.8, "hallucination": 0.5, "vision_centric": 0.9}
    kinds = {name: benchmark.kind for name, benchmark in BENCHMARKS.items() if benchmark.kind != "general"}
    assert kinds == {
        **dict.fromkeys(("pope", "chair", "amber", "hallusionbench"), "hallucination"),
        **dict.fromkeys(("cv_bench", "mmvp"), "vision_centric"),
    }
    assert Var(VarConfig(rho=0.3)).for_benchmark("hallucination").settings.rho == 0.3
    assert Var(VarConfig(rules="released")).for_benchmark("vision_centric").settings.rho == 0.5
    mask = np.ones((1, 3), bool)
    enabled = [
        attention_redistribution(VarConfig(rules=rules), visual=mask, valid=mask, dims=(0,), num_layers=5).enabled.tolist()
        for rules in ("paper", "released")
    ]
    assert enabled == [[False, False, True, True, False], [False, False, True, True, True]]
    old = from_dict(VarConfig, {"tau": 20.0, "rho": 0.5, "min_visual": 0.2, "p": 0.6, "first_layer": 2}, where="run.json")
    assert old == VarConfig(rho=0.5, kept=0.6)  # what earlier versions computed
    with pytest.raises(ConfigError, match=r"var\.p is the earlier name of var\.kept: give one of them"):
        from_dict(VarConfig, {"p": 0.6, "kept": 0.4}, where="c.toml")
    assert Var(VarConfig(rules="released")).without_bos and not Var(VarConfig()).without_bos
