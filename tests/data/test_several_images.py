"""Records with any number of images: rows, token ids, chat templates and batches."""

import dataclasses
import hashlib
import io
import json

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image as PILImage
from tokenizers_for_tests import byte_level_tokenizer, llama_tokenizer, model_config
from transformers import AutoTokenizer, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from converters.byte_tokenizer import IMAGE, write_byte_tokenizer
from lsg_jax.config import Canvas, DataConfig
from lsg_jax.data.conversation import RecordError, Turn, parse_record, question_turn
from lsg_jax.data.images import open_image, prepare_tiles, to_patches
from lsg_jax.data.pipeline import TrainingData
from lsg_jax.data.prepared import FolderLayout, write_manifest, write_rows
from lsg_jax.data.processor import Processor
from lsg_jax.data.records import LAYOUT, open_records, prepare_llava
from lsg_jax.data.reports import Report
from lsg_jax.data.templates import TEMPLATES

SIZES = [(40, 30), (7, 20), (28, 28)]  # width, height


def png(index):
    file = io.BytesIO()
    width, height = SIZES[index]
    PILImage.new("RGB", (width, height), (60 * index + 40, 0, 0)).save(file, "PNG")
    return file.getvalue()


def record(record_id, images, *texts):
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"id": record_id, "image": [f"{index}.png" for index in images], "conversations": turns}


RECORDS = [
    record("two", [1, 0], "<image> or <image>?", "first"),
    record("later", [0, 2], "<image>\nThis?", "a", "And <image>", "b"),
    record("one", [2], "<image>\nWhat?", "c"),
    record("none", [], "Hello", "d"),
    record("three", [0, 1, 2], "Compare.", "e"),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    write_byte_tokenizer(tmp_path_factory.getbasetemp() / "byte")
    return AutoTokenizer.from_pretrained(tmp_path_factory.getbasetemp() / "byte", local_files_only=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("several")
    for index in range(3):
        (root / f"{index}.png").write_bytes(png(index))
    (root / "r.json").write_text(json.dumps(RECORDS))
    prepare_llava(root / "r.json", root, root / "prepared")
    return root / "prepared"


def test_rows_hold_the_images_in_their_order(folder):
    rows = open_records(folder)
    report = rows.manifest.report
    assert (report.rows, report.without_image, report.notes) == (5, 1, {"image_without_tag": 1})
    numbers = [[int(name[0]) for name in entry["image"]] for entry in RECORDS]
    assert [rows[i].images for i in range(5)] == [tuple(map(png, each)) for each in numbers]
    assert [rows[i].image_sizes for i in range(5)] == [tuple(SIZES[k] for k in each) for each in numbers]
    assert rows[4].turns[0].text == "<image> <image> <image>\nCompare."
    found = tfds.builder_from_directory(LAYOUT.rows(folder)).as_data_source("train")
    assert [bytes(image) for image in found[0]["images"]] == [png(1), png(0)]


def test_the_digest_of_rows_with_one_image_stays(tmp_path):
    """As format 2 computed it: ids, the image's bytes (none for a text) and the turns, each after its length."""
    (tmp_path / "2.png").write_bytes(png(2))
    (tmp_path / "r.json").write_text(json.dumps(RECORDS[2:4]))
    expected = hashlib.sha256()
    for entry, image in zip(RECORDS[2:4], (png(2), b""), strict=True):
        turns = json.dumps([[turn["from"], turn["value"]] for turn in entry["conversations"]])
        for part in (entry["id"].encode(), image, turns.encode()):
            expected.update(len(part).to_bytes(8, "little") + part)
    assert prepare_llava(tmp_path / "r.json", tmp_path, tmp_path / "out").content_sha256 == expected.hexdigest()


def test_folders_of_format_2_are_read(tmp_path):
    layout = FolderLayout(LAYOUT.manifest, LAYOUT.dataset, format=2, oldest=1)
    features = {
        "record_id": tfds.features.Text(),
        "image": tfds.features.Image(),
        "image_sizes": tfds.features.Tensor(shape=(None, 2), dtype=np.int32),
        "turns": tfds.features.Text(),
    }
    turns = json.dumps([["human", "q"], ["gpt", "a"]])
    stored = [(png(0), [[41, 31]]), (b"", np.zeros((0, 2)))]  # a size that is not the header's: it is taken from the row
    rows = [
        {"record_id": "r", "image": image, "image_sizes": np.array(sizes, np.int32), "turns": turns} for image, sizes in stored
    ]
    write_rows(tmp_path, layout, features, rows)
    write_manifest(tmp_path, layout, Report("r.json", records=2, rows=2))
    found = open_records(tmp_path)
    assert [(found[i].images, found[i].image_sizes) for i in range(2)] == [((png(0),), ((41, 31),)), ((), ())]


# ------------------------------------------------------------------------------------------------------------------ token ids


def plain(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize(
    ("text", "images", "placed"),
    [
        ("q", 0, "q"),
        (" q <image>", 1, "<image>\nq"),
        (" q ", 2, "<image> <image>\nq"),
        ("<image>: a\n<image>: b ", 2, "<image>: a\n<image>: b"),
    ],
)
def test_tags_of_a_question(text, images, placed):
    assert question_turn(text, images) == Turn("human", placed)


@pytest.mark.parametrize(("text", "images"), [("<image>\nq", 2), ("<image><image><image>", 2), ("Is <image> like <image>?", 1)])
def test_a_tag_for_each_image_of_a_question(text, images):
    with pytest.raises(RecordError, match=rf"\d <image> tags? in the text for {images} image") as caught:
        question_turn(text, images)
    assert caught.value.reason == "tags_and_images_differ"


@pytest.mark.parametrize("scheme", ["first", "always", "normalizer"])
def test_text_between_images_is_tokenized_on_its_own(scheme):
    """As LLaVA's code does: split at the tags, tokenize each part with BOS, drop the BOS of all but the first."""
    tokenizer = llama_tokenizer("normalizer")  # as SentencePiece
    processor = Processor(llama_tokenizer(scheme), model_config())
    encoded = processor.encode_question("A <image>, then\n<image> which?", image_sizes=SIZES[:2])
    text = TEMPLATES["vicuna_v1"].system + "USER: A <image>, then\n<image> which? ASSISTANT:"
    first, *rest = text.split("<image>")
    expected = tokenizer(first).input_ids
    for part in rest:
        expected += [IMAGE] * 4 + tokenizer(part).input_ids[1:]
    assert encoded.ids.tolist() == expected
    assert (encoded.image_sizes, encoded.num_tiles, encoded.tiles) == (tuple(SIZES[:2]), 2, 3)


def test_ids_equal_those_of_hugging_face(tokenizer):
    """LlavaProcessor writes the tokens of each image into the text first; byte by byte, that is the same."""
    crop = {"height": 28, "width": 28}
    theirs = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=crop),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    prompt = "<image>\nThis? ASSISTANT: a</s>USER: And <image> or <image>? ASSISTANT:"
    shown = [PILImage.open(io.BytesIO(png(index))) for index in range(3)]
    processor = Processor(tokenizer, model_config())
    turns = [Turn("human", "<image>\nThis?"), Turn("gpt", "a"), Turn("human", "And <image> or <image>?")]
    ours = processor.encode(turns, None, image_sizes=SIZES)
    start = processor.encode_question("x", image_sizes=()).ids.tolist()
    start = start[: -len(plain(tokenizer, "x ASSISTANT:"))]  # BOS, system text and USER:
    expected = theirs(images=shown, text=prompt, return_tensors="np")["input_ids"][0].tolist()
    assert ours.ids.tolist() == start + expected[1:]
    assert ours.num_tiles == 3


def test_a_prompt_shows_the_images_of_its_turns(tokenizer):
    processor = Processor(tokenizer, model_config())
    turns = parse_record(RECORDS[1]).turns
    sizes = (SIZES[0], SIZES[2])
    limits = {"max_length": 400, "max_answer_tokens": 8}
    first, second = (processor.encode(turns[:n], turns[n].text, image_sizes=sizes) for n in (1, 3))
    assert (first.image_sizes, second.image_sizes) == (sizes[:1], sizes)
    whole = processor.encode_conversation(turns, image_sizes=sizes, **limits)
    assert whole.ids.tolist() == second.ids.tolist() and whole.image_sizes == sizes
    assert len(whole.answers) == 2 and whole.answers[0] == (first.num_prompt, len(first.ids))
    with pytest.raises(RecordError, match="2 <image> tags in the text for 1 image"):
        processor.encode(turns[:3], "b", image_sizes=sizes[:1])
    with pytest.raises(RecordError, match="the tokens of 2 images do not fit into") as caught:
        processor.encode(turns[:3], "b", image_sizes=sizes, max_length=second.ids.tolist().index(IMAGE) + 30)
    assert caught.value.reason == "image_truncated"


PARTS = (
    "{% for m in messages %}{% for c in m['content'] %}({{ c['type'] }})"
    "{{ c['text'] if c['type'] == 'text' else '<image>' }}{% endfor %}{% endfor %}"
)
STRING = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"


@pytest.mark.parametrize(
    ("source", "text", "shown"),
    [
        (PARTS, "A <image>, then\n<image>\nwhich?", "(text)A (image)<image>(text), then\n(image)<image>(text)which?"),
        (PARTS, "<image> <image>\nwhich?", "(image)<image>(image)<image>(text)which?"),
        (PARTS, "which? <image><image>", "(text)which? (image)<image>(image)<image>"),
        (PARTS, "<image><image>", "(image)<image>(image)<image>(text)"),
        (STRING, "A <image>, then\n<image>\nwhich?", "[A <image>, then\n<image>\nwhich?]"),
    ],
)
def test_chat_templates_get_parts_in_the_order_of_the_text(source, text, shown):
    tokenizer = byte_level_tokenizer()
    image = tokenizer.convert_tokens_to_ids("<image>")
    tokenizer.chat_template = source
    processor = Processor(tokenizer, model_config(image_token_id=image))
    encoded = processor.encode_question(text, image_sizes=SIZES[:2])
    assert tokenizer.decode(encoded.ids).replace("<image>" * 4, "<image>") == shown


def test_a_template_that_drops_an_image_is_refused():
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<image>' if m['content'][0]['type'] == 'image' }}"
        "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }}{% endfor %}{% endfor %}"
    )
    processor = Processor(tokenizer, model_config(image_token_id=tokenizer.convert_tokens_to_ids("<image>")))
    with pytest.raises(RecordError, match="the chat template writes 1 images of 2") as caught:
        processor.encode_question("which?", image_sizes=SIZES[:2])
    assert caught.value.reason == "image_not_written"


# -------------------------------------------------------------------------------------------------------------------- batches


def test_batches_of_records_that_differ_in_their_images(folder, tokenizer):
    processor, rows = Processor(tokenizer, model_config()), open_records(folder)
    data = TrainingData(folder, processor, DataConfig(max_length=260, max_answer_tokens=8), batch_size=6, seed=0, epochs=1)
    batch = next(data)
    data.close()
    assert (data.num_examples, data.dropped) == (6, {})
    assert batch.images.patches.shape == (6, 3, 4, 14 * 14 * 3)  # one shape: room for three images
    answers = [processor.decode(target[target >= 0]) for target in batch.answer_target]
    counts = {"first": 2, "a": 1, "b": 2, "c": 1, "d": 0, "e": 3}
    assert sorted(answers) == sorted(counts)
    for row, answer in enumerate(answers):
        shown = rows[int(batch.row_id[row])].images[: counts[answer]]
        tiles = np.concatenate([*map(processor.pixels, shown), processor.blank, processor.blank, processor.blank])[:3]
        np.testing.assert_array_equal(batch.images.patches[row], to_patches(tiles, 14))
        places = batch.source[row, :, 0]
        assert places[places >= 0].tolist() == list(range(4 * counts[answer]))
        assert (batch.input_ids[row][places >= 0] == IMAGE).all()


def test_an_image_is_alone_in_the_examples_that_show_no_other(folder, tokenizer):
    """OneVision: of the two images of a split conversation, the first one is cut into tiles until the second one appears."""
    config = model_config()
    image = dataclasses.replace(config.image, canvases=(Canvas(56, 28), Canvas(28, 56)), max_tiles=9)
    processor = Processor(tokenizer, dataclasses.replace(config, image=image))
    for conversations, expected in (("split", {"a": [True], "b": [False] * 2}), ("whole", {"a b": [False] * 2})):
        settings = DataConfig(max_length=260, max_answer_tokens=8, conversations=conversations)
        data = TrainingData(folder, processor, settings, batch_size=6 if conversations == "split" else 5, seed=0, epochs=1)
        batch = next(data)
        data.close()
        assert data.dropped == {} and batch.images.patches.shape[1] == 3
        answers = []
        for row in np.flatnonzero(batch.row_id == 1):
            kept = batch.answer_target[row]
            answers.append(processor.decode(kept[kept > 2]))  # without end markers
            alone = expected[answers[-1]]
            shown = [open_image(png(index)) for index in (0, 2)][: len(alone)]
            tiles = np.concatenate([prepare_tiles(i, image, alone=a) for i, a in zip(shown, alone, strict=True)])
            np.testing.assert_array_equal(batch.images.patches[row, : len(tiles)], to_patches(tiles, 14))
            places = batch.source[row]
            assert places.max() // 4 == len(tiles) - 1 and (batch.weight[row][places >= 0] > 0).all()
        assert sorted(answers) == sorted(expected)


def test_what_does_not_fit_is_counted_by_name(folder, tokenizer):
    processor = Processor(tokenizer, model_config())
    at = processor.encode_question("Compare.", image_sizes=SIZES).ids.tolist().index(IMAGE)
    data = TrainingData(folder, processor, DataConfig(max_length=at + 30, max_answer_tokens=8), batch_size=1, seed=0, epochs=1)
    batch = next(data)
    data.close()
    # the second image of "later" would begin at that place, and the prompt of "three" ends behind it
    assert (data.dropped, data.num_examples) == ({"image_truncated": 1, "nothing_supervised": 1}, 4)
    assert batch.images.patches.shape[1] == 2  # "three" takes no part
