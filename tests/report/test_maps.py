"""Maps of attention as the report and `lsg sinks` show them: shares, colours, words, files; glossary and pivot."""

import dataclasses
import io
import re
from pathlib import Path

import numpy as np
import pytest
import study_rows
from PIL import Image

from lsg_jax.eval.benchmark import LOWER
from lsg_jax.eval.results import result_of
from lsg_jax.report import page
from lsg_jax.report.glossary import TERMS, as_markdown, explained, id_of
from lsg_jax.report.map_values import spread
from lsg_jax.report.maps import answer_maps, strip_of, telling_layer
from lsg_jax.report.overlay import draw_map
from lsg_jax.report.pivot import found_in, pivot
from lsg_jax.report.sink_files import file_stems


def grid(across, down):
    """Boxes of a grid over the whole image, row by row."""
    return [[x / across, y / down, (x + 1) / across, (y + 1) / down] for y in range(down) for x in range(across)]


def entry(attention, v_sinks, l_sinks, across=3, down=2):
    return {"boxes": grid(across, down), "v_sinks": v_sinks, "l_sinks": l_sinks, "answer_attention": attention}


def test_shares_of_a_map():
    raw = [[0.4, 0.2, 0.0, 0.1, 0.1, 0.0], [0.2, 0.0, 0.0, 0.1, 0.0, 0.0], [0.0] * 6]
    maps = answer_maps(entry(raw, [0], [[], [3], []]))
    np.testing.assert_allclose(maps.maps["raw"], [[0.5, 0.25, 0, 0.125, 0.125, 0], [2 / 3, 0, 0, 1 / 3, 0, 0], [0] * 6])
    np.testing.assert_allclose(maps.maps["no_sinks"], [[0, 0.5, 0, 0.25, 0.25, 0], [0] * 6, [0] * 6])
    np.testing.assert_allclose(maps.on_image, [0.8, 0.3, 0], atol=1e-7)
    np.testing.assert_allclose(maps.on_sinks, [0.5, 1, 0], atol=1e-7)
    assert maps.sinks.tolist() == [1, 2, 1] and telling_layer([maps]) == 0
    first, second, third = maps.words(0).split("; ")
    assert first == "Layer 0: 80.0 % of the answer's attention falls on the image"
    assert second.startswith("50.0 % of that on its V-sinks and L-sinks (1 of 6 tokens). ")
    assert second.endswith("Strongest: all attention at 17 % from the left, 25 % from the top")
    assert third == "without sinks at 50 % from the left, 25 % from the top."
    assert "without sinks" not in maps.words(1) and maps.words(2) == "Layer 2: the answer does not look at the image."
    unknown = answer_maps(entry(raw, None, None))
    np.testing.assert_array_equal(unknown.maps["raw"], unknown.maps["no_sinks"])
    assert "sinks (" not in unknown.words(0) and unknown.unknown == ["V-sinks", "L-sinks"]
    assert answer_maps(entry(None, [0], None)) is None and answer_maps({"grid": 2}) is None  # no answer; an old file


def test_a_map_is_spread_over_its_boxes():
    rng = np.random.default_rng(1)
    boxes, values = np.array(grid(5, 3), np.float32), rng.uniform(0, 1, 15).astype(np.float32)
    drawn = spread(boxes, values / values.sum(), (10, 9))
    np.testing.assert_allclose(drawn, np.kron(values.reshape(3, 5), np.ones((3, 2))) / values.mean(), rtol=1e-5)
    assert drawn.mean() == pytest.approx(1, rel=1e-5)  # in units of an even spread, whatever the size
    assert spread(boxes, values / values.sum(), (7, 4)).mean() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize(("across", "down"), [(3, 2), (8, 8), (40, 90)])
def test_the_page_shows_the_colours_of_the_files(across, down):
    """The strip of all layers over the grey picture, as the page does it with CSS, is what `draw_map` draws."""
    rng = np.random.default_rng(2)
    raw = rng.dirichlet(np.ones(across * down), 3)
    maps = answer_maps(entry(raw.tolist(), [1], None, across, down))
    strip = strip_of(maps, "no_sinks")
    width, height = strip.size
    assert max(strip.size) <= 64 and (across > 64 or width % across == 0)
    picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
    over = np.asarray(Image.open(io.BytesIO(strip.png)).convert("RGBA"), np.float64) / 255
    css = Path(page.__file__).with_name("page.css").read_text()
    contrast, brightness = map(float, re.search(r"filter: grayscale\(1\) contrast\((.*?)\) brightness\((.*?)\)", css).groups())
    grey = brightness * (contrast * (np.asarray(picture.convert("L"), np.float64)[..., None] / 255 - 0.5) + 0.5)
    assert over.shape == (3 * height, width, 4)
    for layer in range(3):
        own = over[layer * height : (layer + 1) * height]
        shown = own[..., :3] * own[..., 3:] + grey * (1 - own[..., 3:])
        values = maps.drawn("no_sinks", layer, strip.size)
        assert values.max() == pytest.approx(strip.peaks[layer])
        np.testing.assert_allclose(255 * shown, np.asarray(draw_map(picture, values), np.float64), atol=6)


def test_images_of_one_name_have_files_of_their_own():
    assert file_stems(["a/1.png", "b/1.jpg", "c/1-2.png", "2.png"]) == {
        "a/1.png": "1",
        "b/1.jpg": "1-2",
        "c/1-2.png": "1-2-2",
        "2.png": "2",
    }


def test_terms_are_explained_once_in_a_text():
    html = explained("V-sinks & V-sink: <b>tau</b>, taus, Gate ratios")
    assert html.count(f'popovertarget="{id_of("V-sink")}"') == 1 and html.count("<button") == 3
    assert "&amp;" in html and "&lt;b&gt;" in html and ">Gate ratios<" in html and ", taus," in html
    needed = {"tau", "criterion", "v_sink_rest", "key_scale", "gate ratio", "remat"}
    assert needed <= TERMS.keys() and len({id_of(term) for term in TERMS}) == len(TERMS)


def test_the_glossary_of_the_docs_is_the_same():
    path = Path(__file__).parents[2] / "docs" / "glossary.md"
    assert path.read_text(encoding="utf-8") == as_markdown(), "run: python -m lsg_jax.report.glossary > docs/glossary.md"


def test_one_table_of_many_runs():
    first = result_of(study_rows.result())
    benchmark = first.benchmarks["cv_bench"]
    other = dataclasses.replace(first, benchmarks={"mine": benchmark, "cv_bench": benchmark})
    worse = {**benchmark.methods, "base": {**benchmark.methods["base"], "accuracy": benchmark.methods["lsg"]["accuracy"]}}
    third = dataclasses.replace(first, benchmarks={"cv_bench": dataclasses.replace(benchmark, methods=worse)})
    table = pivot("all", [("runs/a", first), ("runs/b", other), ("runs/c", third)])
    # the base of the third run has other scores: a column of its own
    assert table.columns == ["base, runs/a", "LSG, runs/a", "LSG, runs/b", "base, runs/c", "LSG, runs/c"]
    assert [label for label, _, _ in table.rows] == ["cv_bench, accuracy (7 of 10)", "mine, accuracy (7 of 10)"]
    assert [majority for _, majority, _ in table.rows] == ["25.00", "25.00"]
    (_, _, cells), (_, _, mine) = table.rows
    assert [cell is None for cell in mine] == [False, True, False, True, True]
    assert (cells[0].score, cells[0].change) == ("50.00 [48.00, 52.00]", "")
    assert (cells[1].score, cells[1].change, cells[1].clear) == ("53.00 [51.00, 55.00]", "+3.00 [+1.00, +5.00]", "up")
    every = pivot("all", [("", first)], every_metric=True)
    assert every.columns == ["base", "LSG"] and [label for label, _, _ in every.rows] == [
        "cv_bench, accuracy (7 of 10)",
        "cv_bench, 2D (7 of 10)",
    ]
    protocols = {"cv_bench": dataclasses.replace(benchmark, protocol="lmms")}
    two = pivot("all", [("a", first), ("b", dataclasses.replace(first, benchmarks=protocols))])
    assert [label.rpartition("protocol ")[2] for label, _, _ in two.rows] == ["paper", "lmms"]
    assert found_in([("a", first)]) == ["LSG changes cv_bench, accuracy, by +3.00 [+1.00, +5.00] to 53.00, a gain."]
    errors = lambda of: {method: {f"errors{LOWER}": scores["accuracy"]} for method, scores in of.items()}
    falls = dataclasses.replace(benchmark, score=None, methods=errors(benchmark.methods), change=errors(benchmark.change))
    (told,) = found_in([("a", dataclasses.replace(first, benchmarks={"x": falls}))])
    assert told == "LSG changes x, errors (lower is better), by +3.00 [+1.00, +5.00] to 53.00, a loss."
    lengths = lambda of: {method: {"mean_length": scores["accuracy"]} for method, scores in of.items()}
    longer = dataclasses.replace(benchmark, score=None, methods=lengths(benchmark.methods), change=lengths(benchmark.change))
    table = pivot("all", [("a", dataclasses.replace(first, benchmarks={"x": longer}))])
    assert table.rows[0][2][1].clear == ""  # longer captions are neither better nor worse
    many = [("a", first), ("b", other), ("c", third)]
    assert found_in(many) == ["Of 4 changes over the base model 4 are gains, 0 losses, and 0 unclear."]
