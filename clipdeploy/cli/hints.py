"""Hints that this command can follow.

A hint is written where an error is found, which several commands may reach.  Its ways out are
joined by ", or ": one that names an option of another command is left out here, unless it names
that command.
"""

from __future__ import annotations

import re

import click

__all__ = ["OPTION", "followable", "named_commands", "options_of"]

OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
_OTHER_WAY = ", or "
# What a hint calls a command by, beside its name.
_ALSO = {"build": "build-engine", "quantise": "quantize"}


def options_of(command: click.Command) -> set[str]:
    """The names of a command's options, and of those below it."""
    below = command.commands.values() if isinstance(command, click.Group) else ()
    own = {name for param in command.params for name in (*param.opts, *param.secondary_opts)}
    return own.union(*map(options_of, below))


def named_commands(text: str, program: click.Group) -> list[click.Command]:
    """The commands that a text names: ``export again``, ``clipdeploy build-engine``."""
    words = re.findall(r"(?<![\w-])[a-z][a-z-]*", OPTION.sub("", text))
    names = dict.fromkeys(_ALSO.get(word, word) for word in words)
    return [program.commands[name] for name in names if name in program.commands]


def followable(hint: str, command: click.Command, program: click.Group) -> str:
    """``hint`` without the ways out that ``command`` does not have; all of them if none is left."""
    ways = hint.split(_OTHER_WAY)
    possible = [way for way in ways if _is_possible(way, command, program)]
    return _OTHER_WAY.join(possible or ways)


def _is_possible(way: str, command: click.Command, program: click.Group) -> bool:
    options = set(OPTION.findall(way))
    known = options_of(program)
    # What no command has belongs to another program: pip, ray.
    return bool(named_commands(way, program)) or options & known <= options_of(command)
