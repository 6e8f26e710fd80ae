"""One self-contained HTML page: tables, drawings as inline SVG with their numbers as CSV, images. Nothing is fetched."""

from __future__ import annotations

import base64
import html
import json
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lsg_jax.checkpoint.files import write_atomic
from lsg_jax.report.drawing import Row

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 66rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h2 { margin-top: 3rem; border-top: 1px solid #ccc; padding-top: 1rem }
.scroll { overflow-x: auto } table { border-collapse: collapse; margin: 1rem 0; font-size: .9rem }
caption { text-align: left; font-weight: 600; padding-bottom: .25rem }
th, td { padding: .2rem .75rem; text-align: right; border-bottom: 1px solid #ccc; font-variant-numeric: tabular-nums }
th:first-child, td:first-child { text-align: left }
figure { margin: 1.5rem 0 } figure.image { display: inline-block; margin: .5rem; max-width: 16rem }
figcaption { font-size: .9rem; color: #444 } figure svg { max-width: 100%; height: auto } figure.image img { max-width: 100% }
.note { background: #fff4d6; padding: .5rem 1rem }
pre { font-size: .8rem; overflow-x: auto; background: #f6f6f6; padding: .5rem }
"""


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
    """A part of the page; `parts` are HTML and drawings."""

    title: str
    parts: list[str | Drawing]


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
    contents = "".join(f'<li><a href="#s{i}">{html.escape(s.title)}</a></li>' for i, s in enumerate(sections))
    drawn = 0
    body = []
    for index, section in enumerate(sections):
        body.append(f'<section aria-labelledby="s{index}"><h2 id="s{index}">{html.escape(section.title)}</h2>')
        for part in section.parts:
            drawn += isinstance(part, Drawing)
            body.append(_figure(part, drawn) if isinstance(part, Drawing) else part)
        body.append("</section>")
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><main><h1>{html.escape(title)}</h1>{''.join(map(note, notes))}"
        f'<nav aria-label="Contents"><ul>{contents}</ul></nav>{"".join(body)}</main></body></html>\n'
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, page.encode())


def paragraph(text: str) -> str:
    """Plain text as a paragraph."""
    return f"<p>{html.escape(text)}</p>"


def note(text: str) -> str:
    """Plain text that a reader must not miss."""
    return f'<p class="note">{html.escape(text)}</p>'


def table(caption: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of plain text."""
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{html.escape(caption)}"><table>'
        f"<caption>{html.escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def details(summary: str, body: str) -> str:
    """HTML that is folded away."""
    return f"<details><summary>{html.escape(summary)}</summary>{body}</details>"


def settings(values: Any) -> str:
    """Plain data, folded away."""
    return details("Settings", f"<pre>{html.escape(json.dumps(values, indent=1))}</pre>")


def image(caption: str, png: bytes) -> str:
    """A PNG with its caption."""
    text = html.escape(caption)
    data = base64.b64encode(png).decode()
    return (
        f'<figure class="image"><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'
    )


def _figure(drawing: Drawing, number: int) -> str:
    text = html.escape(f"Figure {number}. {drawing.caption}")
    data = base64.b64encode(drawing.csv.encode()).decode()
    link = f'<a download="{html.escape(drawing.name)}" href="data:text/csv;base64,{data}">numbers (CSV)</a>'
    return f"<figure>{_inline(drawing.svg, f'f{number}-', text)}<figcaption>{text} {link}</figcaption></figure>"


def _inline(svg: str, prefix: str, label: str) -> str:
    """The SVG as an element of a page: ids made unique by a prefix, no namespaces, which HTML knows by itself."""

    def adapt(tag: re.Match[str]) -> str:
        text = re.sub(r'\s(id|xlink:href)="(#?)', lambda m: f' {m[1].removeprefix("xlink:")}="{m[2]}{prefix}', tag[0])
        return re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text).replace("url(#", f"url(#{prefix}")

    element = re.sub(r"<[^>]*>", adapt, svg[svg.index("<svg") :])
    return element.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
