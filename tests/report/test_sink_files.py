"""The folder of `lsg sinks`: no file of the user is touched, nothing of an earlier run is left, each image has its files."""

import re

import pytest
import study_rows
from PIL import Image
from test_maps import entry

from lsg_jax.cli import main
from lsg_jax.cli.sinks import _images_below
from lsg_jax.errors import InputError
from lsg_jax.json_files import read_sealed
from lsg_jax.report import sections, sink_files, sinks
from lsg_jax.report.figures import draw_sinks_by_layer
from lsg_jax.report.parts import Drawing
from lsg_jax.report.sink_files import write_sinks


def photos(folder, *names):
    """Small pictures, each with a colour of its own, and what `find_sinks` would return for them."""
    images = {}
    for index, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 4), (40 * index, 90, 200)).save(folder / name)
        answered = entry([[0.1, 0.2, 0, 0, 0, 0]], [0], [[]]) if index == 0 else entry(None, [], [[]])
        images[str(folder / name)] = {**answered, "answer": "two" if index == 0 else "", "warnings": []}
    rows = {"counts": study_rows.counts(), "attention": study_rows.attention(), "warnings": []}
    found = {"format": "lsg-sinks-2", "prompt": "How many?", "images": images, **rows}
    return found, {name: folder / name for name in images}


def below(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def quick(monkeypatch):
    """Figures are files that say `figure`."""

    def draw(rows, stem):
        for kind in ("csv", "svg", "png"):
            stem.with_name(f"{stem.name}.{kind}").write_text("figure")

    for name in ("draw_sinks_by_layer", "draw_attention_shares"):
        monkeypatch.setattr(sink_files, name, draw)


@pytest.mark.parametrize(
    ("names", "out"),
    [
        (["p.png"], "."),
        (["sub/p.png"], "."),
        (["attention_shares.png"], "."),  # named like a figure
        (["images/p.png"], "."),  # in a folder named like one of ours
        (["marked/p.png"], "."),
    ],
)
def test_an_image_is_never_written_onto(tmp_path, names, out, capsys):
    found, images = photos(tmp_path / "own", *names)
    before = below(tmp_path)
    with pytest.raises(InputError, match="one of the images; choose another output"):
        write_sinks(found, images, tmp_path / "own" / out)
    # the command refuses before it opens the model, which is not there
    assert main(["sinks", "no-model", "--images", str(tmp_path / "own"), "--out", str(tmp_path / "own")]) == 65
    assert "one of the images" in capsys.readouterr().err and below(tmp_path) == before


@pytest.mark.parametrize("name", ["notes.pdf", "q.png", "images/q.png", "maps/deep/q.png", "marked"])
def test_files_of_another_kind_are_kept(tmp_path, name):
    found, images = photos(tmp_path / "own", "p.png")
    (tmp_path / "out" / name).parent.mkdir(parents=True)
    Image.new("RGB", (2, 2)).save(tmp_path / "out" / name, "png")
    before = below(tmp_path)
    with pytest.raises(InputError, match="choose another output"):
        write_sinks(found, images, tmp_path / "out")
    assert below(tmp_path) == before


@pytest.mark.usefixtures("quick")
def test_a_second_run_replaces_the_first(tmp_path, monkeypatch):
    found, images = photos(tmp_path / "own", "a.png", "b.png")
    out = tmp_path / "out"
    write_sinks(found, images, out)
    figures = {f"{name}.{kind}" for name in ("sinks_by_layer", "attention_shares") for kind in ("csv", "svg", "png")}
    pictures = {"marked/a.png", "marked/b.png", "images/a.png", "images/b.png", "maps/a.png"}
    assert below(out).keys() == figures | pictures | {"sinks.json"}
    found, images = photos(tmp_path / "own", "b.png", "attention_shares.png")
    with monkeypatch.context() as broken:
        broken.setattr(sink_files, "draw_sinks_by_layer", lambda rows, stem: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_sinks(found, images, out)
    assert not (out / "sinks.json").exists()  # no numbers of one run beside pictures of another
    write_sinks(found, images, out)
    names = {"marked/b.png", "images/b.png", "maps/b.png", "marked/attention_shares.png", "images/attention_shares.png"}
    assert below(out).keys() == figures | names | {"sinks.json"}
    assert below(out)["attention_shares.png"] == b"figure"  # and not the photo of this name


@pytest.mark.usefixtures("quick")
def test_each_image_names_its_files(tmp_path):
    found, images = photos(tmp_path / "own", "x/p.png", "y/p.png")
    written = write_sinks(found, images, tmp_path / "out")
    assert read_sealed(tmp_path / "out" / "sinks.json") == written
    files = {name: of["file"] for name, of in written["images"].items()}
    assert files == {str(tmp_path / "own/x/p.png"): "p", str(tmp_path / "own/y/p.png"): "p-2"}
    for name, file in files.items():
        with Image.open(tmp_path / "out" / "images" / f"{file}.png") as plain, Image.open(name) as photo:
            assert plain.getpixel((0, 0)) == photo.getpixel((0, 0))
    assert "file" not in found["images"][str(tmp_path / "own/x/p.png")]


@pytest.fixture
def page(tmp_path, monkeypatch):
    """Writes a report of images of `photos`, without its figures; returns its text."""
    figure = lambda draw, rows, name, caption: Drawing("<svg></svg>", "", name, caption)
    monkeypatch.setattr(sinks, "drawing", figure)

    def write(found, images):
        write_sinks(found, images, tmp_path / "sinks")
        assert main(["report", str(tmp_path / "sinks"), "--out", str(tmp_path / "report.html")]) == 0
        return (tmp_path / "report.html").read_text()

    return write


def with_fields(found, **fields):
    """The same with other values in each image."""
    return found | {"images": {name: each | fields for name, each in found["images"].items()}}


@pytest.mark.usefixtures("quick")
def test_the_report_says_only_what_there_is(tmp_path, page):
    found, images = photos(tmp_path / "own", "p.png", "q.png")
    text = page(found | {"warnings": ["set sinks.vit_dims (`lsg calibrate` finds them)"]}, images)
    assert "The 2 images have 0.5 " in text and "Large orange frames" in text and "Small blue frames" not in text
    assert "the answer&#39;s tokens ask" in text and "(<code>lsg calibrate</code> finds them)" in text
    # one image, no sinks, no answer
    found, images = photos(tmp_path / "own", "q.png")
    of_prompt = {"attention": [row for row in found["attention"] if row["queries"] == "prompt"]}
    text = page(with_fields(found, v_sinks=[], answer_attention=None) | of_prompt, images)
    assert "The image has 0 " in text and "of 6 tokens." in text and "Sinks</a> 1 image<" in text
    assert "No token is marked as a sink." in text and "frames" not in text and "tokens ask" not in text
    # an answer whose image has no sinks
    found, images = photos(tmp_path / "own", "p.png")
    text = page(with_fields(found, v_sinks=[]), images)
    assert "where the answers look most at the image, 30 %" in text and "draw most" not in text


def test_an_axis_of_counts_does_not_reach_below_none(tmp_path):
    rows = [{"layer": layer, "group": "v_sink", "mean": 0.0, "std": 0.0} for layer in (0, 1)]
    draw_sinks_by_layer(rows, tmp_path / "figure")
    assert not re.search(r"0\.0\d<", (tmp_path / "figure.svg").read_text())  # labels of ticks


def test_kinds_of_question_are_counted_without_their_pool(monkeypatch):
    monkeypatch.setattr(sections, "drawing", lambda draw, rows, name, caption: Drawing("<svg></svg>", "", name, caption))
    study = {"rows": [], "kinds": {"exists": {}, "all": {}}, "best": [], "chosen_on": "validation", "warnings": []}
    assert sections.pointing_section(study, title="Pointing").gist == "1 kind of question"


def test_a_look_is_no_part_of_a_report(tmp_path, capsys):
    (tmp_path / "looked").mkdir()
    (tmp_path / "looked" / "look.json").write_text("{}")
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "report.html")]) == 65
    assert f"open {tmp_path / 'looked' / 'look.html'}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("broken", "taken"),
    [("", "0257"), ("2", "0357"), ("23456", "0789"), ("9", "0257"), ("789", "0125"), ("1234567", "089"), ("0123456789", None)],
)
def test_a_file_that_cannot_be_read_is_replaced_by_the_next(tmp_path, broken, taken):
    photos(tmp_path, *(f"{index}.png" for index in range(10)))
    for name in broken:
        (tmp_path / f"{name}.png").write_bytes(b"no image")
    if taken is None:
        with pytest.raises(InputError, match=r"no image in it can be read, the first: .*0\.png"):
            _images_below(tmp_path, 4)
        return
    chosen, skipped = _images_below(tmp_path, 4)
    assert "".join(path.stem for path in chosen) == taken
    assert all(f"{name}.png" in " ".join(skipped) for name in "0257" if name in broken) and len(skipped) <= len(broken)
