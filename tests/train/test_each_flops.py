"""The work that one run of all layers' gates saves: matrix products of the traced steps at the size of LLaVA-1.5-7B."""

from llava_7b import LAYERS, abstract_step, alone, each

from lsg_jax.plan.traced import traced_flops


def flops(gate, trips=None):
    """FLOPs of one training step, without what nobody uses."""
    step, arguments = abstract_step(gate)
    return traced_flops(step, *arguments, trips=trips)


def test_all_gates_in_one_run_cost_at_most_three_quarters_of_separate_runs():
    low, middle, high, top = 0, 15, LAYERS - 2, LAYERS - 1
    own = {layer: flops(alone(layer)) for layer in (low, middle, high, top)}
    assert 2 * own[middle] == own[low] + own[high]  # linear in the layer
    separate = top * (own[low] + own[high]) / 2 + own[top]
    # between a gate at layer l and the last layer lie LAYERS - 2 - l others: 15 in the mean over the gates below the last layer
    together = flops(each(range(LAYERS)), trips={"of_gate": (LAYERS - 2) / 2})
    assert 0.65 < together / separate <= 0.75
    two = flops(each((low, high)), trips={"of_gate": (LAYERS - 2) / 2})
    assert two < own[low] + own[high]
