"""What a plan is made of, without compiling: the programs' arguments, search, costs, errors."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsg_jax.checkpoint import RunFolder
from lsg_jax.cli import main
from lsg_jax.cli.plan import _model_config
from lsg_jax.config import DataConfig, EvalConfig, GateConfig, MeshConfig, SinkConfig, TrainConfig
from lsg_jax.errors import InputError
from lsg_jax.memory import shard_bytes
from lsg_jax.methods.eah import EahConfig
from lsg_jax.methods.first_questions import routes
from lsg_jax.methods.gift import Gift, GiftConfig
from lsg_jax.methods.lora import LoraConfig
from lsg_jax.methods.method import BASE
from lsg_jax.opening import load_backbone
from lsg_jax.plan import chips
from lsg_jax.plan.chips import CHIPS, Topology, open_topology, parse_topology
from lsg_jax.plan.hlo import analyse
from lsg_jax.plan.measure import Measured, Seconds, needed_gib
from lsg_jax.plan.programs import (
    each_config,
    eval_prompts,
    question_batch,
    sweep_cells,
    sweep_prompts,
    train_program,
    training_batch,
)
from lsg_jax.plan.recipe import Assumptions, assume, recipe
from lsg_jax.plan.record_lengths import RecordLengths, record_lengths
from lsg_jax.plan.results import Plan, SlicePlan, as_json
from lsg_jax.plan.search import fastest, largest_batch, try_policies
from lsg_jax.plan.table import table
from lsg_jax.plan.traced import traced_flops
from lsg_jax.run_config import RunConfig, load_run_config
from lsg_jax.sharding import answering_mesh, make_mesh, place_rows
from lsg_jax.train.loop import set_up
from lsg_jax.train.seeds import SeedFolders

SINKS = SinkConfig(criterion="norm", vit_tau=10.0)


def measured(*, bound, rows=1, peak=0.0):
    """A program that takes `bound` seconds, or does not fit."""
    seconds = None if bound is None else Seconds(mxu=bound, hbm=0.0, ici=0.0, expected=2 * bound)
    return Measured(program="made", rows=rows, memory_gib={"peak": peak}, compile_s=0.0, seconds=seconds)


def shapes(tree):
    """Shape, dtype and place of every leaf."""
    leaf = lambda x: (x.shape, str(x.dtype), x.sharding.is_equivalent_to(x.sharding, x.ndim) and x.sharding.spec)
    return jax.tree.map(leaf, tree)


@pytest.fixture(scope="module")
def run_config(tiny_model, records, tmp_path_factory):
    return RunConfig(
        model=str(tiny_model),
        output=str(tmp_path_factory.mktemp("plan") / "run"),
        tables={"gate": GateConfig(layers=(1, 2))},
        sinks=SINKS,
        data=DataConfig(records=str(records), max_length=256, max_answer_tokens=8),
        train=TrainConfig(batch_size=2, epochs=3),
    )


def test_the_planned_step_is_the_one_that_is_trained(run_config):
    seeds = dataclasses.replace(run_config, output=f"{run_config.output}-seeds", train=TrainConfig(batch_size=2, seeds=2))
    for config in (
        run_config,
        seeds,
        dataclasses.replace(run_config.with_settings(LoraConfig(layer=2)), method="lora"),
        "each",
    ):
        if config == "each":
            config = run_config.with_settings(GateConfig(independent=True))
        folder = RunFolder(f"{run_config.output}-{config.method}-{config.gate.independent}", keep=1)
        run = SeedFolders(config) if config is seeds else folder
        with run.lock():
            trainer = set_up(config, run)
        batch = place_rows(next(trainer.data), trainer.vlm.mesh, config.train.batch_size)
        trainer.data.close()
        mesh = make_mesh(config.mesh)
        planned = train_program(config, trainer.vlm.config, mesh, dtype=jnp.float32)
        assert planned.name == ("each" if config.gate.independent else "train")
        assert shapes(planned.arguments) == shapes((trainer.state, trainer.vlm.frozen, batch))
        assert shard_bytes(planned.arguments[1]) == sum(leaf.nbytes for leaf in jax.tree.leaves(trainer.vlm.frozen))
    assert planned.function is train_program(each_config(run_config, trainer.vlm.config), trainer.vlm.config, mesh).function


@pytest.mark.parametrize("name", ["base", "gift", "diysink"])
def test_planned_questions_are_those_that_are_asked(run_config, tiny_model, name):
    method = dataclasses.replace(run_config, method=name).get_method() if name != "base" else BASE
    vlm = load_backbone(tiny_model, sinks=SINKS)
    if method.reads_words:
        vlm = vlm.with_method(Gift(GiftConfig(saliency_layer=1, first_layer=2, last_layer=3)))
    encoded = vlm.processor.encode_question("What is it?")
    side = vlm.config.image.size
    asked = vlm.pad_questions([encoded] * 4, [np.zeros((1, side, side, 3), np.uint8)] * 4)
    asked = dataclasses.replace(asked, answer_index=None, answer_target=None, row_id=None)
    if first := method.first_questions("What is it?"):
        asked = dataclasses.replace(asked, route=routes(method, [(0, one) for one in first], ["simple"] * len(first), range(4)))
    assert (asked.words is not None, asked.route is not None) == (name == "gift", name == "diysink")
    mesh = answering_mesh(None, vlm.config.text, weights=0, memory=1)
    planned = question_batch(vlm.config, mesh, 4, method=method)
    sequences = {asked.input_ids.shape, asked.source.shape}
    longer = lambda x, like: (x.shape[0], like.shape[1], *x.shape[2:]) if x.shape in sequences else x.shape
    jax.tree.map(lambda a, p: (longer(a, p), a.dtype) == (p.shape, p.dtype) or pytest.fail(f"{a.shape} {p}"), asked, planned)


def test_a_sweep_is_compiled_from_prompts_to_cells(run_config, tiny_model):
    model = load_backbone(tiny_model, sinks=SINKS).config
    config = dataclasses.replace(run_config, eval=EvalConfig(batch_size=4))
    mesh = answering_mesh(None, model.text, weights=0, memory=1)
    prompts = sweep_prompts(config, model, mesh, max_new_tokens=3, cells=2, dtype=jnp.float32)
    compiled = prompts.compile()
    cells = sweep_cells(prompts, compiled, model, coefficients=((0.0, 1.0), (1.0, 0.0)))
    assert (prompts.rows, cells.rows) == (2, 4)
    for program, made in ((prompts, compiled), (cells, cells.compile())):
        traced = traced_flops(lambda *a, p=program: p.function(*a, *p.static), *program.arguments, trips=program.trips)
        assert analyse(made.as_text(), trips=program.trips).flops == pytest.approx(traced, rel=0.02)


def test_the_layer_that_eah_looks_at_counts_once(run_config, tiny_model):
    model = load_backbone(tiny_model, sinks=SINKS).config
    mesh, text = answering_mesh(None, model.text, weights=0, memory=1), model.text

    def flops(threshold):
        config = dataclasses.replace(run_config.with_settings(EahConfig(threshold=threshold)), method="eah")
        program = eval_prompts(config, model, mesh, max_new_tokens=3, dtype=jnp.float32)
        compiled = analyse(program.compile().as_text(), trips=program.trips).flops
        traced = traced_flops(lambda *a: program.function(*a, *program.static), *program.arguments, trips=program.trips)
        return np.array([compiled, traced]), program.arguments[1].input_ids.shape

    with_eah, (rows, length) = flops(0.01)
    compiled, traced = with_eah - flops(1.0)[0]
    block = length // 4  # queries, each with the keys up to its end
    sums = 2 * rows * text.num_heads * block * block * (1 + 2 + 3 + 4)
    scores, queries = sums * text.head_dim, 2 * rows * length * text.hidden_size * text.num_heads * text.head_dim
    assert traced == scores + sums + queries
    assert sums <= compiled <= traced  # XLA computes scores and queries once for the attention and for its sums


def test_the_largest_batch_of_a_line_is_found_in_few_compilations():
    for fixed, slope, start in ((1.0, 0.1, 64), (6.0, 0.5, 16), (0.5, 0.2, 256), (15.0, 1.0, 8), (20.0, 0.1, 8)):
        limit, unit, ran = 15.75, 8, []

        def run(rows, fixed=fixed, slope=slope, ran=ran, limit=limit):
            ran.append(rows)
            peak = fixed + slope * rows
            return measured(rows=rows, peak=peak, bound=1.0 if peak <= limit else None)

        found = largest_batch(run(start), run, unit=unit, limit_gib=limit)
        expected = math.floor((limit - fixed) / slope + 1e-9) // unit * unit
        assert (found.rows if found else 0) == max(0, expected), (fixed, slope)
        assert len(ran) <= 4 and all(rows % unit == 0 for rows in ran)


def test_policies_are_tried_until_one_fits():
    def run(policy):
        bounds = {"none": None, "dots": 2.0, "mlp": 2.5, "full": 3.0}
        return dataclasses.replace(measured(bound=bounds[policy]), remat=policy)

    found = try_policies(("none", "dots", "mlp", "full"), run, also=("full",))
    assert [one.remat for one in found] == ["none", "dots", "full"]
    assert fastest(found).remat == "dots" and fastest(found[:1]) is None


def test_needed_memory_is_read_from_the_compilers_refusal():
    for message, needed in (
        ("the total memory required for HLO temporaries (1.56T) exceeds available HBM (15.75G).", 1.56 * 1024),
        ("Ran out of memory in memory space hbm. Used 24.70G of 15.75G hbm. Exceeded hbm capacity by 8.95G.", 24.7),
        ("Used 512.00M of 15.75G hbm", 0.5),
        ("INTERNAL: something else", None),
    ):
        assert needed_gib(message) == needed


def test_costs_are_steps_and_batches_times_seconds(run_config):
    chip = CHIPS["v5e"]
    topology = Topology("v5e:4x4", chip, (4, 4), (None,) * 16)
    config = dataclasses.replace(run_config, data=DataConfig(), eval=EvalConfig(benchmarks={"mmstar": "x.parquet"}))
    assumed = assume(config, utilisation=0.5, records=None, questions=None)
    assert (assumed.records, assumed.questions, assumed.max_new_tokens) == (10_000, 1_500, 32)
    assert assume(run_config, utilisation=1.0, records=None, questions=7).records == 12  # those that are there
    programs = {
        "train": measured(bound=0.5, rows=64),
        "each": measured(bound=None, rows=64),
        "sweep prompts": measured(bound=1.0, rows=4),
        "sweep cells": measured(bound=2.0, rows=44),
        "eval prompts": measured(bound=1.0, rows=100),
        "eval answers": measured(bound=2.0, rows=100),
    }
    steps, batches = 10_000 * 3 // 64, 1_500 // 4
    hours = {
        "train": steps * 1.0 / 3600,
        "sweep": batches * (2.0 + 32 * 4.0) / 3600,
        "eval": 2 * 15 * 6.0 / 3600,
    }
    costs = recipe(programs, config, 32, topology, assumed)
    assert {cost.part: cost.hours for cost in costs} == pytest.approx(hours)
    assert {cost.part: cost.chip_hours for cost in costs} == pytest.approx({name: 16 * h for name, h in hours.items()})
    for order, times, how in ((None, 1, "3 seeds together"), (-1, 3, "3 seeds one after the other")):
        seeds = dataclasses.replace(config, data=DataConfig(order=order), train=dataclasses.replace(config.train, seeds=3))
        cost = recipe(programs, seeds, 32, topology, assumed)[0]
        assert (cost.runs, cost.hours) == (f"{steps} steps, {how}", pytest.approx(times * hours["train"]))


def test_hours_follow_the_lengths_of_the_records(run_config):
    """As `TrainingData` chooses them; programs are those of the longest rows."""
    model = load_backbone(run_config.model, sinks=SINKS).config
    assert record_lengths(run_config, model) is None  # one bucket
    bucketed = dataclasses.replace(run_config, data=dataclasses.replace(run_config.data, buckets=3))
    assert record_lengths(dataclasses.replace(bucketed, model="none"), model) is None
    found = record_lengths(bucketed, model)
    run = RunFolder(f"{run_config.output}-lengths", keep=1)
    with run.lock():
        data = set_up(dataclasses.replace(bucketed, output=str(run.path)), run).data
    held = [batch.attention_mask for batch in data]
    data.close()
    assert found.lengths == data.lengths and found.lengths[-1] < 256
    assert found.padding == pytest.approx(1 - sum(mask.sum() for mask in held) / sum(mask.size for mask in held), abs=0.02)

    half = RecordLengths((64, 256), mean=128.0, padding=0.05)
    programs, topology = {"train": measured(bound=0.5, rows=64)}, Topology("v5e:4x4", CHIPS["v5e"], (4, 4), (None,) * 16)
    hours = lambda lengths: (
        recipe(programs, bucketed, 32, topology, assume(bucketed, utilisation=0.5, records=6400, questions=1, lengths=lengths))[
            0
        ].hours
    )
    assert hours(half) == pytest.approx(hours(None) / 2)


def test_links_of_a_slice():
    rate = lambda name: Topology(name, *parse_topology(name), ()).ici_gbps
    assert rate("v5e:1x1") == math.inf
    assert [rate(name) / 50 for name in ("v5e:2x2", "v5e:4x4", "v5e:8x16", "v5e:16x16")] == [2, 2, 3, 4]
    assert [rate(name) / 100 for name in ("v5p:2x2x1", "v5p:2x2x4", "v5p:4x4x4")] == [2, 4, 6]


def test_a_chip_without_neighbours_is_json():
    """JSON has no infinity, and other programs than Python refuse it."""
    topology = Topology("v5e:1x1", *parse_topology("v5e:1x1"), ())
    alone = SlicePlan(topology, training_mesh={}, answering_mesh={}, programs=(), largest_batch=None, costs=())
    assumed = Assumptions(0.5, 10, "the paper's", 10, "one benchmark", 4)
    found = Plan(parameters=1, dtype="bfloat16", assumptions=assumed, versions={"libtpu": "1", "jax": "2"}, topologies=(alone,))
    assert json.loads(json.dumps(as_json(found), allow_nan=False))["topologies"][0]["device"]["ici_gbps"] is None
    assert "GB/s of memory\n" in table(found)


def test_errors_are_one_line(capfd, monkeypatch, tmp_path, tiny_hf_folder):
    config = tmp_path / "run.toml"
    config.write_text(f'model = "{tmp_path}/none"\noutput = "{tmp_path}/run"\n[gate]\nlayers = [99]\n[sinks]\nvit_dims = [1]\n')
    shapes = ["--model-config", str(tiny_hf_folder)]
    for code, said, arguments in (
        (
            65,
            "known: gemma3_12b, internvl3_8b, llava15_13b, llava15_7b, llava16_vicuna_7b, llava_onevision_7b, llava_phi3_mini, "
            "qwen25_vl_7b, qwen3_vl_8b, smolvlm2_500m, tinyllava_qwen25_3b",
            ["--topology", "v5e:2x2"],
        ),
        (65, "no such topology; known: v4:{", ["--topology", "v3:8", *shapes]),
        (65, "no such topology; known: v4:{", ["--topology", f"v5e:{'9' * 5000}x4", *shapes]),
        (65, "libtpu refuses it", ["--topology", "v5e:3x5", *shapes]),
        (65, "layer 99 does not exist", ["--topology", "v5e:2x2", *shapes]),
        (65, "no multiple of 4 devices", ["--topology", "v5e:2x2", "--batch", "6", "--set", "gate.layers=[1]", *shapes]),
        (65, "nothing to train", ["--topology", "v5e:2x2", "--set", "method=var", *shapes]),
        (65, "--utilisation is 0.0: it must lie in (0, 1]", ["--topology", "v5e:2x2", "--utilisation", "0", *shapes]),
    ):
        assert main(["plan", str(config), *arguments]) == code
        out, err = capfd.readouterr()
        assert said in err and err.count("\n") == 1 and not out
    with monkeypatch.context() as patch:
        patch.setattr(chips.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(InputError, match=r"pip install 'lsg_jax\[plan\]'"):
            open_topology("v5e:2x2")

    def locked(**_):
        raise RuntimeError('ABORTED: Internal error when accessing libtpu multi-process lockfile. Run "$ rm".')

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", locked)
    with pytest.raises(InputError, match="locked by another process"):
        open_topology("v5e:2x2")


def test_known_shapes_are_those_of_the_models():
    from importlib.resources import files

    from converters.hf_config import model_config
    from lsg_jax.methods.method_model import abstract_model

    billions = {}
    for entry in (files("lsg_jax.plan") / "models").iterdir():
        stated = json.loads(entry.read_text())
        _, params = abstract_model(model_config(stated, preprocessor=stated.pop("preprocessor", None)))
        billions[entry.name] = round(sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e9, 2)
    # the checkpoints' own counts
    assert billions == {
        "llava15_7b.json": 7.06,
        "llava16_vicuna_7b.json": 7.06,
        "llava15_13b.json": 13.35,
        "llava_onevision_7b.json": 8.03,
        "llava_phi3_mini.json": 4.14,
        "tinyllava_qwen25_3b.json": 3.51,
        "qwen25_vl_7b.json": 8.29,
        "qwen3_vl_8b.json": 8.77,
        "internvl3_8b.json": 7.94,
        "gemma3_12b.json": 12.19,
        "smolvlm2_500m.json": 0.51,
    }


@pytest.mark.parametrize(
    ("name", "trained", "asked"),
    [
        ("qwen25_vl_7b", (1, 6144), (1, 6144, 1408)),  # 36 x 35 squares in windows of 4 x 4: 5,184 patches
        ("qwen3_vl_8b", (1, 6144), (1, 6144, 1408)),
        ("internvl3_8b", (13, 1024), (13, 1024, 3520)),
        ("gemma3_12b", (1, 4096), (1, 4096, 448)),
        ("smolvlm2_500m", (17, 1024), (19, 1024, 1280)),
        ("llava15_7b", (1, 576), (1, 576, 704)),
    ],
)
def test_shipped_shapes_are_planned_with_the_largest_image(name, trained, asked):
    config = load_run_config(Path(__file__).parents[2] / "configs" / f"{name}.toml", [])
    model, mesh = _model_config(config, None)[0], make_mesh(MeshConfig())
    batch = training_batch(config, model, mesh)
    assert batch.images.patches.shape == (config.train.batch_size, *trained, model.vision.patch_values)
    assert batch.input_ids.shape == (config.train.batch_size, config.data.max_length)
    questions = question_batch(model, mesh, 3, config.eval.max_length)
    assert (*questions.images.patches.shape[1:3], questions.input_ids.shape[1]) == asked
    given = {field: getattr(batch, field) is not None for field in ("positions", "block")}
    assert given == {"positions": name.startswith("qwen"), "block": name.startswith("gemma")}
    # a shorter limit leaves larger images out
    short = dataclasses.replace(config, data=dataclasses.replace(config.data, max_length=600))
    assert training_batch(short, model, mesh).images.patches.size <= batch.images.patches.size
    if name == "qwen25_vl_7b":
        assert training_batch(short, model, mesh).images.patches.shape[2] == 3072
