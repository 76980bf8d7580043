"""Parses the page of a report: text, tags and references."""

from __future__ import annotations

import re
from html.parser import HTMLParser

_URL = re.compile(r"url\(\s*[\"']?([^\"')]+)")
_REFERRING = ("src", "href", "xlink:href", "srcset", "data", "action", "poster")


class Page(HTMLParser):
    """The content of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.references: list[str] = []
        self.images: list[str] = []
        self.ids: list[str] = []
        self.sections: list[str] = []
        self.policy = ""
        self._texts: list[str] = []
        self._open: list[str] = []

    @property
    def text(self) -> str:
        """Return the text of the body with normalised white space."""
        return " ".join(" ".join(self._texts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """See the base class."""
        self.tags.add(tag)
        self._open.append(tag)
        values = dict(attrs)
        if tag == "meta" and values.get("http-equiv"):
            self.policy = values.get("content") or ""
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in _REFERRING:
                self.references.append(value or "")
            elif value and not name.startswith("xmlns"):
                self.references += _URL.findall(value)
            assert not name.startswith("on"), f"{tag} {name}"
        if tag == "img":
            self.images.append(values.get("src") or "")

    def handle_endtag(self, tag: str) -> None:
        """See the base class."""
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        """See the base class."""
        inside = self._open[-1] if self._open else ""
        if inside == "style":
            self.references += _URL.findall(data)
        elif inside == "h2":
            self.sections.append(data)
        if inside not in ("style", "title", "script") and data.strip():
            self._texts.append(data.strip())


def read_page(text: str) -> Page:
    """Parse a page."""
    page = Page()
    page.feed(text)
    page.close()
    return page


def headings_of(markdown: str) -> list[str]:
    """Return the second-level headings."""
    return re.findall(r"^## (.+)$", markdown, flags=re.MULTILINE)
