"""Prompts of the later families against Hugging Face's processors."""

import dataclasses
import json

import numpy as np
import pytest

from lsg_jax.config import DataConfig, SinkConfig
from lsg_jax.data.conversation import RecordError, Turn
from lsg_jax.data.layout import lay_out
from lsg_jax.data.pipeline import TrainingData
from lsg_jax.data.processor import Processor
from lsg_jax.data.records import prepare_llava
from lsg_jax.vlm import VLM
from tests.data.family_configs import ALL, NATIVE
from tests.data.family_processors import FAMILIES, SIZES, called, hf_processor, pair, picture, rendered, tokenizer_of


@pytest.fixture(params=FAMILIES)
def both(request, monkeypatch):
    """(our processor, Hugging Face's) of one family."""
    return pair(request.param, monkeypatch)


@pytest.mark.parametrize("size", SIZES)
def test_ids_of_a_question_are_those_of_hf(both, size):
    ours, theirs = both
    ids = called(theirs, rendered(theirs, [("What is this?", 1)]), [picture(size)])["input_ids"][0]
    encoded = ours.encode_question("What is this?", image_sizes=[size])
    assert encoded.ids.tolist() == ids.tolist()
    assert (encoded.ids == ours.model.image_token_id).sum() == len(lay_out(size, ours.model))


def test_ids_of_conversations_of_several_images_are_those_of_hf(both):
    ours, theirs = both
    shown = [picture(size) for size in SIZES[:3]]
    text = rendered(theirs, [("Same?", 2), ("No.", 0), ("And this?", 1), ("Yes, it is.", 0)], generate=False)
    ids = called(theirs, text, shown)["input_ids"][0].tolist()
    turns = [Turn("human", "<image><image>\nSame?"), Turn("gpt", "No."), Turn("human", "<image>\nAnd this?")]
    encoded = ours.encode(turns, "Yes, it is.", image_sizes=SIZES[:3])
    assert encoded.ids.tolist() == ids[: len(encoded.ids)] and len(ids) - len(encoded.ids) <= 1  # a newline
    assert ours.decode(encoded.ids[encoded.num_prompt :]).strip() == "Yes, it is."
    whole = ours.encode_conversation(
        [*turns, Turn("gpt", "Yes, it is.")], image_sizes=SIZES[:3], max_length=4000, max_answer_tokens=99
    )
    assert whole.ids.tolist() == encoded.ids.tolist() and len(whole.answers) == 2


def test_questions_without_an_image_are_those_of_hf(both):
    ours, theirs = both
    text = rendered(theirs, [("What is two and two?", 0)])
    extra = {"add_special_tokens": False} if text.startswith("<bos>") else {}
    ids = theirs.tokenizer(text, **extra).input_ids
    assert ours.encode_question("What is two and two?", image_sizes=[]).ids.tolist() == ids


@pytest.mark.parametrize("name", FAMILIES)
def test_the_named_template_writes_what_the_published_one_does(name, monkeypatch):
    published, _ = pair(name, monkeypatch)
    named, _ = pair(name, monkeypatch, template="qwen2_vl" if name == "qwen2_5_vl" else name)
    tokenizer = tokenizer_of(name)
    assert Processor(tokenizer, published.model, image_token=FAMILIES[name][2]).template == named.template
    for turns in (
        [Turn("human", "<image>\n What?  ")],
        [Turn("human", "Is <image> like <image>?")],
        [Turn("human", "<image>\n<image>\nSame?"), Turn("gpt", "No."), Turn("human", "Why?")],
    ):
        shown = SIZES[: sum(turn.text.count("<image>") for turn in turns)]
        assert (
            named.encode(turns, None, image_sizes=shown).ids.tolist()
            == published.encode(turns, None, image_sizes=shown).ids.tolist()
        )
        answered = named.encode(turns, "a b", image_sizes=shown).ids.tolist()
        assert answered == published.encode(turns, "a b", image_sizes=shown).ids.tolist()


def test_separators_in_a_question_are_text(both):
    ours, _ = both
    plain = ours.encode_question("ab", image_sizes=[SIZES[0]]).ids
    for marker in (
        "<img>",
        "<|vision_start|>",
        "<start_of_image>",
        "<fake_token_around_image>",
        FAMILIES[ours.model.family][2],
    ):
        ids = ours.encode_question(f"a{marker}b", image_sizes=[SIZES[0]]).ids
        special = list(ours.tokenizer.added_tokens_decoder)
        assert np.isin(ids, special).sum() == np.isin(plain, special).sum()


def test_an_image_that_does_not_fit_is_named(both):
    ours, _ = both
    with pytest.raises(RecordError, match="the image's tokens do not fit into 8 tokens"):
        ours.encode_question("a", image_sizes=[SIZES[0]], max_length=8)


def test_a_folder_of_a_checkpoint_is_opened(both, tmp_path):
    """The token of a patch, and how the template writes an image, are found in the files."""
    ours, theirs = both
    ours.tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(theirs.chat_template)
    opened = Processor.from_folder(tmp_path, ours.model)
    assert opened.model == ours.model
    sizes = SIZES[:2]
    expected = ours.encode_question("a", image_sizes=sizes).ids.tolist()
    assert opened.encode_question("a", image_sizes=sizes).ids.tolist() == expected


def test_an_answer_ends_where_the_model_stops(monkeypatch):
    """Gemma 3 ends turns with another token than its tokenizer's end of sequence."""
    ours, theirs = pair("gemma3", monkeypatch)
    tokenizer = ours.tokenizer
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    tokenizer.eos_token = "<pad>"
    config = dataclasses.replace(ours.model, eos_token_ids=(0, end))
    processor = Processor(tokenizer, config, chat_template=theirs.chat_template, image_token="<image_soft_token>")
    assert processor.encode([Turn("human", "a")], "b", image_sizes=[]).ids[-1] == end
    stops = Processor(tokenizer, ours.model, chat_template=theirs.chat_template, image_token="<image_soft_token>")
    assert stops.encode([Turn("human", "a")], "b", image_sizes=[]).ids[-2:].tolist() == [end, 0]


def test_images_that_are_too_thin_are_left_out_of_training(tmp_path, monkeypatch):
    """Batches have one shape, with room for the largest image."""
    ours, _ = pair("qwen2_5_vl", monkeypatch)
    (tmp_path / "images").mkdir()
    sizes = [(60, 40), (400, 1), (200, 150), (33, 90), (90, 60)]
    records = []
    for number, size in enumerate(sizes):
        picture(size, number).save(tmp_path / f"images/{number}.png")
        turns = [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": f"a{number}"}]
        records.append({"id": str(number), "conversations": turns, "image": f"{number}.png"})
    records.append({"id": "text", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]})
    (tmp_path / "r.json").write_text(json.dumps(records))
    prepare_llava(tmp_path / "r.json", tmp_path / "images", tmp_path / "records")
    data = TrainingData(
        tmp_path / "records", ours, DataConfig(max_length=300, max_answer_tokens=8), batch_size=1, seed=0, epochs=1
    )
    assert (data.num_examples, data.dropped) == (5, {"image_size": 1})
    batches = list(data)
    data.close()
    assert {batch.images.patches.shape for batch in batches} == {(1, 1, 256, 1176)}
    for batch in batches:
        row = int(batch.row_id[0])
        assert batch.images.used.sum() == (0 if row == 5 else np.prod(lay_out(sizes[row], ours.model).grid))


@pytest.mark.parametrize("name", NATIVE)
def test_v_sinks_come_in_the_order_of_pixel_values(name, monkeypatch):
    """Of a tower that finds sinks by the first value of a patch."""
    config = dataclasses.replace(ALL[name], sinks=SinkConfig(vit_dims=(0,)))
    monkeypatch.setattr("lsg_jax.vlm._v_sinks", lambda _, given, __: (given.patches[..., 0] > 0) & given.used)
    vlm = object.__new__(VLM)
    vlm.config, vlm.frozen, vlm.trained, vlm.graphdef = config, {}, None, None
    fields = hf_processor(config)(images=[picture(size) for size in SIZES], return_tensors="np")
    found = vlm.v_sinks(**fields)
    assert found.tolist() == (fields["pixel_values"][:, 0] > 0).tolist()
