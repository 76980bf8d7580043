"""All stages of a long run at once: a checklist on a terminal, a line a stage anywhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Self

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

    from clipdeploy.stages.stage_log import StageRun

__all__ = ["StageDisplay"]

# The thread that draws would take its share of the processor from what is measured.
_MEASURED = ("benchmark",)
_DRAWN_PER_SECOND = 8


class StageDisplay:
    """A :class:`clipdeploy.stages.stage_log.StageWatch` and a progress, both on stderr.

    What a stage is doing shows in its line, with a bar and the time left where its length is known.
    While a benchmark measures, nothing is drawn.  A context manager: it leaves the checklist as it
    stands at the end, also if that end is an error or Ctrl-C.
    """

    def __init__(self, *, quiet: bool = False, console: Console | None = None) -> None:
        from rich import console as rich

        self._quiet = quiet
        drawn_on = console or rich.Console(stderr=True)
        self._bars = None if quiet or not drawn_on.is_terminal else _bars(drawn_on)
        self._lines: dict[str, TaskID] = {}
        self._now: str | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._now is not None:
            self._show("interrupted" if kind is KeyboardInterrupt else "failed", "")
            self._say(f"{self._now}: {'interrupted' if kind is KeyboardInterrupt else 'failed'}")
        if self._bars is not None and self._lines:
            self._bars.live.transient = False
            self._bars.start()
            self._bars.stop()

    def planned(self, names: Sequence[str]) -> None:
        """See :class:`clipdeploy.stages.stage_log.StageWatch`."""
        if self._bars is None:
            return
        for name in names:
            line = self._bars.add_task(name, start=False, total=None, state="waiting", doing="")
            self._lines[name] = line
        self._bars.start()

    def started(self, name: str) -> None:
        """See :class:`clipdeploy.stages.stage_log.StageWatch`."""
        self._now = name
        self._say(f"{name} ...")
        if self._bars is not None:
            self._bars.start_task(self._lines[name])
            self._show("running", "")
            if name in _MEASURED:
                # It stands again, whole, once there is nothing to disturb.
                self._bars.live.transient = True
                self._bars.stop()

    def ended(self, run: StageRun) -> None:
        """See :class:`clipdeploy.stages.stage_log.StageWatch`."""
        self._now = run.name
        said = f"done, {run.seconds:.1f} s" if run.state == "done" else run.state
        self._say(f"{run.name}: {said}{f', {run.why}' if run.why else ''}")
        self._show(run.state, run.why)
        self._now = None
        if self._bars is not None:
            self._bars.stop_task(self._lines[run.name])
            self._bars.start()

    @contextmanager
    def task(self, text: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """See :class:`exporters.progress.Progress`."""
        if self._bars is None or self._now is None:
            yield lambda count: None
            return
        bars, line = self._bars, self._lines[self._now]
        # The old total goes first: a new one resets the speed that the time left comes from.
        bars.update(line, total=0, completed=0)
        bars.update(line, total=total, completed=0, doing=text)
        yield lambda count: bars.advance(line, count)
        bars.update(line, total=None, completed=0, doing="")

    def _show(self, state: str, doing: str) -> None:
        if self._bars is not None and self._now is not None:
            self._bars.update(self._lines[self._now], total=None, state=state, doing=doing)

    def _say(self, line: str) -> None:
        if self._bars is None and not self._quiet:
            click.echo(line, err=True)


def _bars(console: Console) -> Bars:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        SpinnerColumn,
        Task,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.table import Column
    from rich.text import Text

    class While(ProgressColumn):
        """Another column, while its stage runs and perhaps only where its length is known."""

        max_refresh = None

        def __init__(self, column: ProgressColumn, *, counted: bool = False) -> None:
            super().__init__()
            self._column, self._counted = column, counted

        def render(self, task: Task) -> Text:
            """See the base class."""
            running = task.fields["state"] == "running"
            shown = running and (task.total is not None or not self._counted)
            return self._column(task) if shown else Text("")  # type: ignore[return-value]

    class Seconds(TimeElapsedColumn):
        """The time of a stage that took any."""

        def render(self, task: Task) -> Text:
            """See the base class."""
            took = task.fields["state"] not in ("waiting", "unchanged", "left out")
            return super().render(task) if took else Text("")

    return Progress(
        While(SpinnerColumn()),
        TextColumn("{task.description}", table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[state]}", table_column=Column(no_wrap=True)),
        Seconds(),
        While(BarColumn(16), counted=True),
        While(MofNCompleteColumn(), counted=True),
        While(TimeRemainingColumn(), counted=True),
        TextColumn(
            "{task.fields[doing]}",
            markup=False,
            table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1),
        ),
        console=console,
        expand=True,
        refresh_per_second=_DRAWN_PER_SECOND,
    )
