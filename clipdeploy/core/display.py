"""Displays results as tables in terminals and notebooks.

A result defines ``__rich__`` once.  A terminal prints that with rich; a notebook calls
``_repr_html_`` and gets the same tables and lines as HTML.  File names and class names are escaped:
no cell is interpreted as markup.  rich is imported when a result is shown.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import fields
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, TypeAlias, cast

if TYPE_CHECKING:
    from rich.console import ConsoleRenderable, Group, RichCast
    from rich.table import Table

__all__ = ["Renderable", "Shown", "columns", "facts", "stacked"]

Renderable: TypeAlias = "ConsoleRenderable | RichCast | str"


# Longest text of a field in a repr, in characters.
_LONGEST = 60


class Shown:
    """Base class of results: ``__rich__`` for terminals, ``_repr_html_`` for notebooks.

    Results are dataclasses.  Their repr names every field but abbreviates long values: a notebook
    stores the repr of a cell's result beside its HTML, and a calibration holds megabytes.
    """

    __slots__ = ()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # Here, because @dataclass writes a __repr__ into a class that has none of its own.
        if "__repr__" not in vars(cls):
            cls.__repr__ = Shown.__repr__  # type: ignore[method-assign]

    def __repr__(self) -> str:
        values = ((each.name, getattr(self, each.name)) for each in fields(cast("Any", self)))
        return f"{type(self).__name__}({', '.join(f'{n}={_brief(v)}' for n, v in values)})"

    def __rich__(self) -> Renderable:
        """Return what a terminal prints; each result overrides this."""
        return repr(self)

    def _repr_html_(self) -> str:
        from clipdeploy.core.display_html import to_html

        return to_html(self)


def _brief(value: object) -> str:
    """A scalar as it is, a collection by its size, another object by its class."""
    if isinstance(value, Collection) and not isinstance(value, str | bytes):
        return f"<{len(value)} items>"
    if isinstance(value, PurePath):
        value = str(value)
    if value is not None and not isinstance(value, str | bytes | int | float):
        return f"<{type(value).__name__}>"
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


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
