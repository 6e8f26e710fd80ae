"""CLEVR folders: attributes of scenes, the round trip, and folders that differ from the published one."""

import json
import random

import pytest
from PIL import Image

from lsg_jax.cli import main
from lsg_jax.data.clevr import ATTRIBUTES, COLOURS, LARGEST_EDGES, MATERIALS, SHAPES, attributes, open_clevr, prepare_clevr
from lsg_jax.data.conversation import RecordError
from lsg_jax.data.records import REJECTS
from lsg_jax.errors import ConfigError, InputError


def thing(size="large", depth=10.0, color="red", shape="cube", material="metal"):
    place = {"pixel_coords": [200, 100, depth], "3d_coords": [0.1, 0.2, 0.7], "rotation": 30.0}
    return {"size": size, "color": color, "shape": shape, "material": material, **place}


def scene(*things, split="val", index=0):
    return {"image_index": index, "image_filename": f"CLEVR_{split}_{index:06d}.png", "split": split, "objects": list(things)}


def published(folder, scenes, split="val"):
    for name in (f"images/{split}", "scenes"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for entry in scenes:
        if entry.get("image_filename"):
            Image.new("RGB", (48, 32), (entry["image_index"], 0, 0)).save(folder / f"images/{split}" / entry["image_filename"])
    (folder / f"scenes/CLEVR_{split}_scenes.json").write_text(json.dumps({"info": {"split": split}, "scenes": scenes}))
    return folder


def random_scenes(count=40):
    rng = random.Random(0)

    def draw():
        return thing(
            rng.choice(["small", "large"]), rng.uniform(7, 15), rng.choice(COLOURS), rng.choice(SHAPES), rng.choice(MATERIALS)
        )

    return [scene(*(draw() for _ in range(rng.randint(3, 10))), index=index) for index in range(count)]


def test_attributes():
    found = attributes(scene(thing(depth=10.0), thing("small", 4.6, "blue", "sphere"), thing("small", 9.0, "red")))
    assert found == {
        "count": 3,
        "largest": "0.073 to 0.081",  # the small sphere in front: 0.35 / 4.6 = 0.0761 against 0.7 / 10
        "apparent_size": pytest.approx(0.35 / 4.6),
        "colours": ("red", "blue"),
        "shapes": ("cube", "sphere"),
        "materials": ("metal",),
    }
    assert ATTRIBUTES["largest"] == ("0 to 0.066", "0.066 to 0.073", "0.073 to 0.081", "0.081 to more")
    for place, edge in enumerate(LARGEST_EDGES):
        below, at = (attributes(scene(thing(depth=0.7 / size)))["largest"] for size in (edge - 1e-6, edge + 1e-6))
        assert (below, at) == ATTRIBUTES["largest"][place : place + 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objects": []}, "0 objects"),
        ({"objects": [thing()] * 11}, "11 objects"),
        ({"objects": None}, "TypeError"),
        ({"objects": [{}]}, "lacks a field or has an odd one: KeyError: 'size'"),
        ({"objects": [thing(size="huge")]}, "huge"),
        ({"objects": [thing(depth=0)]}, "ZeroDivisionError"),
        ({"objects": [thing(color="pink"), thing(color="black")]}, "colours that CLEVR does not have: black, pink"),
        ({"objects": [thing(shape="car")]}, "shapes that CLEVR does not have: car"),
    ],
)
def test_odd_scenes_have_a_reason(change, message):
    with pytest.raises(RecordError, match=message) as caught:
        attributes({**scene(thing()), **change})
    assert caught.value.reason == "bad_scene"


def test_round_trip(tmp_path):
    scenes = random_scenes()
    folder = published(tmp_path / "CLEVR_v1.0", scenes)
    report = prepare_clevr(folder, tmp_path / "out", split="val", threads=3)
    rows = open_clevr(tmp_path / "out")
    assert len(rows) == report.rows == 40 and rows.changed_files() == []
    for row, entry in zip((rows[i] for i in range(40)), scenes, strict=True):
        expected = attributes(entry)
        assert row.image == (folder / "images/val" / entry["image_filename"]).read_bytes()
        assert (row.name, row.image_size) == (entry["image_filename"], (48, 32))
        assert row.attributes == {**expected, "apparent_size": pytest.approx(expected["apparent_size"])}
    assert sum(report.counts["count"].values()) == sum(report.counts["largest"].values()) == 40
    assert report.counts["shapes"]["cube"] == sum("cube" in rows[i].attributes["shapes"] for i in range(40))
    stored = rows.manifest.report
    assert (stored.counts, stored.scenes_sha256) == (report.counts, report.scenes_sha256)
    assert stored.attributes["colours"] == list(COLOURS) and "40 of 40 scenes" in report.summary()

    prepare_clevr(folder, tmp_path / "few", split="val", limit=5)
    assert [open_clevr(tmp_path / "few")[i].name for i in range(5)] == [entry["image_filename"] for entry in scenes[:5]]
    with pytest.raises(IndexError):
        open_clevr(tmp_path / "few")[5]


def test_bad_scenes_are_listed(tmp_path):
    scenes = random_scenes(10)
    scenes[3]["objects"][0]["color"] = "pink"
    folder = published(tmp_path, scenes)
    (folder / "images/val/CLEVR_val_000005.png").unlink()
    with pytest.raises(InputError, match=r"2 of 10 scenes are bad, .*first: CLEVR_val_000003.png: colours .* pink"):
        prepare_clevr(folder, tmp_path / "out", split="val")
    assert not (tmp_path / "out").exists()
    report = prepare_clevr(folder, tmp_path / "out", split="val", max_bad_fraction=0.2)
    assert report.rejects == {"bad_scene": 1, "missing_image": 1} and report.rows == len(open_clevr(tmp_path / "out")) == 8
    rejects = [json.loads(line) for line in (tmp_path / "out" / REJECTS).read_text().splitlines()]
    assert [(entry["line"], entry["id"]) for entry in rejects] == [(4, "CLEVR_val_000003.png"), (6, "CLEVR_val_000005.png")]


def test_folders_that_are_not_as_published(tmp_path):
    folder = published(tmp_path / "c", random_scenes(2))
    scenes = folder / "scenes/CLEVR_val_scenes.json"
    for options, message in [
        ({"split": "test"}, "test split is published without scenes; use val"),
        ({"split": "train"}, "CLEVR_train_scenes.json: no such file; scenes are there for: val"),
    ]:
        with pytest.raises(InputError, match=message):
            prepare_clevr(folder, tmp_path / "out", **options)
    with pytest.raises(ConfigError, match="limit is 0"):
        prepare_clevr(folder, tmp_path / "out", split="val", limit=0)
    with pytest.raises(InputError, match="no folder of scenes in it; give the CLEVR_v1"):
        prepare_clevr(tmp_path, tmp_path / "out")
    for text, message in [
        ("{", "damaged"),
        ("[]", "not CLEVR scenes"),
        ('{"scenes": []}', "holds no scenes"),
        ('{"scenes": [3]}', "1 of 1 scenes are bad"),
        ("version https://git-lfs", "not CLEVR scenes"),
    ]:
        scenes.write_text(text)
        with pytest.raises(InputError, match=message):
            prepare_clevr(folder, tmp_path / "out", split="val")
    assert not (tmp_path / "out").exists()


def test_command(tmp_path, capsys):
    folder = published(tmp_path / "CLEVR_v1.0", random_scenes(4))
    common = ["prepare", str(folder), str(tmp_path / "out"), "--format", "clevr"]
    assert main([*common, "--split", "test"]) == 65
    assert "published without scenes" in capsys.readouterr().err
    assert main([*common, "--seed", "1"]) == 65
    assert "--seed does not go with --format clevr" in capsys.readouterr().err
    assert main([*common, "--split", "val", "--limit", "3"]) == 0
    assert capsys.readouterr().out.startswith("3 of 3 scenes written\ncount: 1 0, 2 0, 3 ")
