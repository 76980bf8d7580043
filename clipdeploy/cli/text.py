"""Text on stdout and stderr: in a terminal words are wrapped, in a file lines are left alone.

Everything that is printed goes through this module or :mod:`clipdeploy.cli.console`, so that no
name or message from outside acts on the terminal, see :mod:`clipdeploy.core.printable`.
"""

from __future__ import annotations

import os
import re
import sys
import textwrap
from typing import IO, TYPE_CHECKING, Any, TextIO

import click

from clipdeploy.core.printable import printable

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["COMMAND", "echo", "echo_json", "echo_line", "show", "wrapped"]

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
    text = printable(text, keep="\n")
    columns = _columns(sys.stderr if err else sys.stdout)
    click.echo(text if columns is None else wrapped(text, columns), err=err)


def echo_line(text: str, file: IO[Any] | None = None) -> None:
    """Print ``text`` on stderr, or in ``file``, as exactly one line."""
    click.echo(printable(text), file=file, err=True)


def echo_json(data: bytes) -> None:
    """Print JSON on stdout; inside its texts every acting character is an escape of JSON."""
    # As bytes: JSON is UTF-8, whatever the terminal's encoding is.
    click.echo(printable(data.decode(), keep="\n", escape="json").encode())


def show(shown: RenderableType) -> None:
    """Print a table or a text on stdout; in a file its lines are as long as they come.

    There ``$COLUMNS`` limits them, where it is set.
    """
    if isinstance(shown, str):
        echo(shown)
        return
    import io

    from clipdeploy.cli.console import PlainConsole

    console = PlainConsole()
    if console.is_terminal:
        # What is not to be wrapped, such as a command, goes over the edge and is not cut there.
        console.print(shown, crop=False)
        return
    text = io.StringIO()
    wide = None if os.environ.get("COLUMNS") else _ENDLESS
    PlainConsole(file=text, width=wide).print(shown)
    click.echo("\n".join(line.rstrip() for line in text.getvalue().splitlines()))
