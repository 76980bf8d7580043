"""Text on stdout and stderr: in a terminal words are wrapped, in a file lines are left alone."""

from __future__ import annotations

import os
import re
import sys
import textwrap
from typing import TYPE_CHECKING, TextIO

import click

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["COMMAND", "echo", "show", "wrapped"]

# What stands behind this arrow is to be copied into a shell, and never cut.
COMMAND = "-> "
# Columns: more than any line has; of a terminal that does not say.
_ENDLESS = 10_000
_USUAL = 80
# Up to where the text begins: indentation, and a label or two before a gap.
_LABELS = re.compile(r" *(?:\S(?:\S| \S){0,23} {2,})*")


def _columns(stream: TextIO) -> int | None:
    """Of the terminal, ``$COLUMNS`` first; None for a file or another program."""
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
    """``text`` with lines of at most ``columns``; no word is cut, and no command.

    What does not fit goes on below where the text of its line began.
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
    columns = _columns(sys.stderr if err else sys.stdout)
    click.echo(text if columns is None else wrapped(text, columns), err=err)


def show(shown: RenderableType) -> None:
    """Print a table or a text on stdout; in a file its lines are as long as they come.

    There ``$COLUMNS`` limits them, where it is set.
    """
    if isinstance(shown, str):
        echo(shown)
        return
    import io

    from rich.console import Console

    console = Console()
    if console.is_terminal:
        # What is not to be wrapped, such as a command, goes over the edge and is not cut there.
        console.print(shown, crop=False)
        return
    text = io.StringIO()
    wide = None if os.environ.get("COLUMNS") else _ENDLESS
    Console(file=text, width=wide).print(shown)
    click.echo("\n".join(line.rstrip() for line in text.getvalue().splitlines()))
