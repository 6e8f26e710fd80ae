"""Shapes of records that other tools write: the same conversation, or a reason by name; never a record without its image."""

import random

import pytest

from lsg_jax.data.conversation import RecordError, parse_record
from lsg_jax.data.record_shapes import image_fields

TURNS = [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}]
CHAT = [{"role": "user", "content": "<image>\nq"}, {"role": "assistant", "content": "a"}]


def turn(role, like):
    return like | {"from": role}


TEXT_CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def parts(*shown, answer="a"):
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in shown]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]


IMAGE, INPUT_TEXT = {"type": "image"}, {"type": "input_text", "text": "q"}
ONE_IMAGE = {
    "LLaVA": {"image": "a.png", "conversations": TURNS},
    "LLaMA-Factory sharegpt": {"images": ["a.png"], "conversations": TURNS},
    "LLaMA-Factory openai": {"images": ["a.png"], "messages": CHAT},
    "LLaMA-Factory alpaca": {"images": ["a.png"], "instruction": "<image>", "input": "q", "output": "a"},
    "roles of XComposer": {"image": ["a.png"], "conversations": [turn("user", TURNS[0]), turn("assistant", TURNS[1])]},
    "roles of Gemma": {"image": "a.png", "conversations": [TURNS[0], {"from": "model", "value": "a"}]},
    "roles in capitals": {"image": "a.png", "messages": [c | {"role": c["role"].upper()} for c in CHAT]},
    "role and value": {"image": "a.png", "conversations": [{"role": "user", "value": "<image>\nq"}, TURNS[1]]},
    "ms-swift": {"images": [{"path": "a.png", "bytes": None}], "messages": CHAT},
    "ms-swift, pairs": {"images": ["a.png"], "query": "<image>q", "response": "a", "history": []},
    "part with its path": {"messages": parts({"type": "image", "image": "a.png"}, "q")},
    "part with a path": {"messages": parts({"type": "image", "path": "a.png", "text": None}, "q")},
    "part after the text": {"messages": parts("q", {"type": "image", "path": "a.png"})},
    "OpenAI part": {"messages": parts({"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}}, "q")},
    "OpenAI part, short": {"messages": parts({"type": "input_image", "image_url": "a.png"}, INPUT_TEXT)},
    "bare part": {"images": ["a.png"], "messages": parts(IMAGE | {"index": 0, "text": None}, "q")},
    "parts of Qwen-VL": {"conversations": [{"role": "user", "content": [{"image": "a.png"}, {"text": "q"}]}, CHAT[1]]},
    "part of text alone": {"images": ["a.png"], "messages": [{"role": "user", "content": [IMAGE, "q"]}, CHAT[1]]},
    "image in the turn": {"messages": [{"role": "user", "content": "q", "images": ["a.png"]}, CHAT[1]]},
    "in the turn and the record": {"image": "a.png", "messages": [CHAT[0] | {"image": "a.png"}, CHAT[1]]},
    "image null beside images": {"image": None, "images": ["a.png"], "messages": CHAT},
    "list in a list": {"images": [["a.png"]], "messages": CHAT},
    "URL where it came from": {"image": "a.png", "image_url": "https://example.org/1.png", "messages": CHAT},
    "both names of the turns": {"image": "a.png", "messages": TURNS, "conversations": TURNS},
    "empty video": {"image": "a.png", "messages": CHAT, "video": "", "videos": [], "audios": None},
    **{key: {key: "a.png", "messages": CHAT} for key in ("image_path", "image_file", "img", "picture", "image_url")},
}  # fmt: skip


@pytest.mark.parametrize("shape", ONE_IMAGE)
def test_every_shape_is_the_same_conversation(shape):
    parsed = parse_record({"id": "r", **ONE_IMAGE[shape]})
    assert (parsed.images, [(t.role, t.text) for t in parsed.turns]) == (("a.png",), [("human", "<image>\nq"), ("gpt", "a")])
    assert parsed.notes == ()


REJECTED = {
    "video": ({"messages": CHAT, "video": "a.mp4"}, "video", "the record has video"),
    "videos": ({"messages": TEXT_CHAT, "videos": ["a.mp4"]}, "video", "videos"),
    "video beside an image": ({"messages": CHAT, "image": "a.png", "video_path": "a.mp4"}, "video", "video_path"),
    "audio": ({"messages": TEXT_CHAT, "audios": ["a.wav"]}, "audio", "audio is not supported"),
    "video tag": ({"query": "<video>\nq", "response": "a"}, "video", "turn 0 contains <video>"),
    "audio tag": ({"messages": [{"role": "user", "content": "q <audio>"}, CHAT[1]]}, "audio", "turn 0 contains <audio>"),
    "boxes": ({"query": "q", "response": "at <bbox>", "objects": {"bbox": [[1, 2]]}}, "boxes_elsewhere", "turn 1 has"),
    "video part": ({"messages": parts({"type": "video_url", "video_url": {"url": "a"}}, "q")}, "video", "video_url of a part"),
    "audio part": ({"messages": parts({"type": "input_audio", "data": ""}, "q")}, "audio", "type input_audio"),
    "unknown part": ({"messages": parts({"type": "table"}, "q")}, "bad_turn", "neither text nor image"),
    "bare part without image": ({"messages": parts(IMAGE, "q")}, "tag_without_image", "no image"),
    "unknown key of a file": ({"messages": TEXT_CHAT, "file_name": "x/a.JPG"}, "unknown_image_key", "file_name"),
    "unknown key in an object": ({"messages": TEXT_CHAT, "meta": {"im": ["a.webp"]}}, "unknown_image_key", "meta.im"),
    "unknown key by its name": ({"messages": TEXT_CHAT, "photoId": 3}, "unknown_image_key", "photoId"),
    "URL": ({"messages": CHAT, "image": "https://example.org/a.png"}, "image_not_a_file", "give its path"),
    "data URL": ({"messages": parts({"type": "image_url", "image_url": {"url": "data:image/png;base64,QQ"}})},
                 "image_not_a_file", "data:image"),
    "bytes": ({"messages": CHAT, "image": {"bytes": "QQ", "path": None}}, "image_not_a_file", "save it to a file"),
    "object of tags": ({"messages": CHAT, "image": {"<image_00>": "a.png"}}, "bad_image_field", "without a path"),
    "keys that differ": ({"messages": CHAT, "image": "a.png", "images": ["b.png"]}, "several_image_keys", "image and images"),
    "turns that differ": ({"messages": CHAT, "conversations": TURNS[:1]}, "two_conversations", "keep one"),
    "two images": ({"messages": CHAT, "images": ["a.png", "b.png"]}, "tags_and_images_differ", "1 <image> tag in the text"),
    "question and answer": ({"image": "a.png", "question": "q", "answer": "a"}, "no_turns", "the keys are id, image, question"),
    "pairs of another kind": ({"query": "q", "response": "a", "history": ["q"]}, "bad_turn", "history"),
    "no answer": ({"query": "q", "response": None}, "bad_turn", "turn 1 has no text"),
    "roles that differ": ({"messages": [CHAT[0] | {"from": "gpt"}]}, "bad_turn", "from, role differ"),
    "two assistants": ({"messages": [TEXT_CHAT[0], CHAT[1], CHAT[1]]}, "roles_not_alternating", "second assistant turn"),
    "system, assistant twice": ({"messages": [{"role": "system", "content": "s"}, CHAT[1], CHAT[1]]},
                                "roles_not_alternating", "turn 2 is a second assistant turn in a row"),
    "tool first": ({"messages": [{"role": "tool", "content": "s"}, CHAT[1]]}, "roles_not_alternating", "a human turn is due"),
    "tool": ({"messages": [TEXT_CHAT[0], {"role": "tool", "content": "x"}]}, "unknown_role", "'tool'; expected human or gpt"),
    "system later": ({"messages": [*TEXT_CHAT, {"role": "system", "content": "x"}]}, "system_not_first", "turn 2"),
    "answer not to learn": ({"messages": [TEXT_CHAT[0], CHAT[1] | {"loss": False}]}, "unsupervised_turn", "loss = False"),
    **{f"{key} = {value}": ({"messages": [TEXT_CHAT[0], CHAT[1] | {key: value}]}, "unsupervised_turn", f"{key} = {value}")
       for key, value in (("loss", "false"), ("loss", 0), ("weight", 0.0), ("mask", True), ("mask", "True"), ("masked", 1))},
    **{f"record, {key} = {value}": ({"messages": TEXT_CHAT, key: value}, "unsupervised_turn", f"{key} = {value} marks")
       for key, value in (("label", False), ("label", "false"), ("kto_tag", False), ("kto_tag", 0))},
    **{f"pair, {key} = {value}": ({"instruction": "q", "output": "a"} | {key: value}, "bad_turn", f"{key} is not text")
       for key in ("instruction", "input", "output") for value in (["x", "y"], {"x": 1}, 3)},
    "history of lists": ({"query": "q", "response": "a", "history": [["q", ["x"]]]}, "bad_turn", "not text: ['x']"),
    "NaN as answer": ({"instruction": "q", "output": float("nan")}, "bad_turn", "turn 1 has no text"),
    "pair without question": ({"instruction": None, "input": None, "output": "a"}, "empty_question", "turn 0"),
    **{tag: ({"image": "a.png", "query": f"{tag} q", "response": "a"}, "other_image_tag", "write <image>")
       for tag in ("<ImageHere>", "<|image_1|>", "<|image|>", "<image_1>", "<image 1>", "<img>a.png</img>")},
}  # fmt: skip


@pytest.mark.parametrize("case", REJECTED)
def test_what_is_not_read_is_rejected_by_name(case):
    record, reason, message = REJECTED[case]
    with pytest.raises(RecordError) as caught:
        parse_record({"id": "r", **record})
    assert caught.value.reason == reason and message in str(caught.value) and "\n" not in str(caught.value)


SYSTEM = {"role": "system", "content": "Be kind."}


@pytest.mark.parametrize(
    ("record", "notes"),
    [
        ({"messages": [SYSTEM, *TEXT_CHAT]}, ("system_dropped",)),
        ({"messages": TEXT_CHAT, "system": "Be kind."}, ("system_dropped",)),
        ({"messages": [SYSTEM, *TEXT_CHAT], "system": "Be kind."}, ("system_dropped",)),
        ({"messages": [SYSTEM, CHAT[1], *TEXT_CHAT]}, ("system_dropped", "leading_turn_dropped")),
        ({"messages": [CHAT[1], *TEXT_CHAT]}, ("leading_turn_dropped",)),
        ({"messages": TEXT_CHAT, "system": " ", "tools": [], "score": None}, ()),
        ({"messages": TEXT_CHAT, "tools": "[x]", "score": 0}, ("key_not_read: tools", "key_not_read: score")),
        ({"messages": TEXT_CHAT, "label": "no"}, ("key_not_read: label",)),
        ({"messages": TEXT_CHAT, "label": 0, "kto_tag": True}, ("key_not_read: label", "key_not_read: kto_tag")),
        ({"messages": [TEXT_CHAT[0] | {"loss": False}, CHAT[1] | {"mask": False}]},
         ("key_not_read: loss of a turn", "key_not_read: mask of a turn")),
        ({"messages": [TEXT_CHAT[0], CHAT[1] | {"loss": True, "name": "x"}]},
         ("key_not_read: loss of a turn", "key_not_read: name of a turn")),
        ({"image": "a.png", "messages": CHAT, "width": 3, "file_name": "b.png"},
         ("key_not_read: width", "key_not_read: file_name")),
    ],
)  # fmt: skip
def test_what_is_dropped_or_not_read_is_noted(record, notes):
    parsed = parse_record({"id": "r", **record})
    assert parsed.notes == notes and [t.role for t in parsed.turns] == ["human", "gpt"]


def test_html_is_text():
    question = "Why is <video controls><video><source src='a.mp4'></video> <img src='a.png'> <Image> blank?"
    assert parse_record({"query": question, "response": "Write <video> and <bbox>.", "id": 1}).turns[0].text == question


def test_pairs_of_the_history_come_first():
    parsed = parse_record({"id": 1, "instruction": "q3", "input": "", "output": "a3", "history": [["q1", "a1"], ["q2", "a2"]]})
    assert [t.text for t in parsed.turns] == ["q1", "a1", "q2", "a2", "q3", "a3"]


@pytest.mark.parametrize(
    ("fields", "record_id"), [({}, "line 7"), ({"id": None}, "line 7"), ({"id": 0}, "0"), ({"id": ""}, "")]
)
def test_a_record_without_an_id_has_that_of_its_line(fields, record_id):
    assert parse_record({"messages": TEXT_CHAT, **fields}, default_id="line 7").record_id == record_id


@pytest.mark.parametrize("empty", [None, float("nan"), "", " "], ids=str)
def test_an_empty_part_of_a_pair_is_no_text(empty):
    for fields in (
        {"instruction": empty, "input": "q"},
        {"instruction": "q", "input": empty},
        {"query": "q", "history": empty},
    ):
        parsed = parse_record({"id": 1, "response" if "query" in fields else "output": "a", **fields})
        assert [t.text for t in parsed.turns] == ["q", "a"]


@pytest.mark.parametrize(
    ("record", "paths"),
    [
        ({"images": ["a", "b"], "messages": CHAT}, ["a", "b"]),
        (
            {"messages": [*parts({"type": "image", "path": "b"}, "q"), *parts({"type": "image_url", "image_url": "a"})]},
            ["b", "a"],
        ),
        ({"images": ["a", "b"], "messages": parts(IMAGE | {"index": 1}, "q", IMAGE | {"index": 0})}, ["b", "a"]),
        ({"images": ["a", "b"], "messages": parts(IMAGE, "q", IMAGE)}, ["a", "b"]),
        (
            {"messages": [{"role": "user", "content": "q", "image": "b"}, {"role": "user", "content": "q", "image": "a"}]},
            ["b", "a"],
        ),
        ({"image": "a", "conversations": "not turns"}, ["a"]),
        ({"messages": TEXT_CHAT}, []),
    ],
)
def test_images_are_in_order(record, paths):
    assert image_fields(record) == paths


def test_a_file_of_an_image_anywhere_is_never_a_record_of_text_only():
    """The path of an image under a random key, alone or in lists and objects, in the record, a turn or a part."""
    rng, rejected = random.Random(0), 0
    keys = ["image", "images", "x", "meta", "file", "path", "imagePath", "media", "frame", "0", "content_image", "url", "bytes"]
    for _ in range(500):
        value = "folder/a.Png"
        for _ in range(rng.randrange(4)):
            value = [None, value] if rng.random() < 0.5 else {rng.choice(keys): value, "width": 3}
        record = {"id": 1, "messages": parts("q")}
        place = rng.choice([record, record["messages"][0], record["messages"][0]["content"][0]])
        place[rng.choice(keys)] = value
        try:
            assert parse_record(record).images == ("folder/a.Png",)
        except RecordError:
            rejected += 1
    assert 0 < rejected < 500
