"""The category of a Cambrian record: a table of sources, which a user's TOML can extend."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lsg_jax.digest import text_sha256
from lsg_jax.errors import ConfigError, InputError
from lsg_jax.files import read_toml

CATEGORIES = ("ocr", "general", "counting", "code", "math", "science")
"""In the order in which shares are allotted and rows are written."""

TEXT_ONLY = "text_only"
"""Pseudo-category of sources without images, which are left out."""

ANY = ("*",)
_SHAREGPT4V = "sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k"

SOURCES: dict[str, dict[str, tuple[str, ...]]] = {
    "ocr": {
        **dict.fromkeys(
            ("dvqa_2325k", "synthdog_500k_modified", "arxivqa_100k", "screenqa_79k", "docvqa_39k", "chartqa_28k", "ai2d_15k"),
            ANY,
        ),
        "clean_llava_instruct_150k_llavar_20k": ("llavar",),
        _SHAREGPT4V: ("ocr_vqa", "textvqa"),
        "idefics375k": (
            "hfdata/robut_wtq", "hfdata/iconqa", "hfdata/chart2text", "hfdata/tabmwp", "hfdata/st_vqa", "hfdata/rendered_text",
            "hfdata/vistext", "hfdata/finqa", "hfdata/infographic_vqa", "hfdata/tat_qa", "hfdata/hitab",
        ),
    },
    "general": {
        **dict.fromkeys(
            (
                "allava-laion-500k", "allava-vflan-200k", "q-instruct_200k", "qalign_200k", "lnqa_302k", "lvis_instruct4v_220k",
                "gpt77k", "alfworldgpt_45k", "vizwiz_20k", "laion_gpt4v_11k", "idk_11k", "oodvqa_8k", "sketchyvqa_8k",
            ),
            ANY,
        ),
        _SHAREGPT4V: ("vg", "gqa"),
        "idefics375k": ("hfdata/visual7w", "hfdata/hateful_memes", "hfdata/visualmrc"),
    },
    "counting": dict.fromkeys(("clevr_700k", "tallyqa_250k"), ANY),
    "code": {**dict.fromkeys(("websight_800k", "design2code_0k"), ANY), "idefics375k": ("hfdata/datikz",)},
    "math": {
        **dict.fromkeys(("geo170k", "mathvision_3k"), ANY),
        "idefics375k": ("hfdata/raven", "hfdata/geomverse", "hfdata/intergps", "hfdata/tqa"),
    },
    "science": dict.fromkeys(("filtered_data_engine_161k", "pathvqa_32k", "scienceqa_12k"), ANY),
    TEXT_ONLY: dict.fromkeys(
        ("orca_994k", "mathinstruct_262k", "orca_math_200k", "wizardlm_143k", "code_feedback_66k", "dolly_15k"), ANY
    ),
}  # fmt: skip
"""category -> source, without `.json` -> first folders of the image path, or any."""


class SourceMap:
    """{(source, first folder or `*`): category}. A named folder takes precedence over `*`."""

    def __init__(self, categories: dict[tuple[str, str], str]):
        self._categories = categories
        self._sources = {source for source, _ in categories}

    @classmethod
    def built_in(cls) -> SourceMap:
        """`SOURCES`."""
        return cls(
            {(s, f): category for category, sources in SOURCES.items() for s, folders in sources.items() for f in folders}
        )

    def extended(self, path: Path) -> SourceMap:
        """The table with the entries of a TOML file added.

        The file has tables named after categories or `text_only`, with entries `source = "*"` or `source = [folders]`.

        Raises:
            ConfigError: the file is missing or not TOML, a category is unknown, an entry is malformed, or it contradicts an
                existing one.
        """
        try:
            tables = read_toml(path)
        except InputError as error:
            raise ConfigError(str(error)) from None
        categories = dict(self._categories)
        for category, sources in tables.items():
            for key in _entries(path, category, sources):
                there = categories.setdefault(key, category)
                if there != category:
                    raise ConfigError(f"{path}: [{category}] {key[0]}: {key[1]} is in {there} already")
        return SourceMap(categories)

    def category(self, source: str, folder: str) -> str | None:
        """One of `CATEGORIES`, `text_only`, or None if the table has no entry."""
        return self._categories.get((source, folder)) or self._categories.get((source, "*"))

    def knows(self, source: str) -> bool:
        """Whether any folder of the source is in the table."""
        return source in self._sources

    @property
    def sha256(self) -> str:
        """Digest of the table."""
        return text_sha256(json.dumps(sorted([*k, v] for k, v in self._categories.items())))


def _entries(path: Path, category: str, sources: Any) -> Iterator[tuple[str, str]]:
    known = (*CATEGORIES, TEXT_ONLY)
    if category not in known:
        near = difflib.get_close_matches(category, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
        raise ConfigError(f"{path}: unknown category {category}; {hint}")
    if not isinstance(sources, dict):
        raise ConfigError(f"{path}: {category} must be a table of sources, [{category}]; it is {sources!r}")
    for source, folders in sources.items():
        listed = [folders] if folders == "*" else folders
        if not isinstance(listed, list) or not listed or not all(isinstance(f, str) and f.strip("/") for f in listed):
            raise ConfigError(
                f'{path}: [{category}] {source}: write "*" or a list of the first folders of image paths, not {folders!r}'
            )
        for folder in listed:
            yield source_name(source), folder.strip("/")


def source_name(source: str) -> str:
    """The source's name in the table: without `.json`; subsets of DVQA (`random_3rd_dvqa_2325k`) share one name."""
    name = source.removesuffix(".jsonl").removesuffix(".json")
    return "dvqa_2325k" if name.endswith("dvqa_2325k") else name


def first_folder(image: str) -> str:
    """First folder of an image path, or first two below `hfdata`; empty for an image in the root."""
    folders = image.removeprefix("./").split("/")[:-1]
    return "/".join(folders[:2] if folders[:1] == ["hfdata"] else folders[:1])
