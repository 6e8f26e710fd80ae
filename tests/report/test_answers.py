"""Answers side by side: outcomes, the choice of questions, and images that exist, are gone, broken or too many."""

import json
from dataclasses import replace

import numpy as np
import pytest
from pages import HOSTILE, check_structure, write_evaluation, write_questions
from PIL import Image

from lsg_jax.cli import main
from lsg_jax.eval.results import read_result
from lsg_jax.eval.statistics import paired_test
from lsg_jax.report import answers
from lsg_jax.report.answers import OUTCOMES, Answered, Question, choose, read_questions, thumbnails
from lsg_jax.report.pictures import data_url, small


def question(id, *scores):
    """A question with the scores of base, lsg and var."""
    given = {name: Answered("", "", score, None) for name, score in zip(("base", "lsg", "var"), scores, strict=False)}
    return Question(str(id), "", "?", (), given)


def test_outcomes_agree_with_the_paired_test():
    rng = np.random.default_rng(0)
    scores = rng.choice([0.0, 0.3, 1.0], (300, 2))
    found = [question(i, *row).outcome("lsg") for i, row in enumerate(scores)]
    expected = paired_test(scores[:, 0], scores[:, 1])
    assert (found.count("gained"), found.count("lost")) == (expected.better, expected.worse)
    assert found.count("both wrong") == int((scores.sum(-1) == 0).sum()) and found.count("both right") > 0
    several = question(0, 1.0, 1.0, 0.0)
    assert several.outcomes == ["both right", "lost"] and OUTCOMES[several.rank] == "lost"


@pytest.mark.parametrize("counts", [(0, 0, 0, 0), (3, 2, 1, 0), (500, 1, 40, 300), (0, 100, 0, 0), (90, 80, 70, 60)])
def test_an_even_share_of_each_outcome_is_shown(counts):
    pairs = ((0.0, 1.0), (1.0, 0.0), (1.0, 1.0), (0.0, 0.0))
    kinds = np.random.default_rng(1).permutation(np.repeat(np.arange(4), counts))
    asked = [question(i, *pairs[kind]) for i, kind in enumerate(kinds)]
    shown = choose(asked, 40)
    assert len(shown) == min(40, len(asked)) == len({question.id for question in shown})
    ranks = [question.rank for question in shown]
    assert ranks == sorted(ranks)  # questions that changed come first
    for rank, count in enumerate(counts):
        own = [int(question.id) for question in shown if question.rank == rank]
        assert own == sorted(own) and min(count, 10) <= len(own) <= count
        if len(own) > 1:  # spread over the whole file
            assert max(own) >= 0.8 * max(i for i, kind in enumerate(kinds) if kind == rank)


@pytest.fixture
def evaluation(tmp_path):
    """(folder, result of the benchmark, questions) of custom questions; all but one have a photo."""
    write_evaluation(tmp_path, write_questions(tmp_path / "questions"))
    entry = read_result(tmp_path / "result.json").benchmarks["mine"]
    return tmp_path, entry, read_questions(tmp_path, "mine", ["base", "lsg", "var"], {})


def test_images_come_from_the_files_of_the_benchmark_as_long_as_they_fit(evaluation, monkeypatch):
    folder, entry, asked = evaluation
    found, problem = thumbnails("mine", entry, asked)
    assert list(found) == [question.id for question in asked[:-1]] and "hold none" in problem
    assert asked[0].answers["lsg"].ratio == 0.5 and asked[0].answers["var"].ratio is None

    monkeypatch.setattr(answers, "MAX_IMAGE_BYTES", 2 * len(found["1"][0][1]))
    assert thumbnails("mine", entry, asked)[0].keys() == {"1", "2"} and "too large" in thumbnails("mine", entry, asked)[1]
    monkeypatch.undo()

    (folder / "questions" / "photo.jpg").write_bytes(b"GIF89a, but no more")
    assert thumbnails("mine", entry, asked)[0] == {} and "not an image" in thumbnails("mine", entry, asked)[1]
    (folder / "questions" / "photo.jpg").unlink()
    assert thumbnails("mine", entry, asked)[0] == {} and "does not exist" in thumbnails("mine", entry, asked)[1]
    write_questions(folder / "questions", count=5)  # some ids now stand for other questions
    assert thumbnails("mine", entry, asked)[0].keys() == {"1", "2", "3", "4"}
    for gone in (replace(entry, path=str(folder / "no.jsonl")), replace(entry, path=None)):
        assert thumbnails("mine", gone, asked)[0] == {} and thumbnails("mine", gone, asked)[1]
    assert thumbnails("mmstar", entry, asked)[0] == {}  # JSONL is no Parquet


def test_all_images_of_a_question_are_shown(tmp_path):
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (30, 20), colour).save(tmp_path / name)
    given = [["a.png", "b.png", "a.png"], ["b.png"], ["a.png", "b.png"], []]
    lines = [{"question": f"{i}?", "answer": "B", "images": names} for i, names in enumerate(given)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_evaluation(tmp_path / "eval", tmp_path / "questions.jsonl", scenes=4)
    entry = read_result(tmp_path / "eval" / "result.json").benchmarks["mine"]
    asked = read_questions(tmp_path / "eval", "mine", ["base", "lsg"], {})
    red, blue = (small((tmp_path / name).read_bytes(), 224) for name in ("a.png", "b.png"))
    assert thumbnails("mine", entry, asked)[0] == {"1": [red, blue, red], "2": [blue], "3": [red, blue]}
    assert main(["report", str(tmp_path / "eval"), "--out", str(tmp_path / "report.html")]) == 0
    page = check_structure((tmp_path / "report.html").read_text())
    alts = [image["alt"] for image in page.all("img") if image["src"] in [data_url(*red), data_url(*blue)]]
    of = lambda id, *numbers: [f"Image {number}of question {id}" for number in numbers]
    assert sorted(alts) == sorted([*of(1, "1 ", "2 ", "3 "), *of(2, ""), *of(3, "1 ", "2 ")])
    (tmp_path / "b.png").write_bytes(b"GIF89a, but no more")
    assert thumbnails("mine", entry, asked)[0] == {}


def test_small_images_have_few_pixels_and_bytes():
    noise = np.random.default_rng(0).integers(0, 255, (300, 400, 3), np.uint8)
    flat = np.zeros((300, 400, 3), np.uint8)
    for pixels, kind in ((noise, "jpeg"), (flat, "png")):
        found, file = small(Image.fromarray(pixels), 200)
        assert found == kind and len(file) < 30_000
    assert small(Image.new("RGBA", (4, 4)), 200)[0] == "png"


def test_a_huge_evaluation_makes_a_page_that_can_be_sent(tmp_path):
    write_evaluation(tmp_path, None, scenes=2000)
    for file in tmp_path.glob("*.jsonl"):  # a model that never stops
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps(line | {"output": HOSTILE * 100}) + "\n" for line in lines))
    out = tmp_path / "report.html"
    assert main(["report", str(tmp_path), "--out", str(out)]) == 0
    page = check_structure(out.read_text())
    assert out.stat().st_size < 2_000_000 and page.tags.count("img") == 40
    assert any("40 of 2000 questions are shown" in text for text in page.texts["p"])
    cells = page.texts["td"]
    assert ["2000", "500", "500", "500", "500"] in [cells[i : i + 5] for i in range(len(cells))]
    shown = [text for text in page.texts["p"] if text.endswith("(cut)")]
    assert len(shown) == 3 * 40 and all(HOSTILE * 2 in text for text in shown)
    rows = [row["data-outcomes"].split(",") for row in page.all("tr") if "data-outcomes" in row]
    assert len(rows) == 40 and {len(row) for row in rows} == {2}


def test_partial_scores_are_explained(tmp_path):
    write_evaluation(tmp_path, None)
    file = tmp_path / "scenes.lsg.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(line | {"score": 0.3, "output": " "}) + "\n" for line in lines))
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "report.html")]) == 0
    page = check_structure((tmp_path / "report.html").read_text())
    texts = page.texts["p"]
    assert sum("30 % right, gained" in text for text in texts) == sum("30 % right, lost" in text for text in texts) == 4
    assert any("right in part" in text for text in texts) and texts.count("(empty)") == 7
