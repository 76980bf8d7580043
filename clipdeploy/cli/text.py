"""Prints text on stdout and stderr, wrapped for a terminal and unchanged for a file.

All output goes through this module or :mod:`clipdeploy.core.console`, which remove control
characters from file names and messages, see :mod:`clipdeploy.core.printable`.
"""

from __future__ import annotations

import os
import re
import sys
import textwrap
import warnings
from typing import IO, TYPE_CHECKING, Any, TextIO

import click

from clipdeploy.core.device import CpuFallback
from clipdeploy.core.printable import printable

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["COMMAND", "echo", "echo_json", "echo_line", "format_warning", "show", "wrapped"]

# A line with this arrow contains a command to copy, and is never wrapped.
COMMAND = "-> "
# Columns of a file, more than any line has, and of a terminal of unknown size.
_ENDLESS = 10_000
_USUAL = 80
# What precedes the text of a line: indentation, and labels followed by a gap.
_LABELS = re.compile(r" *(?:\S(?:\S| \S){0,23} {2,})*")


def _columns(stream: TextIO) -> int | None:
    """The columns of a terminal, or ``$COLUMNS``; None for a file or a pipe."""
    if not stream.isatty():
        return None
    named = os.environ.get("COLUMNS", "")
    if named.isdecimal() and int(named) > 0:
        return int(named)
    try:
        return os.get_terminal_size(stream.fileno()).columns or _USUAL
    except OSError:  # it was closed a moment ago
        return _USUAL


def wrapped(text: str, columns: int) -> str:
    """``text`` wrapped to ``columns``, without breaking words or commands.

    Continued lines are indented to where the text of their line began.
    """
    return "\n".join(part for line in text.split("\n") for part in _wrapped(line, columns))


def _wrapped(line: str, columns: int) -> list[str]:
    if COMMAND in line:
        return [line]
    labels = _LABELS.match(line)
    begins = labels.end() if labels else 0
    lines = textwrap.wrap(
        line,
        columns,
        subsequent_indent=" " * (begins if begins < columns // 2 else 2),
        break_long_words=False,
        break_on_hyphens=False,
    )
    return lines or [""]


def echo(text: str, *, err: bool = False) -> None:
    """Print ``text`` on stdout, or on stderr."""
    text = printable(text, keep="\n")
    columns = _columns(sys.stderr if err else sys.stdout)
    click.echo(text if columns is None else wrapped(text, columns), err=err)


def echo_line(text: str, file: IO[Any] | None = None) -> None:
    """Print ``text`` on stderr, or in ``file``, as exactly one line."""
    click.echo(printable(text), file=file, err=True)


_standard_format = warnings.formatwarning


def format_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    """Format clipdeploy's own warnings as one line, other warnings as Python does."""
    if issubclass(category, CpuFallback):
        return f"warning: {printable(str(message))}\n"
    return _standard_format(message, category, filename, lineno, line)


def echo_json(data: bytes) -> None:
    """Print JSON on stdout, with control characters escaped."""
    # As bytes, because JSON is UTF-8 in every locale.
    click.echo(printable(data.decode(), keep="\n", escape="json").encode())


def show(shown: RenderableType) -> None:
    """Print a table or text on stdout; in a file, only ``$COLUMNS``, if set, limits lines."""
    if isinstance(shown, str):
        echo(shown)
        return
    import io

    from clipdeploy.core.console import PlainConsole

    console = PlainConsole()
    # Not cropped: text that must not wrap, such as a command or path, may be wider than the lines.
    if console.is_terminal:
        console.print(shown, crop=False)
        return
    text = io.StringIO()
    wide = None if os.environ.get("COLUMNS") else _ENDLESS
    PlainConsole(file=text, width=wide).print(shown, crop=False)
    click.echo("\n".join(line.rstrip() for line in text.getvalue().splitlines()))
