"""The site's configuration against the pages, without mkdocs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from doc_pages import Page

ROOT = Path(__file__).resolve().parents[1]


class Loader(yaml.SafeLoader):
    """Reads the names of Python objects, which mkdocs imports, as None."""


Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)


def config() -> dict[str, Any]:
    loaded = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)
    assert isinstance(loaded, dict)
    return loaded


def pages(entry: object) -> Iterator[str]:
    """The files of a part of the navigation."""
    if isinstance(entry, str):
        yield entry
    else:
        children = entry.values() if isinstance(entry, dict) else entry
        for child in children:  # type: ignore[attr-defined]
            yield from pages(child)


def test_every_page_is_in_the_navigation_once() -> None:
    docs = ROOT / config()["docs_dir"]
    written = {path.relative_to(docs).as_posix() for path in docs.rglob("*.md")}
    assert sorted(pages(config()["nav"])) == sorted(written)


def test_broken_links_end_the_build() -> None:
    assert config()["strict"] is True
    assert set(config()["validation"].values()) == {"warn"}


def test_no_font_comes_from_another_server() -> None:
    assert config()["theme"]["font"] is False


def test_pages_link_to_nothing_outside_the_site() -> None:
    docs = ROOT / "docs"
    for path in docs.glob("*.md"):
        outside = [file for file, _ in Page.read(path).links() if file.startswith("..")]
        assert outside == [], path.name


def test_lists_begin_after_an_empty_line() -> None:
    """Otherwise the site shows them as part of the paragraph, unlike GitHub."""
    for path in (ROOT / "docs").glob("*.md"):
        text = Page.read(path).prose()
        joined = re.findall(r"^(?![-*\d|#> ]|\s*$)(.+)\n(?:[-*]|1\.) .+", text, flags=re.MULTILINE)
        assert joined == [], path.name
