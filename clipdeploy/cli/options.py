"""Options of clipdeploy: their defaults in the help, and the names that they used to have."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

if TYPE_CHECKING:
    from click.parser import _OptionParser

__all__ = ["FormerName", "Option", "long_name", "note_former_name", "option", "renamed"]

F = TypeVar("F", bound=Callable[..., Any])

_META = "clipdeploy.renamed"


class FormerName:
    """What the parser records where an option was given by an old name."""

    def __init__(self, option: Option, old: str, new: str) -> None:
        self.option, self.old, self.new = option, old, new

    def __getattr__(self, name: str) -> Any:
        # What click's parser asks of an option.
        return getattr(self.option, name)


class Option(click.Option):
    """An option with its default in the help.

    ``default_text`` describes a default that is not one value.  ``formerly`` maps old names to the
    present ones: an old name works, is not in the help, and is answered with a note.
    """

    def __init__(
        self,
        param_decls: Sequence[str] | None = None,
        *,
        default_text: str = "",
        formerly: Mapping[str, str] | None = None,
        **attrs: Any,
    ) -> None:
        attrs.setdefault("show_default", True)
        super().__init__(param_decls, **attrs)
        self.formerly = dict(formerly or {})
        self._default_text = default_text

    def get_help_extra(self, ctx: click.Context) -> Any:
        """See :class:`click.Option`; without the parentheses around ``default_text``."""
        extra = super().get_help_extra(ctx)
        if self._default_text:
            extra["default"] = self._default_text
        return extra

    def add_to_parser(self, parser: _OptionParser, ctx: click.Context) -> None:
        """See :class:`click.Option`; the old names as well."""
        super().add_to_parser(parser, ctx)
        for old, new in self.formerly.items():
            super().add_to_parser(cast(Any, _Renaming(parser, self, old, new)), ctx)


class _Renaming:
    """Passes an option on to a parser under its old name."""

    def __init__(self, parser: _OptionParser, option: Option, old: str, new: str) -> None:
        self._parser, self._former = parser, FormerName(option, old, new)

    def add_option(self, *, obj: object, opts: Sequence[str], **rest: Any) -> None:
        """See click's parser."""
        if self._former.new in opts:
            self._parser.add_option(cast(Any, self._former), [self._former.old], **rest)


def option(*names: str, **attrs: Any) -> Callable[[F], F]:
    """``click.option`` with :class:`Option`, or with the ``cls`` that is given."""
    return click.option(*names, **{"cls": Option, **attrs})


def long_name(param: click.Option, *, negative: bool = False) -> str:
    """The name by which messages call an option: ``--output`` for ``-o, --output``."""
    names = param.secondary_opts if negative and param.secondary_opts else param.opts
    return next((name for name in names if name.startswith("--")), names[0])


def note_former_name(ctx: click.Context, found: FormerName) -> None:
    """Remember that an old name was used; :func:`renamed` returns the notes."""
    note = f"{found.old} is now {found.new}"
    if note not in (notes := ctx.meta.setdefault(_META, [])):
        notes.append(note)


def renamed(ctx: click.Context) -> list[str]:
    """One note for each old name on the command line."""
    notes: list[str] = ctx.meta.get(_META, [])
    return notes
