"""The parts of a report as plain data; templates/parts.html.j2 turns each kind into HTML."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, get_args

from PIL import Image

from lsg_jax.eval.results import EvaluationResult
from lsg_jax.report.drawing import Kept, Row
from lsg_jax.report.pictures import data_url, small

PICTURE_SIDE = 448  # pixels; as large as a phone shows, and sharp in print
NUMBER = re.compile(r"[-+\N{MINUS SIGN}±\d.,%/\[\] e]*")


class Part(Protocol):
    """A part of a section. `kind` chooses the markup. All texts are plain: the template escapes them."""

    kind: ClassVar[str]


@dataclass(frozen=True)
class Heading:
    """A heading within a section."""

    kind: ClassVar[str] = "heading"
    text: str


@dataclass(frozen=True)
class Paragraph:
    """A paragraph of text."""

    kind: ClassVar[str] = "paragraph"
    text: str


@dataclass(frozen=True)
class Note:
    """A paragraph that a reader must not miss."""

    kind: ClassVar[str] = "note"
    text: str


@dataclass(frozen=True)
class Verbatim:
    """Text whose line breaks and spaces are kept."""

    kind: ClassVar[str] = "verbatim"
    text: str


@dataclass(frozen=True)
class Table:
    """A table of text; the first column names the rows.

    Raises:
        ValueError: a row has more or fewer cells than the header.
    """

    kind: ClassVar[str] = "table"
    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.header):
                raise ValueError(f"{self.caption}: {len(row)} cells under {len(self.header)} headings")

    @property
    def numeric(self) -> list[bool]:
        """Whether a column holds nothing but numbers, which are aligned right; never the first one."""
        columns = zip(*self.rows, strict=True) if self.rows else ([] for _ in self.header)
        return [index > 0 and all(map(NUMBER.fullmatch, column)) for index, column in enumerate(columns)]


@dataclass(frozen=True)
class Details:
    """Parts that can be folded, and are folded at first unless `opened`; in print they are unfolded."""

    kind: ClassVar[str] = "details"
    summary: str
    parts: Sequence[Part]
    opened: bool = False


@dataclass(frozen=True)
class Picture:
    """An image with its caption; `source` is a data URL."""

    kind: ClassVar[str] = "picture"
    caption: str
    source: str
    alt: str


@dataclass(frozen=True)
class Gallery:
    """Pictures side by side, as many as there is room for."""

    kind: ClassVar[str] = "gallery"
    pictures: Sequence[Picture]


@dataclass(frozen=True)
class LayerMap:
    """A map of attention at every layer.

    Attributes:
        title: what is mapped.
        source: data URL of the maps of all layers, one below the other; they lie over the picture.
        peaks: the value of the brightest place, by layer, as text.
    """

    title: str
    source: str
    peaks: Sequence[str]


@dataclass(frozen=True)
class MappedImage:
    """An image with its maps.

    Attributes:
        caption: the name of the image, the question's answer.
        marked: the image with its sinks marked, if it is there.
        plain: data URL of the image without marks.
        words: of each layer, what the maps show.
    """

    caption: str
    marked: Picture | None
    plain: str
    maps: Sequence[LayerMap]
    words: Sequence[str]


@dataclass(frozen=True)
class Maps:
    """Images with their maps, and one slider that chooses the layer of all.

    Attributes:
        layer: the one shown at first.
        layers: their number.
        bar: CSS colours of the colour bar, from 0 to the peak.
    """

    kind: ClassVar[str] = "maps"
    layer: int
    layers: int
    bar: str
    images: Sequence[MappedImage]


@dataclass(frozen=True)
class Drawing:
    """A figure of report.figures.

    Attributes:
        svg, csv: contents of the two files.
        name: file name under which a reader can save the CSV.
    """

    kind: ClassVar[str] = "drawing"
    svg: str
    csv: str
    name: str
    caption: str

    @property
    def csv_url(self) -> str:
        """The CSV as a data URL."""
        return f"data:text/csv;base64,{base64.b64encode(self.csv.encode()).decode()}"


Group = Literal["sinks", "results", "training"]
GROUPS: tuple[Group, ...] = get_args(Group)
"""In the order of the page."""


@dataclass(frozen=True)
class Section:
    """A section of the page.

    Attributes:
        gist: one line about the content, for the list of contents.
        group: where on the page it stands.
        found: sentences for the top of the page.
        settings: shown in a section of their own at the end.
        evaluation: whose scores go into the table of all evaluations, with the name of the run.
    """

    title: str
    parts: Sequence[Part]
    gist: str = ""
    group: Group = "results"
    found: Sequence[str] = ()
    settings: Any = None
    evaluation: tuple[str, EvaluationResult] | None = None


def as_json(values: Any) -> Verbatim:
    """Settings as JSON."""
    return Verbatim(json.dumps(values, indent=1))


def picture(caption: str, image: bytes | Image.Image, *, alt: str) -> Picture:
    """An image of at most PICTURE_SIDE pixels a side.

    Raises:
        InputError: the bytes are not an image that can be read.
    """
    return Picture(caption, data_url(*small(image, PICTURE_SIDE)), alt)


def drawing(draw: Callable[[Sequence[Row], Kept], list[Path]], rows: Sequence[Row], name: str, caption: str) -> Drawing:
    """Draws rows with a function of report.figures.

    Raises:
        InputError: the rows cannot be drawn.
    """
    kept = Kept(name)
    draw(rows, kept)
    return Drawing(kept.files[".svg"].decode(), kept.files[".csv"].decode(), f"{name}.csv", caption)
