"""Results as tables, in a terminal and in a notebook.

A result says once how it looks, as something that rich can print.  A terminal prints that; a
notebook, which calls ``_repr_html_``, gets the same tables and lines as HTML.  Whatever stands in
them is text: file names and class names are escaped, and no cell is read as markup.  rich is
imported when a result is shown.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from rich.console import ConsoleRenderable, RichCast
    from rich.table import Table

__all__ = ["Renderable", "Shown", "facts"]

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
