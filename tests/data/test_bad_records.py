"""Users' files and what becomes of them: a row (perhaps repaired), a reject with its reason, or an error for the whole file."""

import json
from collections import Counter

import numpy as np
import pytest
from image_files import encoded, png_header
from PIL import Image
from tokenizers_for_tests import model_config
from transformers import AutoTokenizer

from converters.byte_tokenizer import EOS, write_byte_tokenizer
from lsg_jax.data.cambrian import prepare_cambrian
from lsg_jax.data.images import image_size, open_image
from lsg_jax.data.processor import Processor
from lsg_jax.data.records import LAYOUT, REJECTS, open_records, prepare_llava
from lsg_jax.errors import InputError

RED = Image.new("RGB", (40, 30), (200, 30, 30))
GREY = Image.new("L", (40, 30), 90)
JPEG = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)), "JPEG")

FILES = {
    "a.jpg": JPEG,
    "empty.jpg": b"",
    "page.jpg": b"<!DOCTYPE html><html>404</html>",
    "lfs.jpg": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
    "half.jpg": JPEG[: len(JPEG) // 2],
    "half.png": encoded(RED)[:60],
    "text.jpg": b"hello, this is text",
    "bomb.png": png_header(20_000, 20_000),
    "long.png": encoded(Image.new("1", (2000, 3))),
    "wide.png": encoded(Image.new("RGB", (500, 1), (200, 30, 30))),
    "dot.png": encoded(RED.crop((0, 0, 1, 1))),
    "rgba.png": encoded(RED.convert("RGBA")),
    "p.png": encoded(RED.quantize(4)),
    "la.png": encoded(GREY.convert("LA")),
    "cmyk.tif": encoded(RED.convert("CMYK"), "TIFF"),
    "i16.png": encoded(Image.fromarray(np.full((30, 40), 90 * 256, np.uint16))),
    "back\\slash.png": encoded(RED),
    "gif.gif": encoded(RED, "GIF", save_all=True, append_images=[Image.new("RGB", (40, 30), "blue")]),
}


def said(*texts, image="a.jpg", first="human", **fields):
    roles = ("human", "gpt") if first == "human" else ("gpt", "human")
    turns = [{"from": roles[i % 2], "value": t} for i, t in enumerate(texts or ("<image>\nWhat?", "A ball."))]
    return {"id": "r", "conversations": turns, "image": image, **fields}


def turn(role, value):
    return {"from": role, "value": value}


FINE, SECOND_ID = None, "duplicate_id"

RECORDS = [
    # record -> a note (or FINE), or (reason, part of the message)
    ("nothing wrong", said(id="0"), FINE),
    ("missing image", said(image="b/z.jpg"), ("missing_image", "b/z.jpg: no such image")),
    ("wrong case", said(image="A.JPG"), ("missing_image", "did you mean a.jpg?")),
    ("wrong case of the folder", said(image="SUB/b.jpg"), ("missing_image", "did you mean sub/b.jpg?")),
    ("wrong suffix", said(image="a.png"), ("missing_image", "did you mean a.jpg?")),
    ("a folder", said(image="sub"), ("missing_image", "no such image")),
    ("path out of the root", said(image="../other/a.jpg"), ("image_outside", "leads outside the image folder")),
    ("path out of the root and back", said(image="../images/sub/../a.jpg", id="10"), FINE),
    ("absolute path elsewhere", said(image="/a.jpg"), ("image_outside", "an absolute path outside the image folder")),
    ("absolute path inside", said(image="{images}/sub/b.jpg", id="11"), FINE),
    ("absolute path inside, as a URL", said(image="file://{images}/sub/b.jpg", id="12"), FINE),
    ("a folder whose name begins as the root's", said(image="{images}2/a.jpg"), ("image_outside", "an absolute path outside")),
    ("Windows path", said(image="sub\\b.jpg", id="13"), FINE),
    ("Windows path of a missing image", said(image=".\\sub\\B.jpg"), ("missing_image", "did you mean sub/b.jpg?")),
    ("Windows drive", said(image="D:\\images\\a.jpg"), ("image_outside", "on a Windows drive")),
    ("backslash in a file's name", said(image="back\\slash.png", id="14"), FINE),
    ("picture under another key", {**said(image=None, id="15"), "img_path": "a.jpg"}, FINE),
    ("picture under an unknown key", said("q", "a", image=None, screen="a.jpg"), ("unknown_image_key", "but screen seems")),
    ("two pictures, one tag", {**said(image=None), "images": ["a.jpg", "a.jpg"]}, ("tags_and_images_differ", "for 2 images")),
    ("video", {**said("<video>\nq", "a", image=None), "video": "a.mp4"}, ("video", "video is not supported")),
    ("unread key", said(id="16", score=3), "key_not_read: score"),
    ("system prompt", said(id="17", system="Be kind."), "system_dropped"),
    ("image null", said("q", "a", image=None, id="1"), FINE),
    ("image ''", said("q", "a", image="", id="2"), FINE),
    ("image 'nan'", said("q", "a", image="nan", id="3"), FINE),
    ("image NaN", said("q", "a", image=float("nan"), id="4"), FINE),
    ("list of one image", said(image=["a.jpg"], id="5"), FINE),
    ("list of two, one tag", said(image=["a.jpg", "a.jpg"]), ("tags_and_images_differ", "1 <image> tag in the text for 2")),
    ("list with a gap", said(image=["a.jpg", None]), ("bad_image_field", "image: entry 2 of 2 has no path")),
    ("list of two, one missing", said("<image><image>", "a", image=["a.jpg", "b.jpg"]), ("missing_image", "b.jpg: no such")),
    ("image without <image>", said("q", "a", id="6"), "image_without_tag"),
    ("<image> without image", said(image=None), ("tag_without_image", "no image")),
    ("several <image>", said("<image><image>\nq", "a"), ("tags_and_images_differ", "2 <image> tags in the text for 1 image")),
    ("<image> in an answer", said("q", "see <image>"), ("tag_in_answer", "turn 1")),
    ("first turn not human", said("hi", "<image>\nq", "a", first="gpt", id="7"), "leading_turn_dropped"),
    (
        "roles not alternating",
        said(conversations=[turn("human", "q"), turn("human", "q"), turn("gpt", "a")]),
        ("roles_not_alternating", "second human turn"),
    ),
    ("unknown role", said(conversations=[turn("human", "q"), turn("tool", "a")]), ("unknown_role", "tool")),
    ("empty answer", said("<image>\nq", " "), ("empty_answer", "turn 1")),
    ("no answer", said("<image>\nq"), ("nothing_supervised", "no answer")),
    ("last question unanswered", said("<image>\nq", "a", "q2", id="8"), "unanswered_turn_dropped"),
    ("no conversation", {"id": "r"}, ("no_turns", "missing")),
    ("half a surrogate pair", said("q", "a\ud83d"), ("bad_turn", "surrogate")),
    ("no object", "text", ("not_a_record", "str")),
    ("id a list", said(id=["r"]), ("bad_id", "['r']")),
    ("same id again", said(id="0"), SECOND_ID),
    ("0-byte image", said(image="empty.jpg"), ("broken_image", "empty.jpg: the image file is empty")),
    ("HTML for an image", said(image="page.jpg"), ("broken_image", "HTML page")),
    ("Git LFS pointer for an image", said(image="lfs.jpg"), ("broken_image", "git lfs pull")),
    ("truncated JPEG", said(image="half.jpg"), ("broken_image", "broken image file")),
    ("truncated PNG", said(image="half.png"), ("broken_image", "broken image file")),
    ("text for an image", said(image="text.jpg"), ("broken_image", "not an image of a known format")),
    ("image bomb", said(image="bomb.png"), ("broken_image", "image bomb")),
    ("extreme aspect", said(image="long.png"), ("broken_image", "2000 x 3 pixels is too extreme")),
    *((f"{name} image", said(image=name, id=name), FINE) for name in FILES if name.split(".")[0] in
      ("wide", "dot", "rgba", "p", "la", "cmyk", "i16", "gif")),
    ("literal </s> in text", said("<image>\n</s>?", "so </s>", id="9"), FINE),
    ("broken last line", '{"id": "r", "conversa', ("bad_json", "line {line} is not JSON")),
]  # fmt: skip


@pytest.fixture
def images(tmp_path):
    root = tmp_path / "images"
    (root / "sub").mkdir(parents=True)
    for name, data in {**FILES, "sub/b.jpg": JPEG}.items():
        (root / name).write_bytes(data)
    return root


def test_records(tmp_path, images):
    lines = [r if what == "broken last line" else json.dumps(r).replace("{images}", str(images)) for what, r, _ in RECORDS]
    (tmp_path / "r.jsonl").write_text("\n".join(lines))
    report = prepare_llava(tmp_path / "r.jsonl", images, tmp_path / "out", max_bad_fraction=0.9)
    rejects = {e["line"]: e for e in map(json.loads, (tmp_path / "out" / REJECTS).read_text().splitlines())}
    rows = open_records(tmp_path / "out")
    place = 0
    for line, (what, record, outcome) in enumerate(RECORDS, start=1):
        if isinstance(outcome, tuple):
            entry, (reason, message) = rejects.pop(line), outcome
            assert entry["reason"] == reason and message.format(line=line) in entry["message"], what
            assert "\n" not in entry["message"], what
            continue
        row = rows[place]
        assert line not in rejects and row.record_id == record["id"], what
        assert row.turns[0].text.startswith("<image>\n") == (len(row.images) == 1) == (len(row.image_sizes) == 1), what
        place += 1
    assert not rejects and place == len(rows)
    assert report.rejects == Counter(o[0] for _, _, o in RECORDS if isinstance(o, tuple))
    assert report.notes == Counter(o for _, _, o in RECORDS if isinstance(o, str))
    decoded = {row.record_id: (open_image(row.images[0]), row) for row in (rows[i] for i in range(place)) if row.images}
    assert all((image.size,) == row.image_sizes == (image_size(row.images[0]),) for image, row in decoded.values())
    colours = {name: image.getpixel((0, 0)) for name, (image, _) in decoded.items()}
    for name in ("wide.png", "dot.png", "rgba.png", "p.png", "cmyk.tif", "gif.gif"):
        assert np.abs(np.subtract(colours[name], (200, 30, 30))).max() <= 2, name
    assert colours["la.png"] == colours["i16.png"] == (90, 90, 90)


# --------------------------------------------------------------------------------------------------- the file, and what follows

GOOD = [said(id=str(i)) for i in range(3)]
ARRAY, LINES = json.dumps(GOOD), "\n".join(map(json.dumps, GOOD))


def prepared(tmp_path, images, text):
    (tmp_path / "r.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    return prepare_llava(tmp_path / "r.jsonl", images, tmp_path / "out")


def cut_shard(tmp_path, images, keep):
    prepared(tmp_path, images, ARRAY)
    (shard,) = LAYOUT.rows(tmp_path / "out").glob("*array_record*")
    data = shard.read_bytes()
    shard.write_bytes(keep(data))
    open_records(tmp_path / "out")[0]


def cambrian(tmp_path, images, *sources):
    lines = [json.dumps(said(source=f"{source}.json", image="sub/b.jpg")) for source in sources]
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    prepare_cambrian(tmp_path / "c.jsonl", images, tmp_path / "out", sample=6)


def encode(tmp_path, question, answer, **limits):
    write_byte_tokenizer(tmp_path / "model")
    processor = Processor(AutoTokenizer.from_pretrained(tmp_path / "model", local_files_only=True), model_config())
    (tmp_path / "r.json").write_text(json.dumps([said(question, answer, image=None)]))
    prepare_llava(tmp_path / "r.json", tmp_path, tmp_path / "out")
    turns = open_records(tmp_path / "out")[0].turns
    return processor.encode(turns[:1], turns[1].text, **limits)


FIVE = ("ai2d_15k", "vizwiz_20k", "clevr_700k", "design2code_0k", "geo170k")
BROKEN = json.dumps(GOOD, indent=1)[:-30]

WHOLE = [
    # file -> None, or part of the error
    ("JSON array named .jsonl", lambda t, i: prepared(t, i, ARRAY), None),
    ("BOM before an array", lambda t, i: prepared(t, i, "\ufeff" + ARRAY), None),
    ("BOM before lines, CRLF", lambda t, i: prepared(t, i, "\ufeff" + LINES.replace("\n", "\r\n") + "\r\n\r\n"), None),
    ("an object with the list", lambda t, i: prepared(t, i, json.dumps({"version": 1, "data": GOOD})), None),
    ("the same over lines", lambda t, i: prepared(t, i, json.dumps({"data": GOOD}, indent=1)), None),
    ("the same, a record a line", lambda t, i: prepared(t, i, '{"data": [\n' + LINES.replace("\n", ",\n") + "\n]}"), None),
    ("line separators in text", lambda t, i: prepared(t, i, LINES.replace("ball", "ball\u2028\u2029\x85")), None),
    ("object without records", lambda t, i: prepared(t, i, '{\n"a": [1]\n}'), r"one object with no records \(a\)"),
    (
        "object with two lists",
        lambda t, i: prepared(t, i, json.dumps({"train": GOOD, "test": GOOD})),
        r"several arrays of records \(train, test\)",
    ),
    ("broken object", lambda t, i: prepared(t, i, json.dumps({"data": GOOD}, indent=1)[:-30]), "broken JSON object at line"),
    ("broken first line", lambda t, i: prepared(t, i, LINES[9:]), "neither a JSON array nor JSONL"),
    ("cut first line", lambda t, i: prepared(t, i, '{"id": "x", "conv\n' + LINES), "1 of 4 .*first at line 1: bad_json"),
    ("bad first lines", lambda t, i: prepared(t, i, '{"id": "\x01"}\n' * 2 + LINES), "2 of 5 .*first at line 1: bad_json"),
    ("empty file", lambda t, i: prepared(t, i, ""), "is empty"),
    ("blank file", lambda t, i: prepared(t, i, " \n"), "is empty"),
    ("CSV", lambda t, i: prepared(t, i, "id,image\n"), "neither a JSON array nor JSONL"),
    ("Git LFS pointer", lambda t, i: prepared(t, i, "version https://git-lfs.github.com/spec/v1\n"), "Git LFS pointer"),
    ("broken array", lambda t, i: prepared(t, i, BROKEN), "broken JSON array at line"),
    ("not UTF-8", lambda t, i: prepared(t, i, b'[{"id": "\xff"}]'), "not UTF-8 at byte 9"),
    ("nested without end", lambda t, i: prepared(t, i, "[" * 100_000), "JSON"),
    ("empty list", lambda t, i: prepared(t, i, "[]"), "no usable record"),
    ("too many bad lines", lambda t, i: prepared(t, i, LINES + "\n{"), "1 of 4 records are bad, .*first at line 4: bad_json"),
    ("truncated array_record", lambda t, i: cut_shard(t, i, lambda data: data[:1000]), "truncated or changed .1000 bytes"),
    ("zeros in array_record", lambda t, i: cut_shard(t, i, lambda data: bytes(len(data))), "does not match its sha256"),
    ("category below its share", lambda t, i: cambrian(t, i, *FIVE), r"\(available / required\): science 0 / 1$"),
    ("unknown source", lambda t, i: cambrian(t, i, *FIVE, "mine"), "science 0 / 1; no category lists 1 more.* mine in sub .1."),
    ("all six", lambda t, i: cambrian(t, i, *FIVE, "pathvqa_32k"), None),
]  # fmt: skip


@pytest.mark.parametrize(("what", "do", "message"), WHOLE, ids=[row[0] for row in WHOLE])
def test_whole(tmp_path, images, what, do, message):
    if message is None:
        do(tmp_path, images)
        assert len(open_records(tmp_path / "out")) in (3, 6)
        return
    with pytest.raises(InputError, match=message) as caught:
        do(tmp_path, images)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob(".out*")), "nothing is left behind"
    assert (tmp_path / "out").exists() == ("array_record" in what)


def test_text_meets_the_tokenizer(tmp_path):
    """Cases that only tokenization shows: a literal end marker, and an answer that truncation removes."""
    (tmp_path / "a").mkdir()
    encoded_ids = encode(tmp_path / "a", "</s>?", "so </s>").ids.tolist()
    assert encoded_ids.count(EOS) == 1 and encoded_ids[-1] == EOS
    (tmp_path / "b").mkdir()
    with pytest.raises(Exception, match="no answer fits into 200") as caught:
        encode(tmp_path / "b", "long " * 100, "a", max_length=200)
    assert caught.value.reason == "nothing_supervised"
