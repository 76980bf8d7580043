"""Options that settings give values to, and shell completion of models and artifacts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource
from click.types import StringParamType

from clipdeploy.cli.numbers import EarlyError
from clipdeploy.cli.options import Option, long_name, option
from clipdeploy.cli.setting_types import Value, as_toml
from clipdeploy.cli.settings import CONFIG_FILE, Settings, load_settings, setting_called
from clipdeploy.core.errors import FileError, UsageError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

__all__ = [
    "ArtifactPath",
    "ModelName",
    "SettingError",
    "SettingFileError",
    "SettingOption",
    "current_settings",
    "fed_values",
    "how_to_give",
    "setting_option",
    "typed_values",
]

F = TypeVar("F", bound=Callable[..., Any])

_META = "clipdeploy.settings"
_ARTIFACTS = (".onnx", ".engine")


class SettingError(EarlyError):
    """A setting is wrong, found before the command began."""


class SettingFileError(SettingError):
    """The settings file cannot be read."""

    exit_code = FileError.exit_code


def current_settings(ctx: click.Context) -> Settings:
    """The settings for this command, read once.

    Raises:
        SettingError: they cannot be read, or one of them is wrong.
    """
    if _META not in ctx.meta:
        try:
            ctx.meta[_META] = load_settings()
        except UsageError as error:
            raise SettingError(str(error)) from error
        except FileError as error:
            raise SettingFileError(str(error)) from error
    settings: Settings = ctx.meta[_META]
    return settings


class SettingOption(Option):
    """An option that takes its value from a setting if the command line does not give it.

    With ``deferred`` the option only shows the setting in its help; the command reads it with
    :meth:`clipdeploy.cli.common.Context.setting` where it needs it.  A flag has a negative form
    (``--offline/--no-offline``), so that the command line can outrank either value.
    """

    def __init__(
        self,
        param_decls: Sequence[str] | None = None,
        *,
        setting: str,
        deferred: bool = False,
        **attrs: Any,
    ) -> None:
        self.setting = setting_called(setting)
        self.deferred = deferred
        if self.setting.default is not None:
            attrs.setdefault("default", self.setting.default)
        attrs.update(envvar=self.setting.variable, show_envvar=True)
        super().__init__(param_decls, **attrs)

    def value_from_envvar(self, ctx: click.Context) -> Any:
        """The setting's value, from the environment or the file.

        Raises:
            SettingError: the settings cannot be used; not raised during shell completion.
        """
        if self.deferred:
            return None
        try:
            found = current_settings(ctx).given.get(self.setting.name)
        except SettingError:
            if ctx.resilient_parsing:
                return None
            raise
        return None if found is None else found.value

    def process_value(self, ctx: click.Context, value: Any) -> Any:
        """See :class:`click.Option`; the error for a missing value lists all ways to give it."""
        try:
            return super().process_value(ctx, value)
        except click.MissingParameter as error:
            ways = how_to_give(self.opts[0], self.setting.name)
            raise click.MissingParameter(f"Give {ways}", ctx, param=self) from error


def setting_option(setting: str, *names: str, **attrs: Any) -> Callable[[F], F]:
    """An option that takes its value and its default from a setting."""
    return option(*names, cls=SettingOption, setting=setting, **attrs)


def how_to_give(way: str, setting: str) -> str:
    """The three ways to give a setting, for an error; ``way`` is that of the command line."""
    row = setting_called(setting)
    return (
        f"{way}, or once for all commands {row.variable} in the environment or "
        f"{row.name} = {as_toml(row.example)} in {CONFIG_FILE}"
    )


def typed_values(ctx: click.Context) -> dict[str, Value]:
    """The values that the command line gave to options of settings, by setting."""
    return {
        param.setting.name: ctx.params[name]
        for name, param in _setting_options(ctx)
        if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE
    }


def fed_values(ctx: click.Context, *, but: str) -> list[str]:
    """The options that settings gave, as one would type them, with their origins.

    The setting ``but`` is left out.
    """
    fed = []
    for name, param in _setting_options(ctx):
        given = ctx.get_parameter_source(name) is ParameterSource.ENVIRONMENT
        if given and param.setting.name != but:
            found = current_settings(ctx).given[param.setting.name]
            fed.append(f"{_typed(param, found.value)} ({found.origin})")
    return fed


def _typed(option: SettingOption, value: Value | None) -> str:
    if option.is_flag:
        return long_name(option, negative=not value)
    return f"{option.opts[0]} {value}"


def _setting_options(ctx: click.Context) -> Iterator[tuple[str, SettingOption]]:
    for param in ctx.command.params:
        if isinstance(param, SettingOption) and param.name:
            yield param.name, param


class ModelName(StringParamType):
    """The name of a model card, looked up later, where an error can be shown in one line."""

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Full and short names; names of timm and mmpretrain only if none of ours match."""
        from click.shell_completion import CompletionItem

        from clipdeploy.models import cards

        ours: list[CompletionItem] = []
        others: list[CompletionItem] = []
        for card in cards.all_cards():
            # No comma: click's script for fish cuts a help text there.
            top1 = "" if card.top1 is None else f"top-1 {card.top1} % at "
            described = f"{top1}{card.image_size} px"
            own = {card.name, card.short}
            for name in (card.name, *card.aliases):
                if name.startswith(incomplete):
                    item = CompletionItem(name, help=described)
                    (ours if name in own else others).append(item)
        return ours or others


class ArtifactPath(click.Path):
    """The path of a graph or an engine; the shell completes the workspace's, else any file."""

    def __init__(self, **attrs: Any) -> None:
        super().__init__(path_type=Path, **attrs)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """The workspace's artifacts that match, else what click completes for a file."""
        from click.shell_completion import CompletionItem

        workspace = ctx.params.get("workspace")
        found = [] if workspace is None else sorted(Path(workspace).glob("*/*"))
        names = [str(path) for path in found if path.suffix in _ARTIFACTS]
        fitting = [CompletionItem(name) for name in names if name.startswith(incomplete)]
        return fitting or super().shell_complete(ctx, param, incomplete)
