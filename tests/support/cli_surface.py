"""The command line as text: every command with its arguments and options, and the exit codes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

import click
from command_cases import every_command

from clipdeploy.cli.common import EXIT_INTERRUPTED, EXIT_VERIFICATION, DefaultGroup
from clipdeploy.core import errors

__all__ = ["command_line"]


def command_line(main: click.Command) -> dict[str, Any]:
    """Every command of ``main`` by what is typed, and the exit code of every error."""
    named = ((" ".join(("clipdeploy", *path)), command) for path, command in every_command(main))
    commands = {name: _entry(command) for name, command in named}
    kinds = [getattr(errors, name) for name in errors.__all__]
    codes = {kind.__name__: kind.exit_code for kind in kinds if isinstance(kind, type)}
    codes |= {"verification failed": EXIT_VERIFICATION, "interrupted": EXIT_INTERRUPTED}
    return {"commands": dict(sorted(commands.items())), "exit codes": dict(sorted(codes.items()))}


def _entry(command: click.Command) -> dict[str, Any]:
    # Without --help: click makes that option for the first context that asks and keeps it.
    parameters = command.params
    entry: dict[str, Any] = {"hidden": True} if command.hidden else {}
    if isinstance(command, DefaultGroup):
        entry["default command"] = command.default
    # In the order in which they are typed.
    entry["arguments"] = [_line(each) for each in parameters if isinstance(each, click.Argument)]
    entry["options"] = sorted(_line(each) for each in parameters if isinstance(each, click.Option))
    return entry


def _line(parameter: click.Parameter) -> str:
    """Such as ``--max-drop: float range 0..100, default 1.0, variable CLIPDEPLOY_MAX_DROP``."""
    return f"{_names(parameter)}: {', '.join(_facts(parameter))}"


def _names(parameter: click.Parameter) -> str:
    off = f" / {', '.join(parameter.secondary_opts)}" if parameter.secondary_opts else ""
    return ", ".join(parameter.opts) + off


def _facts(parameter: click.Parameter) -> Iterator[str]:
    known = parameter.to_info_dict()
    is_flag = known.get("is_flag", False)
    yield _flag(known["flag_value"]) if is_flag else _type(parameter.type)
    default = known["default"]
    # A flag is off, however a version of click writes that.
    if default is not None and not (is_flag and default is False) and default != ():
        yield f"default {_plain(default)!r}"
    if known["required"]:
        yield "required"
    if known["multiple"]:
        yield "multiple"
    if known["nargs"] != 1:
        yield "any number" if known["nargs"] == -1 else f"{known['nargs']} values"
    if known["envvar"]:
        yield f"variable {known['envvar']}"
    if known.get("hidden"):
        yield "hidden"
    if former := getattr(parameter, "formerly", {}):
        yield f"formerly {', '.join(former)}"


def _flag(value: object) -> str:
    return "flag" if isinstance(value, bool) else f"flag for {value!r}"


def _plain(default: object) -> object:
    return default.as_posix() if isinstance(default, PurePath) else default


def _type(kind: click.ParamType) -> str:
    if isinstance(kind, click.Choice):
        return f"one of {' | '.join(map(str, kind.choices))}"
    if isinstance(kind, click.IntRange | click.FloatRange):
        above = "above " if kind.min_open else ""
        return f"{kind.name} {above}{kind.min}..{kind.max}"
    return kind.name
