"""The pointing game: boxes against pixels, closed forms on scripted maps, `vlm.look` as another way, and the command."""

import dataclasses
import json
from dataclasses import replace

import numpy as np
import pytest

import lsg_jax
from lsg_jax.analysis.pointing import PointingSettings, measure, measure_maps, on_target, scene_target
from lsg_jax.analysis.pointing_rows import Measured, best_rows, change_rows, hit_rows, pooled
from lsg_jax.cli import main
from lsg_jax.config import SinkConfig
from lsg_jax.data.drawing import draw
from lsg_jax.data.scene_questions import KINDS, scene_questions
from lsg_jax.data.scene_targets import TARGETS, questions_with_target, target_box
from lsg_jax.data.shapes import CORNERS
from lsg_jax.errors import ConfigError, InputError

SINKS = SinkConfig(criterion="norm", vit_tau=19.0, llm_criterion="norm", llm_tau=25.0)
SIDE = 448  # at which boxes are compared with pixels


def tiles(rows, columns):
    """Boxes [V, 4] of tokens that tile a picture, row by row."""
    row, column = (axis.ravel() for axis in np.mgrid[:rows, :columns])
    return np.stack([column / columns, row / rows, (column + 1) / columns, (row + 1) / rows], axis=-1)


def without_target(asked):
    """The scene without what the question asks about."""
    scene = asked.scene
    if asked.kind == "corner_letter":
        return replace(
            scene, corners={c: letter for c, letter in scene.corners.items() if f"in the {c} corner" not in asked.question}
        )
    if asked.kind == "object_letter":
        items = [
            replace(item, letter="") if item.letter == asked.answer and item.name in asked.question else item
            for item in scene.items
        ]
    elif asked.kind == "smallest_colour":
        items = sorted(scene.items, key=lambda item: -item.radius)[:-1]
    else:
        named = asked.answer if asked.kind == "further_left" else asked.question
        items = [item for item in scene.items if item.name not in named]
    return replace(scene, items=tuple(items))


@pytest.mark.parametrize("kind", TARGETS)
def test_targets_are_the_boxes_of_the_pixels_that_they_change(kind):
    shapes = set()
    for asked in questions_with_target("test", kind, 10):
        changed = (draw(asked.scene, SIDE) != draw(without_target(asked), SIDE)).any(-1)
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        found = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        np.testing.assert_allclose(found, np.array(target_box(asked)) * SIDE, atol=2)  # edges are smoothed
        shapes |= {item.shape for item in asked.scene.items}
    assert len(shapes) == 6


def test_questions_without_a_target():
    none = {asked.kind for asked in scene_questions("test", 160) if target_box(asked) is None}
    assert none == KINDS.keys() - TARGETS.keys() | {"exists"}
    assert all(asked.answer == "yes" for asked in questions_with_target("test", "exists", 20))
    assert len({asked.id for asked in questions_with_target("test", "exists", 20)}) == 20
    with pytest.raises(InputError, match="questions of the kind count have no target"):
        questions_with_target("test", "count", 1)


def test_a_token_is_on_the_target():
    """Letters in corners lie in one token of 8 x 8. In any tiling some token is on any target, none apart from it."""
    for asked in questions_with_target("validation", "corner_letter", 8):
        on = on_target(tiles(8, 8), target_box(asked))
        assert on.sum() == 1
        corner = next(corner for corner in CORNERS if corner in asked.question)
        assert int(np.flatnonzero(on)[0]) == {"top left": 0, "top right": 7, "bottom left": 56, "bottom right": 63}[corner]
    rng = np.random.default_rng(0)
    for _ in range(300):
        boxes, size = tiles(*rng.integers(1, 30, 2)), rng.uniform(0.01, 0.5, 2)
        low = rng.uniform(0, 1 - size)
        on = on_target(boxes, (*low, *(low + size)))
        assert on.any()
        assert (boxes[on, :2] < low + size).all() and (boxes[on, 2:] > low).all()
    some = np.array(
        [[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1], [0.4, 0.4, 0.6, 0.6], [0.51, 0.5, 1, 1], [0.65, 0.3, 0.85, 0.5], [0, 0, 0, 0]]
    )
    assert on_target(some, (0.25, 0.25, 0.75, 0.75)).tolist() == [True, True, True, False, True, False]


def test_measures_of_scripted_maps():
    """One layer of two heads on five tokens: a sink, the target, and three more."""
    heads = np.array([[[0.5, 0.1, 0.05, 0.0, 0.05], [0.1, 0.2, 0.3, 0.0, 0.0]]], np.float32)
    sinks, on = np.array([[True, False, False, False, False]]), np.array([False, True, False, False, False])
    neutral = np.array([[[0.5, 0.2, 0.1, 0.1, 0.0], [0.5, 0.1, 0.3, 0.1, 0.0]]], np.float32)
    found = measure_maps(heads, sinks, on, ("raw", "no_sinks", "relative"), neutral)
    # means over heads: 0.3, 0.15, 0.175, 0, 0.025; relative to 0.5, 0.15, 0.2, 0.1, 0: the last one is 0.025 / 1e-6
    assert found.hit.tolist() == [[[False], [False], [False]]]
    assert found.head_hit.tolist() == [[[[False, False]], [[True, False]], [[False, True]]]]
    np.testing.assert_allclose(found.share[0, :2, 0], [0.15 / 0.65, 0.15 / 0.35], rtol=1e-6)
    np.testing.assert_allclose(
        [found.sink_share[0, 0], found.visual[0, 0], found.chance[0]], [0.3 / 0.65, 0.65, 0.2], rtol=1e-6
    )
    # all tokens are sinks: nothing is left, which hits nothing, whichever token stands first
    empty = measure_maps(heads, ~np.zeros_like(sinks), np.ones(5, bool), ("raw", "no_sinks"))
    assert empty.hit[0, :, 0].tolist() == [True, False] and empty.share[0, 1, 0] == 0 and not empty.head_hit[0, 1].any()


def measured(raw, other, heads):
    """Questions with these hits [Q, L], shares of half of them, and hits of heads [Q, L, N] of both maps."""
    hit = np.stack([raw, other], axis=1)
    count, layers = raw.shape
    ones = np.ones((count, layers))
    return Measured(hit, hit / 2, np.stack([heads, heads], axis=1), np.full(count, 0.1), ones, ones)


def test_rates_changes_and_choices():
    count = 40
    first = lambda hits: np.arange(count) < hits
    raw, other = np.stack([first(10), first(20)], -1), np.stack([first(30), first(16)], -1)
    heads = np.zeros((count, 2, 3), bool)
    heads[:4, 0, 0], heads[:8, 1, 2] = True, True
    own = measured(raw, other, heads)
    rows = hit_rows(own, ("raw", "no_sinks"))
    assert [row["hit"] for row in rows] == [0.25, 0.5, 0.75, 0.4] and [row["share"] for row in rows] == [
        0.125,
        0.25,
        0.375,
        0.2,
    ]
    z, share = 1.959963984540054, 0.25  # Wilson's interval, written out
    middle, half = (share + z * z / 80) / (1 + z * z / 40), z * np.sqrt(share * 0.75 / 40 + z * z / 6400) / (1 + z * z / 40)
    np.testing.assert_allclose([rows[0]["low"], rows[0]["high"]], [middle - half, middle + half])
    changes = change_rows(own, ("raw", "no_sinks"))
    assert [(row["hit"], row["better"], row["worse"]) for row in changes] == [(0.5, 20, 0), (-0.1, 0, 4)]
    np.testing.assert_allclose([row["p_value"] for row in changes], [2 * 0.5**20, 2 * 0.5**4])
    assert 0.3 < changes[0]["low"] < 0.5 < changes[0]["high"] < 0.7
    # where it was chosen, layer 1 was the better one of both maps, and head 2 of layer 1 the best
    choosing = measured(np.stack([first(1), first(2)], -1), np.stack([first(3), first(4)], -1), heads)
    best = best_rows(own, choosing, ("raw", "no_sinks"))
    assert [(row["choice"], row["layer"], row["head"], row["hit"], row["change"]) for row in best] == [
        ("layer", 1, None, 0.5, None),
        ("layer", 1, None, 0.4, -0.1),
        ("head", 1, 2, 0.2, None),
        ("head", 1, 2, 0.2, 0.0),
    ]
    assert [row["chosen"] for row in best] == [0.05, 0.1, 0.2, 0.2]


def test_measures_are_those_of_look(tiny_model):
    """A batch of questions of different lengths against `vlm.look`, one question at a time."""
    vlm = lsg_jax.load(tiny_model, sinks=SINKS)
    asked = [scene_target(questions_with_target("test", kind, 1)[0]) for kind in ("exists", "corner_letter")]
    maps, drawn = ("raw", "no_sinks", "relative"), 0.0
    found = measure(vlm, asked, maps)
    for at, question in enumerate(asked):
        look = vlm.look(question.picture, question.prompt, 1, maps=maps)
        if not look.tokens:  # the answer ends at once
            continue
        on = on_target(look.box, question.target)
        assert found.chance[at] == on.mean()
        for place, name in enumerate(maps):
            values = look.over_heads(name)[0]
            np.testing.assert_allclose(found.share[at, place], values[:, on].sum(-1) / values.sum(-1), rtol=1e-3, atol=1e-6)
            assert found.hit[at, place].tolist() == on[values.argmax(-1)].tolist()
        raw = look.over_heads("raw")[0]
        np.testing.assert_allclose(found.visual[at], raw.sum(-1), rtol=1e-4)
        share = np.where(look.v_sink | look.l_sink, raw, 0).sum(-1) / raw.sum(-1)
        np.testing.assert_allclose(found.sink_share[at], share, rtol=1e-3, atol=1e-6)
        drawn += share.sum()
    assert drawn > 0  # there are sinks to compare


def test_command(tiny_model, tmp_path, capfd):
    sinks = [f"{name}={getattr(SINKS, name)}" for name in ("criterion", "vit_tau", "llm_criterion", "llm_tau")]
    common = ["pointing", tiny_model, "--questions", "3", "--kinds", "exists", "further_left", "--sinks", *sinks]

    def lsg(*arguments):
        capfd.readouterr()
        return main([str(a) for a in arguments]), *capfd.readouterr()

    out = tmp_path / "o"
    code, stdout, err = lsg(*common, "--out", out)
    assert code == 0, err
    assert [line.split()[0] for line in stdout.splitlines()] == [
        "kind",
        *("exists",) * 2,
        *("further_left",) * 2,
        "all",
        "all",
        "best",
    ]
    result = json.loads((out / "pointing.json").read_text())
    assert next(iter(result)) == "format" and result["format"] == "lsg-pointing-1" and result["chosen_on"] == "validation"
    assert {kind: row["questions"] for kind, row in result["kinds"].items()} == {"exists": 3, "further_left": 3, "all": 6}
    assert len(result["rows"]) == 3 * 2 * 6 and len(result["changes"]) == 3 * 6 and len(result["best"]) == 3 * 2 * 2
    assert np.array(result["heads"]["all"]["raw"]).shape == (6, 4)
    assert {path.name for path in out.iterdir()} == {
        "pointing.json",
        "pointing.csv",
        "pointing.svg",
        "pointing.png",
        "examples.png",
    }
    assert main(["report", str(out), "--out", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "Pointing" in page and "chosen on the split validation" in page and "without sinks" in page
    for arguments, message in [
        (["--maps", "rollout"], "pointing.maps: there is no rollout; choose among raw, no_sinks, relative"),
        (["--questions", "1"], "--questions is 1: it must lie in [2, 1e6]"),
    ]:
        code, stdout, err = lsg(*common, *arguments, "--out", tmp_path / "bad")
        assert code == 65 and stdout == "" and message in err and err.count("\n") == 1


def test_settings():
    assert PointingSettings(maps=("no_sinks",)).all_maps == ("raw", "no_sinks")
    with pytest.raises(ConfigError, match=r"pointing\.kinds: there is no count"):
        PointingSettings(kinds=("count",))
    one = measured(np.ones((2, 1), bool), np.ones((2, 1), bool), np.ones((2, 1, 1), bool))
    assert all(len(getattr(pooled([one, one]), field.name)) == 4 for field in dataclasses.fields(Measured))
