"""MMBench, MMMU, VizWiz, MathVista and V*Bench against the codes they have to equal (`record_mixed.py`), and by hand."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lsg_jax.config import EvalConfig
from lsg_jax.data.conversation import question_turn
from lsg_jax.errors import InputError
from lsg_jax.eval.benchmark import Graded, Item
from lsg_jax.eval.benchmarks.mathvista import MATHVISTA, choice_of, list_of, number_of
from lsg_jax.eval.benchmarks.mmbench import MMBENCH
from lsg_jax.eval.benchmarks.mmmu import IMAGES, MMMU
from lsg_jax.eval.benchmarks.vizwiz import VIZWIZ
from lsg_jax.eval.benchmarks.vstar import VSTAR
from lsg_jax.eval.runner import ask

pytestmark = pytest.mark.usefixtures("no_process_that_reads_first")

BENCHMARKS = {benchmark.name: benchmark for benchmark in (MMBENCH, MMMU, VIZWIZ, MATHVISTA, VSTAR)}
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "mixed.json").read_text(encoding="utf-8"))
CASES = [case for case in GOLDEN["cases"] if "row" in case]


def image(number=0):
    return {"bytes": b"image %d" % number, "path": f"{number}.png"}


def row_of(name, **changes):
    """A row of a benchmark's file, whole and right, with some cells changed."""
    if name == "mmbench":
        texts = {"question": "Which?", "hint": "nan", "A": "a", "B": "b", "C": "c", "D": "nan", "answer": "B", "image": image()}
        names = {"index": 7, "category": "ocr", "L2-category": "coarse_perception", "split": "dev"}
        return {**texts, **names, **changes}
    if name == "mmmu":
        texts = {"id": "validation_Art_1", "question": "Which <image 1>?", "answer": "A", "options": "['a', 'b']"}
        kind = {"question_type": "multiple-choice" if "options" in changes or "answer" not in changes else "open"}
        return {**texts, **kind, **dict.fromkeys(IMAGES), "image_1": image(1), "image_2": image(2), **changes}
    if name == "vizwiz":
        texts = {"question_id": "VizWiz_val_0.jpg", "question": "what?", "answers": ["x"] * 10}
        return {**texts, "category": "other", "image": image(), **changes}
    if name == "mathvista":
        about = {"split": "testmini", "task": "math word problem", "skills": ["arithmetic reasoning"]}
        kinds = {"choices": None, "answer_type": "integer", "precision": None, "answer": "3"}
        if "choices" in changes:
            kinds = {"answer_type": "text", "precision": None, "answer": changes["choices"][0]}
        return {"pid": "1", "query": "?", **kinds, "metadata": about, "decoded_image": image(), **changes}
    text = {"question_id": 0, "text": "Which?\n(A) a\n(B) b\nAnswer.", "label": "B", "category": "direct_attributes"}
    return {**text, "image": image(), **changes}


def write(path, *rows):
    path.parent.mkdir(exist_ok=True, parents=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return str(path)


def read(name, folder, *rows):
    return BENCHMARKS[name].read(write(folder / "test.parquet", *rows))


def score(benchmark, items, right):
    graded = Graded(items, [None] * len(items), np.array(right, float), np.ones((1, len(items))))
    return {name: value[0] for name, value in benchmark.metrics(graded).items()}


# ------------------------------------------------------------------------------------------------------------- recorded cases


def test_every_benchmark_and_protocol_is_recorded():
    recorded = {(case["benchmark"], case["protocol"]) for case in CASES}
    by_rule = {("mathvista", "paper"), ("mmbench", "paper"), ("vstar", "paper")}  # for the last two LLaVA has no scorer
    assert recorded | by_rule == {(name, to) for name, of in BENCHMARKS.items() for to in of.official} | by_rule


@pytest.mark.parametrize("name", BENCHMARKS)
def test_prompts_and_scores_equal_those_of_the_codes(name, tmp_path):
    differ = []
    for number, case in enumerate(case for case in CASES if case["benchmark"] == name):
        item = read(name, tmp_path / str(number), row_of(name, **case["row"]))[0]
        protocol, match = case["protocol"], BENCHMARKS[name].match
        if case["prompt"] is not None and (name, protocol) != ("mmmu", "paper"):
            assert BENCHMARKS[name].prompt(item, protocol) == case["prompt"], protocol
        for answer, right in case.get("right", {}).items():
            asked = replace(item, answers=(answer,))
            ours = [text for text in case.get("outputs", GOLDEN["outputs"]) if match(asked, text, protocol).score]
            if set(ours) != set(right):
                differ.append((protocol, case["row"], answer, set(ours) ^ set(right)))
        scores = [(text, match(item, text, protocol).score, expected) for text, expected in case.get("scores", ())]
        differ += [(protocol, case["row"], *found) for found in scores if found[1] != pytest.approx(found[2])]
    assert not differ


def test_mmmu_shows_every_image_where_its_owner_has_a_tag(tmp_path):
    for number, case in enumerate(case for case in CASES if (case["benchmark"], case["protocol"]) == ("mmmu", "paper")):
        item = read("mmmu", tmp_path / str(number), row_of("mmmu", **case["row"]))[0]
        assert MMMU.prompt(item, "paper") == re.sub(r"<image \d>", "<image>", case["prompt"])
        named = re.findall(r"<image (\d)>", case["prompt"])
        assert [each.read() for each in item.images] == [b"image %s" % each.encode() for each in named]


def test_circular_aggregates_equal_the_recorded_ones():
    fields = lambda index, category, l2: {"question": str(index % 10**6), "category": category, "l2_category": l2}
    items = [
        Item(str(index), "?", (answer,), ("x",) * sum(row[0] % 10**6 == index % 10**6 for row in GOLDEN["circular"]),
             fields=fields(index, category, l2) | {"rotation": str(index // 10**6)})
        for index, category, l2, answer, _ in GOLDEN["circular"]
    ]  # fmt: skip
    found = score(MMBENCH, items, [answer == said for *_, answer, said in GOLDEN["circular"]])
    recorded = [case for case in GOLDEN["cases"] if "circular" in case]
    assert [case["protocol"] for case in recorded] == ["lmms_eval", "vlmevalkit", "cambrian"]
    for case in recorded:
        expected = {name: 100 * value for name, value in case["circular"].items()}
        assert {name: found[name] for name in expected} == pytest.approx(expected), case["protocol"]


# --------------------------------------------------------------------------------------------------------- aggregates by hand


def test_mmbench_makes_rotations_and_counts_whole_questions(tmp_path):
    rows = [row_of("mmbench"), row_of("mmbench", index=8, C="nan", answer="A", **{"L2-category": "logic_reasoning"})]
    items = read("mmbench", tmp_path, *rows)
    assert [(item.id, item.choices, item.answers) for item in items] == [
        ("7", ("a", "b", "c"), ("B",)),
        ("1000007", ("b", "c", "a"), ("A",)),
        ("2000007", ("c", "a", "b"), ("C",)),
        ("8", ("a", "b"), ("A",)),
        ("1000008", ("b", "a"), ("B",)),
    ]
    assert {item.choices["ABC".index(item.answers[0])] for item in items[:3]} == {"b"}
    turned = [
        {**row_of("mmbench"), "index": int(item.id), "answer": item.answers[0], **dict(zip("ABC", item.choices, strict=True))}
        for item in items[:3]
    ]
    held = read("mmbench", tmp_path / "held", *turned)  # a file with rotations is taken as it is
    assert [(i.id, i.choices, i.answers, i.fields) for i in held] == [(i.id, i.choices, i.answers, i.fields) for i in items[:3]]
    found = score(MMBENCH, items, [1, 1, 0, 1, 1])
    assert found["circular"] == 50 and found["accuracy"] == 80 and found["plain"] == 100
    assert found["l2_category: coarse_perception"] == 0 and found["l2_category: logic_reasoning"] == 100
    part = score(MMBENCH, [*items[:2], *items[3:]], [1, 1, 1, 0])  # a rotation is missing: that question is not judged
    assert part["circular"] == 0 and part["accuracy"] == 75 and part["plain"] == 100
    weight = np.array([[2.0, 2, 2, 1, 1], [1, 1, 1, 0, 0]])  # a resample counts questions, however many rotations they have
    graded = Graded(items, [None] * 5, np.array([1.0, 1, 1, 0, 0]), weight)
    assert MMBENCH.metrics(graded)["circular"] == pytest.approx([200 / 3, 100])


def test_mmbench_reads_the_owners_table(tmp_path):
    rows = [row_of("mmbench"), row_of("mmbench", index=8, question='Is it "so",\nor not?', hint="A hint")]
    whole = read("mmbench", tmp_path, *rows)
    header = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "l2-category"]
    cells = [
        ["7", "Which?", "", "a", "b", "c", "", "B", "ocr", base64.b64encode(b"x" * 300_000).decode(), "coarse_perception"],
        ["8", '"Is it ""so"",\nor not?"', "A hint", "a", "b", "c", "", "B", "ocr", "7", "coarse_perception"],
    ]
    table = tmp_path / "mmbench.tsv"
    table.write_text("\n".join("\t".join(line) for line in [header, *cells]) + "\n", encoding="utf-8")
    items = MMBENCH.read(str(table))
    assert [replace(item, images=()) for item in items] == [replace(item, images=()) for item in whole]
    assert {item.images[0].read() for item in items} == {b"x" * 300_000}
    table.write_text("\t".join(f'"{name}"' for name in header) + "\n" + table.read_text().partition("\n")[2])
    assert [item.id for item in MMBENCH.read(str(table))] == [item.id for item in items]  # a header in quotes
    table.write_text("\t".join(header) + "\n" + table.read_text().partition("\n")[2])
    table.with_name("empty.tsv").write_text("")
    with pytest.raises(InputError, match=r"empty.tsv: the file is empty"):
        MMBENCH.read(str(table.with_name("empty.tsv")))
    for change, message in [
        (("\tl2-category", "\tl3"), "row 0: no text in a column l2-category (or L2-category)"),
        (("\tanswer\t", "\tright\t"), "no column answer; there are index, question"),
        (("\t7\t", "\t9\t"), "row 1: image 9 is the index of no row with an image"),
        (("\tWhich?\t", "\t\t"), "row 0: question is empty, no text"),
        (("\ta\tb\tc\t\t", "\ta\tb\t\td\t"), "row 0: C is empty, but a choice after it is not"),
        (("\tocr\t7", "\t\t7"), "row 1: category is empty, no text"),
        (("\t7\tcoarse", "\t\tcoarse"), "row 1: image is empty, but every question here has an image"),
        (("\tcoarse", "\tcoarse\tcoarse"), "cannot be read as tab-separated values: CSV parse error"),
    ]:
        table.with_name("wrong.tsv").write_text(table.read_text().replace(*change))
        with pytest.raises(InputError, match=re.escape(message)):
            MMBENCH.read(str(table.with_name("wrong.tsv")))


def test_the_others_by_hand(tmp_path):
    ids = ["validation_Art_1", "validation_Art_Theory_2", "validation_Math_3", "test_Math_4", "dev_Math_1"]
    rows = [row_of("mmmu", id=name, **({"answer": "x"} if "Theory" in name else {})) for name in ids]
    found = score(MMMU, read("mmmu", tmp_path / "mmmu", *rows), [1, 0, 0])
    expected = {"accuracy": 100 / 3, "kind: multiple-choice": 50, "kind: open": 0, "domain: Art and Design": 50}
    expected |= {"domain: Science": 0, "subject: Art": 100, "subject: Art_Theory": 0, "subject: Math": 0}
    assert found == pytest.approx(expected)

    answers = ["cat"] * 3 + ["unanswerable"] * 7
    kinds = {"VizWiz_val_1": "other", "VizWiz_val_2": "other", "VizWiz_val_3": "number", "VizWiz_test_1": "other"}
    rows = [row_of("vizwiz", question_id=name, category=kind, answers=answers) for name, kind in kinds.items()]
    items = read("vizwiz", tmp_path / "vizwiz", *rows)
    said = [VIZWIZ.match(item, text, "paper").score for item, text in zip(items, ("Cat.", "dog", "Unanswerable"), strict=True)]
    assert score(VIZWIZ, items, said) == pytest.approx(
        {"accuracy": 190 / 3, "answer_type: number": 100, "answer_type: other": 45}
    )

    about = [{"split": "testmini", "task": "math word problem", "skills": skills} for skills in
             (["arithmetic reasoning"], ["arithmetic reasoning", "logical reasoning"])]  # fmt: skip
    rows = [row_of("mathvista", pid=str(i), metadata=each) for i, each in enumerate(about)]
    rows.append(row_of("mathvista", pid="2", metadata={**about[0], "task": "geometry problem solving"}, choices=["1", "2"]))
    found = score(MATHVISTA, read("mathvista", tmp_path / "mathvista", *rows), [1, 0, 0])
    expected = {"accuracy": 100 / 3, "answer_type: integer": 50, "answer_type: text": 0, "task: math word problem": 50}
    expected |= {"task: geometry problem solving": 0, "skill: arithmetic reasoning": 100 / 3, "skill: logical reasoning": 0}
    assert found == pytest.approx(expected)

    kinds = ["direct_attributes"] * 3 + ["relative_position"]
    items = read("vstar", tmp_path / "vstar", *(row_of("vstar", question_id=i, category=kind) for i, kind in enumerate(kinds)))
    expected = {"accuracy": 50, "category: direct_attributes": 100 / 3, "category: relative_position": 100}
    assert score(VSTAR, items, [1, 0, 0, 1]) == pytest.approx(expected)


def test_mathvista_finds_answers_by_rule():
    choices = ("35°", "145°", "f(A) (B)")
    read = {
        "B": "B", "(B)": "B", "B. 145°": "B", "145°": "B", "145°.": "B", "The answer is 145°.": "B", "f(A) (B)": "C",
        "So the answer is (B) 145°.": "B", "It is (C) here": "C", "Answer: C": "C", "the answer is: C.": "C", "145": None,
        "I say (A) or (B)": None, "D": None, "(D)": None, "I see 145° and 35°": None, "": None, "because": None,
        "(A) is wrong, so the answer is B": "B",
    }  # fmt: skip
    assert {text: choice_of(text, choices) for text in read} == read
    numbers = {
        "14": "14", "The number is 14.": "14", "2 + 3 = 5": "5", "The answer is 14, not 15": "14", "1,234 cars": "1234",
        "-3": "-3", "14.9": "14", "$1.45": "1", "3e2": "300", "none": None, "": None, "1e999": None, "1, 2, 3": "3",
        ".5": "0", "14%": "14", "2014-2016": "2016", "12,34": "34",
        "The answer is \N{MINUS SIGN}7.": "-7",
    }  # fmt: skip
    assert {text: number_of(text, None) for text in numbers} == numbers
    digits = {"0.666": "0.67", "1.2": "1.2", ".5": "0.5", "The answer is 1,234.567 m": "1234.57", "3": "3.0", "no": None}
    assert {text: number_of(text, 2) for text in digits} == digits
    lists = {"[2014, 2016]": "[2014, 2016]", "[1,2.5] so [3,4]": "[3, 4]", "2014 and 2016": None, "[]": "[]"}
    assert {text: list_of(text) for text in lists} == lists


def test_mmmu_images_of_questions_and_choices(tmp_path):
    asks = lambda **cells: read("mmmu", tmp_path / str(len(list(tmp_path.iterdir()))), row_of("mmmu", **cells))[0]
    twice = asks(question="Is <image 2> like <image 1>, or <image 2>?")  # out of order: all come first
    assert MMMU.prompt(twice, "paper").startswith("Is <image 2> like <image 1>, or <image 2>?\n(A) a")
    again = asks(question="Is <image 1> like <image 2>? See <image 1>.")
    assert MMMU.prompt(again, "paper").startswith("Is <image> like <image>? See <image 1>.\n(A) a")
    assert [each.read() for each in twice.images] == [each.read() for each in again.images] == [b"image 1", b"image 2"]
    untagged = asks(question="Which?")  # it has an image all the same
    assert [each.read() for each in untagged.images] == [b"image 1"]
    only_second = asks(question="Which?", options="['<image 2>', '<image 3>']", image_3=image(3))
    assert [each.read() for each in only_second.images] == [b"image 2", b"image 3"]
    for item in (twice, again, untagged, only_second):
        for protocol in MMMU.official:  # no tag is lost, and none is there without an image
            question_turn(MMMU.prompt(item, protocol), len(item.images))


def test_vstar_reads_its_questions_beside_the_images(tmp_path):
    (tmp_path / "direct_attributes").mkdir()
    (tmp_path / "direct_attributes" / "a.jpg").write_bytes(b"photo")
    file = tmp_path / "test_questions.jsonl"
    file.write_text(json.dumps({**row_of("vstar"), "image": "direct_attributes/a.jpg"}))
    items = VSTAR.read(str(file))
    assert [(i.id, i.answers, i.choices, i.images[0].read()) for i in items] == [("0", ("B",), ("a", "b"), b"photo")]
    assert replace(items[0], images=()) == replace(read("vstar", tmp_path / "parquet", row_of("vstar"))[0], images=())
    assert VSTAR.read(str(tmp_path)) == items and VSTAR.files(str(tmp_path)) == VSTAR.files(str(file)) == [file]
    lines = [{**row_of("vstar", question_id=i), "image": f"direct_attributes/{name}.jpg"} for i, name in enumerate("ab")]
    file.write_text("\n".join(map(json.dumps, lines)))
    assert [item.id for item in VSTAR.read(str(file))] == ["0"]  # only one of the images is there
    file.write_text(json.dumps(row_of("vstar") | {"image": None}))
    with pytest.raises(InputError, match=r"test_questions\.jsonl:1: no image; there are question_id, text, label"):
        VSTAR.read(str(file))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_part_of_a_file_is_read_and_its_plain_answer_is_right(name, tmp_path):
    benchmark = BENCHMARKS[name]
    items = read(name, tmp_path, row_of(name))
    assert all(unit in items[0].fields for unit in (benchmark.unit, benchmark.guess_by, benchmark.task) if unit)
    for protocol in dict.fromkeys(("paper", *benchmark.official)):
        assert [benchmark.match(item, item.answers[0], protocol).score for item in items] == [1] * len(items), protocol
    # Where a task of lmms-eval sets none, as for VizWiz, it is left to the default here too.
    assert benchmark.max_new_tokens.get("lmms_eval") == GOLDEN["lmms_max_new_tokens"].get(name)
    for metric in benchmark.official.values():
        assert score(benchmark, items, [1] * len(items))[metric] == 100
    asked = ask(benchmark, str(tmp_path), EvalConfig())
    assert asked.partial and asked.score is None and set(asked.missing) == set(benchmark.groups) and not asked.broken
    first = ask(benchmark, str(tmp_path), EvalConfig(limit=1))
    assert first.broken == ({"question": 1} if name == "mmbench" else {})


BAD_FILES = [
    ("mmbench", {"image": None}, "row 0: image is empty, but every question here has an image"),
    ("vizwiz", {"image": None}, "row 0: image is empty, but every question here has an image"),
    ("mathvista", {"decoded_image": None}, "row 0: decoded_image is empty, but every question here has an image"),
    ("vstar", {"image": None}, "row 0: image is empty, but every question here has an image"),
    ("mmbench", {"answer": "D"}, "row 0: answer 'D' is none of A, B, C"),
    ("mmbench", {"L2-category": "smell"}, "unknown l2-category smell; known: attribute_reasoning"),
    ("mmbench", {"answer": "nan"}, "no row of split dev with an answer; answers of the test split are not public"),
    ("mmbench", {"split": "test"}, "no row of split dev with an answer"),
    ("mmbench", {"index": -1}, "row 0: index '-1' is no number"),
    ("mmmu", {"id": "test_Art_1"}, "no row of the validation split, whose ids begin with validation_"),
    ("mmmu", {"id": "validation_Cooking_1"}, "unknown subject Cooking; known: Accounting"),
    ("mmmu", {"question_type": "essay"}, "unknown question_type essay; known: multiple-choice, open"),
    ("mmmu", {"options": "a, b"}, "row 0: 'a, b' is no list of texts"),
    ("mmmu", {"answer": "C", "options": "['a', 'b']"}, "row 0: answer 'C' is none of A, B"),
    ("mmmu", {"image_1": None, "question": "Which?"}, "row 0: <image 1>, but 0 images"),
    ("mmmu", {"image_2": None, "question": "<image 1> or <image 2>?"}, "row 0: <image 1>, <image 2>, but 1 images"),
    ("vizwiz", {"answers": ["x"] * 9}, "row 0: question VizWiz_val_0.jpg has 9 answers; expected 10"),
    ("vizwiz", {"category": "smell"}, "unknown answer_type smell; known: number"),
    ("vizwiz", {"question_id": "VizWiz_test_1.jpg"}, "only rows of the test split, whose answers are not public"),
    ("mathvista", {"choices": ["1", "2"], "answer": "3"}, "row 0: answer '3' is none of the choices"),
    ("mathvista", {"answer_type": "poem"}, "unknown answer_type poem; known: float"),
    ("mathvista", {"metadata": {"split": "test", "task": "", "skills": []}}, "no row of split testmini"),
    (
        "mathvista",
        {"metadata": {"split": "testmini", "task": "x", "skills": ["logical reasoning"]}},
        "unknown task x; known: figure",
    ),
    ("mmbench", {"question": None}, "row 0: question is empty, no text"),
    ("mmbench", {"category": None}, "row 0: category is empty, no text"),
    ("mmbench", {"index": "9" * 5000}, "is no number"),
    ("mmmu", {"question": None}, "row 0: question is empty, no text"),
    ("vizwiz", {"question": None}, "row 0: question is empty, no text"),
    ("vizwiz", {"answers": "x" * 10}, "row 0: answers is 'xxxxxxxxxx', no list of texts"),
    ("mathvista", {"query": None}, "row 0: query is empty, no text"),
    ("mathvista", {"precision": -1.0}, "row 0: precision '-1.0' is no number of digits"),
    ("mathvista", {"metadata": None}, "row 0: metadata without split, task or skills"),
    ("vstar", {"label": "C"}, "row 0: answer 'C' is none of A, B"),
    ("vstar", {"category": "colour"}, "unknown category colour; known: direct_attributes"),
]
COLUMN = {"mmbench": "category", "mmmu": "image_7", "vizwiz": "answers", "mathvista": "query", "vstar": "label"}


def test_an_empty_precision_is_none_however_it_is_written(tmp_path):
    items = read(
        "mathvista", tmp_path, row_of("mathvista", precision=float("nan")), row_of("mathvista", pid="2", precision=2.0)
    )
    assert [item.fields["precision"] for item in items] == ["0", "2"]


def test_a_wrong_file_says_what_is_wrong(tmp_path):
    for number, (name, changes, message) in enumerate(BAD_FILES):
        with pytest.raises(InputError, match=re.escape(message)) as raised:
            read(name, tmp_path / str(number), row_of(name, **changes))
        assert str(tmp_path) in str(raised.value) and "\n" not in str(raised.value)
    for name, column in COLUMN.items():
        with pytest.raises(InputError, match=f"no column {column}; there are"):
            read(name, tmp_path / name, {key: value for key, value in row_of(name).items() if key != column})
        with pytest.raises(InputError, match="occurs more than once"):
            read(name, tmp_path / name, row_of(name), row_of(name))
