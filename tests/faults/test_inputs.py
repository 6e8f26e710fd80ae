"""What users' and foreign files may hold: each bad one is a reject or a typed error, none is read as another value."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from converters.reader import SafetensorsSource
from lsg_jax.data.decoding import MAX_DECODING, Budget
from lsg_jax.data.images import check_image, open_image
from lsg_jax.data.records import LAYOUT, REJECTS, Validation, open_records, prepare_llava
from lsg_jax.data.reports import Report
from lsg_jax.data.sources import ImageFolder, in_order, read_source
from lsg_jax.errors import InputError
from lsg_jax.eval.benchmarks import questions
from lsg_jax.files import check_inside, read_regular
from lsg_jax.json_files import write_sealed

soak = lambda strategy, check: pytest.mark.soak(settings(settings.get_profile("soak"))(given(strategy)(check)))

# ------------------------------------------------------------------------------------------------------------------ records

NASTY = [
    "",
    "\ud800",
    "a\0b",
    "../a.png",
    "a.png",
    "\u2028",
    "\x85",
    "<image>",
    "\N{RIGHT-TO-LEFT OVERRIDE}x",
    "x" * 3000,
    "nan",
]
TEXTS = st.one_of(st.sampled_from(NASTY), st.text(st.characters(), max_size=6))
PLAIN = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS)
NAMES = ["id", "image", "conversations", "from", "value", "role", "content", "type", "text", "messages"]
KEYS = st.one_of(st.sampled_from(NAMES), TEXTS)
NESTED = lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=3))
VALUES = st.recursive(PLAIN, NESTED, max_leaves=8)
TURN = st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt"]) | VALUES, "value": TEXTS | VALUES})
OTHERS = dict.fromkeys(["id", "image", "system", "x"], VALUES)
RECORD = st.fixed_dictionaries({"conversations": st.lists(TURN, max_size=3) | VALUES}, optional=OTHERS)
DAMAGE = st.none() | st.tuples(st.integers(0, 200), st.binary(max_size=3))


def line_of(drawn):
    """The bytes of a value as JSON, perhaps with some bytes put into it."""
    value, damage = drawn
    line = json.dumps(value).encode()
    return line if damage is None else line[: damage[0]] + damage[1] + line[damage[0] :]


LINES = st.tuples(RECORD | VALUES, DAMAGE).map(line_of)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    Image.new("RGB", (8, 8)).save(root / "a.png")
    return root


def validated(source: Path):
    """(rows, the lines of the list of rejects) of a file of records."""
    rejects = io.StringIO()
    validation = Validation(Report("x"), ImageFolder(source.parent), rejects, 1)
    rows = [checked.row for checked in validation.check(read_source(source)) if checked.row]
    validation.finish()
    json.dumps(vars(validation.report)).encode()
    return rows, [json.loads(line) for line in rejects.getvalue().splitlines()]


def texts_of(value):
    if isinstance(value, dict):
        return [text for each in value.values() for text in texts_of(each)]
    return [text for each in value for text in texts_of(each)] if isinstance(value, list) else [value]


def test_any_line_is_a_row_or_a_reject(folder):
    def check(line):
        good = json.dumps({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}).encode()
        (folder / "r.jsonl").write_bytes(good + b"\n" + line.replace(b"\n", b" ") + b"\n" + good)
        rows, rejects = validated(folder / "r.jsonl")
        assert len(rows) + len(rejects) == 3 - (not line.strip()) and len(rows) >= 2
        assert all(entry["line"] == 2 and entry["reason"] for entry in rejects)
        if len(rows) == 3:
            given_texts = " ".join(map(str, texts_of(json.loads(line))))
            assert all(turn.text.replace("<image>", "").strip() in given_texts for turn in rows[1].turns)

    given(LINES)(check)()


def check_question(text):
    path = Path(os.environ["PYTEST_QUESTIONS"]) / "q.jsonl"
    path.write_bytes(text.replace(b"\n", b" "))
    try:
        items = questions.read(str(path))
    except InputError as error:
        assert str(path) in str(error) and "\n" not in str(error)[: len(str(path)) + 8]
    else:
        assert all(item.question.strip() and item.answers for item in items)


ASKED = dict.fromkeys(["choices", "image", "id", "category"], VALUES)
QUESTIONS = st.tuples(
    st.fixed_dictionaries({"question": TEXTS | VALUES, "answer": TEXTS | VALUES}, optional=ASKED), DAMAGE
).map(line_of)  # fmt: skip


@pytest.fixture(autouse=True)
def place(folder, monkeypatch):
    monkeypatch.setenv("PYTEST_QUESTIONS", str(folder))


test_any_question_is_read_or_named = given(QUESTIONS)(check_question)
test_any_question_is_read_or_named_long = soak(QUESTIONS, check_question)


@pytest.mark.soak
def test_any_line_is_a_row_or_a_reject_long(folder):
    with_soak = settings(settings.get_profile("soak"))

    def check(line):
        (folder / "s.jsonl").write_bytes(b'{"x": 1}\n' + line.replace(b"\n", b" ") + b'\n{"x": 1}')
        rows, rejects = validated(folder / "s.jsonl")
        assert len(rows) + len(rejects) == 3 - (not line.strip())

    with_soak(given(LINES)(check))()


GOOD = '{"id": "g", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}'
FLAWED = {
    "half a surrogate pair as id": GOOD.replace('"g"', '"\\ud800"'),
    "half a surrogate pair as path": GOOD.replace('"id"', '"image": "\\ud800.png", "id"'),
    "NUL in a path": GOOD.replace('"id"', '"image": "a\\u0000.png", "id"'),
    "long name": GOOD.replace('"id"', '"image": "' + "a" * 5000 + '.png", "id"'),
    "integer of 5,000 digits": GOOD.replace('"g"', "9" * 5000),
    "number beyond float64": GOOD.replace('"g"', "1e999"),
    "deep": GOOD.replace('"g"', "[" * 100_000 + "]" * 100_000),
    "100 levels": GOOD.replace('"g"', "[" * 100 + "]" * 100),
    "a key twice": GOOD.replace('"id"', '"id": "h", "id"'),
    "a key of a turn twice": GOOD.replace('"value": "a"', '"value": "b", "value": "a"'),
    "true as id": GOOD.replace('"g"', "true"),
    "a list for a text": GOOD.replace('"q"', "[1]"),
}


@pytest.mark.parametrize("shape", ["lines", "array"])
def test_each_flaw_is_one_reject(tmp_path, shape):
    records = [GOOD, *FLAWED.values(), GOOD]
    text = "[" + ",\n".join(records) + "]" if shape == "array" else "\r\n\r\n".join(["\ufeff" + GOOD, *records[1:]])
    (tmp_path / "r.json").write_bytes(text.encode())
    report = prepare_llava(tmp_path / "r.json", tmp_path, tmp_path / "out", max_bad_fraction=1)
    rejects = [json.loads(line) for line in (tmp_path / "out" / REJECTS).read_text().splitlines()]
    assert (report.rows, report.rejected) == (2, len(FLAWED)) == (2, len(rejects)), rejects
    assert all(len(json.dumps(entry)) < 1500 for entry in rejects)


def test_a_line_without_end_is_one_reject(tmp_path, monkeypatch):
    monkeypatch.setattr("lsg_jax.data.sources.MAX_LINE", 1000)
    (tmp_path / "r.jsonl").write_text(f'{GOOD}\n{{"x": "{"a" * 5000}"}}\n{GOOD}')
    rows, rejects = validated(tmp_path / "r.jsonl")
    assert len(rows) == 2 and [(entry["line"], entry["reason"]) for entry in rejects] == [(2, "bad_json")]


BAD_IMAGES = [
    json.dumps({"question": "q", "answer": "a", "image": name}) for name in ("a" * 5000, "a\0b", "\ud800", "/dev/zero")
]


def test_a_question_that_is_flawed_is_named(tmp_path):
    for line in (
        '{"question": "q", "answer": "a", "answer": "b"}',
        '{"question": "q", "answer": ' + "9" * 5000 + "}",
        *BAD_IMAGES,
    ):
        (tmp_path / "q.jsonl").write_text('{"question": "q", "answer": "a"}\n' + line)
        with pytest.raises(InputError, match=r"q\.jsonl:2: "):
            questions.read(str(tmp_path / "q.jsonl"))


@pytest.mark.parametrize(
    "choices",
    [
        "{('a',): 'x', None: 'y'}",
        "['a', 0x" + "f" * 9000 + "]",
        {"text": ["x", "y"], "label": 5},
        {"text": ["x", "y"], "label": None},
        {"text": ["x", "y", "z"], "label": ["A", "B"]},
        {"text": ["x", "y"], "label": ["A", "A"]},
    ],
    ids=["keys that are no text", "hexadecimal", "a number as labels", "no labels", "a choice without label", "a label twice"],
)
def test_choices_that_are_flawed_are_named(tmp_path, choices):
    (tmp_path / "q.jsonl").write_text(json.dumps({"question": "q", "answer": "x", "choices": choices}))
    with pytest.raises(InputError, match=r"q\.jsonl:1: .*choices"):
        questions.read(str(tmp_path / "q.jsonl"))


# -------------------------------------------------------------------------------------------------------------------- files


def test_a_file_that_is_longer_than_its_size_says_is_not_read_whole(tmp_path, monkeypatch):
    (tmp_path / "grown").write_bytes(bytes(100))
    real = os.fstat
    fake = lambda fd: os.stat_result((*real(fd)[:6], 0, *real(fd)[7:]))
    monkeypatch.setattr("lsg_jax.files.os.fstat", fake)
    with pytest.raises(InputError, match="larger than"):
        read_regular(tmp_path / "grown", limit=50)
    assert read_regular(tmp_path / "grown", limit=100) == bytes(100)


def test_special_files_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(InputError, match="no regular file"):
        read_regular(tmp_path / "pipe.png")
    with pytest.raises(InputError, match="no regular file"):
        open_image(tmp_path / "pipe.png")
    with pytest.raises(InputError, match="no regular file"):
        list(read_source(Path("/dev/zero")))
    (tmp_path / "r.jsonl").write_text(GOOD.replace('"id"', '"image": "pipe.png", "id"'))
    _, (reject,) = validated(tmp_path / "r.jsonl")
    assert reject["reason"] == "broken_image" and "no regular file" in reject["message"]


def test_links_out_of_the_folder_are_followed_when_asked(tmp_path):
    for name in ("images", "elsewhere"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "a.png")
    (tmp_path / "images/out.png").symlink_to(tmp_path / "elsewhere/a.png")
    (tmp_path / "images/folder").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "images/in.png").symlink_to("a.png")
    (tmp_path / "linked").symlink_to("images")
    kept = ImageFolder(tmp_path / "linked")
    assert kept.read("in.png")[1] == (8, 8)
    for name in ("out.png", "folder/a.png"):
        with pytest.raises(Exception, match="leads outside the image folder; give --follow-links") as caught:
            kept.read(name)
        assert caught.value.reason == "image_outside"
        assert ImageFolder(tmp_path / "images", follow_links=True).read(name)[1] == (8, 8)


def test_names_of_foreign_manifests_stay_in_their_folder(tmp_path):
    for name in ("", "../../evil", "/etc/evil", "a/../../b", "..\\evil", "a\0b"):
        with pytest.raises(InputError, match="x: names a file outside of its folder"):
            check_inside(["fine", "a/b..c", name], "x")
    (tmp_path / "r.jsonl").write_text(GOOD)
    prepare_llava(tmp_path / "r.jsonl", tmp_path, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / LAYOUT.manifest).read_text())
    manifest["files"]["../../../r.jsonl"], manifest["sha256"]["../../../r.jsonl"] = len(GOOD), "0" * 64
    del manifest["self_sha256"]
    write_sealed(tmp_path / "out" / LAYOUT.manifest, manifest)
    with pytest.raises(InputError, match="names a file outside of its folder"):
        open_records(tmp_path / "out")


def header_file():
    from safetensors.numpy import save

    return bytearray(save({"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.int8)}))


def check_header(changes):
    path = Path(os.environ["PYTEST_QUESTIONS"]) / "x.safetensors"
    data = header_file()
    for place, value in changes:
        data[place % len(data)] = value
    path.write_bytes(data)
    try:
        source = SafetensorsSource([path])
        for name, tensor in source.tensors.items():
            if tensor.shape:
                assert source.rows(name, 0, tensor.shape[0]).shape == tensor.shape
        source.close()
    except InputError as error:
        assert str(path) in str(error)


CHANGES = st.lists(st.tuples(st.integers(0, 1 << 12), st.integers(0, 255)), max_size=4)
test_any_safetensors_header_is_read_or_named = given(CHANGES)(check_header)
test_any_safetensors_header_is_read_or_named_long = soak(CHANGES, check_header)


# ------------------------------------------------------------------------------------------------------------------- images

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 20, 4), dtype=np.uint8)
FORMATS = [
    ("PNG", "RGB", {}), ("PNG", "I;16", {}), ("JPEG", "RGB", {}), ("JPEG", "CMYK", {"progressive": True}), ("GIF", "P", {}),
    ("WEBP", "RGBA", {}), ("BMP", "RGB", {}), ("TIFF", "RGB", {}), ("TIFF", "F", {"compression": "tiff_lzw"}), ("PPM", "L", {}),
    ("AVIF", "RGB", {}), ("JPEG2000", "RGB", {}),
]  # fmt: skip


def small_image(number):
    kind, mode, options = FORMATS[number]
    image = (
        Image.fromarray(PIXELS[..., 0].astype(np.uint16)) if mode == "I;16" else Image.fromarray(PIXELS, "RGBA").convert(mode)
    )
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def check_changed_image(drawn):
    number, changes, cut = drawn
    data = bytearray(small_image(number))
    for place, value in changes:
        data[place % len(data)] = value
    outcome = []
    for read in (check_image, lambda source: open_image(source).size):
        try:
            outcome.append(read(bytes(data[: len(data) - cut])))
        except InputError as error:
            outcome.append(None)
            assert "\n" not in str(error)
    assert outcome[0] == outcome[1], (FORMATS[number], outcome)


CHANGED = st.tuples(st.integers(0, len(FORMATS) - 1), CHANGES, st.sampled_from([0, 0, 0, 1, 30]))
test_any_image_is_read_or_named = given(CHANGED)(check_changed_image)
test_any_image_is_read_or_named_long = soak(CHANGED, check_changed_image)


def test_grey_of_many_bits_is_what_it_was():
    rng = np.random.default_rng(1)
    for values in (
        rng.integers(0, 1 << 16, (700, 3000)).astype(np.uint16),
        rng.integers(-500, 90000, (30, 20)).astype(np.int32),
    ):
        file = io.BytesIO()
        Image.fromarray(values).save(file, "PNG" if values.dtype == np.uint16 else "TIFF")
        expected = (values.astype(np.int64) >> 8).clip(0, 255)
        assert (np.asarray(open_image(file.getvalue())) == expected[..., None]).all()


CHILD = """
import sys, resource
from pathlib import Path
from lsg_jax.data.records import prepare_llava
folder = Path(sys.argv[1])
report = prepare_llava(folder / "r.jsonl", folder, folder / "out", threads=4, max_bad_fraction=1)
# not ru_maxrss, which a child inherits from the process that started it
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]
print(report.rows, report.rejected, int(peak) // 1024)
"""


def test_hostile_images_take_bounded_memory(tmp_path):
    """Images of 89 million pixels, of kilobytes each, and a broken one: before, 16-bit grey took 1.6 GB each."""
    Image.new("I;16", (9459, 9459)).save(tmp_path / "a.png", compress_level=1)
    Image.new("LA", (9459, 9459)).save(tmp_path / "b.png", compress_level=1)
    (tmp_path / "c.png").write_bytes((tmp_path / "b.png").read_bytes()[:-100])
    record = lambda name: json.dumps({"image": name, "conversations": json.loads(GOOD)["conversations"]})
    (tmp_path / "r.jsonl").write_text("\n".join(record(name) for name in ("a.png", "b.png", "c.png")))
    done = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path)], capture_output=True, text=True, timeout=300)
    rows, rejected, peak = map(int, done.stdout.split())
    assert (rows, rejected) == (2, 1) and peak < 1024 + 4 * 64


def test_an_image_that_alone_is_too_much_is_refused_with_the_limit_of_its_format():
    file = io.BytesIO()
    Image.new("L", (6000, 6000)).save(file, "WEBP", method=0, quality=1)
    with pytest.raises(InputError, match=r"36,000,000 pixels take 552 MiB.* a WEBP image of mode RGB may have 33,"):
        check_image(file.getvalue())


def test_the_budget_is_given_back():
    budget, most = Budget(100), []

    def use(count):
        with budget.take(count):
            most.append(budget._used)
        return count

    assert list(in_order(use, [60, 60, 500, 30, 30] * 20, 8)) == [60, 60, 500, 30, 30] * 20
    assert budget._used == 0 and set(most) <= {30, 60, 90, 500} and MAX_DECODING == 512 << 20


def test_few_bytes_wait_for_the_ones_before_them(monkeypatch):
    monkeypatch.setattr("lsg_jax.data.sources.HELD", 100)
    begun = []
    results = in_order(lambda item: item, iter(lambda: begun.append(0) or 60, None), 4, held=lambda item: item)
    assert next(results) == 60
    assert len(begun) <= 4  # without the bound, 16 are read ahead
    results.close()
