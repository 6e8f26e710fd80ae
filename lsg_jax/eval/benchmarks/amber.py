"""AMBER (Wang et al., 2023): descriptions of 1004 images, and yes/no questions about existence, attributes and relations.

PATH is the owner's folder `data` (annotations.json, relation.json, safe_words.txt, query/) with the images in `image/`. The
owner's metrics.txt holds only zeros to begin with and is not read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lsg_jax.config import Protocol
from lsg_jax.data.parquet import as_label
from lsg_jax.data.prompts import WORD_SUFFIX
from lsg_jax.errors import InputError
from lsg_jax.eval.benchmark import LOWER, Benchmark, Graded, Item, Match, Metrics, check_unique, check_values, mean, ratio
from lsg_jax.eval.image_files import image_file, with_their_images
from lsg_jax.eval.short_answers import yes_or_no, yes_or_no_word
from lsg_jax.eval.words import singular, tokens
from lsg_jax.eval.yes_no import yes_no_scores
from lsg_jax.files import is_file, read_regular
from lsg_jax.json_files import read_json, read_object

GENERATIVE = "generative"
TYPES = {  # in annotations.json -> dimension, and kind of attribute
    GENERATIVE: (GENERATIVE, ""),
    "discriminative-hallucination": ("existence", ""),
    "discriminative-attribute-state": ("attribute", "state"),
    "discriminative-attribute-number": ("attribute", "number"),
    "discriminative-attribute-action": ("attribute", "action"),
    "discriminative-relation": ("relation", ""),
    "relation": ("relation", ""),
}
DIMENSIONS = (GENERATIVE, "existence", "attribute", "relation")
_DETERMINERS = frozenset(
    ("a", "an", "the", "this", "that", "these", "those", "his", "her", "its", "their", "some", "each", "another", "one", "two")
)
_SELDOM_NOUNS = frozenset(("can", "hot", "watch", "support", "sailing", "drawing", "sound", "note", "file"))


@dataclass(frozen=True)
class Lexicon:
    """What the nouns of a description are compared with.

    Attributes:
        relation: word -> words that stand for it.
        words: all of them; other nouns are ignored.
        safe: words that are never wrong.
    """

    relation: Mapping[str, Sequence[str]]
    words: frozenset[str]
    safe: Collection[str]


@dataclass(frozen=True)
class Scene:
    """Objects that are in an image, and objects that people expect in it though they are not."""

    lexicon: Lexicon
    truth: Sequence[str]
    hallu: Sequence[str]


def nouns(text: str, words: frozenset[str]) -> Iterator[str]:
    """The words of a text that are among `words`, in the singular and in order.

    The owner takes nouns by nltk's tagger, in the case in which they are written. Here a word that is seldom a noun (`can be
    seen`) counts after an article, a possessive or a small number alone.
    """
    previous = ""
    for token in tokens(text):
        word = singular(token, words)
        if word in words and (word not in _SELDOM_NOUNS or previous.lower() in _DETERMINERS):
            yield word
        previous = token


def counts_of(found: Sequence[str], scene: Scene) -> dict[str, float]:
    """The owner's counts for one description: `nouns`, `wrong` ones, `covered` ones of `truth`, `expected` ones of `hallu`."""
    there, absent = _places(scene.truth, scene.lexicon.relation), _places(scene.hallu, scene.lexicon.relation)
    covered, expected, wrong = set(), set(), 0
    for noun in found:
        if noun in scene.lexicon.safe:
            continue
        if noun in there:
            covered.add(there[noun])
            continue
        wrong += 1
        if noun in absent:
            expected.add(absent[noun])
    return {
        "nouns": len(found),
        "wrong": wrong,
        "covered": len(covered),
        "truth": len(scene.truth),
        "expected": len(expected),
        "hallu": len(scene.hallu),
    }


def _places(objects: Sequence[str], relation: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Word -> which of the objects it stands for: words related to one come before the objects themselves, the first wins."""
    places: dict[str, int] = {}
    for i, name in enumerate(objects):
        for word in relation.get(name, ()):
            places.setdefault(word, i)
    for i, name in enumerate(objects):
        places.setdefault(name, i)
    return places


def _base(path: str) -> Path:
    base = next((folder for folder in (Path(path), Path(path) / "data") if is_file(folder / "annotations.json")), None)
    if base is None:
        file = "a file; give its folder: " if is_file(Path(path)) else ""
        raise InputError(f"{path}: {file}no annotations.json in it or in its folder data")
    return base


def _query_files(base: Path) -> list[Path]:
    """The files with the questions: that of all of them, else those of the tasks, else those of the dimensions."""

    def there(*names: str) -> list[Path]:
        return [file for name in names if is_file(file := base / "query" / f"query_{name}.json")]

    parts = [f"discriminative-{name}" for name in DIMENSIONS[1:]]
    found = there("all") or there("generative") + (there("discriminative") or there(*parts))
    if not found:
        raise InputError(f"{base}: no query_all.json in its folder query")
    return found


def files(path: str) -> list[Path]:
    """The files that are read. Raises InputError if there are no annotations or questions."""
    base = _base(path)
    return [base / "annotations.json", base / "relation.json", base / "safe_words.txt", *_query_files(base)]


def read(path: str) -> list[Item]:
    """Items with the fields `dimension`, `image` and, of attributes, `kind`; `data` of a description: its Scene.

    Raises InputError: see `Benchmark.read`; also for a question without annotation.
    """
    base = _base(path)
    relation = read_object(base / "relation.json")
    if not all(map(_are_words, relation.values())):
        raise InputError(f"{base / 'relation.json'}: expected a list of words for each word")
    words = {*relation, *(word for others in relation.values() for word in others)}
    # `leave` stands for leaves there, of which the owner's lemmatizer makes `leaf`: it is never found as a noun
    safe = read_regular(base / "safe_words.txt").decode("utf-8", "replace").split()
    lexicon = Lexicon(relation, frozenset(words - {"leave"}), safe)
    annotations = {str(row["id"]): row for row in _rows(base / "annotations.json", ("id", "type", "truth"))}
    check_values((row["type"] for row in annotations.values()), TYPES, what="type", where=str(base / "annotations.json"))
    folders = [Path(path) / "image", base / "image", Path(path) / "images", Path(path)]
    items = []
    for file in _query_files(base):
        for row in _rows(file, ("id", "image", "query")):
            if (name := str(row["id"])) not in annotations:
                raise InputError(f"{file}: question {name} is not in annotations.json")
            if not as_label(row["query"], f"{file}: id {name}", "query"):
                raise InputError(f"{file}: id {name}: query is empty")
            items.append(_item(row, annotations[name], folders, lexicon, f"{base / 'annotations.json'}: id {name}"))
    check_unique(items, path)
    return with_their_images(items, path)


def _rows(file: Path, needs: Sequence[str]) -> list[dict[str, Any]]:
    rows = read_json(file)
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{file}: expected a list of entries")
    for number, row in enumerate(rows):
        if missing := [name for name in needs if name not in row]:
            raise InputError(f"{file}: entry {number}: no {', '.join(missing)}; there are {', '.join(row)}")
    if repeated := [name for name, count in Counter(str(row["id"]) for row in rows).items() if count > 1]:
        raise InputError(f"{file}: id {repeated[0]} occurs more than once")
    return rows


def _are_words(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(word, str) for word in value)


def _item(row: Mapping[str, Any], truth: Mapping[str, Any], folders: Sequence[Path], lexicon: Lexicon, where: str) -> Item:
    dimension, kind = TYPES[truth["type"]]
    scene = None
    if dimension == GENERATIVE:
        lists = [truth["truth"], truth.get("hallu")]
        if not all(map(_are_words, lists)):
            raise InputError(f"{where}: truth and hallu are not both lists of words")
        scene = Scene(lexicon, *lists)
    return Item(
        id=str(row["id"]),
        question=str(row["query"]),
        answers=(tuple(scene.truth) or ("",)) if scene else (yes_or_no(truth["truth"], where),),
        images=(image_file(str(row["image"]), folders),),
        fields={"dimension": dimension, "image": str(row["image"])} | ({"kind": kind} if kind else {}),
        data=scene,
    )


def prompt(item: Item, protocol: Protocol) -> str:
    """The request for a description as it is; a question with LLaVA-1.5's suffix. The owner takes only `Yes` and `No`."""
    return item.question if item.data else item.question + WORD_SUFFIX


def match(item: Item, output: str, protocol: Protocol) -> Match:
    """The nouns of a description, right if none is wrong; else `yes` or `no` if exactly one of them is a word of the output."""
    if item.data:
        found = list(nouns(output, item.data.lexicon.words))
        counts = counts_of(found, item.data)
        return Match(", ".join(found), float(not counts["wrong"]), counts)
    parsed = yes_or_no_word(output)
    return Match(parsed, float(parsed == item.answers[0]))


def metrics(graded: Graded) -> Metrics:
    """Percent. Descriptions: `chair` of nouns, `cover` of objects, `hal` of descriptions, `cog` of expected objects. Questions:
    accuracy, and precision, recall and F1 of the answer no, also by dimension and kind. `amber_score`: (100 - chair + f1) / 2.
    """
    described = graded.where("dimension", GENERATIVE)
    scores = yes_no_scores(graded, ~described, "no")
    chair = ratio(graded.total("wrong"), graded.total("nouns"))
    parts: Metrics = {}
    for field, values in (("dimension", DIMENSIONS[1:]), ("kind", ("state", "number", "action"))):
        for value in values:
            of = yes_no_scores(graded, graded.where(field, value), "no")
            parts |= {f"{value}: {name}": score for name, score in of.items()}
    return {
        "amber_score": (100.0 - chair + scores["f1"]) / 2,
        f"chair{LOWER}": chair,
        "cover": ratio(graded.total("covered"), graded.total("truth")),
        f"hal{LOWER}": 100.0 - mean(graded, described),
        f"cog{LOWER}": ratio(graded.total("expected"), graded.total("hallu")),
        **scores,
        **parts,
    }


def _is_description(item: Item) -> bool:
    return item.fields["dimension"] == GENERATIVE


AMBER = Benchmark(
    name="amber",
    kind="hallucination",
    read=read,
    prompt=prompt,
    match=match,
    metrics=metrics,
    official={"paper": "amber_score"},
    size=15220,
    groups={"dimension": DIMENSIONS},
    files=files,
    behind={
        **dict.fromkeys([f"chair{LOWER}", "cover", f"hal{LOWER}", f"cog{LOWER}"], _is_description),
        **dict.fromkeys(["accuracy", "precision", "recall", "f1"], lambda item: not _is_description(item)),
    },
    note=lambda items: (
        "nouns by rule; the owner tags them and forgives similar words by their vectors, so chair is higher here"
    ),
    unit="image",
    guess_by="dimension",
    task="dimension",
    max_new_tokens={"paper": 512},
)
