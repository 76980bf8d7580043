"""Parses Markdown pages: code blocks, commands, links and anchors.

A block is executed if the line before it is the invisible comment ``<!-- runs -->``.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

RUNS = "<!-- runs -->"
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?:^|\n)\n((?: {4}.*\n)(?:(?: {4}.*)?\n)*)")
_SPAN = re.compile(r"`([^`]+)`")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", flags=re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A code block; ``runs`` if it is marked to be executed.

    ``language`` is ``text`` for a fence without one, and empty for an indented block.
    """

    language: str
    text: str
    runs: bool

    def commands(self) -> Iterator[list[str]]:
        """Yield the arguments of each line that calls clipdeploy."""
        if self.language not in ("", "sh", "console"):
            return
        for line in re.sub(r"\s*\\\n\s*", " ", self.text).splitlines():
            line = re.sub(r"[\[\]]|\s+#.*", "", line.strip().removeprefix("$ "))
            # Two spaces separate the columns of a table.
            if line.startswith("clipdeploy ") and "  " not in line:
                call = re.split(r"\s(?:[|>]|&&|\|\|)\s", line)[0]
                yield shlex.split(call)[1:]


@dataclass(frozen=True)
class Page:
    """A Markdown file."""

    path: Path
    text: str

    @classmethod
    def read(cls, path: Path) -> Page:
        return cls(path, path.read_text(encoding="utf-8"))

    def blocks(self) -> list[Block]:
        """Yield fenced blocks, then indented ones."""
        fenced = [
            Block(found[1] or "text", found[2], self.text[: found.start()].rstrip().endswith(RUNS))
            for found in _FENCE.finditer(self.text)
        ]
        return fenced + [Block("", found[1], False) for found in _INDENTED.finditer(self.prose())]

    def prose(self) -> str:
        """Return the text without fenced blocks."""
        return _FENCE.sub("", self.text)

    def spans(self) -> list[str]:
        """Return all text in single backticks."""
        return [re.sub(r"\s+", " ", span) for span in _SPAN.findall(self.prose())]

    def links(self) -> list[tuple[str, str]]:
        """Yield (file, anchor) of each link to another page or an anchor of this one."""
        found = _LINK.findall(_SPAN.sub("", self.prose()))
        inner = [link for link in found if not re.match(r"[a-z]+:", link)]
        return [(link.partition("#")[0], link.partition("#")[2]) for link in inner]

    def anchors(self) -> set[str]:
        """Return the anchors that GitHub generates for the headings."""
        plain = (re.sub(r"[^\w\- ]", "", title.lower()) for title in _HEADING.findall(self.prose()))
        return {title.strip().replace(" ", "-") for title in plain}
