"""DIYSink: against a Hugging Face model fed with embeddings made by hand, its two-step questions, and its training."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax.sharding import PartitionSpec
from test_gated_parity import PATCHES, assert_close, between, examples, hf_model, ours
from whole_model import loss_and_gradients, plain_logits

from lsg_jax.checkpoint import RunFolder, read_step
from lsg_jax.config import DataConfig, EvalConfig, MeshConfig, TrainConfig
from lsg_jax.eval import answering
from lsg_jax.eval.answering import answer
from lsg_jax.eval.benchmark import Item
from lsg_jax.methods.diysink import BOTH, GLOBAL, LOCAL, DiySink, DiySinkConfig, QuestionWeights, read_route, taking_part
from lsg_jax.methods.method_model import abstract_model, assemble
from lsg_jax.methods.sink_front import SinkFront, SinkFrontConfig
from lsg_jax.opening import load_backbone, open_trained
from lsg_jax.run_config import RunConfig
from lsg_jax.sharding import make_mesh, place_rows, shard_params
from lsg_jax.train.loop import _loop, set_up
from lsg_jax.types import IGNORE

TAU = 18.5  # of the drawn scenes: their patches have norms from 13.8 to 20.6 in the tiny model, 18.4 in the middle


def test_routes_are_read_from_words():
    for complexity, scope, route in [
        ("simple", "holistic", GLOBAL),
        ("Simple.", "**Holistic**", GLOBAL),
        ("simple", "LOCAL details", LOCAL),
        ("complex", "local", BOTH),
        ("simple or complex", "local", BOTH),
        ("The cat is black.", "holistic", BOTH),
        ("simple", "holistic and local", BOTH),
        ("simple", "locally", BOTH),
        ("", "", BOTH),
    ]:
        assert read_route(complexity, scope) == route, (complexity, scope)
    asked = DiySink().first_questions(" How many {dogs}?\n")
    assert len(asked) == 2 and all(first.sees_image and '"How many {dogs}?"' in first.text for first in asked)


def test_a_route_that_would_keep_nothing_keeps_all():
    some, none, every = [True, False, False], [False] * 3, [True] * 3
    cases = [
        (some, BOTH, every),
        (some, GLOBAL, some),
        (some, LOCAL, [False, True, True]),
        (none, GLOBAL, every),
        (none, LOCAL, every),
        (every, GLOBAL, every),
        (every, LOCAL, every),
    ]
    is_sink, route, kept = (jnp.array(column) for column in zip(*cases, strict=True))
    np.testing.assert_array_equal(taking_part(is_sink[:, None], route)[:, 0], kept)
    images = jnp.array([[some, none, every]] * 2)  # of one row each
    np.testing.assert_array_equal(taking_part(images, jnp.array([GLOBAL, LOCAL]))[0], [some, every, every])
    np.testing.assert_array_equal(taking_part(images, jnp.array([GLOBAL, LOCAL]))[1], [[False, True, True], every, every])


def vit_features(model, data):
    """What enters the projector: [2, P, Dv] of the two images."""
    seen = []
    hook = model.model.multi_modal_projector.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(**data.torch())
    hook.remove()
    return seen[0]


def by_hand(model, data, method, parameters, routes):
    """Logits of each row's kept tokens, the mean loss, and the torch parameters with their gradients.

    Row by row without any padding: what a route drops is not in the sequence at all.
    """
    torch_of = lambda leaf: torch.tensor(np.asarray(leaf)).requires_grad_()
    parameters = jax.tree.map(torch_of, parameters)

    def project(name, features):
        first, second = parameters[name]["linear_1"], parameters[name]["linear_2"]
        inner = torch.nn.functional.gelu(features @ first["kernel"] + first["bias"])
        return inner @ second["kernel"] + second["bias"]

    embed = model.get_input_embeddings().weight.detach()
    large = lambda patches: torch.linalg.norm(patches, dim=-1) >= method.tau
    sinks_first = [torch.cat([patches[large(patches)], patches[~large(patches)]]) for patches in vit_features(model, data)]
    features = dict(zip(data.image_rows, sinks_first, strict=True))
    logits, kept_positions, losses = [], [], []
    for row in range(len(data.ids)):
        positions = np.flatnonzero(data.mask[row])
        prompt = [t for t in positions if t <= data.gate_position[row] and data.ids[row, t] != 3]
        question = embed[data.ids[row, prompt]].mean(0)
        weight = [1.0, 1.0]
        if method.routing == "mlp":
            p = parameters["weights"]
            normed = (question - question.mean()) / torch.sqrt(question.var(unbiased=False) + 1e-5)
            inner = torch.nn.functional.gelu(normed @ p["fc1_kernel"] + p["fc1_bias"], approximate="tanh")
            weight = 2 * torch.softmax(inner @ p["fc2_kernel"] + p["fc2_bias"], 0)
        sequence, kept, patch = [], [], 0
        for t in positions:
            if data.ids[row, t] != 3:
                sequence.append(embed[data.ids[row, t]])
            else:
                feature, patch = features[row][patch], patch + 1
                is_sink = bool(torch.linalg.norm(feature) >= method.tau)
                if routes[row] == (LOCAL if is_sink else GLOBAL):
                    continue
                name = "sink_projector" if is_sink else "other_projector"
                sequence.append(project(name, feature) * weight[0 if is_sink else 1])
            kept.append(t)
        out = model(inputs_embeds=torch.stack(sequence)[None]).logits[0]
        logits.append(out)
        kept_positions.append(kept)
        target = torch.tensor(data.labels[row, kept][1:])
        losses.append(
            torch.nn.functional.cross_entropy(out[:-1], target, ignore_index=IGNORE, reduction="none")[target != IGNORE]
        )
    loss = torch.cat(losses).mean()
    loss.backward()
    return [out.detach().numpy() for out in logits], kept_positions, loss.item(), parameters


def test_logits_and_gradients_against_hugging_face():
    """Weights of the sets and routes at once, which no routing combines: each also shows in the gradients of the others."""
    routes = (GLOBAL, BOTH, LOCAL)
    data, model = examples("left"), hf_model("clip", "llama")
    config, frozen = ours("clip", "llama")
    features = vit_features(model, data).numpy()
    method = DiySinkConfig(tau=between(np.linalg.norm(features, axis=-1), 0.3), routing="mlp", width=8)
    sinks = (np.linalg.norm(features, axis=-1) >= method.tau).sum(1)
    assert sinks.min() > 0 and sinks.max() < PATCHES
    graphdef, _ = abstract_model(config, DiySink(method))
    batch, everything = data.batch().replace(route=jnp.array(routes)), data.batch().replace(route=jnp.zeros(3, int))

    start = DiySink(method).initial(config, frozen, jax.random.key(0))
    (_, untrained), gradients = loss_and_gradients(start, frozen, everything, data.labels, graphdef, "full")
    front = SinkFront(SinkFrontConfig(tau=method.tau, positions="new"))
    reordered = plain_logits(frozen, data.batch(), abstract_model(config, front)[0])
    np.testing.assert_allclose(untrained, reordered, rtol=0, atol=1e-6 * np.abs(reordered).max())
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients["sink_projector"]))

    rng = np.random.default_rng(1)
    parameters = jax.tree.map(lambda leaf: leaf + jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32), start)
    alone = {"weights": parameters["weights"]}  # over the frozen projector, as both projectors with its parameters
    both = {**start, **alone}
    graph_alone = abstract_model(config, DiySink(dataclasses.replace(method, trains="weights")))[0]
    (loss, logits), gradients = loss_and_gradients(both, frozen, batch, data.labels, graphdef, "full")
    (loss_alone, logits_alone), of_alone = loss_and_gradients(alone, frozen, batch, data.labels, graph_alone, "full")
    np.testing.assert_allclose(logits_alone, logits, rtol=0, atol=1e-6 * np.abs(logits).max())
    assert_close(loss_alone, loss, "loss of the weights alone")
    jax.tree.map(lambda a, b: assert_close(a, b, "gradient"), of_alone, {"weights": gradients["weights"]})

    (loss, logits), gradients = loss_and_gradients(parameters, frozen, batch, data.labels, graphdef, "full")
    expected, kept, expected_loss, reference = by_hand(model, data, method, parameters, routes)
    assert [len(positions) for positions in kept] == [
        int(mask.sum()) - {GLOBAL: PATCHES - count, LOCAL: count, BOTH: 0}[route]
        for mask, count, route in zip(data.mask, (sinks[0], 0, sinks[1]), routes, strict=True)
    ]
    for row, positions in enumerate(kept):
        assert_close(logits[row][jnp.array(positions)], expected[row], f"logits of row {row}")
    assert_close(loss, expected_loss, "loss")
    where = lambda path: "/".join(key.key for key in path)
    for path, gradient in jax.tree.leaves_with_path(gradients):
        theirs = reference
        for key in path:
            theirs = theirs[key.key]
        assert_close(gradient, theirs.grad.numpy(), f"gradient of {where(path)}")


def test_untrained_weights_are_one_and_add_up_to_two():
    @jax.jit
    def before_and_after(key):
        weights = QuestionWeights(12, 8, rngs=nnx.Rngs(0))
        question = jax.random.normal(key, (5, 12))
        before = weights(question)
        weights.fc2_kernel[...] = jax.random.normal(key, (8, 2))
        return before, weights(question)

    before, after = before_and_after(jax.random.key(1))
    np.testing.assert_array_equal(before, np.ones((5, 2)))
    np.testing.assert_allclose(after.sum(-1), 2.0, rtol=1e-6)
    assert np.abs(after - 1).max() > 0.1


def test_projectors_lie_on_a_mesh_as_the_stock_one():
    config, _ = ours("clip", "llama")
    _, abstract = abstract_model(config, DiySink(DiySinkConfig(routing="mlp")))
    sharded = shard_params(abstract, make_mesh(MeshConfig()))
    specs = lambda tree: jax.tree.map(lambda leaf: leaf.sharding.spec, tree)
    for name in ("sink_projector", "other_projector"):
        assert specs(sharded["trained"][name]) == specs(sharded["projector"])
    assert set(specs(sharded["trained"]["weights"]).values()) == {PartitionSpec()}


def test_projectors_are_used_in_the_backbones_dtype():
    config, frozen = ours("clip", "llama")
    method = DiySinkConfig(tau=5.0)
    half = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), frozen)
    start = DiySink(method).initial(config, half, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(start)} == {jnp.dtype("float32")}
    model = assemble(abstract_model(config, DiySink(method))[0], half, start)
    features = jax.random.normal(jax.random.key(1), (1, 9, 40), jnp.bfloat16)
    ours_, stock = model.trained(features, features[..., 0] > 0, None, model.projector), model.projector(features)
    assert ours_.dtype == stock.dtype == jnp.bfloat16
    np.testing.assert_array_equal(ours_, stock)


@pytest.fixture(scope="module")
def run_config(tiny_model, records, tmp_path_factory):
    return RunConfig(
        model=str(tiny_model),
        output=str(tmp_path_factory.mktemp("runs") / "whole"),
        method="diysink",
        tables={"diysink": DiySinkConfig(tau=TAU, routing="mlp")},
        data=DataConfig(records=str(records), max_length=256, max_answer_tokens=8),
        train=TrainConfig(batch_size=4, epochs=3, learning_rate=0.003, save_every=3),
    )


def test_trained_stopped_and_resumed(run_config, tiny_model, tmp_path):
    run = RunFolder(run_config.output)
    with run.lock():
        trainer = set_up(run_config, run)
        before, start = jax.tree.map(np.array, (trainer.vlm.frozen, trainer.state.trained))
        stops = iter([False] * 3 + [True])
        with pytest.raises(Exception, match="stopped at step 4 of 9"):
            _loop(trainer, lambda: next(stops), None)
    with run.lock():
        resumed = set_up(run_config, run)
        assert int(resumed.state.step) == 4
        _loop(resumed, lambda: False, None)
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 10))
    epoch = lambda i: np.mean([line["loss"] for line in lines[3 * i : 3 * i + 3]])
    assert epoch(2) < epoch(0) - 0.2
    bits = lambda array: np.asarray(array).view(np.uint8)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(bits(a), bits(b)), before, trainer.vlm.frozen)

    whole = RunFolder(tmp_path / "whole")
    with whole.lock():
        trainer = set_up(dataclasses.replace(run_config, output=str(whole.path)), whole)
        _loop(trainer, lambda: False, None)
    stored = read_step(run.path)[1]["trained"]
    jax.tree.map(np.testing.assert_array_equal, stored, read_step(whole.path)[1]["trained"])
    assert all((now != then).any() for now, then in zip(jax.tree.leaves(stored), jax.tree.leaves(start), strict=True))

    vlm = open_trained(load_backbone(tiny_model), run.path)
    assert vlm.method == run_config.get_method() and vlm.method.first_questions("Why?") == ()
    jax.tree.map(np.testing.assert_array_equal, vlm.trained, stored)


def test_questions_are_asked_in_two_steps(tiny_model, scenes, monkeypatch):
    """`generate` and `answer` agree, and each answer is that of its own route."""
    base = load_backbone(tiny_model)
    method = DiySink(DiySinkConfig(tau=TAU))
    vlm = base.with_method(method, method.initial(base.config, base.frozen, jax.random.key(0)))
    images = [scenes / f"images/{i}.png" for i in range(4)]
    prompts = ["How many?", "Colour?", "How many?", "Which one?"]
    asked = list(zip(*([first.text for first in method.first_questions(prompt)] for prompt in prompts), strict=True))
    said = list(zip(*(base.generate(images, texts, 8) for texts in asked), strict=True))  # both replies to each prompt
    routes = {replies: (GLOBAL, LOCAL, BOTH)[i % 3] for i, replies in enumerate(dict.fromkeys(said))}
    monkeypatch.setattr(DiySink, "read_replies", lambda self, replies: routes[replies])
    answers = vlm.generate(images, prompts, 4)
    assert len(set(routes.values())) > 1

    encoded = [vlm.processor.encode_question(prompt) for prompt in prompts]
    batch = vlm.pad_questions(encoded, [vlm.processor.pixels(image) for image in images])
    batch = batch.replace(route=np.array([routes[replies] for replies in said], np.int32))
    assert answers == [vlm.processor.decode(row) for row in vlm.generate_batch(batch, 4)]
    assert answers != [vlm.processor.decode(row) for row in vlm.generate_batch(batch.replace(route=np.zeros(4, np.int32)), 4)]

    items = [Item(str(i), "", (), images=(OnDisk(image),)) for i, image in enumerate(images)]
    config = EvalConfig(batch_size=4, near_tie=0.0)
    found = answer(vlm, items, prompts, config, max_new_tokens=4)
    assert [one.text for one in found] == answers
    known, placed = {i: one for i, one in enumerate(found) if i}, []
    place = lambda batch, *where: placed.append(batch) or place_rows(batch, *where)
    monkeypatch.setattr(answering, "place_rows", place)
    assert answer(vlm, items, prompts, config, max_new_tokens=4, known=known) == found
    assert placed[-1].route.tolist() == [routes[said[0]], 0, 0, 0]  # the batch of the whole run, for the same rounding


@dataclasses.dataclass(frozen=True)
class OnDisk:
    path: object

    def read(self):
        return self.path.read_bytes()
