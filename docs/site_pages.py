"""Hooks of mkdocs.yml: files of the repository outside docs/ become pages of the site, and links to them lead there.

Pages are written for GitHub, with links relative to the file that they stand in: `docs/x.md` in README.md, `../tpu/README.md`
in docs/. On the site such a file is another page (PAGES), a part of the page of all configurations, or a file to download.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "tpu/README.md": "tpu.md",
    "tpu/TROUBLESHOOTING.md": "tpu_troubleshooting.md",
    "lsg_jax/embedded/checkpoint/README.md": "embedded_model.md",
}
"""File of the repository -> page of the site."""

DOWNLOADS = ("CITATION.cff", "LICENSE", "notebooks/look.ipynb")
CONFIGS = "configs.md"
LINK = re.compile(r"(```.*?^```|`[^`\n]*`)|\]\(([^)#\s]*)(#[^)\s]*)?\)", re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds what lies outside docs/."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for source in DOWNLOADS:
        files.append(File.generated(config, source, abs_src_path=os.fspath(ROOT / source)))
    files.append(File.generated(config, CONFIGS, content=configurations()))
    return files


def configurations() -> str:
    """Every file of configs/ on one page."""
    parts = ["# Configurations", "The files of `configs/`, as `lsg train` and other commands take them."]
    for path in sorted((ROOT / "configs").glob("*.toml")):
        parts += [f"## {path.name} {{ #{path.name} }}", f"```toml\n{path.read_text(encoding='utf-8')}```"]
    return "\n\n".join(parts) + "\n"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page with links of the site in place of those of the repository."""
    here = page.file.src_uri
    source = next((source for source, name in PAGES.items() if name == here), f"docs/{here}")

    def one(match: re.Match[str]) -> str:
        code, target, anchor = match.groups()
        if code or not target or "://" in target or target.startswith("mailto:"):
            return match[0]
        found = site_path(posixpath.normpath(posixpath.join(posixpath.dirname(source), target)))
        if found is None:
            return match[0]
        name, own_anchor = found
        return f"]({posixpath.relpath(name, posixpath.dirname(here) or '.')}{anchor or own_anchor})"

    return LINK.sub(one, markdown)


def site_path(path: str) -> tuple[str, str] | None:
    """Page or file of the site, and anchor, of a path in the repository; None for what is not there, an error of the build."""
    if path == "configs" or path.startswith("configs/"):
        return CONFIGS, f"#{path.partition('/')[2]}" if "/" in path else ""
    if path in DOWNLOADS:
        return path, ""
    if path.startswith("docs/"):
        return path.removeprefix("docs/"), ""
    return (PAGES[path], "") if path in PAGES else None


def on_post_build(config: MkDocsConfig, **_: Any) -> None:
    """Refuses pages that would fetch something from elsewhere when they are read."""
    fetched = re.compile(
        r"<(?:script|img|iframe|source)[^>]*\ssrc=[\"']?(?:https?:)?//|<link[^>]*rel=\"?stylesheet[^>]*href=\"?https?://"
    )
    for path in Path(config.site_dir).rglob("*.html"):
        if found := fetched.search(path.read_text(encoding="utf-8")):
            raise SystemExit(f"{path}: fetches from elsewhere: {found[0]}")
