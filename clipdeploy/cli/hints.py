"""Reduces hints to the advice that the present command can follow.

A hint is written where the error is raised, in code that several commands call.  It lists
alternatives, joined by ", or ".  An alternative with an option that the command does not have is
left out, unless it names the command that has the option.
"""

from __future__ import annotations

import re

import click

__all__ = ["OPTION", "followable", "named_commands", "options_of"]

OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
_OTHER_WAY = ", or "
# Other words by which hints name commands.
_ALSO = {"build": "build-engine", "quantise": "quantize"}


def options_of(command: click.Command) -> set[str]:
    """The option names of a command and of its subcommands."""
    below = command.commands.values() if isinstance(command, click.Group) else ()
    own = {name for param in command.params for name in (*param.opts, *param.secondary_opts)}
    return own.union(*map(options_of, below))


def named_commands(text: str, program: click.Group) -> list[click.Command]:
    """The commands named in a text, such as ``export again`` or ``clipdeploy build-engine``."""
    words = re.findall(r"(?<![\w-])[a-z][a-z-]*", OPTION.sub("", text))
    names = dict.fromkeys(_ALSO.get(word, word) for word in words)
    return [program.commands[name] for name in names if name in program.commands]


def followable(hint: str, command: click.Command, program: click.Group) -> str:
    """``hint`` without the alternatives that ``command`` lacks; unchanged if none would be left."""
    ways = hint.split(_OTHER_WAY)
    possible = [way for way in ways if _is_possible(way, command, program)]
    return _OTHER_WAY.join(possible or ways)


def _is_possible(way: str, command: click.Command, program: click.Group) -> bool:
    options = set(OPTION.findall(way))
    known = options_of(program)
    # An option that no command has belongs to another program, such as pip or ray.
    return bool(named_commands(way, program)) or options & known <= options_of(command)
