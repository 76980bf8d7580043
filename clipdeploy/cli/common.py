"""What every command shares: options, progress, results as JSON, errors in one line.

Nothing here imports torch, onnx or TensorRT: ``--help`` has to answer at once.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from clipdeploy.cli.hints import followable
from clipdeploy.cli.numbers import number
from clipdeploy.cli.params import (
    ModelName,
    current_settings,
    fed_values,
    setting_option,
    typed_values,
)
from clipdeploy.cli.streams import made_more_than_output
from clipdeploy.cli.text import echo, echo_json, echo_line, show
from clipdeploy.cli.usage import Group, refuse_before_subcommand
from clipdeploy.core.errors import ClipdeployError, UsageError
from clipdeploy.core.printable import printable
from clipdeploy.core.progress import SILENT
from clipdeploy.core.spans import THREADS

if TYPE_CHECKING:
    from rich.console import RenderableType

    from clipdeploy.cli.setting_types import Value
    from clipdeploy.cli.settings import Settings
    from clipdeploy.core.progress import Progress
    from clipdeploy.stages.cluster import ClusterConfig
    from clipdeploy.workspace.folder import Workspace

__all__ = [
    "Context",
    "DefaultGroup",
    "cluster_or_none",
    "data_option",
    "emit",
    "force_option",
    "model_option",
    "ray_option",
    "shard_option",
    "shard_or_none",
    "skip_unreadable_option",
    "stage_command",
    "threads_option",
    "trust_option",
]

EXIT_VERIFICATION = 3
EXIT_INTERRUPTED = 130
# Beside these, a command that gives a verdict makes more than its output.
_MAKES_FILES = frozenset({"export", "calibrate", "quantize", "build-engine", "bisect", "package"})
# Columns of a bar, of a spinner with a time, and of all that stands beside a task's text.
_BAR = 30
_TIME = 12
_BESIDE_TEXT = _BAR + _TIME + 14

F = TypeVar("F", bound=Callable[..., Any])


class Context:
    """What a command knows beside its own options."""

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
        """Bars on stderr; silent with ``--quiet``."""
        return SILENT if self.quiet else cast("Progress", RichProgress())

    def note(self, text: str) -> None:
        """A line for the person at the terminal, on stderr."""
        if not self.quiet:
            echo(printable(text), err=True)

    @property
    def settings(self) -> Settings:
        """What the environment and ``clipdeploy.toml`` say."""
        return current_settings(self._click)

    def setting(self, name: str) -> Value | None:
        """What a setting gives to a ``deferred`` option, which is said; None if nobody gave it."""
        found = self.settings.given.get(name)
        if found is None:
            return None
        self.note(f"{name}: {found.value} ({found.origin})")
        return found.value

    def model(self, name: str | None) -> str:
        """The model asked for, else the settings' or the workspace's last one, which is said."""
        from clipdeploy.models import cards

        if chosen := name or self.setting("model"):
            return cards.find(str(chosen)).name
        last = self.workspace.last_model()
        self.note(f"model: {last} (the last one of {self._root})")
        return last


class RichProgress:
    """Progress bars on a terminal; one line a task elsewhere."""

    @contextmanager
    def task(self, text: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """See :class:`clipdeploy.core.progress.Progress`."""
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            ProgressColumn,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        from clipdeploy.cli.console import PlainConsole

        console, text = PlainConsole(stderr=True), printable(text)
        if not console.is_terminal:
            console.print(f"{text} ...", highlight=False, markup=False, soft_wrap=True)
            yield lambda count: None
            return
        # Brackets in a file's name are no markup.
        said = TextColumn("{task.description}", markup=False)
        columns: list[ProgressColumn] = [SpinnerColumn(), said]
        if total:
            left = TimeRemainingColumn(elapsed_when_finished=True)
            columns += [BarColumn(_BAR), MofNCompleteColumn(), left]
        else:
            columns.append(TimeElapsedColumn())
        # Beside a bar a long text would be cut, and the bar as well: it goes above.
        if len(text) > console.width - (_BESIDE_TEXT if total else _TIME):
            console.print(text, highlight=False, markup=False)
            text = ""
        with Progress(*columns, console=console) as bars:
            task = bars.add_task(text, total=total)
            yield lambda count: bars.advance(task, count)
            bars.update(task, total=total or 1, completed=total or 1)


def _tell_settings(context: Context, ctx: click.Context) -> None:
    """Say which options a setting gave: what a verdict rests on has to be seen beside it.

    The workspace is not told: it begins the paths that are shown.
    """
    told = fed_values(ctx, but="workspace")
    if told and ctx.invoked_subcommand is None:
        context.note(f"settings: {', '.join(told)}")


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
    """Add the shared options to a command and turn its errors into one line and an exit code."""

    @workspace_option
    @click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
    @click.option("--quiet", is_flag=True, help="No progress and no notes.")
    @click.option("--debug", is_flag=True, help="Show the traceback of an error.")
    @functools.wraps(function)
    def command(
        *args: Any, workspace: Path, as_json: bool, quiet: bool, debug: bool, **options: Any
    ) -> None:
        ctx = click.get_current_context()
        context = Context(ctx, workspace, as_json=as_json, quiet=quiet, debug=debug)
        if debug:
            # TensorRT's messages come through Python's loggers.
            logging.basicConfig(format="%(message)s")
            logging.getLogger().handlers[0].setLevel(logging.WARNING)
        try:
            with context.settings.in_environment(typed_values(ctx)):
                refuse_before_subcommand()
                _tell_settings(context, ctx)
                status = function(context, *args, **options)
                if status is not None or ctx.find_root().invoked_subcommand in _MAKES_FILES:
                    made_more_than_output()
        except ClipdeployError as error:
            status = _fail(error, debug=debug)
        except KeyboardInterrupt:
            click.echo("interrupted; run the same command again to go on", err=True)
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


model_option = setting_option(
    "model",
    "--model",
    # Looked up by Context.model: beside files, a setting is no contradiction.
    deferred=True,
    type=ModelName(),
    help="Model name or alias; the last one if left out.",
)
force_option = click.option("--force", is_flag=True, help="Do it again even if nothing changed.")
skip_unreadable_option = click.option(
    "--skip-unreadable", is_flag=True, help="Leave out images that cannot be read, and name them."
)


trust_option = click.option(
    "--trust", is_flag=True, help="Load an engine that no passport vouches for."
)


ray_option = click.option(
    "--ray",
    metavar="ADDRESS",
    help="Spread the work over a Ray cluster: HOST:PORT, auto, or local for this machine alone. "
    "All nodes need the workspace and the images under the same path.",
)
threads_option = click.option(
    "--threads",
    type=number(THREADS),
    default=0,
    help="CPU threads of a run or, with --ray, of each shard; they decide the last bits. "
    "A thread a core if left out.",
)


def cluster_or_none(address: str | None) -> ClusterConfig | None:
    """What ``--ray`` names.

    Raises:
        UsageError: it is no address.
    """
    if address is None:
        return None
    from clipdeploy.stages.cluster import ClusterConfig

    return ClusterConfig(address)


def shard_option(merge: str) -> Callable[[F], F]:
    """``--shard I/N``; ``merge`` is the command that joins the parts."""
    return click.option("--shard", metavar="I/N", help=f"Only the I-th of N parts; then `{merge}`.")


def shard_or_none(text: str | None) -> tuple[int, int] | None:
    """``1/4`` as (1, 4).

    Raises:
        UsageError: it is no part.
    """
    if text is None:
        return None
    parts = text.split("/")
    # Python reads no more than some thousand digits.
    if len(parts) != 2 or not all(part.isdecimal() and len(part) < 20 for part in parts):
        raise UsageError(f"--shard {text[:40]!r} is no part", hint="--shard 1/4 to --shard 4/4")
    return int(parts[0]), int(parts[1])


class DefaultGroup(Group):
    """A group in which what is no subcommand belongs to the ``default`` one.

    ``verify FILE`` is ``verify run FILE``, and ``verify merge`` a command of its own.
    """

    def __init__(self, *args: Any, default: str, **options: Any) -> None:
        super().__init__(*args, **options)
        self.default = default

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """See :class:`click.Group`."""
        if not args or args[0] not in self.commands:
            args = [self.default, *args]
        return super().parse_args(ctx, args)


def data_option(
    text: str, setting: str, *, required: bool = True, deferred: bool = False
) -> Callable[[F], F]:
    """``--data``, a folder or zip of images, which a setting gives where nobody types it."""
    return setting_option(
        setting,
        "--data",
        deferred=deferred,
        type=click.Path(path_type=Path),
        required=required,
        help=text,
    )
