"""Writes a report as one self-contained HTML page: text, tables, inline SVG with its numbers as CSV, and images.

The page loads nothing. Its Content-Security-Policy says so to the browser, and allows no script but the page's own.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lsg_jax.eval.results import EvaluationResult
from lsg_jax.files import write_atomic
from lsg_jax.report.drawing import GRID, INK, PAPER
from lsg_jax.report.gains import BAND
from lsg_jax.report.glossary import TERMS, explained, id_of
from lsg_jax.report.parts import GROUPS, Details, Part, Section, as_json
from lsg_jax.report.pivot import found_in, pivot

STYLE_FILE, SCRIPT_FILE = Path(__file__).with_name("page.css"), Path(__file__).with_name("page.js")
SCREEN = {INK.lower(): "--ink", PAPER.lower(): "--paper", GRID.lower(): "--grid", BAND.lower(): "--band"}
"""Colours of figures -> those of the page, page.css."""

THEMED = re.compile("|".join(SCREEN), re.IGNORECASE)
SETTINGS_LEAD = "Words in these settings: criterion, tau, key_scale, v_sink_rest, gate ratio, remat."


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
            found=_found(sections),
            contents=_contents(sections),
            terms=[(term, text) for term, (text, _) in sorted(TERMS.items(), key=lambda item: item[0].lower())],
            style=Markup(STYLE_FILE.read_text(encoding="utf-8")),
            script=Markup(script),
            script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        )
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, page.encode())


@dataclass(frozen=True)
class Entry:
    """A section as the page has it: `lead` is a paragraph below the heading."""

    id: str
    title: str
    gist: str
    parts: Sequence[Part]
    lead: str = ""


def _ordered(sections: Sequence[Section]) -> list[Section]:
    """By group: sinks, results, training; within a group as given."""
    return sorted(sections, key=lambda section: GROUPS.index(section.group))


def _found(sections: Sequence[Section]) -> list[str]:
    """What was found, in the order of the page; all evaluations at once. Of several studies of a kind each is named."""
    kind = lambda section: section.title.partition(": ")[0]
    counts = Counter(map(kind, sections))
    named = lambda section: f"{section.title}: " if counts[kind(section)] > 1 else ""
    first, later = (
        [named(each) + text for each in _ordered(sections) if (each.group == "sinks") == sinks for text in each.found]
        for sinks in (True, False)
    )
    return [*first, *found_in([section.evaluation for section in sections if section.evaluation is not None]), *later]


def _contents(sections: Sequence[Section]) -> list[Entry]:
    """The sections in order, all evaluations in one table before the results, and all settings at the end."""
    ordered = _ordered(sections)
    entries = [Entry(f"s{index}", each.title, each.gist, each.parts) for index, each in enumerate(ordered)]
    if evaluations := [each.evaluation for each in ordered if each.evaluation is not None]:
        first = sum(each.group == "sinks" for each in ordered)
        entries.insert(first, _scores(evaluations))
    if settings := [Details(each.title, [as_json(each.settings)]) for each in ordered if each.settings is not None]:
        entries.append(Entry("settings", "Settings", "what each was run with", settings, SETTINGS_LEAD))
    return entries


def _scores(evaluations: Sequence[tuple[str, EvaluationResult]]) -> Entry:
    caption = "Scores with intervals at 95 %, and differences to the base"
    table = pivot(caption, evaluations)
    parts: list[Part] = [table]
    every = pivot("Every task and metric, and differences to the base", evaluations, every_metric=True)
    if len(every.rows) > len(table.rows):
        parts.append(Details(f"Every task and metric: {len(every.rows)} rows", [every]))
    lead = "A triangle marks a difference for the better or the worse whose interval excludes 0."
    asked = list(dict.fromkeys(name for _, result in evaluations for name in result.benchmarks))
    return Entry("scores", "Scores", f"all in one table: {', '.join(asked)}", parts, lead)


@functools.cache
def _templates() -> Environment:
    found = Environment(
        loader=PackageLoader("lsg_jax.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.globals |= {"inline_svg": inline_svg, "explained": explained, "id_of": id_of}
    return found


@dataclass(frozen=True)
class InlineSvg:
    """An SVG file as an element of a page: attributes and content of <svg>, and its width in points, "" if it has none."""

    attributes: Markup
    content: Markup
    width: str


def inline_svg(svg: str, prefix: str) -> InlineSvg:
    """Adapts an SVG file to HTML: ids get a prefix that makes them unique, namespaces go, which HTML implies, and ink
    and paper become the page's, which differ on a dark screen.
    """

    def adapt(tag: re.Match[str]) -> str:
        text = re.sub(r'\s(id="|href="#)', rf" \g<1>{prefix}", tag[0].replace(" xlink:href=", " href="))
        return re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text).replace("url(#", f"url(#{prefix}")

    element = re.sub(r"<[^>]*>", adapt, svg[svg.index("<svg") : svg.rindex("</svg>")])
    element = THEMED.sub(lambda colour: f"var({SCREEN[colour[0].lower()]}, {colour[0]})", element)
    start, _, content = element.removeprefix("<svg").partition(">")
    width = re.search(r'width="([\d.]+pt)"', start)
    return InlineSvg(Markup(start), Markup(content), width[1] if width else "")
