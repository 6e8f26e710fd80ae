"""CHAIR (Rohrbach et al., 2018): which objects of COCO that a caption mentions are not in the image?

PATH is a folder with `instances_val2014.json`, or with it in `annotations/`, and the images in it, in `val2014/` or `images/`.
Three more files are used if they are beside it:

- `captions_val2014.json`: objects that a reference caption names count as in the image, as in the original;
- the owner's `synonyms.txt`; without it, words are those of `coco_objects.OBJECTS`;
- `images.txt`: ids of the images to describe, one a line; without it, they are 500 that SEED draws from the whole file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lsg_jax.config import Protocol
from lsg_jax.digest import text_sha256
from lsg_jax.errors import InputError
from lsg_jax.eval.benchmark import LOWER, Benchmark, Graded, Item, Match, Metrics, check_unique, check_values, mean, ratio
from lsg_jax.eval.benchmarks.coco_objects import OBJECTS, Vocabulary, by_rule, from_synonyms
from lsg_jax.eval.image_files import image_file, with_their_images
from lsg_jax.files import is_file, read_regular
from lsg_jax.json_files import read_object

PROMPT = "Please describe this image in detail."
SEED = 0
COUNT = 500
INSTANCES, CAPTIONS, SYNONYMS, IMAGES = "instances_val2014.json", "captions_val2014.json", "synonyms.txt", "images.txt"
MAX_BYTES = 1 << 30  # the official annotations have 154 MB
NEEDED = {"images": ("id", "file_name"), "annotations": ("image_id", "category_id"), "categories": ("id", "name")}


@dataclass(frozen=True)
class Truth:
    """What captions are compared with, and which files it comes from."""

    words: Vocabulary
    source: str


def files(path: str) -> list[Path]:
    """The files that are there, the instances first. Raises InputError if these are not."""
    folders = (Path(path), Path(path) / "annotations")
    places = ([folder / name for folder in folders] for name in (INSTANCES, CAPTIONS, SYNONYMS, IMAGES))
    found = [next(filter(is_file, places_of_one)) for places_of_one in places if any(map(is_file, places_of_one))]
    if not found or found[0].name != INSTANCES:
        file = "a file; give its folder: " if is_file(Path(path)) else ""
        raise InputError(f"{path}: {file}no {INSTANCES} in it or in its folder annotations")
    return found


def read(path: str) -> list[Item]:
    """An item for each image; its answers are the objects in it, those that most images have first; `data`: a Truth.

    Raises InputError: see `Benchmark.read`; also for annotations of no image of the file, or an unknown id in `images.txt`.
    """
    given = {file.name: file for file in files(path)}
    tree = _tables(given[INSTANCES], NEEDED)
    names = {str(row["id"]): row["name"] for row in tree["categories"]}
    check_values(names.values(), OBJECTS, what="category", where=str(given[INSTANCES]))
    words, source = by_rule(), "object words by rule, not the owner's synonyms.txt"
    if SYNONYMS in given:
        words, source = from_synonyms(_text(given[SYNONYMS]), str(given[SYNONYMS])), f"object words of {SYNONYMS}"
    objects: dict[str, set[str]] = {str(row["id"]): set() for row in tree["images"]}
    for row in tree["annotations"]:
        image, category = str(row["image_id"]), str(row["category_id"])
        if image not in objects or category not in names:
            raise InputError(f"{given[INSTANCES]}: an annotation is of image {image} and category {category}; one is unknown")
        objects[image].add(words.objects[names[category]])
    if CAPTIONS in given:
        captions = _tables(given[CAPTIONS], {"annotations": ("image_id", "caption")})["annotations"]
        if not any(str(row["image_id"]) in objects for row in captions):
            raise InputError(f"{given[CAPTIONS]}: no caption is of an image in {INSTANCES}; is it of another year?")
        for row in captions:
            objects.get(str(row["image_id"]), set()).update(words.mentions(str(row["caption"])))
    source += "; objects of segmentations and reference captions" if CAPTIONS in given else "; objects of segmentations alone"
    return _items(path, tree["images"], _asked(given.get(IMAGES), list(objects)), objects, Truth(words, source))


def _items(path: str, images: Sequence[Any], asked: set[str], objects: dict[str, set[str]], truth: Truth) -> list[Item]:
    common = Counter(name for image in asked for name in objects[image])
    folders = [Path(path) / "val2014", Path(path) / "images", Path(path)]
    items = [
        Item(
            id=str(row["id"]),
            question=PROMPT,
            answers=tuple(sorted(objects[str(row["id"])], key=lambda name: (-common[name], name))) or ("",),
            images=(image_file(str(row["file_name"]), folders),),
            fields={"image": str(row["file_name"])},
            data=truth,
        )
        for row in images
        if str(row["id"]) in asked
    ]
    check_unique(items, path)
    return with_their_images(items, path)


def _asked(listed: Path | None, ids: list[str]) -> set[str]:
    """The ids of the images to describe: those with the smallest hashes, or those of a file."""
    if listed is None:
        return set(sorted(ids, key=lambda image: text_sha256(f"{SEED} {image}"))[:COUNT])
    wanted = _text(listed).split()
    if not wanted:
        raise InputError(f"{listed}: no ids in it")
    if unknown := sorted(set(wanted) - set(ids)):
        raise InputError(f"{listed}: no image {', '.join(unknown)[:200]} in {INSTANCES}; give ids as 42, one a line")
    if repeated := [name for name, count in Counter(wanted).items() if count > 1]:
        raise InputError(f"{listed}: id {repeated[0]} occurs more than once")
    return set(wanted)


def _text(file: Path) -> str:
    try:
        return read_regular(file).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{file}: no text in UTF-8") from None


def _tables(file: Path, needs: Mapping[str, Sequence[str]]) -> dict[str, list[Any]]:
    """The lists of a COCO file. Raises InputError: one is missing, or a row lacks a field."""
    tree = read_object(file, max_bytes=MAX_BYTES)
    for table, fields in needs.items():
        rows = tree.get(table)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise InputError(f"{file}: no list {table}; there are {', '.join(tree)}")
        if missing := {name for name in fields for row in rows if not isinstance(row.get(name), int | str)}:
            raise InputError(f"{file}: {table} without {', '.join(sorted(missing))}")
    return tree


def prompt(item: Item, protocol: Protocol) -> str:
    """The request for a description."""
    return item.question


def match(item: Item, output: str, protocol: Protocol) -> Match:
    """The objects that are mentioned; the score is 1 if all of them are in the image."""
    found, there = item.data.words.mentions(output), {name for name in item.answers if name}
    wrong = sum(name not in there for name in found)
    counts = {"mentions": len(found), "wrong": wrong, "found": len(there & set(found)), "objects": len(there)}
    return Match(", ".join(found), float(not wrong), {**counts, "words": len(output.split())})


def metrics(graded: Graded) -> Metrics:
    """`chair_s`: percent of captions with an object that is not there; `chair_i`: percent of mentions; percent of objects found
    (`recall`); words a caption (`mean_length`).
    """
    return {
        f"chair_s{LOWER}": 100.0 - mean(graded),
        f"chair_i{LOWER}": ratio(graded.total("wrong"), graded.total("mentions")),
        "recall": ratio(graded.total("found"), graded.total("objects")),
        "mean_length": graded.total("words") / graded.weight.sum(-1),
    }


CHAIR = Benchmark(
    name="chair",
    kind="hallucination",
    read=read,
    prompt=prompt,
    match=match,
    metrics=metrics,
    official={"paper": f"chair_s{LOWER}"},
    size=COUNT,
    files=files,
    note=lambda items: items[0].data.source,
    max_new_tokens={"paper": 512},
)
