"""Made-up results of every kind, and a parser that checks the page of `lsg report`."""

import html.parser
import itertools
import json
import re

import study_rows
from PIL import Image

from lsg_jax.checkpoint import RunRecord
from lsg_jax.config import SinkConfig
from lsg_jax.eval.benchmarks.questions import QUESTIONS
from lsg_jax.eval.benchmarks.scenes import SCENES

HOSTILE = "evil \"<script>alert(1)</script> & co' --> </style><img src=x onerror=alert(2)>"
LINKING = ("href", "xlink:href", "src", "srcset", "action", "formaction", "data", "poster", "background", "ping", "manifest")


class Page(html.parser.HTMLParser):
    """Texts by tag, ids, references and attributes of a page; asserts that elements are properly nested."""

    VOID = ("meta", "img", "link", "br", "input")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.ids, self.references, self.texts = [], [], [], [], [], {}
        self.unlabelled, self.captionless = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        if self.tags and self.tags[-1] == "table" and tag != "caption":
            self.captionless.append(attributes)
        if tag in ("input", "select") and "label" not in self.open:
            self.unlabelled.append(attributes)
        self.tags.append(tag)
        self.attributes.append((tag, dict(attributes)))
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("aria-labelledby", "aria-describedby", "for"):
                self.references += value.split()
            self.references += (
                [value[1:]] if name == "href" and value.startswith("#") else re.findall(r"url\(#(.*?)\)", value or "")
            )
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)

    def all(self, tag):
        """The attributes of all elements with this tag."""
        return [attributes for name, attributes in self.attributes if name == tag]


def check_structure(text):
    """Asserts what must hold for any report, and returns the parsed page."""
    page = Page(text)
    assert text.startswith("<!doctype html>") and page.all("html") == [{"lang": "en"}] and page.tags.count("title") == 1
    assert len(set(page.ids)) == len(page.ids) and set(page.references) <= set(page.ids)
    for tag, attributes in page.attributes:
        for name, value in attributes.items():
            assert name not in LINKING or value.startswith(("#", "data:")), (tag, name, value[:80])
            assert not name.startswith("on"), (tag, name)
    assert not re.search(r"url\((?!#)|@import|https?://|//cdn", text)
    assert page.tags.count("script") == page.tags.count("h1") == page.tags.count("main") == 1
    # a map over a picture has no text of its own: that of the picture says what is to be seen
    assert all(attributes["alt"].strip() or attributes.get("class") == "over" for attributes in page.all("img"))
    assert all(attributes["aria-label"].strip() for attributes in page.all("svg"))
    levels = [int(tag[1]) for tag in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert not page.captionless and not page.unlabelled
    assert all(attributes.get("scope") in ("col", "row") for attributes in page.all("th"))
    return page


def write(path, value):
    """Writes JSON; creates the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_run(folder, steps=6, total=6, **metrics):
    """A training run; the last line of its metrics is incomplete, as after a kill."""
    config = {"gate": {"layers": [1, 2], "grouping": "v_sink_rest"}}
    run = RunRecord(config, SinkConfig(), "0" * 64, "1" * 64, total, HOSTILE, versions={}, devices="1 cpu", starts=())
    write(folder / "run.json", run.as_json())
    lines = [
        {"step": step, "loss": 2.0 / step, "ratios": [[0.25, 0.75], [0.5, 0.5]], **metrics} for step in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 7, "lo')


def write_sinks(folder):
    """Sinks of one image with its maps, whose layer 1 gets most attention, and of one without an answer."""
    boxes = [[0, 0, 0.5, 0.5], [0.5, 0, 1, 0.5], [0, 0.5, 0.5, 1], [0.5, 0.5, 1, 1]]
    entry = {"boxes": boxes, "v_sinks": [0, 3], "l_sinks": [[], [1]], "warnings": ["every patch is flagged"]}
    entry |= {"answer": HOSTILE, "answer_attention": [[0.1, 0.05, 0.05, 0.1], [0.3, 0.1, 0.1, 0.3]]}
    study = {"format": "lsg-sinks-2", "counts": study_rows.counts(), "attention": study_rows.attention()}
    images = {f"photos/{HOSTILE[:5]}.jpg": entry, "a/x.jpg": entry | {"answer": "", "answer_attention": None}}
    write(folder / "sinks.json", study | {"images": images, "prompt": "What is <image>?", "warnings": [HOSTILE]})
    for name in ("marked/evil .png", "images/evil .png", "marked/x.png", "images/x.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (90, 60, 30)).save(folder / name)


def write_evaluation(folder, questions, scenes=8):
    """An evaluation of drawn scenes and custom questions, in turn gained, lost, right and wrong.

    Args:
        questions: a .jsonl of custom questions, or None.
    """
    result, entries = study_rows.result(), {}
    entry = result["benchmarks"].pop("cv_bench")
    for of in ("methods", "change", "paired_test", "unread"):
        entry[of]["var"] = entry[of]["lsg"]
    result["methods"] = {**result["methods"], "var": {"gate": None}}
    benchmarks = {"scenes": (SCENES, "")} | ({"mine": (QUESTIONS, str(questions))} if questions else {})
    for name, (benchmark, path) in benchmarks.items():
        items = benchmark.read(path)[:scenes]
        entries[name] = entry | {"path": path, "questions": len(items), "of": len(items)}
        for method, pattern in (("base", "0101"), ("lsg", "1001"), ("var", "0011")):
            lines = [
                {"id": item.id, **item.fields, "prompt": benchmark.prompt(item, "paper"), "answers": item.answers}
                | {"score": float(pattern[i % 4]), "parsed": HOSTILE if i else None, "output": f"{HOSTILE} of {method} \0"}
                | ({"ratios": [[0.25, 0.75], [0.5, 0.5], [0.75, 0.25]]} if method == "lsg" else {})
                for i, item in enumerate(items)
            ]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{name}.{method}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write(folder / "result.json", result | {"benchmarks": entries})


def write_questions(folder, count=6):
    """Custom questions with hostile text and a photo; the last has no image."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.effect_noise((400, 300), 60).convert("RGB").save(folder / "photo.jpg")
    lines = [
        {
            "question": f"{number}. {HOSTILE}",
            "answer": "B",
            "choices": ["x", HOSTILE, "y"],
            "category": f"{HOSTILE} {number % 2}",
        }
        | ({} if number == count - 1 else {"image": "photo.jpg"})
        for number in range(count)
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "questions.jsonl"


def write_work(folder):
    """One result of each kind."""
    write_run(folder / "run")
    write_evaluation(folder / "run" / "eval", write_questions(folder / "questions"))
    write(folder / "run" / "checkpoints" / "run.json", {"format": "not to be looked at"})
    write_sinks(folder / "sinks")
    write(folder / "probe" / "probe.json", {"format": "lsg-probe-1", "rows": study_rows.probe(), "seed": 5})
    sweep = {"format": "lsg-sweep-1", "groups": ["v_sink", "rest"], "rows": study_rows.sweep()}
    write(folder / "sweep" / "sweep.json", sweep)
    write(folder / "stack" / "stack.json", {"format": "lsg-stack-1", **study_rows.stack()})
    variants = [{"variant": row["method"], **row} for row in study_rows.gains()]
    write(folder / "ablate" / "ablate.json", {"format": "lsg-ablate-1", "rows": variants})
    return folder
