"""The checkpoint in the package: its card says what is measured, and PyTorch gives the same answers."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import lsg_jax
from converters.convert import convert
from converters.torch_gate import attach
from lsg_jax.data.drawing import draw
from lsg_jax.data.scene_questions import scene_questions
from lsg_jax.opening import with_gates
from lsg_jax.quickstart import CHECKPOINT, GATES

NEW_TOKENS, COMPARED = 6, 200
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embedded") / "model"
    convert(CHECKPOINT, folder, dtype="float32")
    return folder


def evaluate(model, questions):
    """Folder of the card's evaluation with so many of its 2,000 questions, base and gated.

    It runs in a process of its own with XLA's optimisations, which other tests turn off: most of the time here is computation.
    """
    out = model.parent / f"eval{questions}"
    command = [sys.executable, "-m", "lsg_jax", "eval", "configs/tiny.toml"]
    command += ["--set", f"model={json.dumps(str(model))}", f"eval.limit={questions}"]
    command += ["--gates", str(GATES), "--benchmark", "scenes", "--out", str(out)]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (out / "stdout").write_text(done.stdout)
    return out


@pytest.fixture(scope="module")
def evaluated(model):
    """With the questions that PyTorch is asked too."""
    return evaluate(model, COMPARED)


def test_it_is_small():
    assert sum(file.stat().st_size for file in CHECKPOINT.parent.rglob("*")) < 8e6


@pytest.mark.soak
def test_the_card_says_what_is_measured_and_each_kind_is_better_than_the_majority(model):
    """Of all 2,000 questions. By default the answers to 200 of them are those of PyTorch, below."""
    evaluated = evaluate(model, 2000)
    assert (evaluated / "stdout").read_text().strip() in (CHECKPOINT / "README.md").read_text(encoding="utf-8")
    scores = json.loads((evaluated / "result.json").read_text())["benchmarks"]["scenes"]
    kinds = {name: majority for name, majority in scores["majority"].items() if name.startswith("kind: ")}
    assert scores["methods"].keys() == {"base", "lsg"}
    for method in scores["methods"].values():
        assert len(kinds) == 8 and all(method[name]["low"] > majority for name, majority in kinds.items())


@cache
def hugging_face():
    """The model, its processor, and prompts and images of the questions that `eval.limit` leaves of the 2,000."""
    torch.set_num_threads(1)
    processor = AutoProcessor.from_pretrained(CHECKPOINT)
    model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    asked = scene_questions("test", 2000)
    questions = [asked[i] for i in np.linspace(0, 1999, COMPARED).round().astype(int)]
    images = [Image.fromarray(draw(question.scene)) for question in questions]
    return model, processor, [question.prompt for question in questions], images


def torch_answers(batch=20):
    model, processor, prompts, images = hugging_face()
    processor.tokenizer.padding_side = "left"
    answers = []
    for start in range(0, len(prompts), batch):
        texts = [
            processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}], add_generation_prompt=True
            )
            for prompt in prompts[start : start + batch]
        ]
        inputs = processor(images=images[start : start + batch], text=texts, padding=True, return_tensors="pt")
        with torch.no_grad():
            ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        answers += [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]
    return answers


def our_answers(evaluated, method):
    """The raw outputs for the same questions."""
    rows = [json.loads(line) for line in (evaluated / f"scenes.{method}.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == hugging_face()[2]
    return [row["output"].strip() for row in rows]


def test_pytorch_gives_the_same_answers(model, evaluated):
    expected = torch_answers()
    assert our_answers(evaluated, "base") == expected and len(set(expected)) > 10
    _, _, prompts, images = hugging_face()
    assert [text.strip() for text in lsg_jax.load(model).generate(images[:40], prompts[:40], NEW_TOKENS)] == expected[:40]


def test_pytorch_gives_the_same_answers_with_gates(model, evaluated):
    with attach(hugging_face()[0], GATES):
        expected = torch_answers()
    assert our_answers(evaluated, "lsg") == expected
    _, _, prompts, images = hugging_face()
    gated = with_gates(lsg_jax.load(model), GATES)
    assert [text.strip() for text in gated.generate(images[:40], prompts[:40], NEW_TOKENS)] == expected[:40]
