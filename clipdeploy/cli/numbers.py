"""Options that take a number: each has a span, and a wrong number is reported in one line."""

from __future__ import annotations

from contextlib import suppress
from typing import IO, Any

import click

from clipdeploy.cli.text import echo_line
from clipdeploy.core.errors import UsageError
from clipdeploy.core.spans import Span

__all__ = ["EarlyError", "number", "whole_numbers"]


class EarlyError(click.ClickException):
    """An error found before the command began, in one line as every error of clipdeploy."""

    exit_code = UsageError.exit_code

    def show(self, file: IO[Any] | None = None) -> None:
        """See :class:`click.ClickException`."""
        echo_line(f"error: {self.message}", file)


class _Whole(click.IntRange):
    def __init__(self, span: Span) -> None:
        super().__init__(int(span.least), int(span.most))
        self._span = span

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return _converted(value, int, self._span, param)


class _Real(click.FloatRange):
    def __init__(self, span: Span) -> None:
        super().__init__(span.least, span.most, min_open=span.above)
        self._span = span

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        # click's own comparison lets NaN pass.
        return _converted(value, float, self._span, param)


def _converted(
    value: Any, kind: type[int] | type[float], span: Span, param: click.Parameter | None
) -> Any:
    name = param.opts[0] if param else "the number"
    if isinstance(value, str):
        # What is no number stays a text, which no span holds.
        with suppress(ValueError):
            value = kind(value)
    try:
        span.check(value, name)
    except UsageError as error:
        raise EarlyError(str(error)) from error
    return value


def number(span: Span) -> click.IntRange | click.FloatRange:
    """The type of an option that takes a number of ``span``."""
    return _Whole(span) if span.whole else _Real(span)


def whole_numbers(text: str, option: str, wanted: str) -> tuple[int, ...]:
    """Numbers with commas between them.

    Raises:
        UsageError: something else; it says what is ``wanted``.
    """
    parts = [part.strip() for part in text.split(",")]
    # Python reads no more than some thousand digits.
    if not all(part.isdecimal() and len(part) < 20 for part in parts):
        raise UsageError(f"{option} {text[:40]!r} is no list of whole numbers", hint=wanted)
    return tuple(int(part) for part in parts)
