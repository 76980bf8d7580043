"""What a notebook shows: well-formed HTML, nothing of a name read as markup.

Covers: clipdeploy/core/display_html.py.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from calibration.table import load_table
from clipdeploy.core.display import Renderable, Shown, facts
from clipdeploy.core.display_html import to_html
from clipdeploy.models import cards
from clipdeploy.workspace.folder import Workspace

HOSTILE = '<script>alert("x")</script> & [bold]model[/bold]'


class _Page(HTMLParser):
    """Tags that are open, the text, and every tag that was seen."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@dataclass(frozen=True)
class Named(Shown):
    name: str

    def __rich__(self) -> Renderable:
        table = Table("artifact", box=None)
        table.add_column(Text("top-1 <%>"), justify="right")
        table.add_row(self.name, Text("99.40", style="green"), style="bold")
        lines = Text(f"  {self.name}: ").append(self.name, style="red")
        return Group(Text(self.name, style="bold"), table, Text(""), Padding(lines, (0, 0, 0, 2)))


def page(shown: object) -> _Page:
    parsed = _Page(to_html(shown))
    assert parsed.open == []
    return parsed


def test_a_name_is_text_wherever_it_stands() -> None:
    found = page(Named(HOSTILE))
    assert found.text.count(HOSTILE) == 4
    assert set(found.seen) <= {"table", "thead", "tbody", "tr", "th", "td", "div", "span"}


def test_without_escaping_it_would_be_a_script() -> None:
    # The check above can fail: this is what it would see.
    assert "script" in _Page(HOSTILE).seen


def test_tables_keep_rows_columns_and_sides() -> None:
    html = to_html(Named("int8 graph"))
    found = _Page(html)
    assert [found.seen.count(tag) for tag in ("table", "tr", "th", "td")] == [1, 2, 2, 2]
    assert "text-align:right" in html
    assert "color: #008000" in html


def test_what_ipython_calls_is_what_rich_prints() -> None:
    shown = Named("int8 graph")
    printed = io.StringIO()
    Console(file=printed, width=80).print(shown)
    assert "".join(printed.getvalue().split()) == "".join(page(shown).text.split())
    assert shown._repr_html_() == to_html(shown)


def test_facts_have_no_header() -> None:
    found = page(facts([("graph", HOSTILE), ("SHA-256", "0")]))
    assert "th" not in found.seen
    assert HOSTILE in found.text


@pytest.mark.parametrize("empty", ["", Text(""), Group(), Text("\n")])
def test_nothing_is_nothing(empty: object) -> None:
    assert to_html(empty) == ""


def test_a_table_without_columns_is_still_a_table() -> None:
    assert page(Table()).seen == ["table", "thead", "tr", "tbody"]


@dataclass(frozen=True)
class _Long(Shown):
    name: str
    path: Path
    rows: tuple[int, ...]
    table: dict[str, int]
    made: object
    score: float | None = None


def test_the_repr_of_a_result_is_short() -> None:
    result = _Long("x" * 1000, Path("a/b.onnx"), tuple(range(9999)), {"a": 1}, Path, 0.5)
    assert repr(result) == (
        f"_Long(name='{'x' * 56}..., path='a/b.onnx', rows=<9999 items>, table=<1 items>, "
        "made=<type>, score=0.5)"
    )


def test_a_calibrations_repr_is_short_too(demo_workspace: Workspace) -> None:
    table = load_table(demo_workspace.calibration(cards.DEMO))
    assert len(repr(table)) < 1000
    assert "clip-vit-demo" in repr(table)
