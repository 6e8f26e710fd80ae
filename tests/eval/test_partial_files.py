"""A file that has only some questions of a benchmark: it is asked, has no official score, and what it lacks is said."""

from dataclasses import replace

import pytest
import test_mixed_benchmarks
from test_choice_benchmarks import TABLES, cv_row, mmstar_row
from test_choice_benchmarks import write as write_file
from test_short_benchmarks import IMAGE, ROWS, gqa_rows
from test_short_benchmarks import write as write_folder

from lsg_jax.config import EvalConfig
from lsg_jax.eval.registry import BENCHMARKS
from lsg_jax.eval.runner import ask, grade, summary
from lsg_jax.eval.table import table

pytestmark = pytest.mark.usefixtures("no_process_that_reads_first")

PARTS = {  # benchmark -> rows of a file that lacks questions, and what is missing of them
    "mmstar": (
        TABLES["mmstar"][:15],
        {"category": ["math"], "l2_category": [row["l2_category"] for row in TABLES["mmstar"][15:]]},
    ),
    "cv_bench": (TABLES["cv_bench"][:2], {"type": ["3D"], "task": ["Depth", "Distance"], "source": ["Omni3D"]}),
    "scienceqa_img": (TABLES["scienceqa_img"], {}),
    "ai2d": (TABLES["ai2d"], {}),
    "seed_img": (TABLES["seed_img"][1:], {"dimension": ["scene understanding"]}),
    "realworldqa": (TABLES["realworldqa"], {}),
    "pope": (ROWS["pope"]()[:2], {"category": ["adversarial"]}),
    "mme": (ROWS["mme"]()[2:], {"category": ["existence"]}),
    "gqa": (gqa_rows(), {}),
    "textvqa": (ROWS["textvqa"](), {}),
    "chartqa": (ROWS["chartqa"]()[:1], {"category": ["augmented"]}),
    "ocrbench": (ROWS["ocrbench"]()[1:], {"category": ["Regular Text Recognition"]}),
}
NEED_ALL = {"mmstar": "mean_of_18", "cv_bench": "official", "pope": "f1_macro", "mme": "perception"}
"""Metrics that are defined over all groups."""


def asked_and_graded(name, path):
    asked = ask(BENCHMARKS[name], str(path), EvalConfig())
    found = summary(asked, {"base": grade(asked, [item.answers[0] for item in asked.items])})
    return asked, found, table({name: found})


def test_every_benchmark_of_files_is_here():
    elsewhere = {"scenes", "chair", "amber", "hallusionbench", "mmvp"}  # drawn; in test_hallucination_benchmarks.py
    assert {*PARTS, *elsewhere, *test_mixed_benchmarks.BENCHMARKS} == set(BENCHMARKS)


@pytest.mark.parametrize("name", PARTS)
def test_a_file_of_some_questions_is_partial(name, tmp_path):
    rows, missing = PARTS[name]
    if name == "gqa":
        write_folder(tmp_path, [{"id": "n1", "image": IMAGE}], "images.parquet")
    write_folder(tmp_path, rows)
    asked, found, text = asked_and_graded(name, tmp_path)
    assert asked.partial and asked.score is None and found.score is None and asked.missing == found.missing == missing
    assert f"PARTIAL, {len(rows)} of {BENCHMARKS[name].size}: no official score" in text and " *" not in text
    for field, values in missing.items():
        assert f"no questions of {field} {', '.join(values)}" in text
    # every metric over questions has its value; what needs all groups has none
    assert found.methods["base"]["accuracy"].value == 100
    if name in NEED_ALL:
        assert found.methods["base"][NEED_ALL[name]].value is None


def test_a_file_of_the_right_size_that_lacks_a_category_is_partial_too(tmp_path):
    path = write_file(tmp_path / "cv.parquet", [cv_row(i, i % 2) for i in range(4)])
    asked = ask(replace(BENCHMARKS["cv_bench"], size=4), path, EvalConfig())
    assert asked.partial and asked.score is None and asked.missing["source"] == ["Omni3D"]


def test_many_missing_values_are_counted_in_the_table(tmp_path):
    _, found, text = asked_and_graded("mmstar", write_file(tmp_path / "m.parquet", [mmstar_row(0)]))
    assert len(found.missing["l2_category"]) == 17 and "object counting" in text and " and 9 more\n" in text


def test_a_pair_that_lost_a_question_is_not_counted_as_a_pair(tmp_path):
    rows = [row for row in ROWS["mme"]() if row["category"] in ("existence", "count")]
    rows += [{**row, "question_id": "existence/2.png"} for row in rows[:2]]
    write_folder(tmp_path, rows[1:])  # one question of the first pair is gone
    asked = ask(BENCHMARKS["mme"], str(tmp_path), EvalConfig())
    assert asked.broken == {"pair": 1}
    # the lone question and one whole pair are right, one whole pair is half right
    outputs = ["no", "yes", "yes", "yes", "no"]
    found = summary(asked, {"base": grade(asked, outputs)})
    values = {name: at.value for name, at in found.methods["base"].items()}
    assert (values["existence: acc"], values["existence: acc_plus"]) == (100, 100)
    assert (values["count: acc"], values["count: acc_plus"]) == (50, 0)
    assert "groups by pair that are not whole, so not counted: 1" in table({"mme": found})
    lone = ask(BENCHMARKS["mme"], str(tmp_path), EvalConfig(limit=1))
    assert lone.broken == {"pair": 1}
    assert summary(lone, {"base": grade(lone, ["no"])}).methods["base"]["existence: acc_plus"].value is None


def test_a_part_without_the_official_score_is_shown_by_a_metric_that_has_a_value(tmp_path):
    """Perception is the first metric of MME, and a sum over categories of which most were not asked."""
    write_folder(tmp_path, ROWS["mme"]()[:2])
    _, found, _ = asked_and_graded("mme", tmp_path)
    assert found.methods["base"]["perception"].value is None and found.shown("base") == "accuracy"
    assert replace(found, score="total").shown("base") == "total"
