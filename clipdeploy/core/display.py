"""Results as tables, in a terminal and in a notebook.

A result says once how it looks, as something that rich can print.  A terminal prints that; a
notebook, which calls ``_repr_html_``, gets the same tables and lines as HTML.  Whatever stands in
them is text: file names and class names are escaped, and no cell is read as markup.  rich is
imported when a result is shown.
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
    """A result that prints itself with rich and shows itself in a notebook."""

    __slots__ = ()

    def __rich__(self) -> Renderable:
        """What a terminal prints; every result has its own."""
        return repr(self)

    def _repr_html_(self) -> str:
        from clipdeploy.core.display_html import to_html

        return to_html(self)


def columns(titles: Sequence[str], rows: Iterable[Sequence[str]], *, left: Sequence[str]) -> Table:
    """A table; the columns named in ``left`` hold text, all others hold numbers."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for title in titles:
        table.add_column(title, justify="left" if title in left else "right")
    for row in rows:
        # Text: brackets in a name are no markup.
        table.add_row(*map(Text, row))
    return table


def stacked(*parts: Renderable) -> Group:
    """The parts below each other; a str is shown as it is, without markup."""
    from rich.console import Group
    from rich.text import Text

    return Group(*(Text(part) if isinstance(part, str) else part for part in parts))


def facts(rows: Iterable[tuple[str, str]]) -> Table:
    """A name and what it is, a row each."""
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=None, pad_edge=False, show_header=False)
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, text in rows:
        grid.add_row(name, Text(text))
    return grid
