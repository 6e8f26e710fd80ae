"""Multiple-choice benchmarks: prompts and matchers against recorded outcomes, aggregates by hand, files and their faults."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from golden.hallucination_cases import MMSTAR_OUTPUTS
from PIL import Image

from lsg_jax.config import EvalConfig
from lsg_jax.errors import InputError
from lsg_jax.eval.benchmark import Graded
from lsg_jax.eval.benchmarks.ai2d import AI2D
from lsg_jax.eval.benchmarks.cv_bench import CV_BENCH
from lsg_jax.eval.benchmarks.mmstar import CATEGORIES, MMSTAR, SUB_CATEGORIES, split_question
from lsg_jax.eval.benchmarks.realworldqa import REALWORLDQA
from lsg_jax.eval.benchmarks.scienceqa_img import SCIENCEQA_IMG
from lsg_jax.eval.benchmarks.seed_img import SEED_IMG
from lsg_jax.eval.letters import chosen_letter
from lsg_jax.eval.registry import find_benchmark
from lsg_jax.eval.runner import ask

pytestmark = pytest.mark.usefixtures("no_process_that_reads_first")

BENCHMARKS = {b.name: b for b in (MMSTAR, CV_BENCH, SCIENCEQA_IMG, AI2D, SEED_IMG, REALWORLDQA)}
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "choice.json").read_text(encoding="utf-8"))


def encoded(colour=0):
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2), (colour, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def cell(colour=0):
    return {"bytes": encoded(colour), "path": f"{colour}.png"}


def mmstar_row(i, l2=None):
    question = "Which?\nOptions: A: a, B: b, C: c, D: d"
    l2 = l2 or SUB_CATEGORIES[i % 18]
    names = {"category": next(name for name, parts in CATEGORIES.items() if l2 in parts), "l2_category": l2}
    return {"index": i, "question": question, "image": encoded(i % 256), "answer": "ABCD"[i % 4], **names}


def cv_row(i, kind=0):
    kinds = [("2D", "Count", "ADE20K"), ("2D", "Relation", "COCO"), ("3D", "Depth", "Omni3D"), ("3D", "Distance", "Omni3D")]
    names = dict(zip(("type", "task", "source"), kinds[kind], strict=True))
    text = {"question": "Which?", "prompt": "Which?\n(A) a\n(B) b", "choices": ["a", "b"], "answer": "(B)"}
    return {"idx": i, "image": cell(i % 256), "source_filename": f"{i // 2}.jpg", **names, **text}


def seed_row(i, kind="image"):
    text = {"question": "Which?", "choice_a": "a", "choice_b": "b", "choice_c": "c", "choice_d": "d", "answer": "D"}
    names = {"question_id": str(100 + i), "question_type_id": i % 9 + 1, "data_type": kind, "data_id": f"photo {i // 2}"}
    return {"image": [cell(i % 256)], **names, **text}


# The smallest table that has every category of the file.
TABLES = {
    "mmstar": [mmstar_row(i) for i in range(18)],
    "cv_bench": [cv_row(i, i) for i in range(4)],
    "scienceqa_img": [{"image": cell(), "question": "Which?", "choices": ["a", "b"], "answer": 1, "hint": "", "subject": "x"}],
    "ai2d": [{"image": cell(), "question": "Which?", "options": ["a", "b", "c", "d"], "answer": "2"}],
    "seed_img": [seed_row(i) for i in range(9)],
    "realworldqa": [{"image": cell(), "question": "Which?\nA. a\nB. b", "answer": "b"}],
}
UNUSED_ID = {"mmstar": {"index": 99}, "cv_bench": {"idx": 99}, "seed_img": {"question_id": "99"}}


def write(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_prompts_and_outcomes_equal_those_of_the_presets_own_code(name, tmp_path):
    benchmark = BENCHMARKS[name]
    checked = set()
    for case in (case for case in GOLDEN["cases"] if case["benchmark"] == name):
        answer = {"answer": next(iter(case["protocols"]["lmms_eval"]["right"]))} if name == "realworldqa" else {}
        row = {**TABLES[name][-1], **UNUSED_ID.get(name, {}), **case["row"], **answer}
        item = benchmark.read(write(tmp_path / "test.parquet", [*TABLES[name], row]))[-1]
        for protocol, recorded in case["protocols"].items():
            assert benchmark.prompt(item, protocol) == recorded["prompt"], protocol
            for answer, right in recorded["right"].items():
                asked = replace(item, answers=(answer,))
                ours = [text for text in case["outputs"] if benchmark.match(asked, text, protocol).score]
                assert ours == right, (protocol, answer, set(ours) ^ set(right))
            checked.add(protocol)
    assert checked | {"paper"} == set(benchmark.official) - {"mmstar"}  # recorded in hallucination.json


def test_the_paper_protocol_reads_a_leading_letter_and_nothing_wordier(tmp_path):
    read = {"B": "B", "(B)": "B", "B.": "B", "B. a cat": "B", " B \n": "B", "B)": "B", "B: x": "B", "B, x": "B", "(B": "B"}
    unread = [
        "",
        "b",
        "B cat",
        "A cat",
        "Based on the image, C",
        "Answer: B",
        "The answer is B",
        "A or B",
        "ABC",
        "E",
        "[B]",
        "\uff22",
    ]
    assert {text: chosen_letter(text, 4) for text in (*read, *unread)} == read | dict.fromkeys(unread)
    assert [chosen_letter("C", count) for count in (2, 3, 26)] == [None, "C", "C"]
    for name in ("mmstar", "cv_bench", "ai2d", "seed_img", "realworldqa"):
        item = BENCHMARKS[name].read(write(tmp_path / "test.parquet", TABLES[name]))[-1]
        found = {text: BENCHMARKS[name].match(item, text, "paper").parsed for text in (*read, *unread)}
        assert found == read | dict.fromkeys(unread), name


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_plain_answer_is_right_and_the_official_metric_is_written(name, tmp_path):
    benchmark = BENCHMARKS[name]
    items = benchmark.read(write(tmp_path / "test.parquet", TABLES[name]))
    for protocol, metric in benchmark.official.items():
        matches = [benchmark.match(item, item.answers[0], protocol) for item in items]
        assert [match.score for match in matches] == [1] * len(items), protocol
        graded = Graded(items, [m.parsed for m in matches], np.ones(len(items)), np.ones((1, len(items))))
        assert benchmark.metrics(graded)[metric] == [100], protocol
    for field in (benchmark.unit, benchmark.guess_by):
        assert field is None or all(item.fields[field] for item in items)
    # A task that sets none leaves it to lmms-eval's llava classes: 1024.
    assert benchmark.max_new_tokens["lmms_eval"] == (GOLDEN["lmms_max_new_tokens"][name] or 1024)
    one = Graded(items[:1], ["A"], np.ones(1), np.ones((1, 1)))  # as under eval.limit: groups may be empty, names stay
    assert benchmark.metrics(one)["accuracy"] == [100]


def graded_by(benchmark, path, right):
    """Items of a file, of which those with `right` are answered rightly."""
    items = benchmark.read(path)
    return Graded(items, [None] * len(items), np.array(right, float), np.ones((1, len(items))))


def test_mmstar_aggregates_by_hand(tmp_path):
    # 17 sub-categories of one question and one of three: A has 1 + 1 + 3 questions, of which the three are right.
    rows = [mmstar_row(i) for i in range(18)] + [mmstar_row(18 + i, SUB_CATEGORIES[0]) for i in range(2)]
    right = [i in (0, 3, 18, 19) for i in range(20)]
    found = MMSTAR.metrics(graded_by(MMSTAR, write(tmp_path / "mmstar.parquet", rows), right))
    assert found["accuracy"] == pytest.approx([100 * 4 / 20])
    assert found["mean_of_18"] == pytest.approx([100 * 2 / 18])
    assert found["category: coarse perception"] == pytest.approx([100 * 3 / 5])
    assert found["category: fine-grained perception"] == pytest.approx([100 / 3])
    assert found["sub-category: image scene and topic"] == [100] and found["sub-category: image emotion"] == [0]
    assert len(found) == 2 + 6 + 18


def test_cv_bench_aggregates_by_hand(tmp_path):
    # ADE20K 1/2, COCO 3/4, Depth 1/1, Distance 0/3.
    kinds = [0, 0, 1, 1, 1, 1, 2, 3, 3, 3]
    right = [1, 0, 1, 1, 1, 0, 1, 0, 0, 0]
    graded = graded_by(CV_BENCH, write(tmp_path / "cv.parquet", [cv_row(i, kind) for i, kind in enumerate(kinds)]), right)
    expected = {
        "official": ((1 / 2 + 3 / 4) / 2 + 1 / 4) / 2,
        "accuracy": 5 / 10,
        "2D": (1 / 2 + 3 / 4) / 2,
        "3D": 1 / 4,
        "source: ADE20K": 1 / 2,
        "source: COCO": 3 / 4,
        "source: Omni3D": 1 / 4,
        "task: Count": 1 / 2,
        "task: Relation": 3 / 4,
        "task: Depth": 1,
        "task: Distance": 0,
    }
    assert CV_BENCH.metrics(graded) == {name: pytest.approx([100 * value]) for name, value in expected.items()}
    # Weights count an item as often as a table that repeats it.
    weight = np.array([2, 1, 1, 1, 0, 1, 3, 1, 0, 1])
    index = np.repeat(np.arange(10), weight)
    repeated = Graded([graded.items[i] for i in index], [None] * 11, graded.score[index], np.ones((1, 11)))
    weighted = CV_BENCH.metrics(replace(graded, weight=weight[None].astype(float)))
    assert weighted == {name: pytest.approx(value) for name, value in CV_BENCH.metrics(repeated).items()}


def test_groups_of_the_others(tmp_path):
    seed = graded_by(SEED_IMG, write(tmp_path / "a.parquet", TABLES["seed_img"] + [seed_row(9)]), [1] + [0] * 9)
    assert SEED_IMG.metrics(seed)["dimension: scene understanding"] == [50] and SEED_IMG.metrics(seed)["accuracy"] == [10]
    assert len(SEED_IMG.metrics(seed)) == 10 and seed.items[0].fields["photo"] == seed.items[1].fields["photo"] == "photo 0"
    short = [{**TABLES["realworldqa"][0], "answer": answer} for answer in ("A", "Two", "7")]
    kinds = graded_by(REALWORLDQA, write(tmp_path / "b.parquet", short), [1, 1, 0])
    assert REALWORLDQA.metrics(kinds) == {"accuracy": pytest.approx([200 / 3]), "kind: letter": [100], "kind: short": [50]}
    rows = [{**TABLES["scienceqa_img"][0], "subject": name} for name in ("x", "y", "y")]
    subjects = graded_by(SCIENCEQA_IMG, write(tmp_path / "c.parquet", rows), [0, 1, 0])
    assert SCIENCEQA_IMG.metrics(subjects) == {"accuracy": pytest.approx([100 / 3]), "subject: x": [0], "subject: y": [50]}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("mmstar", lambda rows: [row.pop("l2_category") for row in rows], "no column l2_category; there are index"),
        ("mmstar", lambda rows: rows[0].update(category="maths"), "unknown category maths; known: coarse"),
        ("mmstar", lambda rows: rows[0].update(l2_category="l2 6"), "unknown l2_category l2 6; known: biology"),
        ("mmstar", lambda rows: rows[1].update(index=0), "id 0 occurs more than once"),
        ("mmstar", lambda rows: rows[2].update(answer="E"), "row 2: answer 'E' is none of A, B, C, D"),
        ("mmstar", lambda rows: rows[2].update(answer=None), "row 2: answer None is none of A, B, C, D"),
        ("cv_bench", lambda rows: rows[1].update(answer="(C)"), "row 1: answer 'C' is none of A, B"),
        ("cv_bench", lambda rows: rows[1].update(answer=""), "row 1: answer '' is none of A, B"),
        ("cv_bench", lambda rows: rows[0].update(source="COCO2"), "unknown source COCO2; known: ADE20K, COCO, Omni3D"),
        ("cv_bench", lambda rows: rows[1].update(idx=0), "id 2D-0 occurs more than once"),
        ("cv_bench", lambda rows: [row.pop("image") for row in rows], "no column image"),
        ("scienceqa_img", lambda rows: rows[0].update(answer=2), "row 0: answer 2 is no position among 2 choices"),
        ("scienceqa_img", lambda rows: rows[0].update(answer=-1), "row 0: answer -1 is no position among 2 choices"),
        ("scienceqa_img", lambda rows: rows[0].update(image=None), "no question has an image"),
        ("mmstar", lambda rows: rows[3].update(image=None), "row 3: image is empty, but every question here has an image"),
        ("cv_bench", lambda rows: rows[1].update(image=None), "row 1: image is empty, but every question here has an image"),
        ("ai2d", lambda rows: rows[0].update(image=None), "row 0: image is empty, but every question here has an image"),
        ("seed_img", lambda rows: rows[0].update(image=None), "row 0: image is empty, but every question here has an image"),
        ("realworldqa", lambda rows: rows[0].update(image=None), "row 0: image is empty, but every question here has an image"),
        ("ai2d", lambda rows: rows[0].update(answer="C"), "row 0: answer 'C' is no position among 4 choices, counted from 0"),
        ("ai2d", lambda rows: rows[0].update(answer="4"), "row 0: answer '4' is no position"),
        ("seed_img", lambda rows: rows[0].update(question_type_id=12), "unknown question_type_id 12; known: 1, 2"),
        ("seed_img", lambda rows: rows.append(seed_row(2)), "id 102 occurs more than once"),
        ("seed_img", lambda rows: [row.update(data_type="video") for row in rows], "no row of data_type image"),
        ("seed_img", lambda rows: rows[3].update(answer="e"), "row 3: answer 'e' is none of A, B, C, D"),
        ("realworldqa", lambda rows: rows[0].update(answer=" "), "row 0: no answer"),
        ("realworldqa", lambda rows: rows.clear(), "no column"),
    ],
)
def test_a_wrong_file_says_what_is_wrong(name, change, message, tmp_path):
    rows = [dict(row) for row in TABLES[name]]
    change(rows)
    with pytest.raises(InputError) as error:
        BENCHMARKS[name].read(write(tmp_path / "test.parquet", rows))
    assert message in str(error.value) and str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_images_as_bytes_struct_base64_or_list_of_one(tmp_path):
    forms = {
        "bytes": lambda data: data,
        "struct": lambda data: {"bytes": data, "path": None},
        "base64": lambda data: base64.b64encode(data).decode(),
        "list": lambda data: [{"bytes": data, "path": "x.png"}],
    }
    for form, wrap in forms.items():
        rows = [{**TABLES["ai2d"][0], "question": str(i), "image": wrap(encoded(i))} for i in range(5)]
        folder = tmp_path / form
        folder.mkdir()
        pq.write_table(pa.Table.from_pylist(rows[:3]), folder / "test-0.parquet", row_group_size=2)
        write(folder / "test-1.parquet", rows[3:])
        items = AI2D.read(str(folder))
        assert [item.id for item in items] == [item.question for item in items] == list("01234"), form
        assert [item.images[0].read() for item in items] == [encoded(i) for i in range(5)], form
    several = write(tmp_path / "two.parquet", [{**TABLES["ai2d"][0], "image": [cell(), cell()]}])
    with pytest.raises(InputError, match=r"two.parquet: row 0: image holds 2 images, expected one"):
        AI2D.read(several)[0].images[0].read()
    for path, message in (
        (None, "image holds no image"),
        ("a.png", r"image holds a path \(a.png\) and no image; use the file"),
    ):
        rows = [TABLES["ai2d"][0], {**TABLES["ai2d"][0], "image": {"bytes": None, "path": path}}]
        with pytest.raises(InputError, match=f"row 1: {message}"):
            AI2D.read(write(tmp_path / "none.parquet", rows))[1].images[0].read()


def test_questions_without_image_and_videos_are_left_out(tmp_path):
    # Null cells, of which the statistics of a column may know or not.
    for form, wrap in {"bytes": lambda data: data, "struct": lambda data: {"bytes": data, "path": None}}.items():
        for statistics in (True, False):
            images = [None, wrap(encoded(1)), None, wrap(encoded(3))]
            rows = [{**TABLES["scienceqa_img"][0], "image": image, "hint": None} for image in images]
            pq.write_table(pa.Table.from_pylist(rows), tmp_path / "sqa.parquet", write_statistics=statistics, row_group_size=3)
            items = SCIENCEQA_IMG.read(str(tmp_path / "sqa.parquet"))
            assert [(item.id, item.images[0].read()) for item in items] == [("1", encoded(1)), ("3", encoded(3))], form
    rows = [seed_row(20, "video") | {"image": [cell(), cell()], "question_type_id": 10}, *TABLES["seed_img"]]
    assert [item.id for item in SEED_IMG.read(write(tmp_path / "seed.parquet", rows))] == [str(100 + i) for i in range(9)]


def test_mmstar_options_are_split_from_the_question():
    cases = {
        "Q?\nOptions: A: x, y, B: z": ("Q?", ("x, y", "z")),
        "Q: A: 1?\nOptions:\nA: x\nB: y.": ("Q: A: 1?", ("x", "y.")),
        "Q?\nOptions: A: AB: 2, B: C: no": ("Q?", ("AB: 2", "C: no")),
        "Q?\nOptions: A: x, C: y": ("Q?\nOptions: A: x, C: y", ()),
        "Q?\nChoices:\n(A) 1\n(B) f(A) = 2\n(C) nan": ("Q?", ("1", "f(A) = 2")),
        "No options": ("No options", ()),
    }
    assert {question: split_question(question) for question in cases} == cases


def test_mmstars_own_letters_equal_the_recorded_ones(tmp_path):
    recorded = json.loads((Path(__file__).parents[1] / "golden" / "hallucination.json").read_text(encoding="utf-8"))["mmstar"]
    item = MMSTAR.read(write(tmp_path / "m.parquet", TABLES["mmstar"]))[0]
    for answer, outputs in recorded.items():
        asked = replace(item, answers=(answer,))
        assert [text for text in MMSTAR_OUTPUTS if MMSTAR.match(asked, text, "mmstar").score] == outputs
    assert MMSTAR.prompt(item, "mmstar") == f"{item.question}\nAnswer the question directly."
    asked = ask(find_benchmark("mmstar", "m"), str(tmp_path / "m.parquet"), EvalConfig(protocol="mmstar"))
    assert (asked.rules, asked.max_new_tokens) == ("mmstar", 512)
