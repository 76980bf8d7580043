"""Option types for numbers: each has a range, and a wrong number is reported in one line."""

from __future__ import annotations

from contextlib import suppress
from typing import IO, Any

import click

from clipdeploy.cli.options import long_name
from clipdeploy.cli.text import echo_line
from clipdeploy.core.errors import UsageError
from clipdeploy.core.spans import Span

__all__ = ["EarlyError", "number", "whole_numbers"]

# A range with a higher upper limit only guards against typing errors; the help leaves it out.
_LARGEST_SHOWN = 5000


class EarlyError(click.ClickException):
    """An error found before the command began, shown in one line like all errors."""

    exit_code = UsageError.exit_code

    def show(self, file: IO[Any] | None = None) -> None:
        """See :class:`click.ClickException`."""
        echo_line(f"error: {self.message}", file)


def _described(span: Span) -> str:
    """A range for the help: ``range: 0 to 100``, or nothing if it is only a safeguard."""
    if span.most > _LARGEST_SHOWN:
        return ""
    return f"range: {'above ' if span.above else ''}{span.least:g} to {span.most:g}"


class _Whole(click.IntRange):
    name = "integer"

    def __init__(self, span: Span) -> None:
        super().__init__(int(span.least), int(span.most))
        self._span = span

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return _converted(value, int, self._span, param)

    def _describe_range(self) -> str:
        return _described(self._span)


class _Real(click.FloatRange):
    name = "number"

    def __init__(self, span: Span) -> None:
        super().__init__(span.least, span.most, min_open=span.above)
        self._span = span

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        # click's own comparison accepts NaN.
        return _converted(value, float, self._span, param)

    def _describe_range(self) -> str:
        return _described(self._span)


def _converted(
    value: Any, kind: type[int] | type[float], span: Span, param: click.Parameter | None
) -> Any:
    name = long_name(param) if isinstance(param, click.Option) else "the number"
    if isinstance(value, str):
        # Text that is not a number stays text, which no span contains.
        with suppress(ValueError):
            value = kind(value)
    try:
        span.check(value, name)
    except UsageError as error:
        raise EarlyError(str(error)) from error
    return value


def number(span: Span) -> click.IntRange | click.FloatRange:
    """The type of an option that takes a number in ``span``."""
    return _Whole(span) if span.whole else _Real(span)


def whole_numbers(text: str, option: str, wanted: str) -> tuple[int, ...]:
    """Parse whole numbers separated by commas.

    Raises:
        UsageError: ``text`` is something else; the hint is ``wanted``, the expected form.
    """
    parts = [part.strip() for part in text.split(",")]
    # Python does not parse numbers of more than a few thousand digits.
    if not all(part.isdecimal() and len(part) < 20 for part in parts):
        raise UsageError(f"{option} {text[:40]!r} is not a list of whole numbers", hint=wanted)
    return tuple(int(part) for part in parts)
