"""Original layouts, one file each. `LAYOUTS` is the only place that lists them.

A layout is a translation in front of the families: its config.json and tensor names become those of the Hugging Face layout,
and everything after that is the same. A new layout is one file with a `Layout` and a row here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converters.layouts import llava, tinyllava
from converters.layouts.layout import Layout

LAYOUTS: tuple[Layout, ...] = (tinyllava.LAYOUT, llava.LAYOUT)


def original_layout(config: Mapping[str, Any]) -> Layout | None:
    """The original layout of a config.json; None for the Hugging Face layout."""
    return next((layout for layout in LAYOUTS if layout.matches(config)), None)
