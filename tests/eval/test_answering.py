"""The same answers whatever the batch size, the devices, the processes and interruptions."""

import json
import os
import signal
from dataclasses import replace

import jax
import numpy as np
import pytest
from processes import run_processes

import lsg_jax
from lsg_jax.config import EvalConfig, MeshConfig
from lsg_jax.data.encoded import Encoded
from lsg_jax.errors import InputError, Preempted
from lsg_jax.eval import runner
from lsg_jax.eval.answering import Answer, answer
from lsg_jax.eval.batches import Asked, plan
from lsg_jax.eval.benchmark import Item
from lsg_jax.eval.benchmarks.scenes import SCENES
from lsg_jax.eval.registry import BENCHMARKS
from lsg_jax.eval.results import read_result
from lsg_jax.json_files import read_sealed
from lsg_jax.sharding import local_rows, make_mesh, place_rows

CONFIG = EvalConfig(batch_size=3, max_new_tokens=6)

SHARED = """
import dataclasses, json, sys
from pathlib import Path
import jax
import lsg_jax
from lsg_jax.config import MeshConfig
from lsg_jax.eval.answering import answer
from lsg_jax.sharding import make_mesh
from eval.test_answering import CONFIG, questions
model, out = sys.argv[1], Path(sys.argv[2])
items, prompts = questions()
"""

MANY_DEVICES = (
    SHARED
    + """
vlm = lsg_jax.load(model, mesh=make_mesh(MeshConfig(data=2), jax.devices()))
answers = answer(vlm, items, prompts, CONFIG, max_new_tokens=6)
(out / "answers.json").write_text(json.dumps([found.text for found in answers]))
"""
)

TWO_PROCESSES = (
    SHARED
    + """
from lsg_jax.eval.benchmarks.scenes import SCENES
from lsg_jax.eval.registry import BENCHMARKS
from lsg_jax.eval.results import read_result
from lsg_jax.eval.runner import evaluate
from test_vlm import gates

assert (jax.process_count(), jax.device_count()) == (2, 4)
read = []

@dataclasses.dataclass(frozen=True)
class Counted:
    item: object
    def read(self):
        read.append(self.item.id)
        return self.item.images[0].read()

items = [dataclasses.replace(item, images=(Counted(item),)) for item in items]
BENCHMARKS["scenes"] = dataclasses.replace(SCENES, read=lambda path: items)
config = dataclasses.replace(CONFIG, benchmarks={"scenes": ""})
mesh = make_mesh(MeshConfig())
models = {"base": lsg_jax.load(model, mesh=mesh), "lsg": lsg_jax.load(model, gates(), mesh=mesh)}
results = [dataclasses.asdict(evaluate(models, config, out / "eval"))]
once = list(read)
results.append(dataclasses.asdict(evaluate(models, config, out / "eval")))
# process 0 compares the images with those that the answers are about, and nothing is asked again
again = [item.id for item in items] if jax.process_index() == 0 else []
assert read == once + again, "what the log holds was asked again"
(out / f"process{jax.process_index()}.json").write_text(json.dumps({"results": results, "read": once}))
"""
)


def questions():
    """Twenty questions of one length, so that one shape compiles."""
    items = [item for item in SCENES.read("") if item.fields["kind"] == "count"][:20]
    return items, [SCENES.prompt(item, "paper") for item in items]


@pytest.fixture(scope="module")
def vlm(tiny_model):
    return lsg_jax.load(tiny_model)


@pytest.fixture(scope="module")
def outputs(vlm):
    items, prompts = questions()
    return [found.text for found in answer(vlm, items, prompts, CONFIG, max_new_tokens=6)]


def test_batch_size_and_what_is_known_change_nothing(vlm, outputs):
    items, prompts = questions()
    assert len(set(outputs)) > 3
    batches = []
    known = {i: Answer(outputs[i]) for i in (1, 15)}
    again = answer(vlm, items, prompts, replace(CONFIG, batch_size=7), max_new_tokens=6, known=known, on_batch=batches.append)
    assert [found.text for found in again] == outputs
    assert sorted(i for batch in batches for i in batch) == sorted(set(range(20)) - {1, 15})


def test_near_ties_are_answered_alone(vlm, outputs):
    """All questions count as near ties here: they are answered one by one, at the end."""
    items, prompts = questions()
    batches = []
    again = answer(
        vlm,
        items[:4],
        prompts[:4],
        replace(CONFIG, near_tie=1e9),
        max_new_tokens=6,
        on_batch=batches.append,
    )
    assert [found.text for found in again] == outputs[:4]
    assert batches == [{i: Answer(outputs[i])} for i in range(4)]


@pytest.mark.soak
def test_devices_change_nothing(tiny_model, outputs, tmp_path):
    """The model twice, each over four devices; once over four is what the two processes below do."""
    run_processes(MANY_DEVICES, 1, devices_each=8, args=[tiny_model, tmp_path], timeout=300)
    assert json.loads((tmp_path / "answers.json").read_text()) == outputs


def test_processes_change_nothing_and_share_the_images(tiny_model, outputs, tmp_path):
    run_processes(TWO_PROCESSES, 2, devices_each=2, args=[tiny_model, tmp_path], timeout=300)
    first, second = (json.loads((tmp_path / f"process{rank}.json").read_text()) for rank in (0, 1))
    result = read_sealed(tmp_path / "eval" / "result.json")
    assert first["results"] == second["results"] == [result, result]
    assert {(row["task"], row["questions"]) for row in result["ratios"]} == {("count", 20)}
    for layer in (1, 4):
        assert sum(row["mean"] for row in result["ratios"] if row["layer"] == layer) == pytest.approx(1, abs=2e-3)
    rows = [json.loads(line) for line in (tmp_path / "eval" / "scenes.base.jsonl").read_text().splitlines()]
    assert [row["output"] for row in rows] == outputs
    gated = [json.loads(line) for line in (tmp_path / "eval" / "scenes.lsg.jsonl").read_text().splitlines()]
    assert sum(a["output"] != b for a, b in zip(gated, outputs, strict=True)) > 3
    means = np.mean([row["ratios"] for row in gated], axis=0).ravel()  # layers x groups, as the rows of the result
    np.testing.assert_allclose(means, [row["mean"] for row in result["ratios"]], atol=2e-3)
    assert "ratios" not in rows[0] and result["benchmarks"]["scenes"]["path"] == ""
    # 12 questions a batch, 6 for each process: the second has 8 and repeats its first one four times, in the other process
    everything = {item.id for item in questions()[0]}
    assert {*first["read"], *second["read"]} == everything
    # (near ties are read again, in both; the first reads the other 8 for the digests of its log)
    assert [2 * (6 + 6) + 8 <= len(first["read"]) <= 36, 2 * (6 + 3) <= len(second["read"]) <= 22] == [True, True]


def test_a_stopped_evaluation_goes_on(vlm, outputs, tmp_path, monkeypatch):
    items, _ = questions()
    monkeypatch.setitem(BENCHMARKS, "scenes", replace(SCENES, read=lambda path: items))
    settings = replace(CONFIG, benchmarks={"scenes": ""})
    models = {"base": vlm}
    asked = []

    def stop(done, total, what):
        if done >= 9:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Preempted, match=r"stopped at 9 of 20 answers of scenes; run the same command to go on"):
        runner.evaluate(models, settings, tmp_path, progress=stop)
    assert not (tmp_path / "result.json").exists()
    result = runner.evaluate(models, settings, tmp_path, progress=lambda done, total, what: asked.append(done))
    assert asked[0] > 9
    rows = [json.loads(line) for line in (tmp_path / "scenes.base.jsonl").read_text().splitlines()]
    assert [row["output"] for row in rows] == outputs
    assert result.benchmarks["scenes"].partial
    asked.clear()
    again = runner.evaluate(models, settings, tmp_path, progress=lambda done, total, what: asked.append(done))
    assert not asked and again == result == read_result(tmp_path / "result.json")


def test_plan_fills_batches_and_keeps_lengths_apart():
    lengths = [80, 65, 129, 128, 192, 64, 100]
    asked = [Asked(i, Encoded(np.zeros(n, np.int32), n)) for i, n in enumerate(lengths)]
    found = [[one.position for one in members] for members in plan(asked, lambda _: 3)]
    assert found == [[0, 1, 3], [5, 5, 5], [6, 6, 6], [2, 4, 2]]


def test_plan_keeps_sizes_of_native_images_apart():
    asked = [Asked(i, Encoded(np.zeros(9, np.int32), 9, patches=p)) for i, p in enumerate([64, 128, 64, 128, 192])]
    found = [[one.position for one in members] for members in plan(asked, lambda _: 2)]
    assert found == [[0, 2], [1, 3], [4, 4]]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image": None}, "question x: image"),
        ({}, "question x: the image's tokens do not fit into 60 tokens"),
    ],
)
def test_errors_name_the_question(vlm, change, message):
    class Broken:
        def read(self):
            return b"" if "image" in change else SCENES.read("")[0].images[0].read()

    items = [Item("x", "?", ("a",), images=(Broken(),))]
    with pytest.raises(InputError, match=message):
        answer(vlm, items, ["?"], replace(CONFIG, max_length=256 if change else 60), max_new_tokens=6)


def test_rows_are_placed_as_they_are():
    assert local_rows(None, 3) == [0, 1, 2]
    mesh = make_mesh(MeshConfig(), jax.devices())
    rows = {"a": np.arange(6).reshape(3, 2), "b": None}
    placed = place_rows(rows, mesh, 3)
    np.testing.assert_array_equal(placed["a"], rows["a"])
    assert placed["b"] is None and place_rows(rows, None, 3) is rows
