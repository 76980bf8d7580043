"""Converts rich tables and text to HTML for notebooks."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from rich.console import Console, Group, RichCast
from rich.padding import Padding
from rich.style import Style
from rich.table import Table
from rich.text import Text

__all__ = ["to_html"]

_CELL = "text-align:{}; vertical-align:top; white-space:pre-wrap"
_LINE = '<div style="white-space:pre-wrap">{}</div>'
# Only resolves styles; nothing is printed on it.
_CONSOLE = Console(quiet=True, color_system="truecolor", force_terminal=True)


def to_html(shown: object) -> str:
    """Convert a table, a text or a group to HTML; anything else is converted to ``str``."""
    if isinstance(shown, Table):
        return _table(shown)
    if isinstance(shown, Group):
        return "".join(to_html(each) for each in shown.renderables)
    if isinstance(shown, Padding):
        return f'<div style="padding-left:{shown.left}ch">{to_html(shown.renderable)}</div>'
    if isinstance(shown, RichCast):
        return to_html(shown.__rich__())
    return _LINE.format(inline) if (inline := _inline(shown)) else ""


def _inline(content: object) -> str:
    if not isinstance(content, Text):
        return escape(str(content))
    parts = (part for part in content.render(_CONSOLE) if part.text.strip("\n"))
    inner = "".join(_span(escape(part.text), part.style) for part in parts)
    return _span(inner, content.style) if inner else ""


def _css(style: Style | str | None) -> str:
    return _CONSOLE.get_style(style).get_html_style() if style else ""


def _span(html: str, style: Style | str | None) -> str:
    css = _css(style)
    return f'<span style="{escape(css)}">{html}</span>' if css else html


def _table(table: Table) -> str:
    sides = [_CELL.format(column.justify) for column in table.columns]
    rows = zip(*(column.cells for column in table.columns), strict=True)
    body = "".join(
        f'<tr style="{escape(_css(row.style))}">{_cells("td", cells, sides)}</tr>'
        for row, cells in zip(table.rows, rows, strict=True)
    )
    titles = _cells("th", [column.header for column in table.columns], sides)
    head = f"<thead><tr>{titles}</tr></thead>" if table.show_header else ""
    return f"<table>{head}<tbody>{body}</tbody></table>"


def _cells(tag: str, cells: Iterable[object], sides: Iterable[str]) -> str:
    # strict would fail on a table without columns, whose rows are empty.
    pairs = zip(cells, sides, strict=False)
    return "".join(f'<{tag} style="{side}">{_inline(cell)}</{tag}>' for cell, side in pairs)
