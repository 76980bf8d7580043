"""Rich's progress bars as a checklist: a line a stage, whatever state it is in.

A line has the fields ``state``, ``doing`` (what the stage is at) and ``counted`` (whether its total
means anything).
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

from clipdeploy.cli.console import PlainConsole

__all__ = ["checklist"]

_DRAWN_PER_SECOND = 8
_BAR = 12
_MINUTE = 60
# A terminal writes ^C where the cursor stands: at the edge it would shift all that is drawn.
_ROOM = 3


class _While(ProgressColumn):
    """Another column, while its stage runs, and if ``counted`` only where its total is known."""

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
    """The time of a stage that took any, with all that it did."""

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
    """Something that leaves the last columns of a terminal free."""

    def __init__(self, shown: RenderableType) -> None:
        self._shown = shown

    def __rich_console__(self, console: Console, options: object) -> Iterator[RenderableType]:
        yield Constrain(self._shown, max(1, console.width - _ROOM))


def checklist(console: Console | None = None) -> Progress | None:
    """Bars to add the stages to, on stderr or another console; None where no terminal draws."""
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
