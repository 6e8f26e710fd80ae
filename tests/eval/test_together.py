"""Several methods in one pass: answers as one by one, and the vision tower and lower layers run once."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from eval.test_answering import questions
from test_vlm import SINKS, gates

import lsg_jax
from lsg_jax.answer_programs import read_batch, read_first, read_rest
from lsg_jax.config import EvalConfig, GateConfig
from lsg_jax.eval.answering import answer, answer_all
from lsg_jax.eval.runner import evaluate
from lsg_jax.eval.together import MOST_STARTS, Together, chosen_starts, groups
from lsg_jax.methods.diysink import DiySink
from lsg_jax.methods.fixed import Fixed, FixedConfig
from lsg_jax.methods.gates import Gates
from lsg_jax.methods.lora import Lora, LoraConfig
from lsg_jax.methods.pai import Pai, PaiConfig
from lsg_jax.methods.sink_front import SinkFront
from lsg_jax.plan.traced import traced_flops

CONFIG = EvalConfig(batch_size=3, max_new_tokens=6)


@pytest.fixture(scope="module")
def models(tiny_model):
    base = lsg_jax.load(tiny_model, sinks=SINKS)

    def trained(method):
        start = method.for_model(base.config).initial(base.config, base.frozen, jax.random.key(0))
        return jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(jax.random.key(1), leaf.shape), start)

    made = gates()
    high, low_rank = Gates(GateConfig(layers=(3,))), Lora(LoraConfig(layer=2, rank=2))
    return {
        "base": base,
        "lsg": base.with_method(Gates(made.gate), made.parameters),
        "high": base.with_method(high, trained(high)),
        "fixed": base.with_method(Fixed(FixedConfig(layers=(2,), coefficients=(0.1, 1.0)))),
        "lora": base.with_method(low_rank, trained(low_rank)),
        "pai": base.with_method(Pai(PaiConfig(first_layer=1, last_layer=3))),
        "sink_front": base.with_method(SinkFront()),
    }


def test_answers_and_ratios_are_those_of_each_model_alone(models):
    assert [list(group) for group in groups(models)] == [list(models)]
    models = {name: models[name] for name in ("base", "lsg", "pai")}  # the logits of the others are compared below
    items, prompts = (rows[:8] for rows in questions())
    together = answer_all(models, items, prompts, CONFIG, max_new_tokens=6)
    for name, model in models.items():
        alone = answer(model, items, prompts, CONFIG, max_new_tokens=6)
        assert [found.text for found in together[name]] == [found.text for found in alone], name
        for a, b in zip(together[name], alone, strict=True):
            assert (a.ratios is None) == (b.ratios is None) == (name != "lsg")
            if a.ratios is not None:
                np.testing.assert_allclose(a.ratios, b.ratios, atol=1e-5)
    for name in ("lsg", "pai"):
        assert any(a.text != b.text for a, b in zip(together[name], together["base"], strict=True)), name


def test_the_logits_of_what_is_read_are_those_of_each_model_alone(models):
    """Hidden states before the head, and keys and values of every layer."""
    base, (items, prompts) = models["base"], questions()
    batch = base.questions([[items[i].images[0].read()] for i in range(3)], prompts[:3])
    starts = (0, 1, 3)
    _, _, prefix = read_first(base.params, batch, base.graphdef, 2, starts)
    for name, start in [("lsg", 1), ("high", 3), ("fixed", 1), ("lora", 0), ("sink_front", None)]:
        model = models[name]
        found = read_rest(model.params, batch, prefix, model.graphdef, 2, start)
        expected = read_batch(model.params, batch, model.graphdef, 2)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4), found, expected)


def test_work_below_the_lowest_change_is_done_once(models):
    """A model that changes layer l costs the layers from l on, and no vision tower."""
    base, (items, prompts) = models["base"], questions()
    batch = base.questions([[items[0].images[0].read()]], prompts[:1])
    layers = base.config.text.num_layers
    first = lambda model, starts: lambda p, b: read_first(p, b, model.graphdef, 2, starts)
    rest = lambda model, start: lambda p, b, prefix: read_rest(p, b, prefix, model.graphdef, 2, start)
    whole = traced_flops(lambda p, b: read_batch(p, b, base.graphdef, 2), base.params, batch)
    assert traced_flops(first(base, (0, 2)), base.params, batch) == whole
    fixed = models["fixed"]
    prefix = jax.eval_shape(first(base, (0, 1, 2, 3)), base.params, batch)[2]
    cost = [traced_flops(rest(fixed, start), fixed.params, batch, prefix) for start in (1, 2)]
    text = traced_flops(lambda p, b: read_batch(p, b, base.graphdef, 2), base.params, batch.without_images())
    assert text - cost[0] == pytest.approx(cost[0] - cost[1], rel=1e-3)  # a layer each, and all but the layers is the same
    assert cost[1] < 0.7 * whole
    assert Together({"base": base, "fixed": fixed}).start == {"base": layers - 1, "fixed": 2}


def test_models_that_read_other_features_answer_apart(models):
    base = models["base"]
    route = DiySink()
    start = route.initial(base.config, base.frozen, jax.random.key(0))
    others = {
        "diysink": base.with_method(route, start),
        "other_sinks": base.with_method(models["fixed"].method, sinks=replace(SINKS, vit_tau=1.0)),
    }
    chosen = {name: models[name] for name in ("base", "fixed", "lsg")}
    assert [list(group) for group in groups(chosen | others)] == [["base", "fixed", "lsg"], ["diysink"], ["other_sinks"]]
    assert [list(group) for group in groups(others)] == [["diysink"], ["other_sinks"]]
    assert [list(group) for group in groups({"base": base})] == [["base"]]


@pytest.mark.parametrize("lowest", [[], [None, 0], [5, 3, 5, None], [99], list(range(32))])
def test_starts_are_few_and_below_what_is_changed(lowest):
    starts = chosen_starts(lowest, 32)
    assert starts[0] == 0 and list(starts) == sorted(set(starts)) and len(starts) <= MOST_STARTS + 1
    wanted = {min(layer, 31) for layer in lowest if layer}
    assert set(starts[1:]) <= wanted
    if len(wanted) <= MOST_STARTS:
        assert set(starts[1:]) == wanted


def test_a_resumed_evaluation_equals_one_run(models, tmp_path):
    """One model's answers are there already; the others go on from the same pass."""
    chosen = {name: models[name] for name in ("base", "lsg", "fixed")}
    settings = EvalConfig(benchmarks={"scenes": ""}, limit=8, batch_size=3, max_new_tokens=2)
    whole = evaluate(chosen, settings, tmp_path / "whole")
    for log in (tmp_path / "whole/answers").iterdir():
        if "lsg" in log.name:
            (tmp_path / "again/answers").mkdir(parents=True)
            (tmp_path / "again/answers" / log.name).write_bytes(log.read_bytes())
    again = evaluate(chosen, settings, tmp_path / "again")
    assert again == whole
    work = whole.benchmarks["scenes"].work
    layers = models["base"].config.text.num_layers
    assert work == {"layers_run": 8 * (3 * layers - 1 - 2), "layers_naive": 24 * layers, "share": work["share"]}


def test_questions_without_images_share_no_pass(models, tmp_path):
    chosen = {name: models[name] for name in ("base", "lsg", "fixed")}
    (tmp_path / "text.jsonl").write_text('{"id": "1", "question": "How many?", "answer": "2"}\n')
    settings = EvalConfig(benchmarks={"text": str(tmp_path / "text.jsonl")}, max_new_tokens=2)
    result = evaluate(chosen, settings, tmp_path / "out").benchmarks["text"]
    layers = models["base"].config.text.num_layers
    assert result.work == {"layers_run": 3 * layers, "layers_naive": 3 * layers, "share": 1.0}
