"""Asking, grading, resuming and telling of results, without a model."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest

from lsg_jax.config import EvalConfig, GateConfig
from lsg_jax.errors import InputError
from lsg_jax.eval.answering import Answer
from lsg_jax.eval.answers import AnswerLog
from lsg_jax.eval.benchmark import Benchmark, Item, Match, by, mean
from lsg_jax.eval.registry import find_benchmark
from lsg_jax.eval.results import (
    Estimate,
    EvaluationResult,
    MethodSettings,
    read_questions,
    read_result,
    write_questions,
    write_result,
)
from lsg_jax.eval.runner import ask, grade, question_rows, ratio_rows, summary
from lsg_jax.eval.statistics import PairedTest
from lsg_jax.eval.table import table

ITEMS = [
    Item(str(i), "?", ("yes" if i % 3 else "no",), fields={"kind": "ab"[i % 2], "picture": str(i // 4)}) for i in range(24)
]
MADE = Benchmark(
    name="made",
    read=lambda path: ITEMS,
    prompt=lambda item, protocol: f"{protocol}: {item.id}",
    match=lambda item, output, protocol: Match(output if output != "?" else None, float(output == item.answers[0])),
    metrics=lambda graded: {"accuracy": mean(graded), **by(graded, "kind")},
    official={"paper": "accuracy", "cambrian": "a"},
    size=24,
    unit="picture",
    guess_by="kind",
    max_new_tokens={"cambrian": 5},
)


def test_a_protocol_without_rules_of_its_own_takes_the_papers():
    for protocol, rules, tokens, score in [
        ("paper", "paper", 32, "accuracy"),
        ("cambrian", "cambrian", 5, "a"),
        ("vlmevalkit", "paper", 32, "accuracy"),
    ]:
        asked = ask(MADE, "", EvalConfig(protocol=protocol))
        assert (asked.rules, asked.max_new_tokens, asked.score) == (rules, tokens, score)
        assert asked.prompts[3] == f"{rules}: 3"


@pytest.mark.parametrize("limit, count, partial", [(None, 24, False), (24, 24, False), (99, 24, False), (5, 5, True)])
def test_a_partial_run_has_no_official_score(limit, count, partial):
    asked = ask(MADE, "", EvalConfig(limit=limit))
    assert (len(asked.items), asked.partial, asked.score) == (count, partial, None if partial else "accuracy")
    if partial:
        assert [item.id for item in asked.items] == ["0", "6", "12", "17", "23"]  # spread over the file
    graded = {"base": grade(asked, ["yes"] * count)}
    text = table({"made": summary(asked, graded)})
    assert ("PARTIAL, 5 of 24: no official score" in text) == partial == ("official score: accuracy" not in text)
    assert ("accuracy *" in text) != partial


@pytest.mark.parametrize("size, told", [(25, "PARTIAL, 24 of 25: no"), (20, "the official file has 20: no")])
def test_a_file_that_is_not_the_whole_benchmark_has_no_official_score(size, told):
    asked = ask(replace(MADE, size=size), "", EvalConfig())
    assert asked.partial and asked.score is None
    assert told in table({"made": summary(asked, {"base": grade(asked, ["yes"] * 24)})}).splitlines()[0]


def test_summary_of_base_and_gated():
    asked = ask(MADE, "", EvalConfig())
    right = [item.answers[0] for item in ITEMS]
    better = ["?"] * 6 + right[6:]
    worse = ["?"] * 12 + right[12:]
    entry = summary(asked, {"base": grade(asked, worse), "lsg": grade(asked, better)})
    methods, change = entry.methods, entry.change["lsg"]["accuracy"]
    assert methods["base"]["accuracy"].value == 50.0 and methods["lsg"]["accuracy"].value == 75.0
    assert change.value == 25.0 and change.low < 25.0 < change.high
    assert entry.paired_test["lsg"] == PairedTest(6, 0, pytest.approx(2 * 0.5**6))
    # 16 of 24 are "yes", in either kind 8 of 12
    assert entry.majority == {name: pytest.approx(200 / 3) for name in ("accuracy", "a", "b")}
    json.dumps(asdict(entry), allow_nan=False)
    lines = table({"made": entry}).splitlines()
    assert lines[2].split()[:3] == ["accuracy", "*", "66.67"] and lines[-1].endswith("6 questions better, 0 worse, p = 0.0312")
    assert lines[-2] == "outputs that the matcher found no answer in: base 12, lsg 6"
    # of several methods the table has the changes only
    more = summary(asked, {"base": grade(asked, worse), "lsg": grade(asked, better), "var": grade(asked, right)})
    head, first = table({"made": more}).splitlines()[1:3]
    assert head.split("  ")[-1].strip() == "var: change [95 %]" and "lsg [95 %]" not in head.replace("lsg: ", "")
    assert "+25.00 [" in first and "+50.00 [" in first and "75.00" not in first


def test_summary_over_seeds():
    """Deviations by hand: 75, 50 and 100 of 100 deviate by 25; that of the mean is the bootstrap's, with seeds fixed."""
    asked = ask(MADE, "", EvalConfig())
    right = [item.answers[0] for item in ITEMS]
    wrong = {"base": 12, "lsg_seed3": 6, "lsg_seed4": 12, "lsg_seed5": 0}
    graded = {method: grade(asked, ["?"] * count + right[count:]) for method, count in wrong.items()}
    seeds = [method for method in wrong if method != "base"]
    entry = summary(asked, graded, {"lsg": seeds})
    over = entry.over_seeds["lsg"]
    assert over.seeds == tuple(seeds) and entry.methods.keys() == wrong.keys()
    assert over.deviation["accuracy"] == pytest.approx(25.0)
    # one that answers each question right as often as the seeds do in the mean
    mean_graded = replace(graded["base"], score=np.mean([graded[seed].score for seed in seeds], axis=0))
    pooled = summary(asked, {"base": graded["base"], "mean": mean_graded})
    for ours, theirs in [(over.methods, pooled.methods["mean"]), (over.change, pooled.change["mean"])]:
        assert ours["accuracy"].value == pytest.approx(theirs["accuracy"].value)
        assert (ours["accuracy"].low, ours["accuracy"].high) == pytest.approx((theirs["accuracy"].low, theirs["accuracy"].high))
    lines = table({"made": entry}).splitlines()
    assert "lsg: mean change [95 %] ± over seeds" in lines[1] and "lsg_seed" not in lines[1]
    assert "+25.00 [" in lines[2] and lines[2].endswith("] ± 25.00")
    assert any(line.startswith("lsg, accuracy: mean 75.00 [") and line.endswith(" 75.00, 50.00, 100.00") for line in lines)
    assert [line.split(" against")[0] for line in lines if " against base" in line] == seeds  # a paired test for each


def test_seeds_that_are_all_right_have_the_interval_of_one():
    asked = ask(MADE, "", EvalConfig())
    right = grade(asked, [item.answers[0] for item in ITEMS])
    entry = summary(asked, {"base": right, "lsg_seed0": right, "lsg_seed1": right}, {"lsg": ["lsg_seed0", "lsg_seed1"]})
    assert entry.over_seeds["lsg"].methods == entry.methods["lsg_seed0"]
    assert entry.over_seeds["lsg"].methods["accuracy"].low == pytest.approx(60.967, abs=1e-3)  # Wilson's, of 6 pictures


def test_a_metric_that_is_no_number_is_null():
    nothing = replace(MADE, metrics=lambda graded: {"none": mean(graded, np.zeros(24, bool))})
    asked = ask(nothing, "", EvalConfig())
    entry = summary(asked, {"base": grade(asked, ["yes"] * 24)})
    assert entry.methods["base"]["none"] == Estimate(None, None, None)
    assert table({"made": entry}).splitlines()[2].split()[-1] == "-]"


def test_the_log_gives_back_what_it_holds(tmp_path):
    prompts = [f"q{i}" for i in range(24)]
    log = AnswerLog(tmp_path, "made.base", {"a": 1}, ITEMS, prompts)
    assert log.known() == {}
    ratios = np.array([[0.25, 0.75]], np.float32)
    log.add({0: Answer("x"), 5: Answer("two\nlines \u2028 é", ratios)})
    with log.path.open("a") as file:
        file.write('\n{"id": "7", "prompt": "')  # killed while it wrote
    again = AnswerLog(tmp_path, "made.base", {"a": 1}, ITEMS, prompts)
    again.add({8: Answer("y")})
    known = again.known()
    assert {i: answer.text for i, answer in known.items()} == {0: "x", 5: "two\nlines \u2028 é", 8: "y"}
    assert known[0].ratios is None and np.array_equal(known[5].ratios, ratios)
    # another meaning, another prompt, another item: not the same question
    assert AnswerLog(tmp_path, "made.base", {"a": 2}, ITEMS, prompts).known() == {}
    assert AnswerLog(tmp_path, "made.base", {"a": 1}, ITEMS, ["new", *prompts[1:]]).known().keys() == {5, 8}
    assert AnswerLog(tmp_path, "made.base", {"a": 1}, ITEMS[::-1], prompts[::-1]).known().keys() == {23, 18, 15}


def test_names():
    assert find_benchmark("mine", "x.jsonl").name == "questions"
    for name, path, message in [
        ("mmstr", "x.parquet", "benchmark mmstr: unknown; known are mmstar, "),
        ("mmstar", "", "give its file, folder or glob as mmstar=PATH"),
    ]:
        with pytest.raises(InputError, match=message):
            find_benchmark(name, path)


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "a\\b", "/x", ".x", " x", "-x", "x\n", "x\0", "c:x", "x" * 101])
def test_a_name_that_is_a_path_is_refused(name):
    with pytest.raises(InputError, match="results are written under this name") as caught:
        find_benchmark(name, "x.jsonl")
    assert "\n" not in str(caught.value)
    assert find_benchmark("my questions-v1.2_é", "x.jsonl").name == "questions"


def test_results_are_read_as_they_were_written(tmp_path):
    asked = ask(MADE, "", EvalConfig())
    right = [item.answers[0] for item in ITEMS]
    graded = {"base": grade(asked, ["?", *right[1:]]), "lsg": grade(asked, right)}
    ratios = np.array([[0.25, 0.75]], np.float32)
    answers = [Answer(text, None if i else ratios) for i, text in enumerate(right)]
    rows = question_rows(asked, answers, graded["lsg"])
    write_questions(tmp_path / "made.lsg.jsonl", rows)
    assert read_questions(tmp_path / "made.lsg.jsonl") == rows
    assert json.loads((tmp_path / "made.lsg.jsonl").read_text().splitlines()[0]) == {
        "id": "0", "kind": "a", "picture": "0", "prompt": "paper: 0", "output": "no", "parsed": "no", "answers": ["no"],
        "score": 1.0, "ratios": [[0.25, 0.75]],
    }  # fmt: skip
    result = EvaluationResult(
        model="tiny",
        backbone="0",
        methods={"base": MethodSettings(), "lsg": MethodSettings(gate={"layers": [1]})},
        settings={"limit": None},
        benchmarks={"made": summary(asked, graded, {"both": ["base", "lsg"]})},
        ratios=tuple(ratio_rows("lsg", "made", asked, answers, GateConfig(layers=(1,)))),
    )
    write_result(tmp_path, result)
    assert read_result(tmp_path / "result.json") == result and len(result.ratios) == 2
    (tmp_path / "made.lsg.jsonl").write_text('{"id": "0"}\n')
    with pytest.raises(InputError, match=r"made\.lsg\.jsonl: not as lsg writes it"):
        read_questions(tmp_path / "made.lsg.jsonl")
    for number, message in ((2, "this version of lsg reads lsg-eval-3"), (3, "not as lsg writes it")):
        (tmp_path / "result.json").write_text(f'{{"format": "lsg-eval-{number}"}}')
        with pytest.raises(InputError, match=message):
            read_result(tmp_path / "result.json")
