"""Stages one after the other: what each did, how long it took, and who is told meanwhile."""

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
    """A stage that is over; ``why`` is a sentence where it was left out."""

    name: str
    state: StageState
    seconds: float
    why: str = ""


class StageWatch(Protocol):
    """Anything that shows where a run of stages is; the command line shows a checklist."""

    def planned(self, names: Sequence[str]) -> None:
        """All stages, before the first one starts."""

    def started(self, name: str) -> None:
        """This one runs now."""

    def ended(self, run: StageRun) -> None:
        """This one is over."""


class _Unwatched:
    def planned(self, names: Sequence[str]) -> None:
        """Nobody looks."""

    def started(self, name: str) -> None:
        """Nobody looks."""

    def ended(self, run: StageRun) -> None:
        """Nobody looks."""


UNWATCHED: StageWatch = _Unwatched()


class StageLog:
    """Runs stages and keeps what came of each."""

    def __init__(self, names: Sequence[str], watch: StageWatch = UNWATCHED) -> None:
        self.runs: list[StageRun] = []
        self._watch = watch
        watch.planned(names)

    def run(
        self, name: str, work: Callable[[], T], changed: Callable[[T], bool] = lambda made: True
    ) -> T:
        """Do the ``work`` of a stage; ``changed`` says of its result whether it was made now."""
        self._watch.started(name)
        begun = time.perf_counter()
        made = work()
        seconds = round(time.perf_counter() - begun, 3)
        self._end(StageRun(name, "done" if changed(made) else "unchanged", seconds))
        return made

    def leave_out(self, name: str, why: str) -> None:
        """A stage that was planned and is not to be."""
        self._end(StageRun(name, "left out", 0.0, why))

    def _end(self, run: StageRun) -> None:
        self.runs.append(run)
        self._watch.ended(run)
