"""Writes a report as one self-contained HTML page: text, tables, inline SVG with its numbers as CSV, and images.

The page loads nothing. Its Content-Security-Policy says so to the browser, and allows no script but the page's own.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lsg_jax.files import write_atomic
from lsg_jax.report.parts import Section

STYLE_FILE, SCRIPT_FILE = Path(__file__).with_name("page.css"), Path(__file__).with_name("page.js")


def write_report(path: Path, *, title: str, notes: Sequence[str], sections: Sequence[Section]) -> None:
    """Writes the page atomically; a missing folder is created.

    Args:
        notes: warnings below the title.
    """
    script = SCRIPT_FILE.read_text(encoding="utf-8")
    page = (
        _templates()
        .get_template("page.html.j2")
        .render(
            title=title,
            notes=notes,
            sections=sections,
            style=Markup(STYLE_FILE.read_text(encoding="utf-8")),
            script=Markup(script),
            script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        )
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, page.encode())


@functools.cache
def _templates() -> Environment:
    found = Environment(
        loader=PackageLoader("lsg_jax.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.globals["inline_svg"] = inline_svg
    return found


@dataclass(frozen=True)
class InlineSvg:
    """An SVG file as an element of a page: attributes and content of <svg>, and its width in points, "" if it has none."""

    attributes: Markup
    content: Markup
    width: str


def inline_svg(svg: str, prefix: str) -> InlineSvg:
    """Adapts an SVG file to HTML: ids get a prefix that makes them unique, and namespaces go, which HTML implies."""

    def adapt(tag: re.Match[str]) -> str:
        text = re.sub(r'\s(id="|href="#)', rf" \g<1>{prefix}", tag[0].replace(" xlink:href=", " href="))
        return re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text).replace("url(#", f"url(#{prefix}")

    element = re.sub(r"<[^>]*>", adapt, svg[svg.index("<svg") : svg.rindex("</svg>")])
    start, _, content = element.removeprefix("<svg").partition(">")
    width = re.search(r'width="([\d.]+pt)"', start)
    return InlineSvg(Markup(start), Markup(content), width[1] if width else "")
