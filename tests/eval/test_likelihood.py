"""Log probabilities of given answers: against Hugging Face, and, with gates, against the logits of whole rows."""

import io
from string import ascii_lowercase

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer
from transformers import LlavaForConditionalGeneration

import lsg_jax
from converters.convert import convert
from converters.tiny_checkpoint import write_tiny_checkpoint
from lsg_jax.config import EvalConfig, GateConfig, SinkConfig
from lsg_jax.data.conversation import Turn
from lsg_jax.data.images import normalise
from lsg_jax.errors import InputError
from lsg_jax.eval.benchmark import Item
from lsg_jax.eval.likelihood import log_likelihoods
from lsg_jax.gating.portable import PortableGates


class Noise:
    """An image of random pixels."""

    def __init__(self, seed):
        self.image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 56, 3), np.uint8))

    def read(self):
        file = io.BytesIO()
        self.image.save(file, "PNG")
        return file.getvalue()


ITEMS = [Item(str(i), "", (), images=() if i == 4 else (Noise(i),)) for i in range(5)]
# of different lengths, but (the last takes the room of the image) of one bucket, so that one shape compiles
PROMPTS = ["Which?", "How many are there?", "Count.", "How many are seen?", "Without an image, " * 3 + "which?"]
ANSWERS = [" a cat", "x", "?", "no, no", "a dog"]
SETTINGS = EvalConfig(batch_size=2)
LENGTH = 128  # rows of the references


CHAT = (
    "{% for m in messages %}{% if m['role'] == 'user' %}Q: {{ m['content'] }} A:"
    "{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny model that writes letters and nothing else, so that what it would write can be given: HF folder, and converted."""
    folder = tmp_path_factory.mktemp("likelihood")
    write_tiny_checkpoint(folder / "hf")
    (folder / "hf" / "chat_template.jinja").write_text(CHAT)
    tensors = load_file(folder / "hf" / "model.safetensors")
    tokenizer = Tokenizer.from_file(str(folder / "hf" / "tokenizer.json"))
    letters = tokenizer.encode(ascii_lowercase, add_special_tokens=False).ids
    head = np.zeros_like(tensors["language_model.lm_head.weight"])
    head[letters] = np.random.default_rng(0).normal(size=(len(letters), head.shape[1]))
    tensors["language_model.lm_head.weight"] = head
    save_file(tensors, folder / "hf" / "model.safetensors", metadata={"format": "pt"})
    convert(folder / "hf", folder / "model")
    return folder / "hf", folder / "model"


def rows_of(vlm, answers):
    """ids [5, LENGTH] of prompts and answers without end markers, padded right; bounds of the answers; pixels of ITEMS[:4]."""
    ids, bounds = np.zeros((len(ITEMS), LENGTH), np.int32), []
    for row, item, prompt, answer in zip(ids, ITEMS, PROMPTS, answers, strict=True):
        text = f"<image>\n{prompt}" if item.images else prompt
        encoded = vlm.processor.encode([Turn("human", text)], answer.strip())
        bounds.append((encoded.num_prompt, len(encoded.ids) - 1))
        row[: len(encoded.ids) - 1] = encoded.ids[:-1]
    pixels = np.concatenate([normalise(vlm.processor.pixels(item.images[0].image), vlm.config.image) for item in ITEMS[:4]])
    return ids, bounds, pixels.transpose(0, 3, 1, 2)


def score(logits, ids, start, end):
    """Sum of the log probabilities of ids[start:end], and whether each is the most probable."""
    logp = torch.tensor(logits[start - 1 : end - 1]).double().log_softmax(-1).numpy()
    return logp[np.arange(end - start), ids[start:end]].sum(), bool((logp.argmax(-1) == ids[start:end]).all())


def check(vlm, answers, logits_of):
    """Holds `log_likelihoods` to the logits [5, LENGTH, V] that `logits_of(ids, pixels, bounds)` gives, and returns it."""
    found = log_likelihoods(vlm, ITEMS, PROMPTS, answers, SETTINGS)
    ids, bounds, pixels = rows_of(vlm, answers)
    for logits, row, (start, end), (nats, is_greedy) in zip(logits_of(ids, pixels, bounds), ids, bounds, found, strict=True):
        expected, expected_greedy = score(logits, row, start, end)
        assert nats == pytest.approx(expected, rel=1e-4, abs=1e-4 * float(np.abs(logits).max()))  # as logits are held elsewhere
        assert is_greedy == expected_greedy
    return found


def test_equal_to_hugging_face(folders):
    vlm = lsg_jax.load(folders[1])
    hf = LlavaForConditionalGeneration.from_pretrained(folders[0]).eval()

    def logits_of(ids, pixels, bounds):
        for i, (row, (_, end)) in enumerate(zip(ids, bounds, strict=True)):
            image = torch.tensor(pixels[i : i + 1]) if i < 4 else None
            with torch.no_grad():
                yield hf(input_ids=torch.tensor(row[None, :end]).long(), pixel_values=image).logits[0].numpy()

    assert not any(is_greedy for _, is_greedy in check(vlm, ANSWERS, logits_of))
    written = [""] * len(ITEMS)
    for _ in range(3):
        ids, bounds, pixels = rows_of(vlm, written)
        nexts = [logits[end - 1].argmax() for logits, (_, end) in zip(logits_of(ids, pixels, bounds), bounds, strict=True)]
        written = [text + vlm.processor.decode([token]) for text, token in zip(written, nexts, strict=True)]
    assert all(is_greedy for _, is_greedy in check(vlm, written, logits_of)), written


def test_gates_read_at_the_end_of_the_prompt(folders):
    rng = np.random.default_rng(0)
    shapes = {
        "norm_scale": (64,),
        "norm_bias": (64,),
        "fc1_kernel": (64, 8),
        "fc1_bias": (8,),
        "fc2_kernel": (8, 2),
        "fc2_bias": (2,),
    }
    gates = PortableGates(
        gate=GateConfig(layers=(1, 4), width=8),
        sinks=SinkConfig(criterion="norm", vit_tau=10.0),
        parameters={name: rng.normal(size=(2, *shape)).astype(np.float32) for name, shape in shapes.items()},
    )
    vlm = lsg_jax.load(folders[1], gates)

    def logits_of(ids, pixels, bounds, at=-1):
        valid = np.arange(LENGTH) < np.array([end for _, end in bounds])[:, None]
        return vlm.logits(ids, pixels, valid, [start + at for start, _ in bounds])

    gated = check(vlm, ANSWERS, logits_of)
    ids, bounds, pixels = rows_of(vlm, ANSWERS)
    elsewhere = logits_of(ids, pixels, bounds, at=-9)
    others = [score(logits, row, *bound)[0] for logits, row, bound in zip(elsewhere, ids, bounds, strict=True)]
    assert max(abs(nats - other) for (nats, _), other in zip(gated, others, strict=True)) > 1e-3


def test_what_does_not_fit_is_refused(tiny_model):
    vlm = lsg_jax.load(tiny_model)
    for answer, length, message in [
        ("a cat", 50, "question 0: .*image.*fit into 50 tokens"),
        ("a" * 300, 300, "question 0: the answer does not fit into 300"),
    ]:
        with pytest.raises(InputError, match=message):
            log_likelihoods(vlm, ITEMS[:1], PROMPTS[:1], [answer], EvalConfig(max_length=length))


def test_an_image_that_cannot_be_read_names_its_question(tiny_model):
    class Empty:
        def read(self):
            return b""

    items = [Item("x", "?", (), images=(Empty(),))]
    with pytest.raises(InputError, match="question x: image: the image file is empty"):
        log_likelihoods(lsg_jax.load(tiny_model), items, ["?"], ["a"], EvalConfig(batch_size=1))
