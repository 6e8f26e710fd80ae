"""`auto` sizes: the estimate against compiled programs, what is done where these need more, and answers of any size."""

import dataclasses
import json
from importlib.resources import files

import jax
import numpy as np
import pytest

import lsg_jax
from converters.hf_config import model_config
from converters.tiny_checkpoint import CONFIG
from lsg_jax.analysis.sweep_cells import answer_cells, run_prompts
from lsg_jax.answer_programs import answer_batch, read_batch
from lsg_jax.config import EvalConfig, MeshConfig, SinkConfig
from lsg_jax.eval import sizes
from lsg_jax.eval.answering import answer
from lsg_jax.eval.batches import Bucket, bucket_of
from lsg_jax.eval.benchmarks.scenes import SCENES
from lsg_jax.eval.sizes import (
    MOST_ON_CPU,
    TILE,
    USED,
    Room,
    Size,
    abstract_questions,
    abstract_results,
    compiled_bytes,
    confirmed,
    smaller,
)
from lsg_jax.memory import GIB, tree_bytes
from lsg_jax.methods.method_model import abstract_model
from lsg_jax.sharding import make_mesh, shard_params, tensor_size

TINY = dataclasses.replace(model_config(CONFIG), sinks=SinkConfig(vit_dims=(1,)))
V5E, V5P = 15.75 * GIB, 95.74 * GIB


def published(name, weights="float"):
    raw = json.loads((files("lsg_jax.plan") / "models" / f"{name}.json").read_text(encoding="utf-8"))
    config = model_config(raw, preprocessor=raw.pop("preprocessor", None), where=name)
    return dataclasses.replace(config, text=dataclasses.replace(config.text, weights=weights))


@pytest.mark.parametrize(
    "name, weights, memory, expected",
    [
        ("llava15_7b", "float", V5E, {1: 1, 4: 4, 16: 4}),  # 13 GiB of weights
        ("llava15_7b", "float", V5P, {1: 1, 4: 1, 16: 1}),
        ("llava15_7b", "int8", V5E, {1: 1, 4: 2, 16: 2}),
        ("llava15_13b", "float", V5E, {1: 1, 4: 4, 16: 8}),
        ("llava15_13b", "int8", V5E, {1: 1, 4: 4, 16: 4}),
    ],
)
def test_weights_take_a_quarter_of_each_device_where_the_heads_allow_it(name, weights, memory, expected):
    model = published(name, weights)
    needed = tree_bytes(abstract_model(model, dtype="bfloat16")[1])
    assert {n: tensor_size(model.text, n, weights=needed, memory=memory) for n in expected} == expected
    narrow = dataclasses.replace(model.text, num_heads=6, num_kv_heads=6)
    assert tensor_size(narrow, 16, weights=needed, memory=V5E / 100) == 2


@pytest.mark.parametrize("heads, length", [(2, 128), pytest.param(4, 128, marks=pytest.mark.soak), (4, 256)])
def test_the_estimate_is_near_what_compiled_programs_need(heads, length):
    """Of each question that is added, on a CPU, where attention holds its weights; both heads and both lengths by default."""
    model = dataclasses.replace(TINY, text=dataclasses.replace(TINY.text, num_kv_heads=heads))
    mesh, bucket, new, cells = make_mesh(MeshConfig(), jax.devices()[:1]), Bucket(1, 0, length), 16, 3
    graphdef, abstract = abstract_model(model, mesh=mesh)
    params = shard_params(abstract, mesh)

    def needed(questions):
        batch = abstract_questions(model, mesh, questions, bucket)
        found = []
        for first, then, more in (
            (read_batch, answer_batch, ()),
            (run_prompts, answer_cells, (np.int32(0), np.ones((cells, 2), np.float32))),
        ):
            reading, compiled = compiled_bytes(first, params, batch, graphdef, new)
            results = abstract_results(first, (params, batch), (graphdef, new), compiled)
            if more:
                answering, _ = compiled_bytes(then, params, results[0], *more, graphdef, "v_sink_rest", new)
            else:
                answering, _ = compiled_bytes(then, params, batch.without_images(), *results, graphdef, new)
            found.append(max(reading, answering))
        return np.array(found)

    room = Room.of(model, params, mesh, GIB)
    assert room.plain and room.most == MOST_ON_CPU
    estimated = [room.question(bucket, new), room.shared_pass(bucket) + room.cells(bucket, new, 8 * cells) / 8]
    ratio = np.array(estimated) / ((needed(16) - needed(8)) / 8)
    assert (ratio > 0.8).all() and (ratio < 2.6).all(), ratio


def test_sizes_never_pass_the_limit():
    """For many limits what is chosen is estimated below them, and a tile more is not; nor do compiled programs that need more
    than was estimated pass them."""
    model, bucket = published("llava15_7b"), Bucket(1, 576, 704)
    rng = np.random.default_rng(0)
    for memory in np.geomspace(2, 200, 25) * GIB:
        weights = memory * rng.uniform(0.1, 0.8)
        room = Room(model, tensor=int(rng.choice([1, 2, 4])), value=2, weights=weights, memory=memory)
        size, limit = room.evaluation(bucket, 32), USED * memory
        assert size.questions == 1 or weights + size.questions * room.question(bucket, 32) <= limit
        if size.questions < room.most:
            assert weights + (size.questions + TILE) * room.question(bucket, 32) > limit
            assert size.questions < TILE or size.questions % TILE == 0
        swept = room.sweep(bucket, 32, 11)
        fits = lambda q, n, room=room, weights=weights, limit=limit: (
            weights + q * room.shared_pass(bucket) + room.cells(bucket, 32, q * n) <= limit
        )
        assert fits(swept.questions, swept.at_once(11)) or swept.at_once(11) == swept.questions == 1
        assert swept.parts == 1 or swept.questions == 1
        assert swept.parts <= 2 or not fits(1, Size(1, swept.parts - 1).at_once(11))
        more = rng.uniform(1.0, 3.0)
        needed = lambda size, more=more, weights=weights: weights + more * size.questions * size.at_once(11) * 2**28
        found = confirmed(swept, needed, room, coefficients=11)
        assert needed(found) <= limit or (found.questions, found.at_once(11)) == (1, 1)
        kept = confirmed(swept, needed, room, coefficients=11, keep_questions=True)
        assert kept.questions == swept.questions and (needed(kept) <= limit or kept.at_once(11) == 1)
        refused = confirmed(size, lambda size, n=size.questions // 2: np.inf if size.questions > n else 0.0, room)
        assert refused.questions <= max(1, size.questions // 2)
    assert smaller(Size(1, 1), 0.5) is None


def test_answers_of_an_auto_size_are_those_of_one_by_one(tiny_model, monkeypatch, caplog):
    vlm = lsg_jax.load(tiny_model)
    items = [item for item in SCENES.read("") if item.fields["kind"] == "count"][:7]  # of one length
    prompts = [SCENES.prompt(item, "paper") for item in items]
    run = lambda size: [found.text for found in answer(vlm, items, prompts, EvalConfig(batch_size=size), max_new_tokens=4)]
    expected = run(1)
    caplog.set_level("INFO", logger="lsg_jax")
    room = Room.of(vlm.config, vlm.params, vlm.mesh, GIB)
    bucket = bucket_of(vlm.processor.encode_question(prompts[0], image_sizes=[items[0].images[0].read().size]))
    for questions in (3, 100):
        memory = (room.weights + (questions + 0.5) * room.question(bucket, 4)) / USED
        monkeypatch.setattr(sizes, "agreed_memory", lambda memory=memory: int(memory))
        caplog.clear()
        assert run("auto") == expected
        (taken,) = (int(line.split()[2]) for line in caplog.messages if line.startswith("eval.batch_size auto"))
        assert taken == min(questions, len(items))
