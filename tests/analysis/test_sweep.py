"""The oracle sweep: every cell equals a separate run, although work is shared, and across interruptions and edge cases."""

import dataclasses
import json
import os
import signal
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from whole_model import visual

import lsg_jax
from lsg_jax.analysis import sweep as sweep_module
from lsg_jax.analysis import sweep_sizes
from lsg_jax.analysis.sweep import SweepConfig, coefficient_grid, sweep
from lsg_jax.analysis.sweep_cells import NO_LAYER, answer_cells, resume_cells, run_prompts
from lsg_jax.analysis.sweep_table import Grader, table
from lsg_jax.cli import main
from lsg_jax.config import EvalConfig, GateConfig, SinkConfig
from lsg_jax.errors import Preempted
from lsg_jax.eval.answering import answer
from lsg_jax.eval.batches import bucket_of
from lsg_jax.eval.benchmark import LOWER, Benchmark, Item, Match, by, macro, mean
from lsg_jax.eval.best_cells import extreme_cells, extreme_layer, where_words
from lsg_jax.eval.runner import ask, ask_all, grade, summary
from lsg_jax.eval.sizes import USED, Room
from lsg_jax.gating.gate import KeyScaling
from lsg_jax.methods.fixed import Fixed, FixedConfig
from lsg_jax.methods.method_model import assemble
from lsg_jax.model.generate import last_token
from lsg_jax.model.rotary import token_positions
from lsg_jax.types import Sequence

LAYERS, PATCHES, IMAGE, LENGTH = 6, 49, 3, 320
SINKS = SinkConfig(criterion="norm", vit_tau=19.0, llm_criterion="norm", llm_tau=21.0)
CONFIG = EvalConfig(max_new_tokens=4, batch_size=3)
CELLS = SweepConfig((1, 4), ((1.0, 1.0), (0.0, 1.0), (0.8, 0.2)), batch_size=3)


@pytest.fixture(scope="module")
def vlm(tiny_model):
    return lsg_jax.load(tiny_model, sinks=SINKS)


@pytest.fixture(scope="module")
def shared(vlm):
    """Three rows: an image and padding on the left, an image and padding on the right, text only."""
    rng = np.random.default_rng(0)
    ids = rng.integers(4, 260, (3, LENGTH)).astype(np.int32)
    ids[0, 5 : 5 + PATCHES] = ids[1, :PATCHES] = IMAGE
    mask = np.ones((3, LENGTH), bool)
    mask[0, :4] = mask[1, -7:] = False
    pixels = rng.integers(0, 256, (3, 56, 56, 3), np.uint8)
    batch = replace(vlm.batch(ids, np.zeros((3, 3, 56, 56)), mask), **visual(mask & (ids == IMAGE), pixels, 8))
    done = run_prompts(vlm.params, batch, vlm.graphdef, 4)[0]  # same shape as the questions below
    some = done.visual.mask & (jnp.arange(LENGTH) % 5 == 0)
    return replace(done, visual=replace(done.visual, v_sink=some))


@partial(jax.jit, static_argnums=3)
def resumed(params, shared, cell, graphdef):
    model = assemble(graphdef, params)
    layer, coefficients = cell
    hidden, cache = resume_cells(model, shared, layer, coefficients, "three", room=2)
    return model.language_model.logits(hidden), cache


@partial(jax.jit, static_argnums=3)
def separate(params, shared, cell, graphdef):
    """One coefficient tuple by a pass over all layers, from the embeddings that enter layer 0."""
    model = assemble(graphdef, params)
    layer, coefficients = cell
    layers = jnp.arange(LAYERS)
    scaling = KeyScaling.for_batch(
        shared.batch,
        shared.visual,
        GateConfig(layers=(0,), grouping="three"),
        model.config.sinks,
        source=jnp.broadcast_to(coefficients, (LAYERS, len(coefficients))),
        enabled=layers == layer,
    )
    valid = jnp.asarray(shared.batch.attention_mask)
    sequence = Sequence(x=shared.boundaries[0], valid=valid, positions=token_positions(valid), visual=shared.visual)
    out = model.language_model(sequence, scaling, rows=last_token(valid)[:, None], keep_kv=True)
    return model.language_model.logits(out.hidden[:, 0]), out.key, out.value


def test_a_resumed_pass_equals_a_whole_one(vlm, shared):
    assert vlm.config.text.num_heads == 2 * vlm.config.text.num_kv_heads
    cells = np.array([(0.2, 0.0, 1.0), (1.0, 1.0, 0.4)], np.float32)
    changed = []
    for layer in (0, 3, LAYERS - 1):
        logits, cache = resumed(vlm.params, shared, (np.int32(layer), cells), vlm.graphdef)
        for c, coefficients in enumerate(cells):
            want, key, value = separate(vlm.params, shared, (np.int32(layer), coefficients), vlm.graphdef)
            np.testing.assert_allclose(logits[c :: len(cells)], want, rtol=0, atol=1e-5 * np.abs(want).max())
            for got, whole in ((cache.key, key), (cache.value, value)):
                of_cell = got[:, c :: len(cells), :, :LENGTH]
                np.testing.assert_allclose(of_cell, whole, rtol=0, atol=1e-5 * np.abs(whole).max())
                assert not got[:, :, :, LENGTH:].any()
            base = separate(vlm.params, shared, (np.int32(NO_LAYER), coefficients), vlm.graphdef)[0]
            changed.append(np.abs(want - base).max(-1))
    assert (
        np.max(changed, axis=0)[:2].min() > 1e-3 and np.max(changed, axis=0)[2] == 0.0
    )  # a row without an image is left alone


def test_images_without_sinks_and_of_sinks_alone(vlm, shared):
    """Coefficients of an empty group change nothing, and scaling all keys to zero still gives finite logits."""
    cells = np.array([(0.0, 1.0, 1.0), (1.0, 0.0, 0.0)], np.float32)
    run = lambda shared: np.asarray(resumed(vlm.params, shared, (np.int32(2), cells), vlm.graphdef)[0])
    with_sinks = lambda mask: replace(shared, visual=replace(shared.visual, v_sink=mask))
    none, every = run(with_sinks(jnp.zeros_like(shared.visual.mask))), run(with_sinks(shared.visual.mask))
    base = np.asarray(separate(vlm.params, shared, (np.int32(NO_LAYER), cells[0]), vlm.graphdef)[0])
    for untouched, zeroed in ((none[0::2], none[1::2]), (every[1::2], every[0::2])):
        np.testing.assert_allclose(untouched, base, rtol=0, atol=1e-5 * np.abs(base).max())
        assert np.isfinite(zeroed).all() and np.abs(zeroed - base)[:2].max() > 1e-3
    np.testing.assert_array_equal(none[1::2], every[0::2])


@pytest.fixture(scope="module")
def questions(scenes, tmp_path_factory):
    """Seven questions of unequal length, padded to the same length; the last one has no image."""
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    rows = [{"question": "How many?" + i * " Say!", "answer": "1", "image": f"{scenes}/images/{i}.png"} for i in range(6)]
    rows.append({"question": "How many is " + "1 + " * 10 + "0?", "answer": "10"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return replace(CONFIG, benchmarks={"mine": str(path)})


@pytest.fixture(scope="module")
def whole(vlm, questions, tmp_path_factory):
    """(folder, result) of an uninterrupted sweep."""
    folder = tmp_path_factory.mktemp("sweep") / "whole"
    before = answer_cells._cache_size()  # other tests of this process may have swept too
    result = sweep(vlm, CELLS, questions, folder)
    assert answer_cells._cache_size() == before + 1  # one program for all layers
    return folder, result


def logged(folder, name):
    (path,) = (folder / "answers").glob(f"{name}.*.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines() if line]
    return {line["id"]: json.loads(line["output"])["outputs"] for line in lines}


def test_every_cell_answers_as_a_separate_run(vlm, questions, whole):
    folder, result = whole
    (test,) = ask_all(questions).values()
    one_by_one = replace(questions, batch_size=1)
    answers = lambda vlm: [found.text for found in answer(vlm, test.items, test.prompts, one_by_one, max_new_tokens=4)]
    names = [item.id for item in test.items]
    of_cell = lambda layer, c: [logged(folder, f"mine.layer{layer}")[name][c] for name in names]
    base = [logged(folder, "mine.base")[name][0] for name in names]
    assert base == answers(vlm) and len(set(base)) > 4
    assert of_cell(1, 0) == of_cell(4, 0) == base  # coefficients (1, 1)
    separate_run = answers(vlm.with_method(Fixed(FixedConfig((4,), CELLS.coefficients[2]))))
    assert of_cell(4, 2) == separate_run and separate_run[6] == base[6]
    assert separate_run != base and of_cell(1, 2) != separate_run
    assert [row["change"] for row in result["rows"] if row["coefficients"] == [1.0, 1.0]] == [0.0, 0.0]
    alone = result["benchmarks"]["mine"]["work"]["answered_alone"]
    assert result["benchmarks"]["mine"]["work"] == {
        "layers_run": 7 * (6 + 3 * (5 + 2)) + 6 * alone,
        "layers_naive": 7 * (6 + 3 * 12) + 6 * alone,
        "share": round((7 * 27 + 6 * alone) / (7 * 42 + 6 * alone), 4),
        "answered_alone": alone,
    }


def test_near_ties_are_answered_alone(vlm, questions, whole, tmp_path):
    """Here all answers count as near ties."""
    few = replace(questions, near_tie=1e9, limit=2)
    result = sweep(vlm, replace(CELLS, layers=(4,)), few, tmp_path)
    assert result["benchmarks"]["mine"]["work"]["answered_alone"] == 2 * (1 + 3)
    for name in ("mine.base", "mine.layer4"):
        before = logged(whole[0], name)
        assert logged(tmp_path, name) == {i: before[i] for i in ("1", "7")}


def test_stopped_and_continued_equals_whole(vlm, questions, whole, tmp_path):
    dones = []

    def stop(done, total, what):
        dones.append(done)
        if len(dones) in (2, 5):
            os.kill(os.getpid(), signal.SIGTERM)

    for done in (6, 15):
        with pytest.raises(Preempted, match=rf"stopped at {done} of 21 questions and layers of mine; run the same command"):
            sweep(vlm, CELLS, questions, tmp_path, progress=stop)
        assert not (tmp_path / "sweep.json").exists()
    sweep(vlm, CELLS, questions, tmp_path, progress=stop)
    assert dones == [3, 6, 9, 12, 15, 18, 19, 20, 21]  # nothing twice
    assert (tmp_path / "sweep.json").read_bytes() == (whole[0] / "sweep.json").read_bytes()


@pytest.mark.parametrize("batch_size, parts", [(3, 2), (3, 3), ("auto", 2)])
def test_parts_give_the_same_as_all_at_once(vlm, questions, whole, tmp_path, monkeypatch, batch_size, parts):
    """With a memory for which the coefficients of three questions, or of one, are run in so many parts."""
    made = []

    def counted(*arguments):
        made.append(arguments[3].shape)
        return answer_cells(*arguments)

    monkeypatch.setattr(sweep_sizes, "answer_cells", counted)
    (test,) = ask_all(questions).values()
    room = Room.of(vlm.config, vlm.params, vlm.mesh, 2**30)
    size = 1 if batch_size == "auto" else batch_size
    at_once = -(-3 // parts)
    bucket = bucket_of(vlm.make_processor().encode_question(test.prompts[0], image_sizes=[(64, 64)]))
    held = size * room.shared_pass(bucket) + room.cells(bucket, 4, size * at_once)
    monkeypatch.setattr(sweep_sizes, "agreed_memory", lambda: int((room.weights + held) / USED) + 100)
    result = sweep(vlm, replace(CELLS, batch_size=batch_size), questions, tmp_path)
    assert set(made) == {(at_once, 2)} and len(made) == parts * len(CELLS.layers) * -(-7 // size)
    assert {**result, "batch_size": 3} == whole[1]
    if batch_size == 3:
        assert (tmp_path / "sweep.json").read_bytes() == (whole[0] / "sweep.json").read_bytes()


def test_command_line(tiny_model, whole, questions, tmp_path, capsys):
    """With all answers known: the command prints and draws the result, and refuses bad input in one line."""
    config = tmp_path / "c.toml"
    sinks = "".join(f"{name} = {json.dumps(value)}\n" for name, value in dataclasses.asdict(SINKS).items())
    text = f'model = "{tiny_model}"\noutput = "{tmp_path}"\n[sinks]\n{sinks}[eval]\nmax_new_tokens = 4\n'
    config.write_text(text)
    common = ["sweep", str(config), "--benchmark", f"mine={questions.benchmarks['mine']}", "--out", str(whole[0])]
    cells = ["--layers", "4", "1", "--coefficients", "1,1", "0,1", "0.8,0.2", "--batch-size", "3"]
    assert main([*common, *cells]) == 0
    out, err = capsys.readouterr()
    assert out == table(whole[1]) + "\n" and "layers run of" in err and "an upper bound" in out
    assert {path.name for path in whole[0].glob("oracle.*")} == {"oracle.csv", "oracle.svg", "oracle.png"}
    assert {row["layer"] for row in json.loads((whole[0] / "sweep.json").read_text())["rows"]} == {1, 4}
    for arguments, message in [
        (["--coefficients", "0,1", "1,2,3"], "coefficients 1,2,3: 3 given, grouping v_sink_rest has 2: v_sink, rest"),
        (
            ["--coefficients", "0,1", "--grouping", "three"],
            "coefficients 0,1: 2 given, grouping three has 3: v_sink, l_sink, ordi",
        ),
        (["--coefficients", "nan,1"], "--coefficients is nan: it must lie in [-1000, 1000]"),
        (["--coefficients", "0,1", "0,1"], "named twice"),
        (["--step", "0.3"], "the step is 0.3: it must lie in [0.01, 1] and divide 1, as 0.1 or 0.25 do"),
        (["--step", "0"], "--step is 0.0: it must lie in [0.01, 1]"),
        (["--batch-size", "0"], "--batch-size is 0: it must lie in [1, 1e6]"),
        (["--layers", "0", "6"], "sweep.layers: layer 6 does not exist, the model has layers 0 to 5"),
        (["--layers", "-1"], "--layers is -1: it must lie in [0, 1e4]"),
        (["--benchmark", "other"], "benchmark other: unknown"),
        (["--set", "sinks.criterion=dim_abs"], "no V-sink dimensions are known for this model: set sinks.vit_dims"),
        (
            ["--set", "sinks.llm_criterion=attention", "--grouping", "three"],
            "sinks.llm_criterion attention_share is only known after",
        ),
    ]:
        assert main([*common, *arguments]) == 65
        out, err = capsys.readouterr()
        assert out == "" and message in err and err.count("\n") == 1, err
    with pytest.raises(SystemExit, match="2"):
        main([*common, "--coefficients", "a,b"])


def test_a_criterion_that_tells_nothing_apart_is_warned_of(vlm, shared, questions, tmp_path, caplog):
    (test,) = ask_all(questions).values()
    for v_sink, message in [
        (np.zeros((3, LENGTH), bool), "mine: no V-sinks in the first images"),
        (shared.visual.mask, "mine: 100 % of the visual tokens of the first images are V-sinks"),
    ]:
        caplog.clear()
        run = sweep_module._Answering(vlm, "mine", test, CELLS, questions, tmp_path, None)
        for _ in range(2):
            run._check_sinks(replace(shared, visual=replace(shared.visual, v_sink=v_sink)))
        assert len(caplog.records) == 1 and message in caplog.text


def test_the_grid_of_coefficients():
    pairs = coefficient_grid(2, 0.1)
    assert len(pairs) == 11 and pairs[0] == (0.0, 1.0) and pairs[3] == (0.3, 0.7) and pairs[-1] == (1.0, 0.0)
    triples = coefficient_grid(3, 0.25)
    assert len(triples) == len(set(triples)) == 15 and {sum(t) for t in triples} == {1.0} and min(map(min, triples)) == 0.0


ITEMS = [
    Item(str(i), "?", ("yes" if i % 3 else "no",), fields={"kind": "ab"[i % 2], "picture": str(i // 4)}) for i in range(24)
]
MADE = Benchmark(
    name="made",
    read=lambda path: ITEMS,
    prompt=lambda item, protocol: item.id,
    match=lambda item, output, protocol: Match(output, float(output == item.answers[0])),
    metrics=lambda graded: {
        "accuracy": mean(graded),
        **{f"kind: {name}": value for name, value in by(graded, "kind").items()},
        "kind: c": mean(graded, graded.where("kind", "c")),
        "of all kinds": macro({name: mean(graded, graded.where("kind", name)) for name in "abc"}),
    },
    official={"paper": "accuracy"},
    unit="picture",
)


def test_rows_are_those_of_an_evaluation_and_hold_no_nan():
    test = ask(MADE, "", EvalConfig())
    right = [item.answers[0] for item in ITEMS]
    base, better = ["yes"] * 24, ["yes"] * 12 + right[12:]
    grader = Grader("made", test, base)
    rows = [*grader.cell_rows(3, (0.5, 0.5), better), *grader.cell_rows(3, (1, 1), right), *grader.cell_rows(3, (0, 1), base)]
    told = summary(test, {"base": grade(test, base), "lsg": grade(test, better)})
    for row in rows[:3]:
        change = told.change["lsg"][row["task"]]
        assert (row["change"], row["low"], row["high"]) == (change.value, change.low, change.high)
        assert row["value"] == told.methods["lsg"][row["task"]].value
        assert {key: row[key] for key in ("benchmark", "layer", "coefficients")} == {
            "benchmark": "made",
            "layer": 3,
            "coefficients": [0.5, 0.5],
        }
    assert [row["questions"] for row in rows[:5]] == [24, 12, 12, 24, 24]
    for row in [*rows[3:5], *grader.base_rows()[3:]]:  # no question is of kind c
        assert row["value"] is row["low"] is row["high"] is None and row["reason"].startswith("no question of this task")
    json.dumps(rows, allow_nan=False)
    best = extreme_cells(rows, "best")
    assert [(row["task"], row["coefficients"]) for row in best] == [
        (task, [0.5, 0.5]) for task in ("accuracy", "kind: a", "kind: b")
    ]
    assert best[0]["change"] == pytest.approx(100 * 4 / 24)
    # of a metric that should fall, the greatest fall is the best cell
    errors = [{**rows[0], "task": f"errors{LOWER}", "change": change} for change in (1.0, -2.0, -1.0)]
    assert [extreme_cells(errors, which)[0]["change"] for which in ("best", "worst")] == [-2.0, 1.0]


def test_where_coefficients_tie_the_oracle_map_names_none():
    """One task, two layers and three coefficients by hand: all tie, two tie, none ties."""

    def cells(*changes):  # a row of changes for each layer
        rows = [
            {"benchmark": "made", "task": "count", "layer": layer, "coefficients": [value, 1 - value], "change": change}
            for layer, of_layer in enumerate(changes)
            for value, change in zip((0.0, 0.25, 0.5), of_layer, strict=True)
        ]
        base = {"benchmark": "made", "task": "count", "layer": 0, "coefficients": [1.0, 1.0], "change": 9.0}
        return {which: extreme_cells([*rows, base], which) for which in ("best", "worst")}

    found = cells((0.0, 0.0, 0.0), (0.0, -2.0, 0.0))
    assert [cell["coefficients"] for cell in found["best"]] == [None, [0.0, 1.0]]
    assert [cell["tied"] for cell in found["best"]] == [[[0, 1], [0.25, 0.75], [0.5, 0.5]], [[0, 1], [0.5, 0.5]]]
    assert [cell["of"] for cell in found["best"]] == [3, 3]
    assert [cell["coefficients"] for cell in found["worst"]] == [None, [0.25, 0.75]]
    assert where_words(extreme_layer(found["best"], "best")) == ("0", "0, 1 (+4)")
    assert where_words(extreme_layer(found["worst"], "worst")) == ("1", "0.25, 0.75")
    same = cells((1 / 3, 1 / 3, 1 / 3), (1 / 3, 1 / 3 + 1e-12, 1 / 3))  # the last digits of a mean are no difference
    assert {where_words(extreme_layer(same[which], which)) for which in same} == {("any", "tie")}
