"""The checkpoint in the package: Hugging Face says what we say, and its card says what is measured."""

from functools import cache

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import lsg_jax
from converters.convert import convert
from converters.torch_gate import attach
from lsg_jax.config import EvalConfig
from lsg_jax.data.drawing import draw
from lsg_jax.data.scene_questions import scene_questions
from lsg_jax.eval.runner import evaluate
from lsg_jax.eval.table import table
from lsg_jax.opening import with_gates
from lsg_jax.quickstart import CHECKPOINT, GATES

NEW_TOKENS = 6


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embedded") / "model"
    convert(CHECKPOINT, folder, dtype="float32")
    return lsg_jax.load(folder)


def test_it_is_small():
    assert sum(file.stat().st_size for file in CHECKPOINT.parent.rglob("*") if file.suffix != ".py") < 8e6


@cache
def hugging_face():
    """Prompts and images of 200 held-out questions, and the model."""
    torch.set_num_threads(1)
    processor = AutoProcessor.from_pretrained(CHECKPOINT)
    model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    questions = scene_questions("test", 200)
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


def ours(vlm):
    _, _, prompts, images = hugging_face()
    answers = []
    for start in range(0, len(prompts), 40):
        part = slice(start, start + 40)
        answers += [text.strip() for text in vlm.generate(images[part], prompts[part], max_new_tokens=NEW_TOKENS)]
    return answers


def test_pytorch_gives_the_same_answers(base):
    expected = torch_answers()
    assert ours(base) == expected and len(set(expected)) > 10


def test_pytorch_gives_the_same_answers_with_gates(base):
    with attach(hugging_face()[0], GATES):
        expected = torch_answers()
    assert ours(with_gates(base, GATES)) == expected


def test_the_card_says_what_is_measured_and_each_kind_is_better_than_the_majority(base, tmp_path):
    settings = EvalConfig(benchmarks={"scenes": ""}, batch_size=50, max_new_tokens=NEW_TOKENS)
    result = evaluate({"base": base, "lsg": with_gates(base, GATES)}, settings, tmp_path)
    assert table(result.benchmarks) in (CHECKPOINT / "README.md").read_text(encoding="utf-8")
    scores = result.benchmarks["scenes"]
    kinds = {name: majority for name, majority in scores.majority.items() if name.startswith("kind: ")}
    for method in scores.methods.values():
        assert len(kinds) == 8 and all(method[name].low > majority for name, majority in kinds.items())
