"""One self-contained HTML page: tables, drawings as inline SVG with their numbers as CSV, images. Nothing is fetched.

The page says so itself: its Content-Security-Policy lets it load nothing, and run no script but its own.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from lsg_jax.checkpoint.files import write_atomic
from lsg_jax.report.drawing import Row
from lsg_jax.report.pictures import data_url, small

STYLE_FILE, SCRIPT_FILE = Path(__file__).with_name("page.css"), Path(__file__).with_name("page.js")
IMAGE_SIDE = 448  # pixels; as large as a phone shows, and sharp in print
NUMBER = re.compile(r"[-+\N{MINUS SIGN}±\d.,%/\[\] e]*")


@dataclass(frozen=True)
class Drawing:
    """A figure of report.figures.

    Attributes:
        svg, csv: the two files' text.
        name: of the CSV that a reader can save.
        caption: what is to be seen, as plain text.
    """

    svg: str
    csv: str
    name: str
    caption: str


@dataclass(frozen=True)
class Section:
    """A part of the page; `parts` are HTML and drawings.

    Attributes:
        gist: what it is about, as one line of plain text for the summary.
        scores: HTML that belongs at the top of the page, "" for most.
    """

    title: str
    parts: list[str | Drawing]
    gist: str = ""
    scores: str = ""


def drawing(draw: Callable[[Sequence[Row], Path], list[Path]], rows: Sequence[Row], name: str, caption: str) -> Drawing:
    """Draws rows by a function of report.figures.

    Raises:
        InputError: the rows cannot be drawn.
    """
    with tempfile.TemporaryDirectory() as folder:
        csv, svg, _ = draw(rows, Path(folder) / name)
        return Drawing(svg.read_text(encoding="utf-8"), csv.read_text(encoding="utf-8"), f"{name}.csv", caption)


def write_report(path: Path, *, title: str, notes: Sequence[str], sections: Sequence[Section]) -> None:
    """Writes the page, whole or not at all; a missing folder is made.

    Args:
        notes: what a reader must know first, as plain text.
    """
    body = [_summary(sections)]
    drawn = 0
    for index, section in enumerate(sections):
        body.append(f'<section aria-labelledby="s{index}"><h2 id="s{index}">{html.escape(section.title)}</h2>')
        for part in section.parts:
            drawn += isinstance(part, Drawing)
            body.append(_figure(part, drawn) if isinstance(part, Drawing) else part)
        body.append("</section>")
    page = (
        f"{_head(title)}<body>"
        '<a class="skip" href="#main">Skip to the results</a>'
        f'<main id="main" tabindex="-1"><h1>{html.escape(title)}</h1>{"".join(map(note, notes))}{"".join(body)}</main>'
        f"<script>{_script()}</script></body></html>\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, page.encode())


def _head(title: str) -> str:
    digest = base64.b64encode(hashlib.sha256(_script().encode()).digest()).decode()
    policy = (
        "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'"
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>{html.escape(title)}</title>"
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="referrer" content="no-referrer">'
        '<link rel="icon" href="data:,">'  # a browser asks the server for one otherwise
        f"<style>{STYLE_FILE.read_text(encoding='utf-8')}</style></head>"
    )


def _script() -> str:
    return SCRIPT_FILE.read_text(encoding="utf-8")


def _summary(sections: Sequence[Section]) -> str:
    """The scores of all evaluations, then what is on the page."""
    contents = "".join(
        f'<li><a href="#s{index}">{html.escape(section.title)}</a> {html.escape(section.gist)}</li>'
        for index, section in enumerate(sections)
    )
    scores = "".join(section.scores for section in sections)
    return (
        f'<section aria-labelledby="summary"><h2 id="summary">Summary</h2>{scores}'
        f'<nav aria-label="Contents"><ul>{contents}</ul></nav></section>'
    )


def heading(text: str) -> str:
    """A heading within a section, of plain text."""
    return f"<h3>{html.escape(text)}</h3>"


def paragraph(text: str) -> str:
    """Plain text as a paragraph."""
    return f"<p>{html.escape(text)}</p>"


def note(text: str) -> str:
    """Plain text that a reader must not miss."""
    return f'<p class="note">{html.escape(text)}</p>'


def table(caption: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of plain text; the first column names the rows, columns of numbers stand to the right."""
    columns = list(zip(*rows, strict=True)) or [()] * len(header)
    aligned = [' class="number"' if i and all(map(NUMBER.fullmatch, column)) else "" for i, column in enumerate(columns)]
    head = "".join(f'<th{side} scope="col">{html.escape(cell)}</th>' for side, cell in zip(aligned, header, strict=True))
    body = "".join(f"<tr>{_cells(row, aligned)}</tr>" for row in rows)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{html.escape(caption)}"><table>'
        f"<caption><span>{html.escape(caption)}</span></caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cells(row: Sequence[str], aligned: Sequence[str]) -> str:
    first = f'<th scope="row">{html.escape(row[0])}</th>'
    return first + "".join(f"<td{side}>{html.escape(cell)}</td>" for side, cell in zip(aligned[1:], row[1:], strict=True))


def details(summary: str, body: str, *, opened: bool = False) -> str:
    """HTML that can be folded away, and is at first unless `opened`; printed it is unfolded."""
    return f"<details{' open' if opened else ''}><summary>{html.escape(summary)}</summary>{body}</details>"


def settings(values: Any) -> str:
    """Plain data, folded away."""
    return details("Settings", f'<pre tabindex="0">{html.escape(json.dumps(values, indent=1))}</pre>')


def gallery(images: Sequence[str]) -> str:
    """Figures of `image` side by side, as many as there is room for."""
    return f'<div class="gallery">{"".join(images)}</div>'


def image(caption: str, picture: bytes | Image.Image, *, alt: str) -> str:
    """An image with its caption.

    Raises:
        InputError: the bytes are no image that can be read.
    """
    source = data_url(*small(picture, IMAGE_SIDE))
    return f'<figure><img alt="{html.escape(alt)}" src="{source}"><figcaption>{html.escape(caption)}</figcaption></figure>'


def _figure(drawing: Drawing, number: int) -> str:
    text = html.escape(f"Figure {number}. {drawing.caption}")
    data = base64.b64encode(drawing.csv.encode()).decode()
    link = f'<a download="{html.escape(drawing.name)}" href="data:text/csv;base64,{data}">numbers (CSV)</a>'
    # The SVG is wider than a phone; it scrolls there, since shrunk its labels could not be read.
    return (
        f'<figure class="drawing"><div class="scroll" tabindex="0" role="region" aria-label="Figure {number}">'
        f"{_inline(drawing.svg, f'f{number}-', text)}</div><figcaption>{text} {link}</figcaption></figure>"
    )


def _inline(svg: str, prefix: str, label: str) -> str:
    """The SVG as an element of a page: ids made unique by a prefix, no namespaces, which HTML knows by itself."""

    def adapt(tag: re.Match[str]) -> str:
        text = re.sub(r'\s(id="|href="#)', rf" \g<1>{prefix}", tag[0].replace(" xlink:href=", " href="))
        return re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text).replace("url(#", f"url(#{prefix}")

    element = re.sub(r"<[^>]*>", adapt, svg[svg.index("<svg") :])
    width = re.search(r'width="([\d.]+pt)"', element)
    style = f' style="--width:{width[1]}"' if width else ""
    return element.replace("<svg", f'<svg role="img" aria-label="{label}"{style}', 1)
