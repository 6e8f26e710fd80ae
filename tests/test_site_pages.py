"""Links that are right on GitHub are right on the site."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("mkdocs", reason="pip install -e '.[docs]'")
ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("site_pages", ROOT / "docs" / "site_pages.py")
assert spec and spec.loader
site_pages = importlib.util.module_from_spec(spec)
spec.loader.exec_module(site_pages)


@pytest.mark.parametrize(
    ("page", "link", "on_site"),
    [
        ("index.md", "docs/speed.md", "speed.md"),
        ("index.md", "docs/pictures/a_look.png", "pictures/a_look.png"),
        ("index.md", "configs", "configs.md"),
        ("index.md", "LICENSE", "LICENSE"),
        ("scaling.md", "../tpu/README.md#storage", "tpu.md#storage"),
        ("scaling.md", "../configs/tiny.toml", "configs.md#tiny.toml"),
        ("scaling.md", "speed.md#x", "speed.md#x"),
        ("scaling.md", "#below", "#below"),
        ("scaling.md", "https://arxiv.org/abs/1", "https://arxiv.org/abs/1"),
        ("api/look.md", "../../CONTRIBUTING.md#a-method", "../contributing.md#a-method"),
        ("tpu.md", "TROUBLESHOOTING.md", "tpu_troubleshooting.md"),
        ("embedded_model.md", "../../../docs/tutorial.md", "tutorial.md"),
        ("scaling.md", "../lsg_jax/vlm.py", "../lsg_jax/vlm.py"),  # no page of the site: the strict build names it
    ],
)
def test_links(page, link, on_site):
    text = f"[a]({{}}) and `[b]({link})`\n\n```text\n[c]({link})\n```\n"
    stands = SimpleNamespace(file=SimpleNamespace(src_uri=page))
    assert site_pages.on_page_markdown(text.format(link), stands, None, None) == text.format(on_site)


def test_every_configuration_is_on_its_page():
    text = site_pages.configurations()
    assert all(f"## {path.name} " in text for path in ROOT.glob("configs/*.toml"))


def test_what_a_page_would_fetch_is_refused(tmp_path):
    config = SimpleNamespace(site_dir=str(tmp_path))
    (tmp_path / "a.html").write_text('<script src="search.js"></script><a href="https://arxiv.org">paper</a>')
    site_pages.on_post_build(config)
    for fetched in ('<script async src="https://x.org/a.js">', "<img alt='' src=//x.org/a.png>"):
        (tmp_path / "b.html").write_text(fetched)
        with pytest.raises(SystemExit, match=r"b\.html"):
            site_pages.on_post_build(config)
