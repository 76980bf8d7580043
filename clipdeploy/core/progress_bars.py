"""Progress bars with rich, for commands and notebooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING

from clipdeploy.core.printable import printable

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["ProgressBars"]

# Columns of a bar, of a spinner with a time, and of all that is shown beside a task's text.
_BAR = 30
_TIME = 12
_BESIDE_TEXT = _BAR + _TIME + 14


def _in_notebook(console: Console) -> bool:
    # In a notebook rich draws bars with ipywidgets.
    return console.is_jupyter and find_spec("ipywidgets") is not None


class ProgressBars:
    """Progress bars on a terminal and in a notebook; elsewhere one line for each task.

    A terminal shows them on stderr.  A notebook needs ipywidgets; without it, it shows lines.

        clipdeploy.export_model(workspace, model, progress=clipdeploy.ProgressBars())
    """

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

        from clipdeploy.core.console import PlainConsole

        console, text = PlainConsole(stderr=True), printable(text)
        if not (console.is_terminal or _in_notebook(console)):
            console.print(f"{text} ...", highlight=False, markup=False, soft_wrap=True)
            yield lambda count: None
            return
        # Without markup: a file name may contain brackets.
        described = TextColumn("{task.description}", markup=False)
        columns: list[ProgressColumn] = [SpinnerColumn(), described]
        if total:
            left = TimeRemainingColumn(elapsed_when_finished=True)
            columns += [BarColumn(_BAR), MofNCompleteColumn(), left]
        else:
            columns.append(TimeElapsedColumn())
        # A long text would be cut off beside the bar, so it is printed above.
        if len(text) > console.width - (_BESIDE_TEXT if total else _TIME):
            console.print(text, highlight=False, markup=False)
            text = ""
        with Progress(*columns, console=console) as bars:
            task = bars.add_task(text, total=total)
            yield lambda count: bars.advance(task, count)
            bars.update(task, total=total or 1, completed=total or 1)
