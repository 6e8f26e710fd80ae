"""A `Look` as a page: one HTML file that needs no server, and the same inside a notebook.

The page loads nothing. Its Content-Security-Policy says so to the browser, and allows no script but the page's own.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lsg_jax.look.look import Look
from lsg_jax.look.page_data import HEAD_BYTES, look_data, picture_data

FOLDER = Path(__file__).parent
SCRIPTS = ("maps.js", "pane.js", "page.js")
NOTEBOOK_HEIGHT = 760  # CSS pixels


def page_html(*looks: Look, titles: Sequence[str] = (), state: Mapping[str, Any] | None = None) -> str:
    """A self-contained HTML page of one look, or of several at the same images side by side.

    The maps of every head are in it while they take at most 2 MB; beyond that, means over heads are.

    Args:
        titles: what stands above the answers; none for a single look.
        state: what is chosen at first: `token`, `layer`, `head` (-1: all), `map`, `opacity`, `v`, `l` and `chart`.
    """
    size = sum(len(look.maps) * look.maps["raw"].size for look in looks)
    named = [*titles, *[""] * len(looks)]
    model = [looks[0].model.get(key) for key in ("name", "method")]
    payload = {
        "pictures": picture_data(looks[0].pictures),
        "looks": [look_data(look, named[index], heads=size <= HEAD_BYTES) for index, look in enumerate(looks)],
        "state": dict(state or {}),
    }
    script = view_script()
    return (
        templates()
        .get_template("page.html.j2")
        .render(
            title=looks[0].prompt,
            model=", ".join(filter(None, model if len(looks) == 1 else model[:1])),
            style=Markup(asset("page.css")),
            script=Markup(script),
            script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            payload=in_script(payload),
        )
    )


def notebook_html(look: Look) -> str:
    """The page in a frame of its own, for Jupyter: neither its style nor its script reaches the notebook."""
    attributes = f'style="width: 100%; height: {NOTEBOOK_HEIGHT}px; border: 0" sandbox="allow-scripts"'
    return f'<iframe title="where the model looks" {attributes} srcdoc="{escape(page_html(look))}"></iframe>'


def in_script(value: Any) -> Markup:
    """JSON that can stand in a script element: nothing in it ends the element."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def view_script() -> str:
    """The scripts of the view, as one."""
    return "".join(map(asset, SCRIPTS))


@functools.cache
def asset(name: str) -> str:
    """The text of a script or style of this folder."""
    return (FOLDER / name).read_text(encoding="utf-8")


@functools.cache
def templates() -> Environment:
    """The pages of this folder."""
    return Environment(
        loader=PackageLoader("lsg_jax.look"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
