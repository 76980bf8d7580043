"""Usage errors for options that exclude each other or have no effect, the same in all commands.

It is an error to give an option that the chosen mode does not use, or two options that exclude each
other.  Values from a settings file, the environment or a default never conflict.  If the same
option is given twice, the last value counts; under two names it is an error.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from clipdeploy.cli.options import FormerName, Option, long_name, note_former_name
from clipdeploy.core.errors import UsageError

__all__ = [
    "Command",
    "Group",
    "command",
    "given",
    "given_options",
    "group",
    "option_names",
    "refuse_before_subcommand",
    "refuse_together",
    "refuse_unused",
    "with_options",
]

F = TypeVar("F", bound=Callable[..., Any])
Decorator = Callable[[Any], Any]


def given(name: str) -> bool:
    """Whether the command line itself set the parameter ``name``."""
    source = click.get_current_context().get_parameter_source(name)
    return source is ParameterSource.COMMANDLINE


def given_options(names: Iterable[str]) -> list[str]:
    """The options for those parameters that the command line set, as typed: ``--fp16-io``."""
    ctx = click.get_current_context()
    options = {option.name: option for option in ctx.command.params}
    return [_typed(options[name], ctx.params[name]) for name in names if given(name)]


def _typed(param: click.Parameter, value: object) -> str:
    if isinstance(param, click.Option):
        return long_name(param, negative=value is False)
    return param.human_readable_name


def with_options(options: Sequence[Decorator], function: F) -> F:
    """Add options to a command's function, in the order of its help."""
    for option in reversed(options):
        function = option(function)
    return function


def option_names(options: Sequence[Decorator]) -> list[str]:
    """The parameter names of these options."""
    made = click.command("")(with_options(options, lambda: None))
    return [param.name for param in made.params if param.name]


def refuse_unused(names: Iterable[str], owner: str, mend: str) -> None:
    """Refuse parameters that only ``owner`` uses, where ``owner`` is not chosen.

    Raises:
        UsageError: the command line set one; ``mend`` says what to pass instead.
    """
    if options := given_options(names):
        raise UsageError(
            f"{options[0]} belongs to {owner}: here it would have no effect",
            hint=f"leave it out, or {mend}",
        )


def refuse_together(*names: str, hint: str = "pass one of them") -> None:
    """Refuse parameters that exclude each other.

    Raises:
        UsageError: the command line set more than one of them.
    """
    if len(options := given_options(names)) > 1:
        raise UsageError(f"{' and '.join(options)} exclude each other", hint=hint)


def refuse_before_subcommand() -> None:
    """Refuse a group's parameters in front of a subcommand, which has its own parameters.

    Raises:
        UsageError: the command line set one.
    """
    ctx = click.get_current_context()
    below = ctx.invoked_subcommand
    if below is None:
        return
    if options := given_options(param.name for param in ctx.command.params if param.name):
        raise UsageError(
            f"{options[0]} has no effect before {below!r}",
            hint=f"write it after {below!r} if `{ctx.command_path} {below} --help` has it",
        )


class _CheckedOptions:
    """A command that refuses two options for one parameter and notes old option names."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """See :class:`click.Command`."""
        assert isinstance(self, click.Command)
        if not ctx.resilient_parsing:
            _, _, order = self.make_parser(ctx).parse_args(list(args))
            params = [_present(ctx, param) for param in order]
            _refuse_two_of_a_choice(ctx, params)
            _refuse_two_names(ctx, params, args)
        parsed: list[str] = super().parse_args(ctx, args)  # type: ignore[misc]
        return parsed


def _present(ctx: click.Context, param: click.Parameter | FormerName) -> click.Parameter:
    if isinstance(param, FormerName):
        note_former_name(ctx, param)
        return param.option
    return param


def _refuse_two_names(
    ctx: click.Context, params: Iterable[click.Parameter], args: Sequence[str]
) -> None:
    """Refuse ``--data A --val-data B``: one option under two names, of which one would be lost."""
    options = itertools.takewhile(lambda arg: arg != "--", args)
    typed = list(dict.fromkeys(arg.partition("=")[0] for arg in options))
    for param in params:
        if not isinstance(param, Option) or param.multiple:
            continue
        known = {*param.opts, *(old for old, new in param.formerly.items() if new in param.opts)}
        if len(names := [name for name in typed if name in known]) > 1:
            raise click.UsageError(
                f"{names[0]} and {names[1]} are the same option: pass one of them", ctx
            )


def _refuse_two_of_a_choice(ctx: click.Context, order: Iterable[click.Parameter]) -> None:
    """Refuse ``--int8 --fp16``, of which click would silently take the last one."""
    chosen: dict[str | None, click.Parameter] = {}
    for param in order:
        first = chosen.setdefault(param.name, param)
        if first is not param:
            pair = f"{first.opts[-1]} and {param.opts[-1]}"
            raise click.UsageError(f"{pair} exclude each other: pass one of them", ctx)


class Command(_CheckedOptions, click.Command):
    """A command of clipdeploy."""


class Group(_CheckedOptions, click.Group):
    """A group of commands."""

    command_class = Command
    group_class = type


def command(name: str | None = None, **attrs: Any) -> Callable[[Callable[..., Any]], Command]:
    """``click.command`` with :class:`Command`."""
    return click.command(name, **{"cls": Command, **attrs})


def group(name: str | None = None, **attrs: Any) -> Callable[[Callable[..., Any]], Group]:
    """``click.group`` with :class:`Group`, or with the ``cls`` that is given."""
    return click.group(name, **{"cls": Group, **attrs})
