"""The lmms-eval plug-in as far as it can be held without lmms-eval: what is declared, and what the task's functions give."""

import importlib
import math
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from cv_bench_file import write_cv_bench
from PIL import Image

from lsg_jax.config import EvalConfig
from lsg_jax.errors import InputError
from lsg_jax.eval.benchmarks.cv_bench import CV_BENCH
from lsg_jax.eval.lmms import requests
from lsg_jax.eval.lmms_tasks import cv_bench
from lsg_jax.eval.runner import MAX_NEW_TOKENS, ask, grade

ROOT = Path(__file__).parent.parent.parent


def find(dotted):
    module, _, name = dotted.rpartition(".")
    return getattr(importlib.import_module(module), name)


class Loader(yaml.SafeLoader):
    """Reads `!function a.b.c` as the function, as lmms-eval does."""


Loader.add_constructor("!function", lambda loader, node: find(loader.construct_scalar(node)))


def test_entry_point_and_package_data_are_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    module, _, function = project["project"]["entry-points"]["lmms_eval.models"]["lsg_jax"].partition(":")
    assert callable(find(f"{module}.{function}"))
    (pattern,) = project["tool"]["setuptools"]["package-data"]["lsg_jax.eval.lmms_tasks"]
    assert list(Path(cv_bench.__file__).parent.glob(pattern))
    assert any(line.startswith("lmms-eval==") for line in project["project"]["optional-dependencies"]["lmms"])


def test_task_file_names_our_functions():
    path = Path(cv_bench.__file__).parent / "cv_bench_official.yaml"
    task = yaml.load(path.read_text(encoding="utf-8"), Loader)  # fails on a function that does not exist
    assert task["task"] == "cv_bench_official" and task["dataset_path"] == "nyu-visionx/CV-Bench"
    assert task["doc_to_text"] is cv_bench.text and task["process_results"] is cv_bench.grade
    assert tuple(str(metric["metric"]) for metric in task["metric_list"]) == cv_bench.METRICS
    # as `lsg eval` does by default, and no stop string, for which lmms-eval would fill in an empty line
    assert task["generation_kwargs"] == {"do_sample": False, "max_new_tokens": MAX_NEW_TOKENS, "until": []}


def test_task_and_benchmark_agree(tmp_path, monkeypatch):
    rows = write_cv_bench(tmp_path / "cv.parquet")
    asked = ask(CV_BENCH, str(tmp_path / "cv.parquet"), EvalConfig())
    outputs = [f"({'ABCD'[i % 3]})" if i % 4 else "none of them" for i in range(len(rows))]
    graded = grade(asked, outputs)
    found = []
    for doc, item, prompt, output, parsed, score in zip(
        rows, asked.items, asked.prompts, outputs, graded.parsed, graded.score, strict=True
    ):
        assert (cv_bench.text(doc), cv_bench.target(doc)) == (prompt, item.answers[0])
        found.append(cv_bench.grade(doc, [output]))
        assert all((row["id"], row["parsed"], row["correct"]) == (item.id, parsed, score) for row in found[-1].values())
        (image,) = cv_bench.visual(doc)
        assert image.size == (80, 48)  # not turned by its EXIF orientation

    expected = CV_BENCH.metrics(graded)
    assert 0 < expected["official"][0] != expected["accuracy"][0]
    functions = {"accuracy": cv_bench.accuracy, "2D": cv_bench.two_d, "3D": cv_bench.three_d}
    for name, function in functions.items():
        assert function([row[name] for row in found]) == expected[name][0]
    official = [row["official"] for row in found]
    assert math.isnan(cv_bench.official(official))  # these are not all questions
    monkeypatch.setattr(cv_bench, "CV_BENCH", replace(CV_BENCH, size=len(rows)))
    assert cv_bench.official(official) == expected["official"][0]


# ------------------------------------------------------------------------------------------------------------------- requests


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_request_has_the_images_of_its_document(count):
    pictures = [Image.new("RGB", (4, 4 + i)) for i in range(count)]
    calls = []
    visuals = lambda: calls.append(1) or pictures or None
    asked = requests.ask("made/test/7", "Which?", visuals, {"until": ["\n\n", "."], "max_new_tokens": 5})
    for _ in range(2):
        assert [image.read() for image in asked.item.images] == pictures
    assert len(calls) == 1 + 2 * (count > 0)
    assert (asked.text, asked.max_new_tokens, asked.until) == ("Which?", 5, (".",))


@pytest.mark.parametrize(
    "visuals, settings, message",
    [
        (["film.mp4"], {}, "made/test/7: the task gives an input of type str; lsg_jax answers questions about images"),
        (
            [Image.new("RGB", (4, 4)), 3],
            {},
            "made/test/7: the task gives an input of type int; lsg_jax answers questions about images",
        ),
        ([], {"do_sample": True}, "made/test/7: lsg_jax decodes greedily; give --gen_kwargs"),
        ([], {"num_beams": 4}, "made/test/7: lsg_jax decodes greedily"),
    ],
)
def test_what_is_refused(visuals, settings, message):
    with pytest.raises(InputError, match=message):
        requests.ask("made/test/7", "Which?", lambda: visuals, settings)


def test_settings_that_ask_for_sampling():
    greedy = [{}, {"temperature": 0}, {"do_sample": False}]
    greedy += [{"temperature": 0.7, "do_sample": False}, {"do_sample": True, "temperature": 0}]
    random = [{"do_sample": True}, {"temperature": 0.7}, {"do_sample": True, "temperature": 1.0}]
    assert list(map(requests.samples, greedy + random)) == [False] * len(greedy) + [True] * len(random)
