"""Command lines as click reads them, without running the command."""

from __future__ import annotations

from collections.abc import Sequence

import click

from clipdeploy.cli.common import DefaultGroup
from clipdeploy.cli.main import main

__all__ = ["find_command", "parse"]


def find_command(words: Sequence[str]) -> tuple[click.Command, list[str]]:
    """The command that these words call, and what is left for it."""
    command, rest = main.commands.get(words[0]) if words else None, list(words[1:])
    if command is None:
        raise click.UsageError(f"no command {words[0] if words else ''!r}")
    while isinstance(command, click.Group):
        if rest and rest[0] in command.commands:
            command = command.commands[rest.pop(0)]
        elif isinstance(command, DefaultGroup):
            command = command.commands[command.default]
        else:
            break
    return command, rest


def parse(words: Sequence[str]) -> None:
    """Let click read the line as the program would.

    Raises:
        click.UsageError: the program would refuse it.
    """
    command, rest = find_command(words)
    if {"-h", "--help"} & set(rest):
        return
    context = command.make_context("clipdeploy", rest)
    if isinstance(command, click.Group):
        # find_command() would have taken it, were it one of the group's commands.
        _, left, _ = command.make_parser(context).parse_args(list(rest))
        if left:
            raise click.UsageError(f"no command {left[0]!r}")
