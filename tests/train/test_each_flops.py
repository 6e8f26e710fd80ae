"""The work that one run of all layers' gates saves: matrix products of the traced steps at the size of LLaVA-1.5-7B."""

import math

import jax
from jax.extend.core import jaxprs_in_params
from jax.interpreters.partial_eval import dce_jaxpr
from llava_7b import LAYERS, abstract_step, alone, each


def flops(gate):
    """FLOPs of one training step, without what nobody uses."""
    step, arguments = abstract_step(gate)
    jaxpr = jax.make_jaxpr(step)(*arguments).jaxpr
    return products(dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0])


def products(jaxpr):
    total = 0
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        assert name not in ("while", "cond", "conv_general_dilated"), f"{name} is not counted"
        if name == "dot_general":
            contracted = math.prod(equation.invars[0].aval.shape[axis] for axis in parameters["dimension_numbers"][0][0])
            total += 2 * math.prod(equation.outvars[0].aval.shape) * contracted
        times = parameters["length"] if name == "scan" else 1
        total += times * sum(products(inner) for inner in jaxprs_in_params(parameters))
    return total


def test_all_gates_in_one_run_cost_at_most_three_quarters_of_separate_runs():
    low, middle, high, top = 0, 15, LAYERS - 2, LAYERS - 1
    # a run of one gate: linear in its layer but for the last layer, which computes answer rows only
    own = {layer: flops(alone(layer)) for layer in (low, middle, high, top)}
    assert 2 * own[middle] == own[low] + own[high]
    separate = top * (own[low] + own[high]) / 2 + own[top]
    # one run: the highest gate as if alone, and for every other one its suffix, linear as well
    suffix = {layer: flops(each([layer, top])) - own[top] for layer in (low, middle)}
    suffix[high] = 2 * suffix[middle] - suffix[low]
    assert flops(each([low, high, top])) == own[top] + suffix[low] + suffix[high]
    together = own[top] + top * (suffix[low] + suffix[high]) / 2
    assert 0.7 < together / separate <= 0.75
