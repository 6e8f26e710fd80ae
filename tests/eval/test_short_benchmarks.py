"""The short-answer benchmarks against the codes they have to equal (`tests/golden/record_short.py`), and by hand."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lsg_jax.errors import InputError
from lsg_jax.eval.benchmark import Graded, Item
from lsg_jax.eval.benchmarks.chartqa import CHARTQA
from lsg_jax.eval.benchmarks.gqa import GQA
from lsg_jax.eval.benchmarks.mme import COGNITION, MME, PERCEPTION
from lsg_jax.eval.benchmarks.ocrbench import FORMULA, GROUPS, OCRBENCH
from lsg_jax.eval.benchmarks.pope import POPE
from lsg_jax.eval.benchmarks.textvqa import TEXTVQA
from lsg_jax.eval.short_answers import soft_accuracy

pytestmark = pytest.mark.usefixtures("no_process_that_reads_first")

BENCHMARKS = {benchmark.name: benchmark for benchmark in (POPE, MME, GQA, TEXTVQA, CHARTQA, OCRBENCH)}
GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "short.json").read_text(encoding="utf-8"))


def recorded(kind):
    return [case for source in GOLDEN["cases"].values() for case in source[kind]]


def item(answers=("x",), question="?", fields=None, name="1"):
    return Item(name, question, tuple(answers), fields=fields or {})


def graded(benchmark, items, outputs, protocol="paper"):
    matches = [benchmark.match(i, output, protocol) for i, output in zip(items, outputs, strict=True)]
    score = np.array([match.score for match in matches])
    return Graded(items, [match.parsed for match in matches], score, np.ones((1, len(items))))


def score(benchmark, items, outputs, protocol="paper"):
    return {name: value[0] for name, value in benchmark.metrics(graded(benchmark, items, outputs, protocol)).items()}


# ------------------------------------------------------------------------------------------------------------- recorded cases


def test_every_benchmark_and_protocol_is_recorded():
    expected = {(name, protocol) for name, benchmark in BENCHMARKS.items() for protocol in benchmark.official}
    no_source = {("chartqa", "paper"), ("ocrbench", "paper")}  # LLaVA-1.5 was not evaluated on them
    assert {(case["benchmark"], case["protocol"]) for case in recorded("matches")} == expected - no_source
    assert {(case["benchmark"], case["protocol"]) for case in recorded("prompts")} == expected - no_source


def test_prompts_equal_the_recorded_ones():
    for case in recorded("prompts"):
        asked = item(question=case["question"], fields=case["fields"])
        assert BENCHMARKS[case["benchmark"]].prompt(asked, case["protocol"]) == case["prompt"], case


def test_matches_equal_the_recorded_ones():
    differ = []
    for case in recorded("matches"):
        asked = item(case["answers"], fields=case.get("fields"))
        for output, expected, *read in case["outputs"]:
            match = BENCHMARKS[case["benchmark"]].match(asked, output, case["protocol"])
            if not math.isclose(match.score, expected, abs_tol=1e-12) or (read and match.parsed != read[0]):
                differ.append((case["benchmark"], case["protocol"], case["answers"], output, expected, *read, match))
    assert not differ


def test_aggregates_equal_the_recorded_ones():
    pope = [item([true], fields={"category": split}) for split, true, _ in GOLDEN["tables"]["pope"]]
    mme = [
        item([true], fields={"category": name, "pair": f"{name}/{pair}"})
        for name, pairs in GOLDEN["tables"]["mme"].items()
        for pair in range(len(pairs))
        for true in ("yes", "no")
    ]
    outputs = {
        "pope": [said for _, _, said in GOLDEN["tables"]["pope"]],
        "mme": [said for pairs in GOLDEN["tables"]["mme"].values() for pair in pairs for said in pair],
    }
    for case in recorded("aggregates"):
        name, protocol = case["benchmark"], case["protocol"]
        found = score(BENCHMARKS[name], {"pope": pope, "mme": mme}[name], outputs[name], protocol)
        for metric, value in case["values"].items():
            assert found[metric] == pytest.approx(value * (100 if name == "pope" else 1)), (name, protocol, metric)


# --------------------------------------------------------------------------------------------------------- aggregates by hand


def test_pope_by_hand():
    # random: 4 true positives, 1 false positive, 2 true negatives, 1 false negative; popular: 1, 1, 0, 0; adversarial: all no
    table = (
        [("random", "yes", "yes")] * 4 + [("random", "no", "yes")] + [("random", "no", "no")] * 2 + [("random", "yes", "no")]
    )
    table += [("popular", "yes", "yes"), ("popular", "no", "yes"), ("adversarial", "yes", "no"), ("adversarial", "no", "no")]
    items = [item([true], fields={"category": split}) for split, true, _ in table]
    found = score(POPE, items, [said for *_, said in table])
    expected = {
        "random: accuracy": 75.0, "random: precision": 80.0, "random: recall": 80.0, "random: f1": 80.0,
        "random: yes_ratio": 62.5,
        "popular: accuracy": 50.0, "popular: precision": 50.0, "popular: recall": 100.0, "popular: f1": 200 / 3,
        "adversarial: precision": 0.0, "adversarial: recall": 0.0, "adversarial: f1": 0.0, "adversarial: yes_ratio": 0.0,
        "accuracy": 100 * 8 / 12, "precision": 100 * 5 / 7, "recall": 100 * 5 / 7, "f1": 100 * 5 / 7, "yes_ratio": 100 * 7 / 12,
        "f1_macro": (80.0 + 200 / 3 + 0.0) / 3,
    }  # fmt: skip
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_mme_by_hand():
    fields = lambda category, pair: {"category": category, "pair": f"{category}/{pair}"}
    # existence: one pair right, one half right, one wrong; every other subtask one half-right pair
    items = [item([true], fields=fields("existence", pair)) for pair in "abc" for true in ("yes", "no")]
    outputs = ["Yes", "No", "Yes", "Yes", "No", "Yes"]
    for category in (PERCEPTION + COGNITION)[1:]:
        items += [item([true], fields=fields(category, "a")) for true in ("yes", "no")]
        outputs += ["no", "no"]
    found = score(MME, items, outputs)
    existence = 50.0 + 100 / 3
    assert found["existence"] == pytest.approx(existence)
    assert found["existence: acc"] == pytest.approx(50.0) and found["existence: acc_plus"] == pytest.approx(100 / 3)
    assert found["count"] == 50.0 and found["count: acc_plus"] == 0.0
    assert found["perception"] == pytest.approx(existence + 9 * 50)
    assert found["cognition"] == pytest.approx(4 * 50)
    assert found["total"] == pytest.approx(existence + 13 * 50)
    perfect = score(MME, items, [i.answers[0] for i in items])
    assert (perfect["perception"], perfect["cognition"]) == (2000.0, 800.0)


def test_soft_accuracy_leaves_one_annotator_out():
    for given, expected in {0: 0.0, 1: 0.3, 2: 0.6, 3: 0.9, 4: 1.0, 10: 1.0}.items():
        annotators = ["cat"] * given + ["dog"] * (10 - given)
        assert soft_accuracy("cat", annotators) == pytest.approx(expected)
        by_definition = [min(1, [*annotators[:i], *annotators[i + 1 :]].count("cat") / 3) for i in range(10)]
        assert soft_accuracy("cat", annotators) == pytest.approx(np.mean(by_definition))


def test_textvqa_chartqa_gqa_and_ocrbench_by_hand():
    ten = [["cat"] * given + ["dog"] * (10 - given) for given in (3, 1, 10)]
    assert score(TEXTVQA, [item(answers) for answers in ten], ["A cat.", "cat", "bird"]) == pytest.approx({"accuracy": 40.0})

    kinds = ["human"] * 3 + ["augmented"]
    charts = [item(["100"], fields={"category": kind}) for kind in kinds]
    found = score(CHARTQA, charts, ["104.9", "106", "a hundred", "100"])
    assert found == pytest.approx({"accuracy": 50.0, "category: human": 100 / 3, "category: augmented": 100.0})

    scenes = [item(["dog"], fields={"semantic": kind}) for kind in ("object", "object", "object", "attr")]
    found = score(GQA, scenes, ["Dog.", "dogs", "dog", "cat"])
    assert found == pytest.approx({"accuracy": 50.0, "semantic: attr": 0.0, "semantic: object": 200 / 3})

    kinds = ["Handwriting Recognition", "Digit String Recognition", "Doc-oriented VQA", FORMULA, FORMULA]
    texts = [item(["a b"], fields={"category": kind, "group": GROUPS[kind], "dataset": ""}) for kind in kinds]
    found = score(OCRBENCH, texts, ["A B", "ab", "see a b", "ab", "A B"])
    assert found["points"] == 3 and found["accuracy"] == 60.0
    assert (
        found["points: Text Recognition"] == 1 and found["points: Doc-oriented VQA"] == 1 and found[f"points: {FORMULA}"] == 1
    )
    assert found["category: Handwriting Recognition"] == 100.0 and found["category: Digit String Recognition"] == 0.0


@pytest.mark.parametrize("name", ["pope", "mme"])
def test_metrics_of_weights_are_those_of_repeated_items(name):
    """A resample as weights equals the same resample written out, and a group that it lacks is NaN."""
    rng = np.random.default_rng(0)
    groups = {"pope": ("random", "popular", "adversarial"), "mme": PERCEPTION + COGNITION}[name]
    items = [
        item([true], fields={"category": group, "pair": f"{group}/{pair}"})
        for group in groups
        for pair in range(3)
        for true in ("yes", "no")
    ]
    outputs = [("yes", "no", "maybe")[i] for i in rng.integers(0, 3, len(items))]
    whole = graded(BENCHMARKS[name], items, outputs, "lmms_eval")
    weight = np.repeat(rng.integers(0, 3, (5, len(items) // 2)), 2, axis=1)  # both items of a pair alike
    weight[1:, 0::6] = weight[1:, 1::6] = 1  # no group is empty
    weight[0, :6] = 0  # but here the first
    found = BENCHMARKS[name].metrics(Graded(items, whole.parsed, whole.score, weight.astype(float)))
    for row in range(1, 5):
        index = np.repeat(np.arange(len(items)), weight[row])
        repeated = Graded(
            [items[i] for i in index], [whole.parsed[i] for i in index], whole.score[index], np.ones((1, len(index)))
        )
        for metric, value in BENCHMARKS[name].metrics(repeated).items():
            np.testing.assert_allclose(found[metric][row], value[0], err_msg=metric)
    assert np.isnan(found[f"{groups[0]}: f1" if name == "pope" else groups[0]][0])
    assert np.isnan(found["f1_macro" if name == "pope" else "perception"][0])


# ------------------------------------------------------------------------------------------------------------ reading of files

IMAGE = {"bytes": b"jpeg", "path": None}


def write(folder, rows, name="test.parquet"):
    folder.mkdir(exist_ok=True, parents=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / name)
    return folder


def pope_rows():
    row = {"id": "0", "question": "Is there a dog?", "answer": "yes", "image_source": "COCO_1", "image": IMAGE}
    return [{**row, "question_id": "1", "category": split} for split in ("random", "popular", "adversarial")]


def mme_rows():
    return [
        {"question_id": f"{name}/1.png", "image": IMAGE, "question": f"Is it {answer}?", "answer": answer, "category": name}
        for name in PERCEPTION + COGNITION
        for answer in ("Yes", "No")
    ]


def gqa_rows():
    return [
        {"id": "7", "imageId": "n1", "question": "Wet?", "answer": "no", "types": {"structural": "verify", "semantic": None}}
    ]


def textvqa_rows():
    row = {"question_id": 5, "image_id": "a", "question": "what?", "answers": ["x"] * 10, "ocr_tokens": ["A", "B"]}
    return [{**row, "image": IMAGE, "set_name": "val"}]


def chartqa_rows():
    return [{"type": kind, "question": "?", "answer": "1", "image": IMAGE} for kind in ("human_test", "augmented_test")]


def ocrbench_rows():
    return [{"dataset": "d", "question": "?", "question_type": kind, "answer": ["x"], "image": IMAGE} for kind in GROUPS]


ROWS = {"pope": pope_rows, "mme": mme_rows, "textvqa": textvqa_rows, "chartqa": chartqa_rows, "ocrbench": ocrbench_rows}


def test_reading(tmp_path):
    read = {name: BENCHMARKS[name].read(str(write(tmp_path / name, rows()))) for name, rows in ROWS.items()}
    write(tmp_path / "gqa" / "testdev_balanced_instructions", gqa_rows())
    write(tmp_path / "gqa" / "testdev_balanced_images", [{"id": "n1", "image": IMAGE}, {"id": "n2", "image": IMAGE}])
    read["gqa"] = GQA.read(str(tmp_path / "gqa"))
    for name, items in read.items():
        assert [i.images[0].read() for i in items] == [b"jpeg"] * len(items)
        unit = BENCHMARKS[name].unit
        assert all(unit is None or unit in i.fields for i in items)
    assert [i.id for i in read["pope"]] == ["random/1", "popular/1", "adversarial/1"]
    assert read["pope"][0].fields == {"category": "random", "image": "COCO_1"}
    assert [i.id for i in read["mme"][:2]] == ["existence/1.png#1", "existence/1.png#2"]
    assert [i.answers for i in read["mme"][:2]] == [("yes",), ("no",)]
    assert read["mme"][1].fields == {"category": "existence", "pair": "existence/1.png"}
    assert read["gqa"] == [
        Item("7", "Wet?", ("no",), images=read["gqa"][0].images, fields={"image": "n1", "structural": "verify"})
    ]
    assert read["textvqa"][0].answers == ("x",) * 10 and read["textvqa"][0].fields == {"image": "a", "ocr_tokens": "A, B"}
    assert [i.fields["category"] for i in read["chartqa"]] == ["human", "augmented"]
    assert {i.fields["group"] for i in read["ocrbench"]} == set(GROUPS.values())


def test_reading_of_other_layouts(tmp_path):
    rows = [{"query": "?", "label": ["1"], "human_or_machine": n, "image": IMAGE} for n in (0, 1)]
    items = CHARTQA.read(str(write(tmp_path / "chartqa", rows)))
    assert [(i.answers, i.fields["category"]) for i in items] == [(("1",), "human"), (("1",), "augmented")]
    write(tmp_path / "textvqa", textvqa_rows(), "validation.parquet")
    write(tmp_path / "textvqa", [{**textvqa_rows()[0], "set_name": "train", "question_id": 6}], "train.parquet")
    assert [i.id for i in TEXTVQA.read(str(tmp_path / "textvqa"))] == ["5"]
    assert len(OCRBENCH.read(str(write(tmp_path / "ocr", [{**row, "answer": "x"} for row in ocrbench_rows()])))) == 10


def without(rows, column):
    return [{name: value for name, value in row.items() if name != column} for row in rows]


BAD_FILES = [
    *((name, lambda r: [*r[:-1], {**r[-1], "image": None}], "image is empty, but every question here has an image")
      for name in ("pope", "mme", "textvqa", "chartqa", "ocrbench")),
    ("pope", lambda r: without(r, "image_source"), "no column image_source; there are id, question, answer"),
    ("pope", lambda r: without(r, "image"), "no column image; there are"),
    ("pope", lambda r: [*r, {**r[0], "category": "hard"}], "unknown category hard; known: adversarial, popular, random"),
    ("pope", lambda r: r + r[:1], "id random/1 occurs more than once"),
    ("pope", lambda r: [{**r[0], "answer": "maybe"}, *r[1:]], "row 0: answer 'maybe' is neither yes nor no"),
    ("mme", lambda r: without(r, "category"), "no column category"),
    ("mme", lambda r: [*r, {**r[0], "category": "smell"}], "unknown category smell"),
    ("mme", lambda r: [r[0], *r], "question_id existence/1.png has 2 questions in 3 rows"),
    ("mme", lambda r: [{**r[0], "question": r[1]["question"]}, *r[1:]], "existence/1.png has 1 questions in 2 rows"),
    ("mme", lambda r: [*r[:-1], {**r[-1], "answer": None}], "row 27: answer None is neither yes nor no"),
    ("textvqa", lambda r: without(r, "ocr_tokens"), "no column ocr_tokens"),
    ("textvqa", lambda r: r + r, "id 5 occurs more than once"),
    ("textvqa", lambda r: [{**r[0], "set_name": "train"}], "no rows of set_name val, only of train"),
    ("textvqa", lambda r: [{**r[0], "answers": ["x"] * 9}], "row 0: question 5 has 9 answers; expected 10"),
    ("chartqa", lambda r: without(r, "type"), "no column type; there are question, answer, image"),
    ("chartqa", lambda r: [*r, {**r[0], "type": "robot_test"}], "unknown question type robot"),
    ("chartqa", lambda r: [{**r[0], "answer": ""}, r[1]], "row 0: no answer"),
    ("chartqa", lambda r: [{"query": "?", "label": ["1"], "image": IMAGE}], "no column human_or_machine"),
    ("chartqa", lambda r: [{"query": "?", "label": [], "human_or_machine": n, "image": IMAGE} for n in (0, 1)], "no answer"),
    ("ocrbench", lambda r: without(r, "dataset"), "no column dataset"),
    ("ocrbench", lambda r: [*r, {**r[0], "question_type": "Braille"}], "unknown question_type Braille"),
    ("ocrbench", lambda r: [{**r[0], "answer": ["x", ""]}, *r[1:]], "row 0: no answer"),
]  # fmt: skip


def test_bad_files(tmp_path):
    for number, (name, change, message) in enumerate(BAD_FILES):
        folder = write(tmp_path / str(number), change(ROWS[name]()))
        with pytest.raises(InputError, match=re.escape(message)) as raised:
            BENCHMARKS[name].read(str(folder))
        assert str(folder) in str(raised.value) and "\n" not in str(raised.value), message


def test_bad_gqa_files(tmp_path):
    folder = write(tmp_path / "gqa", gqa_rows(), "instructions.parquet")
    with pytest.raises(InputError, match="no table with the columns id and image; give a folder or glob that holds"):
        GQA.read(str(folder))
    write(folder, [{"id": "n2", "image": IMAGE}], "images.parquet")
    with pytest.raises(InputError, match=r"instructions\.parquet: row 0: image n1 of question 7 is in no images table"):
        GQA.read(str(folder))
    write(folder, [{"id": "n1", "image": IMAGE}, {"id": "n3", "image": None}], "images.parquet")
    with pytest.raises(InputError, match=r"images\.parquet: row 1: image is empty, but every question here has an image"):
        GQA.read(str(folder))
    write(folder, [{"id": "n1", "image": IMAGE}], "images.parquet")
    write(folder, gqa_rows() * 2, "instructions.parquet")
    with pytest.raises(InputError, match="id 7 occurs more than once"):
        GQA.read(str(folder))
    write(folder, without(gqa_rows(), "answer"), "instructions.parquet")
    with pytest.raises(InputError, match=r"instructions\.parquet: no column answer; there are id, imageId, question"):
        GQA.read(str(folder))
