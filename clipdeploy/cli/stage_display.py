"""Display of all stages of a run: a checklist on a terminal, elsewhere a line for each stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Self

from clipdeploy.cli.text import echo_line
from clipdeploy.core.printable import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

    from clipdeploy.stages.stage_log import StageRun

__all__ = ["StageDisplay"]

# Stages during which nothing is drawn: the drawing thread would disturb the measurement.
_MEASURED = ("benchmark",)


class StageDisplay:
    """Show stages and their progress on stderr.

    Is a :class:`clipdeploy.stages.stage_log.StageWatch` and a
    :class:`clipdeploy.core.progress.Progress`.  The line of a stage shows its present task, and a
    bar and the remaining time if its length is known.  Nothing is drawn while a benchmark measures.
    As a context manager, it leaves the final checklist on the terminal, also after an error or
    Ctrl-C.
    """

    def __init__(self, *, quiet: bool = False, console: Console | None = None) -> None:
        from clipdeploy.cli.checklist import checklist

        self._quiet = quiet
        self._bars = None if quiet else checklist(console)
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
            self._lines[name] = self._bars.add_task(
                name, start=False, total=None, state="waiting", doing="", counted=False
            )
        self._bars.start()

    def started(self, name: str) -> None:
        """See :class:`clipdeploy.stages.stage_log.StageWatch`."""
        self._now = name
        self._say(f"{name} ...")
        if self._bars is not None:
            self._bars.start_task(self._lines[name])
            self._show("running", "")
            if name in _MEASURED:
                # ended() draws the checklist again.
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
        """See :class:`clipdeploy.core.progress.Progress`."""
        if self._bars is None or self._now is None:
            yield lambda count: None
            return
        bars, line = self._bars, self._lines[self._now]
        # A new total resets the speed, from which the remaining time is estimated.
        bars.update(line, total=0, completed=0)
        bars.update(
            line, total=total or 1, completed=0, doing=printable(text), counted=total is not None
        )
        yield lambda count: bars.advance(line, count)
        bars.update(line, doing="", counted=False)

    def note(self, text: str) -> None:
        """Print a line above the checklist."""
        if self._bars is None:
            self._say(text)
        else:
            self._bars.console.print(printable(text), markup=False, highlight=False, soft_wrap=True)

    def _show(self, state: str, doing: str) -> None:
        if self._bars is not None and self._now is not None:
            self._bars.update(self._lines[self._now], state=state, doing=doing, counted=False)

    def _say(self, line: str) -> None:
        if self._bars is None and not self._quiet:
            echo_line(line)
