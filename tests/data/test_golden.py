"""Comparison with LLaVA's code, xtuner and full vocabularies, recorded by `tests/golden/record_text_and_pixels.py`."""

import copy
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from golden.golden_cases import made_image
from PIL import Image
from tokenizers_for_tests import model_config

from converters.image_processor import CLIP_MEAN, CLIP_STD
from lsg_jax.config import ImageConfig
from lsg_jax.data.conversation import examples, parse_record
from lsg_jax.data.images import normalise, prepare_pixels
from lsg_jax.data.processor import Processor

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/text_and_pixels.json").read_text(encoding="utf-8"))
IMAGE = -200  # LLaVA's id for the image
LITERAL = {"end marker in a question", "end marker in an answer"}


@pytest.fixture
def processor(tmp_path):
    """Processors read from a model folder, as for a real checkpoint."""

    def make(vocabulary, family, added, *, template=None, **settings):
        description = copy.deepcopy(GOLDEN["tokenizers"][vocabulary])
        image_token_id = max(index for _, index in [*added, *description["model"]["vocab"].items()]) + 9
        for text, index in [*added, ("<image>", image_token_id)]:
            description["model"]["vocab"][text] = index
            flags = {"single_word": False, "lstrip": False, "rstrip": text != "<image>", "normalized": False, "special": True}
            description["added_tokens"].append({"id": index, "content": text, **flags})
        (tmp_path / "tokenizer.json").write_text(json.dumps(description), encoding="utf-8")
        settings = settings | {"extra_special_tokens": {"image_token": "<image>"}}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        return Processor.from_folder(tmp_path, model_config(image_token_id=image_token_id, family=family), template=template)

    return make


def llama(**settings):
    names = {"bos_token": "<s>", "unk_token": "<unk>", "pad_token": "<unk>", "add_bos_token": True}
    return {"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>", **names, **settings}


def encoded(processor, entry):
    """(ids with one -200 for the image, number of prompt ids) of each answer."""
    turns = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(entry["turns"])]
    record = {"id": "r", "conversations": turns} | ({"image": "a.png"} if entry["image"] else {})
    image, count = processor.model.image_token_id, processor.model.num_image_tokens
    for prompt, answer in examples(parse_record(record).turns):
        result = processor.encode(prompt, answer)
        ids, at = result.ids.tolist(), result.ids.tolist().index(image) if image in result.ids else None
        if at is None:
            yield ids, result.num_prompt
        else:
            assert ids[at : at + count] == [image] * count and ids.count(image) == count
            assert at + count <= result.num_prompt
            yield [*ids[:at], IMAGE, *ids[at + count :]], result.num_prompt - count + 1


@pytest.mark.parametrize("legacy", [True, False])
def test_ids_and_labels_equal_those_of_llava(processor, legacy):
    """LLaVA's slow tokenizer, `preprocess_multimodal` and `preprocess_v1`: equal labels of answers, and all ids before them."""
    ours = processor("llama", "llama", [], template="vicuna_v1", **llama(legacy=legacy))
    compared = 0
    for entry in GOLDEN["vicuna_v1"]:
        reference = entry[f"slow, legacy {legacy}"]
        results = list(encoded(ours, entry))
        if entry["name"] in LITERAL:
            # LLaVA tokenizes </s> in a turn's text as the control token, and then masks the whole sample
            assert reference["spans"] == [] and reference["ids"].count(2) == len(results) + 1
            assert [ids.count(2) for ids, _ in results] == list(range(1, len(results) + 1))
        elif entry["name"] == "generation prompt in an answer":
            # LLaVA masks this one too; the ids are equal, and we keep the labels
            assert reference["spans"] == [] and results[-1][0] == reference["ids"]
        else:
            assert [[count, len(ids)] for ids, count in results] == reference["spans"], entry["name"]
            assert all(ids == reference["ids"][: len(ids)] for ids, _ in results), entry["name"]
            assert results[-1][0] == reference["ids"], entry["name"]
            compared += len(results)
    assert compared == 37


def test_fast_and_slow_tokenizers_agreed_when_recorded():
    assert {entry["fast"] for entry in GOLDEN["vicuna_v1"]} == {"slow, legacy True"}


@pytest.mark.parametrize(("kind", "template"), [("table", "qwen2"), ("onevision", None), ("qwen3", None)])
def test_ids_of_qwen_formats(processor, kind, template):
    """Our qwen2 template, and the chat templates of LLaVA-OneVision (content in parts) and Qwen3."""
    chat = {"onevision": GOLDEN["onevision_chat_template"], "qwen3": GOLDEN["qwen3_chat_template"]}.get(kind)
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": chat,
    }
    ours = processor("qwen", "qwen2", [], template=template, **settings)
    assert ours.template == (template or "chat_template")
    for entry in GOLDEN["qwen2"]:
        *_, (ids, count) = encoded(ours, entry)
        reference = entry[kind]
        answer = entry["turns"][-1]
        if kind != "table":
            assert ids[:count] == reference, entry["name"]
            before, end = ours.tokenizer.decode(ids[count:]).split(answer.strip())
            thought = "<think>\n\n</think>" if kind == "qwen3" else ""
            assert (before.strip(), end.strip()) == (thought, "<|im_end|>"), entry["name"]
        elif answer.startswith("\n"):
            # a single token for both newlines would change the prompt, which has no answer at generation
            assert (ids[:count], ids[count - 1], ids[count]) == ([*reference[: count - 1], 198], 198, 198)
        else:
            assert ids == reference, entry["name"]


@pytest.mark.parametrize("legacy", [True, False])
def test_ids_of_phi3_equal_those_of_xtuner(processor, legacy):
    """Also with `legacy = false`, with which transformers 5 starts no word after a marker."""
    settings = llama(legacy=legacy, eos_token="<|endoftext|>")
    ours = processor("llama", "phi3", [tuple(pair) for pair in GOLDEN["tokenizers"]["phi3"]], **settings)
    assert ours.template == "phi3"
    end = ours.tokenizer.convert_tokens_to_ids("<|end|>")
    for entry in GOLDEN["phi3"]:
        results = list(encoded(ours, entry))
        spans = entry["spans"]
        if entry["name"] in LITERAL:  # a control token for xtuner, text for us
            assert 2 in entry["ids"] and all(2 not in ids for ids, _ in results)
            continue
        for number, (ids, count) in enumerate(results):
            reference = entry["ids"][: spans[number][1]]
            # xtuner tokenizes the newline between turns separately; in one text, as at generation, the marker strips it
            for at in [stop for _, stop in spans[:number]][::-1]:
                assert reference[at - 1 : at + 2] == [end, 29871, 13]
                del reference[at : at + 2]
            # the marker strips whitespace at the start of an answer, too
            if stripped := sum(text[:1].isspace() for text in entry["turns"][1 : 2 * number + 2 : 2]):
                assert set(ids) <= set(reference) and len(reference) - len(ids) == stripped
            else:
                assert (ids, len(ids) - count) == (reference, spans[number][1] - spans[number][0]), entry["name"]


def test_pixels_equal_those_of_llava():
    """LLaVA's `expand2square` and CLIP's processor: the same bytes, and equal normalised values up to rounding."""
    config = ImageConfig(336, "pad", CLIP_MEAN, CLIP_STD)
    for entry in GOLDEN["pixels"]:
        pixels = prepare_pixels(Image.fromarray(made_image(*entry["size"])), config)
        assert hashlib.sha256(pixels.tobytes()).hexdigest() == entry["sha256"], entry["name"]
        reference = np.asarray(entry["every_55th_from_3"], np.float32)
        ours = normalise(pixels, config)[3::55, 3::55].ravel()
        assert len(reference) == len(ours) == 7 * 7 * 3
        assert np.abs(ours - reference).max() < 5e-7, entry["name"]
