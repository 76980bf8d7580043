"""``clipdeploy config``: show each setting, its value and its origin."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import click

from clipdeploy.cli.common import Context, emit, stage_command
from clipdeploy.cli.options import option
from clipdeploy.cli.params import typed_values
from clipdeploy.cli.setting_types import IMAGES, Value, as_toml
from clipdeploy.cli.settings import (
    CONFIG_FILE,
    CONFIG_VARIABLE,
    SETTINGS,
    Found,
    Settings,
    Source,
    nearest,
    setting_called,
    strangers,
)
from clipdeploy.cli.usage import command
from clipdeploy.core.errors import UsageError

__all__ = ["ConfigRow", "Configuration", "config", "template"]


@dataclass(frozen=True)
class ConfigRow:
    """A setting and its present value.

    ``origin`` names the variable, the file or the option.  ``value`` is None if none was given and
    there is no default; passwords and tokens in it are masked.
    """

    name: str
    value: Value | None
    source: Source
    origin: str
    variable: str


@dataclass(frozen=True)
class Configuration:
    """All settings, and the file that was read, or None."""

    file: Path | None
    settings: tuple[ConfigRow, ...]


@command()
@option(
    "--init",
    is_flag=True,
    help=f"Write a {CONFIG_FILE} with comments into the working folder, unless there is one.",
)
@stage_command
def config(context: Context, init: bool) -> None:
    """Show the settings of all commands and their origins.

    A command's options outrank the environment, which outranks clipdeploy.toml, which outranks the
    defaults. The file is read from the working folder only; CLIPDEPLOY_CONFIG names another one.
    Relative paths in it start at the file's folder.
    """
    if init:
        written = _write_template(Path(CONFIG_FILE))
        emit(context, {"file": str(written)}, lambda: f"{written}: uncomment what you want to set")
        return
    shown = _configuration(context.settings, typed_values(click.get_current_context()))
    emit(context, shown, lambda: _render(shown))
    for note in _doubts(context.settings):
        context.note(note)


def _configuration(settings: Settings, typed: dict[str, Value]) -> Configuration:
    rows = []
    for setting in SETTINGS:
        found = settings.look_up(setting)
        if setting.name in typed:
            found = Found(typed[setting.name], "command line", "command line")
        value = setting.type.shown(found.value) if isinstance(found.value, str) else found.value
        rows.append(ConfigRow(setting.name, value, found.source, found.origin, setting.variable))
    return Configuration(settings.file, tuple(rows))


def _render(shown: Configuration) -> str:
    # Not a table: a path that a table wraps cannot be copied.
    rows = [("setting", "value", "from"), *map(_cells, shown.settings)]
    name, value = (max(len(row[column]) for row in rows) for column in (0, 1))
    lines = [f"{row[0]:{name}}  {row[1]:{value}}  {row[2]}" for row in rows]
    if shown.file is None:
        lines += ["", f"no {CONFIG_FILE} here; `clipdeploy config --init` writes one"]
    return "\n".join(lines)


def _cells(row: ConfigRow) -> tuple[str, str, str]:
    if row.value is None:
        return row.name, setting_called(row.name).otherwise, row.origin
    text = str(row.value).lower() if isinstance(row.value, bool) else str(row.value)
    return row.name, text, row.origin


def _doubts(settings: Settings) -> list[str]:
    """Notes on settings that are probably wrong but not an error."""
    known = [CONFIG_VARIABLE, *(setting.variable for setting in SETTINGS)]
    doubts = [f"{name} is not a setting ({nearest(name, known)})" for name in strangers()]
    for setting in SETTINGS:
        found = settings.look_up(setting)
        if setting.type is IMAGES and found.value and not Path(str(found.value)).exists():
            doubts.append(f"{setting.name}: {found.value} does not exist ({found.origin})")
    return doubts


def _write_template(path: Path) -> Path:
    from clipdeploy.core.files import write_atomic

    if os.path.lexists(path):
        raise UsageError(f"{path} exists already", hint="edit it, or move it away first")
    write_atomic(path, template().encode())
    return path


def template() -> str:
    """A ``clipdeploy.toml`` with all settings explained and commented out."""
    lines = [
        "# Settings of clipdeploy for this folder. A command's options outrank the environment,",
        "# which outranks this file. Relative paths start at this file's folder.",
        "# `clipdeploy config` shows the present values.",
    ]
    for setting in SETTINGS:
        unset = setting.otherwise or str(as_toml(setting.default))
        lines += [
            "",
            f"# {setting.help} Default: {unset}. Environment: {setting.variable}",
            f"#{setting.name} = {as_toml(setting.example)}",
        ]
    return "\n".join([*lines, ""])
