"""What all commands share: their context, errors in one line, results as text or JSON.

Nothing here imports torch, onnx or TensorRT, so that ``--help`` answers at once.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from clipdeploy.cli.hints import followable
from clipdeploy.cli.options import option, renamed
from clipdeploy.cli.params import current_settings, fed_values, setting_option, typed_values
from clipdeploy.cli.streams import made_more_than_output
from clipdeploy.cli.text import echo, echo_json, echo_line, show
from clipdeploy.cli.usage import Command, Group, refuse_before_subcommand
from clipdeploy.core.errors import ClipdeployError
from clipdeploy.core.printable import printable
from clipdeploy.core.progress import SILENT
from clipdeploy.core.progress_bars import ProgressBars

if TYPE_CHECKING:
    from rich.console import RenderableType

    from clipdeploy.cli.setting_types import Value
    from clipdeploy.cli.settings import Settings
    from clipdeploy.core.progress import Progress
    from clipdeploy.workspace.folder import Workspace

__all__ = [
    "EXIT_INTERRUPTED",
    "EXIT_VERIFICATION",
    "Context",
    "DefaultCommand",
    "DefaultGroup",
    "emit",
    "stage_command",
]

EXIT_VERIFICATION = 3
EXIT_INTERRUPTED = 130
# These commands make more than their output; so do the commands with a verdict.
_MAKES_FILES = frozenset({"export", "calibrate", "quantize", "build-engine", "bisect", "package"})

F = TypeVar("F", bound=Callable[..., Any])


class Context:
    """The options shared by all commands, the workspace, the settings and the progress."""

    def __init__(
        self,
        click_context: click.Context,
        workspace: Path,
        *,
        as_json: bool,
        quiet: bool,
        debug: bool,
    ) -> None:
        self._click = click_context
        self._root = workspace
        self.as_json = as_json
        self.quiet = quiet
        self.debug = debug

    @functools.cached_property
    def workspace(self) -> Workspace:
        """The folder of artifacts."""
        from clipdeploy.workspace.folder import Workspace

        return Workspace(self._root)

    @functools.cached_property
    def progress(self) -> Progress:
        """Progress bars on stderr; silent with ``--quiet``."""
        return SILENT if self.quiet else cast("Progress", ProgressBars())

    def note(self, text: str) -> None:
        """Print a line on stderr, unless ``--quiet``."""
        if not self.quiet:
            echo(printable(text), err=True)

    @property
    def settings(self) -> Settings:
        """The settings from the environment and ``clipdeploy.toml``."""
        return current_settings(self._click)

    def setting(self, name: str) -> Value | None:
        """The value of a setting for a ``deferred`` option, with a note; None if it is not set."""
        found = self.settings.given.get(name)
        if found is None:
            return None
        self.note(f"{name}: {found.value} ({found.origin})")
        return found.value

    def model(self, name: str | None) -> str:
        """The full name of the model: ``name``, else the setting's or the workspace's last one.

        A note says which model was chosen if ``name`` is None.
        """
        from clipdeploy.models import cards

        if chosen := name or self.setting("model"):
            return cards.find(str(chosen)).name
        last = self.workspace.last_model()
        self.note(f"model: {last} (the last one of {self._root})")
        return last


def _note_settings(context: Context, ctx: click.Context) -> None:
    """Note the options that settings gave, because a verdict depends on them, and old names.

    The workspace is left out: all paths that are shown begin with it.
    """
    for note in (*renamed(ctx), *context.settings.renamed):
        context.note(note)
    fed = fed_values(ctx, but="workspace")
    if fed and ctx.invoked_subcommand is None:
        context.note(f"settings: {', '.join(fed)}")


def _fail(error: ClipdeployError, *, debug: bool) -> int:
    if debug:
        raise error
    ctx = click.get_current_context()
    hint, program = error.hint, ctx.find_root().command
    if isinstance(program, click.Group):
        hint = followable(hint, ctx.command, program)
    echo_line(f"error: {error.message}" + (f" ({hint})" if hint else ""))
    return error.exit_code


workspace_option = setting_option(
    "workspace",
    "--workspace",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of the artifacts.",
)


def stage_command(function: F) -> F:
    """Add the shared options to a command; turn its errors into one line and an exit code."""

    @workspace_option
    @option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
    @option("--quiet", is_flag=True, help="Print no progress and no notes.")
    @option("--debug", is_flag=True, help="Show the traceback of an error.")
    @functools.wraps(function)
    def command(
        *args: Any, workspace: Path, as_json: bool, quiet: bool, debug: bool, **options: Any
    ) -> None:
        ctx = click.get_current_context()
        context = Context(ctx, workspace, as_json=as_json, quiet=quiet, debug=debug)
        if debug:
            # TensorRT's messages are passed on to Python's loggers.
            logging.basicConfig(format="%(message)s")
            logging.getLogger().handlers[0].setLevel(logging.WARNING)
        try:
            with context.settings.in_environment(typed_values(ctx)):
                refuse_before_subcommand()
                _note_settings(context, ctx)
                status = function(context, *args, **options)
                if status is not None or ctx.find_root().invoked_subcommand in _MAKES_FILES:
                    made_more_than_output()
        except ClipdeployError as error:
            status = _fail(error, debug=debug)
        except KeyboardInterrupt:
            click.echo("interrupted; run the same command again to continue", err=True)
            status = EXIT_INTERRUPTED
        if status:
            sys.exit(status)

    return cast(F, command)


def emit(context: Context, result: object, render: Callable[[], RenderableType]) -> None:
    """Print a result on stdout: as JSON with ``--json``, else as ``render`` shows it."""
    if context.as_json:
        from clipdeploy.core.passport import to_json

        echo_json(to_json(result))
        return
    show(render())


class DefaultGroup(Group):
    """A group that passes unknown words on to its ``default`` subcommand.

    ``verify FILE`` is ``verify run FILE``; ``verify merge`` is a subcommand.
    """

    def __init__(self, *args: Any, default: str, **options: Any) -> None:
        super().__init__(*args, **options)
        self.default = default

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """See :class:`click.Group`."""
        if not args or args[0] not in self.commands:
            args = [self.default, *args]
        return super().parse_args(ctx, args)


class _GroupsPath(click.Context):
    @property
    def command_path(self) -> str:
        """The group's: ``clipdeploy verify``, not ``clipdeploy verify run``."""
        return self.parent.command_path if self.parent else super().command_path


class DefaultCommand(Command):
    """The default subcommand of a :class:`DefaultGroup`, with the group's name in its usage."""

    context_class = _GroupsPath
