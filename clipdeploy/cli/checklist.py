"""A checklist of stages, made of Rich's progress bars: one line for each stage.

A line has the fields ``state``, ``doing`` (the present task of the stage) and ``counted`` (whether
the total of that task is known).
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

from rich.console import Console, RenderableType
from rich.constrain import Constrain
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from clipdeploy.core.console import PlainConsole

__all__ = ["checklist"]

_DRAWN_PER_SECOND = 8
_BAR = 12
_MINUTE = 60
# Free columns for the ^C that a terminal prints at the cursor: without them the lines would wrap.
_ROOM = 3


class _While(ProgressColumn):
    """Shows a column while the stage runs; with ``counted``, only if its total is known."""

    max_refresh = None

    def __init__(self, column: ProgressColumn, *, counted: bool = False) -> None:
        super().__init__()
        self._column, self._counted = column, counted

    def render(self, task: Task) -> RenderableType:
        """See the base class."""
        running = task.fields["state"] == "running"
        shown = running and (task.fields["counted"] or not self._counted)
        return self._column(task) if shown else Text("")


class _Seconds(ProgressColumn):
    """The time that a stage took; empty if it was unchanged or left out."""

    def render(self, task: Task) -> RenderableType:
        """See the base class."""
        if task.elapsed is None or task.fields["state"] in ("unchanged", "left out"):
            return Text("")
        whole = str(timedelta(seconds=int(task.elapsed)))
        took = f"{task.elapsed:.1f} s" if task.elapsed < _MINUTE else whole
        return Text(took, style="progress.elapsed", justify="right")


class _Checklist(Progress):
    def get_renderables(self) -> Iterator[RenderableType]:
        """See the base class."""
        yield _Roomy(self.make_tasks_table(self.tasks))


class _Roomy:
    """Leaves the last columns of the terminal free."""

    def __init__(self, shown: RenderableType) -> None:
        self._shown = shown

    def __rich_console__(self, console: Console, options: object) -> Iterator[RenderableType]:
        yield Constrain(self._shown, max(1, console.width - _ROOM))


def checklist(console: Console | None = None) -> Progress | None:
    """Progress bars to add stages to, on stderr or ``console``; None if that is not a terminal."""
    console = console or PlainConsole(stderr=True)
    if not console.is_terminal:
        return None
    one_line = Column(no_wrap=True)
    return _Checklist(
        _While(SpinnerColumn()),
        TextColumn("{task.description}", markup=False, table_column=one_line),
        TextColumn("{task.fields[state]}", table_column=one_line.copy()),
        _Seconds(table_column=one_line.copy()),
        _While(BarColumn(_BAR), counted=True),
        _While(MofNCompleteColumn(), counted=True),
        _While(TimeRemainingColumn(), counted=True),
        TextColumn(
            "{task.fields[doing]}",
            markup=False,
            table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1),
        ),
        console=console,
        expand=True,
        refresh_per_second=_DRAWN_PER_SECOND,
    )
