"""Runs stages in order, records their outcome and time, and reports them to a watcher."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

__all__ = ["UNWATCHED", "StageLog", "StageRun", "StageState", "StageWatch"]

StageState = Literal["done", "unchanged", "left out"]
T = TypeVar("T")


@dataclass(frozen=True)
class StageRun:
    """A finished stage; ``why`` is a sentence if it was left out."""

    name: str
    state: StageState
    seconds: float
    why: str = ""


class StageWatch(Protocol):
    """Shows the progress of a run of stages; the command line shows a checklist."""

    def planned(self, names: Sequence[str]) -> None:
        """Called with the names of all stages, before the first one starts."""

    def started(self, name: str) -> None:
        """Called when a stage starts."""

    def ended(self, run: StageRun) -> None:
        """Called when a stage has ended."""


class _Unwatched:
    def planned(self, names: Sequence[str]) -> None:
        """Does nothing."""

    def started(self, name: str) -> None:
        """Does nothing."""

    def ended(self, run: StageRun) -> None:
        """Does nothing."""


UNWATCHED: StageWatch = _Unwatched()


class StageLog:
    """Runs stages and records the outcome of each in ``runs``."""

    def __init__(self, names: Sequence[str], watch: StageWatch = UNWATCHED) -> None:
        self.runs: list[StageRun] = []
        self._watch = watch
        watch.planned(names)

    def run(
        self, name: str, work: Callable[[], T], changed: Callable[[T], bool] = lambda made: True
    ) -> T:
        """Run the ``work`` of a stage; ``changed`` tells from its result whether it is new."""
        self._watch.started(name)
        begun = time.perf_counter()
        made = work()
        seconds = round(time.perf_counter() - begun, 3)
        self._end(StageRun(name, "done" if changed(made) else "unchanged", seconds))
        return made

    def leave_out(self, name: str, why: str) -> None:
        """Record that a planned stage was left out, and ``why``."""
        self._end(StageRun(name, "left out", 0.0, why))

    def _end(self, run: StageRun) -> None:
        self.runs.append(run)
        self._watch.ended(run)
