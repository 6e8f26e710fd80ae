"""The real lmms-eval on a small local file gives the outputs and scores of `lsg eval`.

Runs where lmms-eval is installed, which is an extra of its own (`pip install lsg_jax[lmms]`); elsewhere the module is skipped.
What can be held without it is in test_lmms_tasks.py.
"""

import dataclasses
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from cv_bench_file import write_cv_bench
from PIL import Image

pytest.importorskip("lmms_eval")

from lmms_eval.api.instance import Instance
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import get_model
from lmms_eval.tasks import TaskManager
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

import lsg_jax
from converters.convert import convert
from lsg_jax.config import EvalConfig, GateConfig, SinkConfig
from lsg_jax.errors import ConfigError
from lsg_jax.eval.benchmarks.cv_bench import CV_BENCH
from lsg_jax.eval.likelihood import log_likelihoods
from lsg_jax.eval.lmms.model import LsgJax
from lsg_jax.eval.lmms.requests import ask, cut
from lsg_jax.eval.lmms_tasks import cv_bench
from lsg_jax.eval.runner import evaluate
from lsg_jax.gating.portable import PortableGates, write_gates

TASKS = Path(cv_bench.__file__).parent
OFFLINE = {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
TOKENS = 3
SETTINGS = EvalConfig(batch_size=4, max_new_tokens=TOKENS)


@pytest.fixture(scope="module")
def model(tiny_hf_folder, tmp_path_factory):
    """A tiny model that knows four letters and the period only, so that some of its answers can be read, and some are right."""
    folder = tmp_path_factory.mktemp("letters")
    for file in tiny_hf_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    words = Tokenizer.from_file(str(folder / "tokenizer.json")).encode("ABCD.", add_special_tokens=False).ids
    head = np.zeros_like(tensors["language_model.lm_head.weight"])
    head[[*words, 2]] = np.random.default_rng(6).normal(size=(len(words) + 1, head.shape[1]))
    save_file(tensors | {"language_model.lm_head.weight": head}, folder / "model.safetensors", metadata={"format": "pt"})
    convert(folder, folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def gates(tmp_path_factory):
    """A gate file that changes what the model says."""
    rng = np.random.default_rng(0)
    shapes = {
        "norm_scale": (64,),
        "norm_bias": (64,),
        "fc1_kernel": (64, 8),
        "fc1_bias": (8,),
        "fc2_kernel": (8, 2),
        "fc2_bias": (2,),
    }
    path = tmp_path_factory.mktemp("gates") / "gates.safetensors"
    made = PortableGates(
        gate=GateConfig(layers=(1, 4), width=8, key_scale=8.0),
        sinks=SinkConfig(criterion="norm", vit_tau=8.0),
        parameters={name: rng.normal(size=(2, *shape)).astype(np.float32) for name, shape in shapes.items()},
    )
    write_gates(path, made)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small CV-Bench file, and a task file that points `cv_bench_official` at it."""
    folder = tmp_path_factory.mktemp("tasks")
    write_cv_bench(folder / "cv.parquet")
    task = {
        "include": str(TASKS / "cv_bench_official.yaml"),
        "task": "cv_bench_here",
        "dataset_path": "parquet",
        "dataset_kwargs": {"data_files": {"test": "cv.parquet"}},
        "generation_kwargs": {"do_sample": False, "max_new_tokens": TOKENS, "until": []},
    }
    (folder / "cv_bench_here.yaml").write_text(yaml.safe_dump(task))
    return folder


@pytest.fixture(scope="module")
def ours(model, gates, folder, tmp_path_factory):
    """What `lsg eval` finds: result, and {method: [line of the outputs file]}."""
    out = tmp_path_factory.mktemp("ours")
    config = replace(SETTINGS, benchmarks={"cv_bench": str(folder / "cv.parquet")})
    result = evaluate({"base": lsg_jax.load(model), "lsg": lsg_jax.load(model, gates)}, config, out)
    lines = {m: (out / f"cv_bench.{m}.jsonl").read_text().splitlines() for m in ("base", "lsg")}
    entry = dataclasses.asdict(result.benchmarks["cv_bench"])
    return entry, {method: list(map(json.loads, found)) for method, found in lines.items()}


def assert_same(samples, scores, entry, lines):
    """Holds lmms-eval's samples and scores to the lines and scores of `lsg eval`."""
    samples = sorted(samples, key=lambda sample: sample["doc_id"])
    given = [sample["filtered_resps"] for sample in samples]  # in the file without the list around it
    assert [text if isinstance(text, str) else text[0] for text in given] == [line["output"] for line in lines]
    for sample, line in zip(samples, lines, strict=True):
        assert sample["target"] == line["answers"][0]
        assert (sample["accuracy"]["parsed"], sample["accuracy"]["correct"]) == (line["parsed"], line["score"])
    for name in ("accuracy", "2D", "3D"):
        assert scores[f"{name},none"] == entry[name]["value"]
    outputs = [line["output"] for line in lines]
    assert len(set(outputs)) > 2 and {line["score"] for line in lines} == {0.0, 1.0}, outputs  # else nothing was compared


def asked_by_lmms_eval(name, arguments, folder, out, batch_size):
    """Samples and scores of the command `lmms_eval`."""
    command = [sys.executable, "-m", "lmms_eval", "--model", name, "--model_args", arguments, "--tasks", "cv_bench_here"]
    command += [
        "--include_path",
        str(folder),
        "--batch_size",
        str(batch_size),
        "--log_samples",
        "--output_path",
        str(out / "out"),
    ]
    environment = os.environ | OFFLINE | {"HF_HOME": str(out), "OPENAI_API_KEY": "none"}
    done = subprocess.run(command, cwd=out, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stdout + done.stderr, done.stdout + done.stderr
    (results,), (samples,) = ((out / "out").rglob(pattern) for pattern in ("*_results.json", "*_samples_*.jsonl"))
    scores = json.loads(results.read_text())["results"]["cv_bench_here"]
    return map(json.loads, samples.read_text().splitlines()), scores


def test_command_line(model, gates, folder, ours, tmp_path):
    samples, scores = asked_by_lmms_eval("lsg_jax", f"model={model},gates={gates}", folder, tmp_path, 4)
    entry, lines = ours
    assert_same(samples, scores, entry["methods"]["lsg"], lines["lsg"])
    assert math.isnan(scores["official,none"]) and entry["score"] is None  # a part of the benchmark has no official score


def test_its_openai_client_against_our_server(model, gates, folder, ours, tmp_path):
    command = [sys.executable, "-m", "lsg_jax", "serve", str(model), "--gates", str(gates), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        arguments = f"model=model,base_url={server.stdout.readline().strip()},num_concurrent=8,timeout=600"
        samples, scores = asked_by_lmms_eval("openai", arguments, folder, tmp_path, 1)
        server.terminate()
    entry, lines = ours
    assert_same(samples, scores, entry["methods"]["lsg"], lines["lsg"])
    assert server.returncode == 0


def test_official_score_of_a_whole_file(model, folder, ours, monkeypatch, tmp_path):
    entry, lines = ours
    monkeypatch.setattr(cv_bench, "CV_BENCH", replace(CV_BENCH, size=len(lines["base"])))
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path))
    found = simple_evaluate(
        model="lsg_jax",
        model_args=f"model={model}",
        tasks=["cv_bench_here"],
        batch_size=4,
        task_manager=TaskManager(include_path=str(folder), model_name="lsg_jax", include_defaults=False),
    )
    scores = found["results"]["cv_bench_here"]
    assert_same(found["samples"]["cv_bench_here"], scores, entry["methods"]["base"], lines["base"])
    asked = {sample["doc_id"]: sample["arguments"][0] for sample in found["samples"]["cv_bench_here"]}
    assert [asked[i] for i in range(len(asked))] == [line["prompt"] for line in lines["base"]]
    assert scores["official,none"] == entry["methods"]["base"]["official"]["value"] != scores["accuracy,none"]
    assert [line["output"] for line in lines["base"]] != [line["output"] for line in lines["lsg"]]


# ------------------------------------------------------------------------------- requests of other kinds, without a task file


def requests(kind, *arguments):
    """lmms-eval's own request objects."""
    meta = {"task": "made", "doc_id": 0, "repeats": 1}
    return [Instance(request_type=kind, arguments=args, idx=i, metadata=meta) for i, args in enumerate(arguments)]


@pytest.fixture(scope="module")
def lm(model):
    """The model as lmms-eval makes it, with two documents in its task."""
    lm = get_model("lsg_jax").create_from_arg_string(f"model={model},max_length=512", {"batch_size": "2"})
    rng = np.random.default_rng(1)
    pictures = [Image.fromarray(rng.integers(0, 256, (30, 60, 3), np.uint8)) for _ in range(2)]
    lm.task_dict = {"made": {"test": [{"pictures": pictures[:1]}, {"pictures": pictures}, {"pictures": None}]}}
    return lm


def pictures(document):
    return document["pictures"]


def test_generate_until(lm):
    assert isinstance(lm, LsgJax) and lm.settings == EvalConfig(batch_size=2, max_length=512)
    texts, settings = ["<image> Which?", "How many?", "No picture."], {"max_new_tokens": 6, "temperature": 0, "until": ["\n\n"]}
    ask_all = lambda **more: lm.generate_until(
        requests("generate_until", *((t, settings | more, pictures, i, "made", "test") for i, t in enumerate(texts)))
    )
    images = [document["pictures"] for document in lm.task_dict["made"]["test"]]
    whole = ask_all()
    assert whole == lm.vlm.generate(images, texts, max_new_tokens=6)
    stop = max(whole, key=len)[1:3]
    assert len(stop) == 2 and ask_all(until=[stop]) == [cut(text, [stop]) for text in whole] != whole


def test_loglikelihood(lm):
    documents = lm.task_dict["made"]["test"]
    asked = [("Which?", " AB", pictures, 0, "made", "test"), ("Which?", lambda document: "C" * 2, pictures, 1, "made", "test")]
    asked.append(("No picture.", " A cat", pictures, 2, "made", "test"))
    found = lm.loglikelihood(requests("loglikelihood", *asked))
    questions = [ask("x", "", lambda i=i: pictures(documents[i]), {}).item for i in range(3)]
    assert found == log_likelihoods(lm.vlm, questions, [args[0] for args in asked], [" AB", "CC", " A cat"], lm.settings)


def test_rounds(lm):
    """Two rounds for one document, three for the other; each puts the answer before it into its text."""
    seen = []

    def next_text(document, *, previous_output, round_idx, previous_round_info):
        seen.append((len(previous_output), round_idx, previous_round_info))
        ended = round_idx == document["rounds"]
        return document["pictures"], f"You said {previous_output[-1]}. Why?", ended, previous_output, round_idx * 10

    for rounds, document in enumerate(lm.task_dict["made"]["test"], 1):
        document["rounds"] = rounds
    settings = {"max_new_tokens": 4, "do_sample": False}
    asked = [("Which?", settings, pictures, next_text, i, "made", "test") for i in range(3)]
    found = lm.generate_until_multi_round(requests("generate_until_multi_round", *asked))
    assert list(map(len, found)) == [1, 2, 3]
    for outputs, document in zip(found, lm.task_dict["made"]["test"], strict=True):
        images, text = document["pictures"], "Which?"
        for output in outputs:
            assert lm.vlm.generate([images], [text], max_new_tokens=4) == [output]
            text = f"You said {output}. Why?"
    assert seen == [(1, 1, None)] * 3 + [(2, 2, 10)] * 2 + [(3, 3, 20)]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"batch_size": "auto"}, "--batch_size auto: give a number"),
        ({"gate": "x"}, "--model_args: unknown argument gate; known: model, gates"),
        ({"image_aspect": "wide"}, "--model_args: image_aspect: 'wide' is not one of pad, crop, squash"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ConfigError, match=message):
        LsgJax("nowhere", **arguments)


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="start lmms-eval as one plain process"):
        LsgJax("nowhere")
