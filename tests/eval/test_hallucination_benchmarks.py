"""CHAIR, AMBER, HallusionBench and MMVP: against recordings of their owners' scorers, by hand, and their files and faults."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from golden import hallucination_cases as cases
from test_short_benchmarks import IMAGE, score, write

from lsg_jax.config import EvalConfig
from lsg_jax.data.prompts import WORD_SUFFIX
from lsg_jax.errors import InputError
from lsg_jax.eval.benchmark import LOWER
from lsg_jax.eval.benchmarks.amber import AMBER, TYPES, counts_of, nouns
from lsg_jax.eval.benchmarks.chair import CHAIR, COUNT
from lsg_jax.eval.benchmarks.coco_objects import OBJECTS, by_rule, from_synonyms
from lsg_jax.eval.benchmarks.hallusionbench import COLUMNS, HALLUSIONBENCH
from lsg_jax.eval.benchmarks.mmvp import MMVP
from lsg_jax.eval.benchmarks.vstar import VSTAR
from lsg_jax.eval.runner import ask, grade, summary
from lsg_jax.eval.table import table

pytestmark = pytest.mark.usefixtures("no_process_that_reads_first")

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/hallucination.json").read_text(encoding="utf-8"))


def write_json(path, value):
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_images(folder, names):
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(b"jpeg")


def faults(benchmark, make, folder, changes):
    """Each change of the plain files, and the message that names it."""
    for number, (change, message) in enumerate(changes):
        path = make(folder / str(number), change)
        with pytest.raises(InputError, match=message) as raised:
            benchmark.read(str(path))
        assert str(path) in str(raised.value) and "\n" not in str(raised.value), message


# ---------------------------------------------------------------------------------------------------------------------- CHAIR


def test_captions_are_read_as_by_the_owner():
    words = by_rule()
    differ = {text: words.mentions(text) for text, found in GOLDEN["chair"].items() if words.mentions(text) != found}
    # its singulars of these are `bu` and `ty`, so that it sees neither; every other name of COCO is read alike, plurals too
    assert differ == {"I see bus there.": ["bus"], "I see ties there.": ["tie"]}
    assert {f"I see {name} there." for name in OBJECTS} < set(GOLDEN["chair"]) and len(OBJECTS) == 80


def test_every_name_and_its_plural_is_its_object():
    words = by_rule()
    for name, others in OBJECTS.items():
        for form in (name, cases.PLURALS.get(name, name + "s"), *others):
            assert words.mentions(f"There: {form}.") == [name], form


def chair_folder(
    folder, change=lambda tree: None, captions=None, synonyms=None, listed=None, images=("1.jpg", "2.jpg", "3.jpg")
):
    ids = {"dog": 18, "person": 1, "bicycle": 2, "toilet": 70}
    tree = {
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in (1, 2, 3)],
        "annotations": [
            {"image_id": i, "category_id": ids[n]} for i, n in ((1, "dog"), (1, "dog"), (1, "person"), (2, "person"))
        ],
        "categories": [{"id": number, "name": name} for name, number in ids.items()],
    }
    change(tree)
    write_json(folder / "annotations/instances_val2014.json", tree)
    if captions is not None:
        write_json(folder / "captions_val2014.json", {"annotations": [{"image_id": i, "caption": c} for i, c in captions]})
    for name, text in (("synonyms.txt", synonyms), ("images.txt", listed)):
        if text is not None:
            (folder / name).write_text(text)
    write_images(folder / "val2014", images)
    return folder


def test_chair_by_hand(tmp_path):
    items = CHAIR.read(str(chair_folder(tmp_path)))
    assert [(item.id, item.answers) for item in items] == [("1", ("person", "dog")), ("2", ("person",)), ("3", ("",))]
    assert CHAIR.prompt(items[0], "paper") == "Please describe this image in detail."
    # mentions: dog, person, person, bicycle | none | bicycle, dog; not there: bicycle | none | both
    asked = ask(CHAIR, str(tmp_path), EvalConfig())
    graded = grade(asked, ["A dog and two people. A man has a bike.", "A wall", "The bike of a dog is here"])
    assert graded.parsed == ["dog, person, person, bicycle", "", "bicycle, dog"] and graded.score.tolist() == [0, 1, 0]
    found = {name: value[0] for name, value in CHAIR.metrics(graded).items()}
    expected = {f"chair_s{LOWER}": 200 / 3, f"chair_i{LOWER}": 50, "recall": 200 / 3, "mean_length": (10 + 2 + 7) / 3}
    assert found == pytest.approx(expected)
    # the first caption counts twice, the last not at all
    weighted = CHAIR.metrics(replace(graded, weight=np.array([[2.0, 1.0, 0.0]])))
    expected = {f"chair_s{LOWER}": 200 / 3, f"chair_i{LOWER}": 25, "recall": 80, "mean_length": 22 / 3}
    assert {name: value[0] for name, value in weighted.items()} == pytest.approx(expected)


def test_chair_says_where_its_words_and_objects_come_from(tmp_path):
    rule = CHAIR.read(str(chair_folder(tmp_path / "a")))
    assert CHAIR.note(rule) == "object words by rule, not the owner's synonyms.txt; objects of segmentations alone"
    # the owner's form; the double space is kept as the owner's `split(", ")` keeps it
    synonyms = "\n".join(f"{name}, {name}like" + (",  wee" if name == "dog" else "") for name in OBJECTS)
    captions = [(1, "a bicyclelike thing"), (3, "toilets and dogs"), (9, "not among the images")]
    items = CHAIR.read(str(chair_folder(tmp_path / "b", captions=captions, synonyms=synonyms, listed="3\n1\n")))
    assert CHAIR.note(items) == "object words of synonyms.txt; objects of segmentations and reference captions"
    assert [(item.id, set(item.answers)) for item in items] == [("1", {"bicycle", "dog", "person"}), ("3", {"dog", "toilet"})]
    assert [file.name for file in CHAIR.files(str(tmp_path / "b"))] == [
        "instances_val2014.json", "captions_val2014.json", "synonyms.txt", "images.txt",
    ]  # fmt: skip
    words = from_synonyms(synonyms, "x")
    assert words.mentions("a doglike man, wee dogs") == ["dog", "dog"] and words.mentions("a wee thing") == []
    asked = ask(CHAIR, str(tmp_path / "b"), EvalConfig())
    text = table({"chair": summary(asked, {"base": grade(asked, ["a dog", "a car"])})})
    assert "PARTIAL, 2 of 500: no official score\nobject words of synonyms.txt" in text
    assert "\nchair_s (lower is better)  " in text
    assert asked.max_new_tokens == 512 and len(asked.files) == 4


def test_the_sample_of_images_does_not_depend_on_what_is_there(tmp_path):
    def many(tree):
        tree["images"] = [{"id": i, "file_name": f"{i}.jpg"} for i in range(1, 701)]

    every = [f"{i}.jpg" for i in range(1, 701)]
    items = CHAIR.read(str(chair_folder(tmp_path / "all", many, images=every)))
    assert len(items) == COUNT and [int(item.id) for item in items] == sorted(int(item.id) for item in items)
    some = CHAIR.read(str(chair_folder(tmp_path / "some", many, images=every[:300])))
    assert [item.id for item in some] == [item.id for item in items if int(item.id) <= 300]
    assert (
        ask(CHAIR, str(tmp_path / "some"), EvalConfig()).partial and not ask(CHAIR, str(tmp_path / "all"), EvalConfig()).partial
    )


def test_wrong_chair_files(tmp_path):
    faults(CHAIR, chair_folder, tmp_path, [
        (lambda t: t.pop("categories"), "no list categories; there are images, annotations"),
        (lambda t: t["annotations"][0].pop("category_id"), "annotations without category_id"),
        (lambda t: t["images"][0].update(id=[1]), "images without id"),
        (lambda t: t["categories"].append({"id": 5, "name": "unicorn"}), "unknown category unicorn; known: airplane"),
        (lambda t: t["images"].append(t["images"][0]), "id 1 occurs more than once"),
        (lambda t: t["annotations"].append({"image_id": 9, "category_id": 1}), "an annotation is of image 9 and category 1"),
    ])  # fmt: skip
    for number, (files, message) in enumerate([
        ({"listed": "1 8"}, "no image 8 in instances_val2014.json"),
        ({"listed": "1\n1"}, "id 1 occurs more than once"),
        ({"synonyms": "dog, puppy"}, r"synonyms.txt: no line has person, bicycle"),
        ({"listed": "\n"}, r"images\.txt: no ids in it"),
        ({"captions": [(9, "A dog")]}, r"captions_val2014\.json: no caption is of an image in instances_val2014\.json"),
        ({"images": ()}, "no image of its questions is there, such as .*1.jpg"),
    ]):  # fmt: skip
        with pytest.raises(InputError, match=message):
            CHAIR.read(str(chair_folder(tmp_path / f"files{number}", **files)))
    with pytest.raises(InputError, match=r"no instances_val2014\.json in it"):
        CHAIR.read(str(tmp_path))


# ---------------------------------------------------------------------------------------------------------------------- AMBER


def amber_folder(folder, change=lambda files: None):
    rows = [{"type": "generative", "truth": truth, "hallu": hallu} for truth, hallu, _ in cases.SCENES]
    rows += [{"type": kind, "truth": truth} for kind, truth, _ in cases.QUESTIONS]
    files = {
        "annotations.json": [{"id": i, **row} for i, row in enumerate(rows, 1)],
        "relation.json": {**cases.RELATION, "table": []},
        "query/query_all.json": [{"id": i, "image": f"{i % 3}.jpg", "query": f"Query {i}?"} for i in range(1, len(rows) + 1)],
    }
    change(files)
    for name, content in files.items():
        write_json(folder / "data" / name, content)
    (folder / "data/safe_words.txt").write_text("\n".join(cases.SAFE))
    write_images(folder / "image", ["0.jpg", "1.jpg", "2.jpg"])
    return folder


def test_amber_equals_its_owners_scorer(tmp_path):
    items = AMBER.read(str(amber_folder(tmp_path)))
    outputs = [" ".join(found) for *_, found in cases.SCENES] + [said for *_, said in cases.QUESTIONS]
    asked = ask(AMBER, str(tmp_path), EvalConfig())
    found = {name: value[0] for name, value in AMBER.metrics(grade(asked, outputs)).items()}
    theirs = {name: value for name, value in GOLDEN["amber"].items()}
    names = {f"Generative Task: {name}": ours for name, ours in {
        "CHAIR": f"chair{LOWER}", "Cover": "cover", "Hal": f"hal{LOWER}", "Cog": f"cog{LOWER}",
    }.items()}  # fmt: skip
    for section in ("Descriminative Task", "Exsitence", "Attribute", "Relation", "State", "Number", "Action"):
        ours = {"Descriminative Task": "", "Exsitence": "existence: "}.get(section, f"{section.lower()}: ")
        names |= {f"{section}: {name}": ours + name.lower() for name in ("Accuracy", "Precision", "Recall", "F1")}
    assert set(names) == set(theirs)
    # it rounds to one digit, and begins to count at 0.001
    assert {name: found[ours] for name, ours in names.items()} == pytest.approx(theirs, abs=0.16)
    assert found["amber_score"] == pytest.approx((100 - found[f"chair{LOWER}"] + found["f1"]) / 2)
    assert AMBER.prompt(items[0], "paper") == "Query 1?" and AMBER.prompt(items[4], "paper") == "Query 5?" + WORD_SUFFIX


def test_amber_by_hand(tmp_path):
    items = AMBER.read(str(amber_folder(tmp_path)))
    scene = items[0].data  # truth: sky, forest, person, ship, ship; hallu: cloud, dog, lake
    # a tree stands for the forest, a boat for the first ship, water for the lake that is expected; light is safe
    assert counts_of(["tree", "boat", "tree", "water", "table", "light"], scene) == {
        "nouns": 6, "wrong": 2, "covered": 2, "truth": 5, "expected": 1, "hallu": 3,
    }  # fmt: skip
    match = AMBER.match(items[0], "The dogs see a tree, and boats; it has a unicorn.", "paper")
    assert (match.parsed, match.score) == ("dog, tree, boat", 0.0)
    assert [AMBER.match(items[4], text, "paper").score for text in ("No", "no.", "Yes", "No, yes", "")] == [1, 1, 0, 0, 0]


def test_nouns_by_rule():
    words = frozenset(("can", "TV", "tree", "knife", "cloud", "watch", "person", "people"))
    text = "Trees can be seen; a can, two knives, the TVs and people watch clouds. Clouds!"
    assert list(nouns(text, words)) == ["can", "knife", "TV", "people", "cloud"]  # `Trees` is not in their case


def test_partial_and_wrong_amber_files(tmp_path):
    def only_discriminative(files):
        rows = files.pop("query/query_all.json")
        files["query/query_discriminative-existence.json"] = rows[4:7]
        files["query/query_discriminative-relation.json"] = rows[-3:]

    asked = ask(AMBER, str(amber_folder(tmp_path / "part", only_discriminative)), EvalConfig())
    assert len(asked.items) == 6 and asked.partial and asked.missing == {"dimension": ["generative", "attribute"]}
    found = summary(asked, {"base": grade(asked, ["no"] * 6)}).methods["base"]
    assert found["amber_score"].value is None and found["accuracy"].value == 100 * 4 / 6
    faults(AMBER, amber_folder, tmp_path, [
        (lambda f: f["annotations.json"][0].update(type="novel"), "unknown type novel; known: discriminative-attribute-action"),
        (lambda f: f["annotations.json"][0].pop("truth"), "annotations.json: entry 0: no truth; there are id"),
        (lambda f: f["annotations.json"][0].pop("hallu"), "id 1: truth and hallu are not both lists of words"),
        (lambda f: f["annotations.json"][5].update(truth="maybe"), "id 6: answer 'maybe' is neither yes nor no"),
        (lambda f: f["annotations.json"][5].update(id=1), "id 1 occurs more than once"),
        (lambda f: f["annotations.json"].pop(), "question 16 is not in annotations.json"),
        (lambda f: f["query/query_all.json"][0].pop("image"), "query_all.json: entry 0: no image"),
        (lambda f: f["query/query_all.json"].append(f["query/query_all.json"][0]), "id 1 occurs more than once"),
        (lambda f: f.pop("query/query_all.json"), "no query_all.json in its folder query"),
        (lambda f: f["relation.json"].update(sky="blue"), "expected a list of words for each word"),
    ])  # fmt: skip
    assert {kind for kind, _ in TYPES.values()} == set(AMBER.groups["dimension"])


# ------------------------------------------------------------------------------------------------------------- HallusionBench


def hallusion_rows():
    names = ("category", "subcategory", "visual_input", "set_id", "figure_id", "question_id", "gt_answer")
    rows = [dict(zip(names, row, strict=False)) for row in cases.YES_NO_TABLE]
    where = lambda row: f"./{row['category']}/{row['subcategory']}/{row['set_id']}_{row['figure_id']}.png"
    return [{**row, "question": "Is it?", "filename": None if row["visual_input"] == "0" else where(row)} for row in rows]


def hallusion_folder(folder, change=lambda rows: None):
    rows = hallusion_rows()
    change(rows)
    write_json(folder / "HallusionBench.json", rows)
    write_images(folder / "hallusion_bench", [row["filename"] for row in hallusion_rows() if row["filename"]])
    return folder


def test_hallusionbench_equals_its_owners_scorer(tmp_path):
    items = HALLUSIONBENCH.read(str(hallusion_folder(tmp_path)))
    said = [row[-1] for row in cases.YES_NO_TABLE]
    found = score(HALLUSIONBENCH, items, said)
    assert {name: found[name] for name in GOLDEN["hallusionbench"]} == pytest.approx(GOLDEN["hallusionbench"])
    # by hand, VD: 3 of 4 and 1 of 2 questions; figures of illusion: right, half right; of ocr: wrong, right
    assert (found["VD: aAcc"], found["VD: fAcc"]) == (pytest.approx(100 * 4 / 6), 50.0)
    assert found["VD: qAcc"] == pytest.approx(100 / 3) and found["subcategory: VS ocr"] == 100.0
    assert HALLUSIONBENCH.prompt(items[0], "paper") == "Is it?" + WORD_SUFFIX
    # unclear is right where no figure is shown
    assert [item.images != () for item in items if item.fields["category"] == "VS"][:3] == [False, True, True]
    unclear = [HALLUSIONBENCH.match(item, "I do not know", "paper") for item in items]
    assert [m.score for m in unclear] == [float(not item.images) for item in items] and unclear[0].parsed is None


def test_hallusionbench_as_parquet_and_in_part(tmp_path):
    rows = hallusion_rows()
    columns = [{name: row[name] for name in COLUMNS} for row in rows]
    shown = [{**row, "image": IMAGE} for row in columns if row["visual_input"] != "0"]
    write(tmp_path / "both", shown, "image.parquet")
    write(tmp_path / "both", [row for row in columns if row["visual_input"] == "0"], "non_image.parquet")
    by_id = lambda items: {item.id: (item.fields, item.answers, len(item.images)) for item in items}
    given = HALLUSIONBENCH.read(str(hallusion_folder(tmp_path / "json")))
    with pytest.raises(InputError, match="row 0: visual_input 1, but 0 images"):
        HALLUSIONBENCH.read(str(write(tmp_path / "none", [{k: v for k, v in shown[0].items() if k != "image"}])))
    assert by_id(HALLUSIONBENCH.read(str(tmp_path / "both"))) == by_id(given)
    asked = ask(HALLUSIONBENCH, str(tmp_path / "both/image.parquet"), EvalConfig())
    assert asked.partial and asked.missing["visual_input"] == ["0"] and "VD video" in asked.missing["subcategory"]
    limited = ask(HALLUSIONBENCH, str(tmp_path / "json"), EvalConfig(limit=4))
    assert limited.broken["pair"] == 4 and limited.score is None
    found = summary(limited, {"base": grade(limited, ["no"] * 4)}).methods["base"]
    assert found["qAcc"].value is None and found["aAcc"].value is not None


def test_wrong_hallusionbench_files(tmp_path):
    faults(HALLUSIONBENCH, hallusion_folder, tmp_path, [
        (lambda r: r[0].pop("gt_answer"), "entry 0: no gt_answer; there are category"),
        (lambda r: r[0].update(category="VX"), "unknown category VX; known: VD, VS"),
        (lambda r: r[0].update(subcategory="chart"), "unknown subcategory VD chart; known: VD figure"),
        (lambda r: r[0].update(gt_answer="yes"), "entry 0: gt_answer 'yes' is neither 0 nor 1"),
        (lambda r: r.append(r[0]), "id VD_illusion_0_0_0 occurs more than once"),
        (lambda r: r[0].update(filename=None), "entry 0: visual_input 1, but 0 images"),
        (lambda r: r.clear(), "expected a list of questions"),
    ])  # fmt: skip
    halved = hallusion_folder(tmp_path / "half", lambda r: r[0].update(question="a \ud800"))
    with pytest.raises(InputError, match="question VD_illusion_0_0_0: it holds half of a surrogate pair"):
        ask(HALLUSIONBENCH, str(halved), EvalConfig())


def test_hallusionbench_without_figures_alone_is_asked(tmp_path):
    def without_figures(rows):
        rows[:] = [row for row in rows if row["visual_input"] == "0"]

    asked = ask(HALLUSIONBENCH, str(hallusion_folder(tmp_path / "text", without_figures)), EvalConfig())
    assert asked.items and not any(item.images for item in asked.items) and asked.missing["visual_input"] == ["1", "2"]


# ----------------------------------------------------------------------------------------------------------------------- MMVP


def mmvp_rows(pairs=2):
    row = {"Question": "Is the door open?", "Options": "(a) Open (b) Closed shut"}
    return [{"Index": str(i + 1), **row, "Correct Answer": ("(b)", "(a)")[i % 2]} for i in range(2 * pairs)]


def mmvp_folder(folder, change=lambda rows: None, index="lndex"):
    rows = mmvp_rows()
    change(rows)
    folder.mkdir(parents=True)
    with (folder / "Questions.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([index if name == "Index" else name for name in rows[0]])
        writer.writerows(row.values() for row in rows)
    write_images(folder / "MMVP Images", [f"{i}.jpg" for i in range(1, 5)])
    return folder


def test_mmvp_prompts_and_letters_equal_the_recorded_ones(tmp_path):
    item = MMVP.read(str(mmvp_folder(tmp_path / "a")))[0]
    question, suffix = GOLDEN["mmvp"]["prompt"].split("\n", 1)
    assert MMVP.prompt(item, "lmms_eval") == MMVP.prompt(item, "paper") == GOLDEN["mmvp"]["prompt"]
    assert MMVP.prompt(item, "cambrian") == f"{question} Options:\n{suffix}"  # its mmvp_eval.py, read
    for protocol, right in GOLDEN["mmvp"]["right"].items():
        for answer, outputs in right.items():
            asked = replace(item, answers=(answer,))
            assert [text for text in cases.MMVP_OUTPUTS if MMVP.match(asked, text, protocol).score] == outputs, protocol
    paper = [text for text in cases.MMVP_OUTPUTS if MMVP.match(replace(item, answers=("B",)), text, "paper").score]
    assert paper == ["B", "(B)", "B. Closed", "B)"]


def test_mmvp_by_hand(tmp_path):
    items = MMVP.read(str(mmvp_folder(tmp_path / "a", index="Index")))
    assert [(item.id, item.answers, item.fields["pair"]) for item in items] == [
        ("1", ("B",), "1"), ("2", ("A",), "1"), ("3", ("B",), "2"), ("4", ("A",), "2"),
    ]  # fmt: skip
    assert score(MMVP, items, ["B", "A", "B", "B"]) == pytest.approx({"pairs": 50.0, "accuracy": 75.0})
    (tmp_path / "a/MMVP Images/4.jpg").unlink()
    asked = ask(MMVP, str(tmp_path / "a"), EvalConfig())
    assert len(asked.items) == 3 and asked.broken == {"pair": 1} and asked.score is None
    found = summary(asked, {"base": grade(asked, ["B", "A", "B"])})
    assert (found.methods["base"]["pairs"].value, found.methods["base"]["accuracy"].value) == (100.0, 100.0)
    assert "groups by pair that are not whole, so not counted: 1\nthe owner has GPT-4" in table({"mmvp": found})
    rows = [{**row, "Index": int(row["Index"]), "image": IMAGE} for row in mmvp_rows(150)]
    whole = ask(MMVP, str(write(tmp_path / "parquet", rows)), EvalConfig(protocol="lmms_eval"))
    assert not whole.partial and (whole.score, whole.max_new_tokens) == ("pairs", 16)


def test_wrong_mmvp_files(tmp_path):
    faults(MMVP, mmvp_folder, tmp_path, [
        (lambda r: [row.pop("Options") for row in r], "no column Options; there are Index, Question, Correct Answer"),
        (lambda r: r[1].pop("Options"), "row 2 has 3 cells instead of 4"),
        (lambda r: r[1].update({"Options": "A or B"}), r"row 2: Options 'A or B' are not `\(a\) text \(b\) text`"),
        (lambda r: r[1].update({"Correct Answer": "(c)"}), "row 2: answer 'C' is none of A, B"),
        (lambda r: r[1].update({"Index": "1"}), "id 1 occurs more than once"),
        (lambda r: r[1].update({"Index": "x"}), "row 2: Index 'x' is no number from 1"),
        (lambda r: r[1].update({"Index": "9" * 5000}), "row 2: Index '9+' is no number from 1"),
    ])  # fmt: skip
    (empty := tmp_path / "Questions.csv").write_text("\n")
    with pytest.raises(InputError, match=f"{empty}: the file is empty"):
        MMVP.read(str(tmp_path))
    rows = [{**row, "Index": int(row["Index"]), "image": image} for row, image in zip(mmvp_rows(1), (IMAGE, None), strict=True)]
    with pytest.raises(InputError, match="row 1: image is empty, but every question here has an image"):
        MMVP.read(str(write(tmp_path / "parquet", rows)))


def test_a_folder_of_neither_kind_says_what_it_lacks(tmp_path):
    for benchmark, file in ((MMVP, "Questions.csv"), (HALLUSIONBENCH, "HallusionBench.json"), (VSTAR, "test_questions.jsonl")):
        with pytest.raises(InputError, match=f"neither {file} nor a Parquet file in it"):
            benchmark.read(str(tmp_path))
