"""Displays results as tables in terminals and notebooks.

A result defines ``__rich__`` once.  A terminal prints that with rich; a notebook calls
``_repr_html_`` and gets the same tables and lines as HTML.  File names and class names are escaped:
no cell is interpreted as markup.  rich is imported when a result is shown.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from rich.console import ConsoleRenderable, Group, RichCast
    from rich.table import Table

__all__ = ["Renderable", "Shown", "columns", "facts", "stacked"]

Renderable: TypeAlias = "ConsoleRenderable | RichCast | str"


class Shown:
    """Base class of results: ``__rich__`` for terminals, ``_repr_html_`` for notebooks."""

    __slots__ = ()

    def __rich__(self) -> Renderable:
        """Return what a terminal prints; each result overrides this."""
        return repr(self)

    def _repr_html_(self) -> str:
        from clipdeploy.core.display_html import to_html

        return to_html(self)


def columns(titles: Sequence[str], rows: Iterable[Sequence[str]], *, left: Sequence[str]) -> Table:
    """Return a table; columns named in ``left`` are left-aligned, all others right-aligned."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for title in titles:
        table.add_column(title, justify="left" if title in left else "right")
    for row in rows:
        # Text, so that brackets in a name are not interpreted as markup.
        table.add_row(*map(Text, row))
    return table


def stacked(*parts: Renderable) -> Group:
    """Stack parts vertically; a str is shown without markup."""
    from rich.console import Group
    from rich.text import Text

    return Group(*(Text(part) if isinstance(part, str) else part for part in parts))


def facts(rows: Iterable[tuple[str, str]]) -> Table:
    """Return a table with one row per name and value."""
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=None, pad_edge=False, show_header=False)
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, text in rows:
        grid.add_row(name, Text(text))
    return grid
