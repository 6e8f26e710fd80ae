"""Sampling from Cambrian: shares, table of sources, rejects, the same rows for any number of threads, constant memory."""

import json
import random
import tracemalloc
from collections import Counter
from hashlib import blake2b, sha256

import pytest
from PIL import Image

from lsg_jax.cli import main
from lsg_jax.data.cambrian import OVERSAMPLING, SAMPLE_FILE, prepare_cambrian, shares
from lsg_jax.data.cambrian_sources import CATEGORIES, SourceMap, first_folder, source_name
from lsg_jax.data.records import REJECTS, open_records
from lsg_jax.errors import ConfigError, InputError

SHAREGPT4V = "sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k.json"
KINDS = [  # source, folder, category or why it is left out
    ("random_3rd_dvqa_2325k.json", "dvqa", "ocr"),
    ("idefics375k.json", "hfdata/st_vqa", "ocr"),
    (SHAREGPT4V, "gqa", "general"),
    ("vizwiz_20k.json", "vizwiz", "general"),
    ("tallyqa_250k.json", "tallyqa", "counting"),
    ("idefics375k.json", "hfdata/datikz", "code"),
    ("geo170k.json", "geo170k", "math"),
    ("scienceqa_12k.json", "scienceqa", "science"),
    ("scienceqa_12k.json", None, "imageless"),
    (SHAREGPT4V, None, "imageless"),
    (SHAREGPT4V, "sam", "unmapped"),
    ("my_own", "photos", "unmapped"),
    (None, "photos", "unmapped"),
    ("dolly_15k.json", None, "text_only"),
]
MISSING = 12  # one in 12 records names an image that does not exist


def written(folder, count=600, missing=0):
    """Writes a source of `count` lines of all kinds, and the images; returns the kind of each line."""
    rng, lines, kinds = random.Random(1), [], []
    for _, place, _ in KINDS:
        if place:
            (folder / "images" / place).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (6, 4), (len(place), 0, 0)).save(folder / "images" / place / "0.png")
    for number in range(count):
        source, place, kind = rng.choice(KINDS)
        turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": f"a{number}"}]
        record = {"id": number, "conversations": turns}
        if place:
            image = f"{place}/{1 if missing and rng.randrange(missing) == 0 else 0}.png"
            # the same image as people write it: with backslashes, absolute, under another key
            spellings = {1: image.replace("/", "\\"), 2: str(folder / "images" / image), 3: f"./{image}"}
            record["images" if number % 5 == 4 else "image"] = spellings.get(number % 5, image)
        if source:
            record["source"] = source
        lines.append(json.dumps(record))
        kinds.append(kind)
    (folder / "c.jsonl").write_text("\n".join(lines) + "\n")
    return kinds


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cambrian")
    return folder, written(folder)


def draw(folder, out, **options):
    return prepare_cambrian(folder / "c.jsonl", folder / "images", out, **options)


def test_shares():
    assert shares(10_000) == dict(zip(CATEGORIES, [1667] * 4 + [1666] * 2, strict=True))
    assert sum(shares(1003).values()) == 1003
    with pytest.raises(ConfigError, match="a sample of 5"):
        shares(5)


def test_equal_shares_of_the_lowest_ranks(source, tmp_path):
    folder, kinds = source
    report = draw(folder, tmp_path / "out", sample=40, seed=7)
    rows = open_records(tmp_path / "out")
    drawn = [int(rows[i].record_id) for i in range(len(rows))]
    expected = []
    for category, share in zip(CATEGORIES, [7, 7, 7, 7, 6, 6], strict=True):
        lines = [line for line, kind in enumerate(kinds, start=1) if kind == category]
        expected += sorted(lines, key=lambda line: blake2b(f"7:{line}".encode(), digest_size=16).digest())[:share]
    assert [number + 1 for number in drawn] == expected
    assert [rows[i].turns[1].text for i in range(40)] == [f"a{number}" for number in drawn]

    assert rows[0].image_sizes == ((6, 4),) and rows.manifest.report == report
    assert report.source_sha256 == sha256((folder / "c.jsonl").read_bytes()).hexdigest() and report.lines == 600
    counts = Counter(kinds)
    for category, share in shares(40).items():
        entry = report.categories[category]
        assert (entry.available, entry.required, entry.rows) == (counts[category], share, share)
        assert sum(entry.sources.values()) == share and sum(report.available[category].values()) == counts[category]
    assert sum(report.text_only.values()) == counts["text_only"]
    assert sum(report.imageless.values()) == counts["imageless"]
    unmapped = {(name, place): count for name, place, count in report.unmapped}
    assert set(unmapped) == {(SHAREGPT4V[:-5], "sam"), ("my_own", "photos"), ("(no source)", "photos")}
    assert sum(unmapped.values()) == counts["unmapped"]
    assert sum(map(counts.get, [*CATEGORIES, "text_only", "imageless", "unmapped"])) == report.lines
    assert f"unmapped: {unmapped['my_own', 'photos']} x my_own in photos" in report.summary()
    listing = [json.loads(line) for line in (tmp_path / "out" / SAMPLE_FILE).read_text().splitlines()]
    assert [entry["line"] for entry in listing] == expected and [entry["row"] for entry in listing] == list(range(40))
    assert report.sample_sha256 == sha256((tmp_path / "out" / SAMPLE_FILE).read_bytes()).hexdigest()


def test_same_for_any_threads_and_run_and_another_for_another_seed(tmp_path):
    written(tmp_path, count=900, missing=MISSING)
    results = {}
    for name, seed, threads in [("a", 0, 1), ("b", 0, 2), ("c", 0, 5), ("d", 1, 2)]:
        out = tmp_path / name
        report = draw(tmp_path, out, sample=150, seed=seed, threads=threads, max_bad_fraction=0.5)
        assert report.rejected > 5
        results[name] = {p.relative_to(out): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}
    assert results["a"] == results["b"] == results["c"]
    ids = {name: {open_records(tmp_path / name)[i].record_id for i in range(150)} for name in "ad"}
    assert len(ids["a"] & ids["d"]) < 100


def test_rejects_are_listed_and_the_next_rank_fills_the_share(tmp_path):
    written(tmp_path, count=900, missing=MISSING)
    with (tmp_path / "c.jsonl").open("a") as file:
        file.write('[1]\n\n{"id": 7, "conver')
    report = draw(tmp_path, tmp_path / "out", sample=150, max_bad_fraction=0.5)
    listing = [json.loads(line) for line in (tmp_path / "out" / SAMPLE_FILE).read_text().splitlines()]
    rejects = [json.loads(line) for line in (tmp_path / "out" / REJECTS).read_text().splitlines()]
    assert report.rows == 150 and report.records == len(listing) == 150 + report.rejected and report.rejected > 5
    assert report.rejects == {"missing_image": report.rejected}
    # first the lines that are not records, from the pass; then drawn records, in the order of validation
    assert [(e["line"], e["reason"]) for e in rejects[:2]] == [(901, "not_a_record"), (903, "bad_json")]
    assert report.unreadable == {"not_a_record": 1, "bad_json": 1} and "line 903 is not JSON" in rejects[1]["message"]
    assert [e["line"] for e in rejects[2:]] == [e["line"] for e in listing if e["row"] is None]
    assert [e["line"] for e in rejects[2:]] == [line for c in report.categories.values() for line in c.rejected]
    for entry in report.categories.values():
        assert entry.checked == entry.rows + len(entry.rejected) <= entry.drawn == OVERSAMPLING * 25


def test_too_few_or_too_many_bad(source, tmp_path):
    folder, kinds = source
    counts = Counter(kinds)
    short = ", ".join(f"{c} {counts[c]} / 100" for c in CATEGORIES if counts[c] < 100)
    with pytest.raises(InputError, match=rf"sample of 600 \(available / required\): {short}; no category lists .*--source-map"):
        draw(folder, tmp_path / "out", sample=600)

    for file in (folder / "images/vizwiz/0.png", folder / "images/gqa/0.png"):
        file.rename(file.with_suffix(".gone"))
    with pytest.raises(InputError, match=r"12 of 62 records are bad, more than the share of 0.1 .*first at line \d+: missing"):
        draw(folder, tmp_path / "out", sample=60, max_bad_fraction=0.1)
    with pytest.raises(
        InputError, match=r"\(usable / required\): general 0 / 10; of 62 drawn, 12 are bad \(12 missing_image\)"
    ):
        draw(folder, tmp_path / "out", sample=60, max_bad_fraction=0.5)
    for file in (folder / "images").rglob("*.gone"):
        file.rename(file.with_suffix(".png"))

    text = (folder / "c.jsonl").read_text()
    (tmp_path / "c.jsonl").write_text(text + "broken\n" * 10)
    with pytest.raises(
        InputError, match=r"10 of 610 lines are not records, more than the share of 0.01 allowed \(10 bad_json\)"
    ):
        prepare_cambrian(tmp_path / "c.jsonl", folder / "images", tmp_path / "out", sample=6)
    (tmp_path / "c.jsonl").write_text("[" + ",".join(text.splitlines()) + "]")
    with pytest.raises(InputError, match="one JSON array or object, which cannot be read line by line"):
        prepare_cambrian(tmp_path / "c.jsonl", folder / "images", tmp_path / "out", sample=6)
    assert [p.name for p in tmp_path.iterdir()] == ["c.jsonl"]


def test_table_of_sources(source, tmp_path):
    folder, kinds = source
    built_in = SourceMap.built_in()
    assert [built_in.category("idefics375k", place) for place in ("hfdata/tqa", "hfdata/mimic", "")] == ["math", None, None]
    assert built_in.category("dolly_15k", "") == "text_only"
    assert [source_name(s) for s in ("dvqa_2325k.json", "random_3rd_dvqa_2325k.jsonl", "x")] == [
        "dvqa_2325k",
        "dvqa_2325k",
        "x",
    ]
    assert [first_folder(p) for p in ("a/b/c.png", "./a/b.png", "a.png", "hfdata/x/y/z.png", "hfdata/z.png", "")] == [
        "a", "a", "", "hfdata/x", "hfdata", "",
    ]  # fmt: skip

    toml = tmp_path / "more.toml"
    toml.write_text(f'[general]\nmy_own = "*"\n"{SHAREGPT4V}" = ["sam/", "coco"]\n[text_only]\nnotes = "*"\n')
    report = draw(folder, tmp_path / "out", sample=6, source_map=toml)
    assert [name for name, *_ in report.unmapped] == ["(no source)"]
    without = draw(folder, tmp_path / "out2", sample=6)
    assert report.source_map_sha256 != without.source_map_sha256
    added = {"my_own": kinds.count("unmapped")}
    assert report.categories["general"].available - without.categories["general"].available < added["my_own"]
    # `*` does not override folders that are listed by name
    toml.write_text(f'[math]\n"{SHAREGPT4V}" = "*"\n')
    extended = built_in.extended(toml)
    assert [extended.category(SHAREGPT4V[:-5], place) for place in ("gqa", "coco")] == ["general", "math"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[generl]\nx = "*"', "unknown category generl; did you mean general"),
        ('[poetry]\nx = "*"', "unknown category poetry; known: ocr, general"),
        ("general = 3", r"general must be a table of sources, \[general\]; it is 3"),
        ("[math]\nx = 3", r"\[math\] x: write .* not 3"),
        ("[math]\nx = []", r"\[math\] x: write .* not \[\]"),
        ('[math]\nx = ["a", 1]', r"\[math\] x: write"),
        ('[math]\nx = "a"', r"\[math\] x: write"),
        ('[math]\nclevr_700k = "*"', r"\[math\] clevr_700k: \* is in counting already"),
        (f'[math]\n"{SHAREGPT4V}" = ["gqa"]', r"gqa is in general already"),
        ("[math\n", r"not valid TOML: .*line 1"),
        (None, "no such file"),
    ],
)
def test_source_map_is_strict(tmp_path, text, message):
    if text is not None:
        (tmp_path / "m.toml").write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        SourceMap.built_in().extended(tmp_path / "m.toml")
    assert "m.toml" in str(caught.value) and "\n" not in str(caught.value)


def test_memory_does_not_grow_with_the_source(tmp_path):
    (tmp_path / "images/f").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "images/f/0.png")
    sources = ("ai2d_15k", "vizwiz_20k", "clevr_700k", "design2code_0k", "geo170k", "pathvqa_32k", "dolly_15k", "mine")
    peaks = []
    for count in (100, 1_000, 10_000):  # the first fills imports and caches
        with (tmp_path / "c.jsonl").open("w") as file:
            for number in range(count):
                file.write(f'{{"id":{number},"image":"f/0.png","source":"{sources[number % 8]}","conversations":')
                file.write('[{"from":"human","value":"q"},{"from":"gpt","value":"a"}]}\n')
        tracemalloc.start()
        report = prepare_cambrian(tmp_path / "c.jsonl", tmp_path / "images", tmp_path / str(len(peaks)), sample=60)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert report.lines == count and report.rows == 60
    assert peaks[2] < 1.1 * peaks[1]


def test_command(source, tmp_path, capsys):
    folder, kinds = source
    common = ["prepare", str(folder / "c.jsonl"), str(tmp_path / "out"), "--images", str(folder / "images"), "--threads", "2"]
    assert main([*common, "--sample", "12"]) == 65
    assert "--sample does not go with --format llava" in capsys.readouterr().err
    assert main([*common, "--format", "cambrian"]) == 65
    assert "sample of 10000 (available / required): ocr" in capsys.readouterr().err
    assert main([*common, "--format", "cambrian", "--sample", "12", "--seed", "3"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("12 of 12 records written") and f"left out, text only: {kinds.count('text_only')}" in out
    assert open_records(tmp_path / "out").manifest.report.seed == 3
