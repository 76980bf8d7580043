"""Turns TensorRT's nested build phases into one progress number, and cancels a build."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tensorrt as trt

__all__ = ["PERCENT", "Phases", "build_monitor"]

PERCENT = 100


@dataclass
class _Phase:
    start: float
    width: float
    steps: int
    done: int = 0


class Phases:
    """The finished share of a build, computed from nested phases.

    A phase divides the current step of its parent evenly among its own steps.  The share never
    decreases, even if a phase opens a second time within one step.
    """

    def __init__(self) -> None:
        self._open: dict[str, _Phase] = {}
        self.share = 0.0

    def start(self, name: str, parent: str | None, steps: int) -> float:
        """Begin phase ``name`` inside ``parent``, and return the share of the build, 0 to 1.

        TensorRT also has phases of 0 steps that contain other phases: they count as 1 step.
        """
        steps = max(steps, 1)
        above = self._open.get(parent or "")
        if above is None:
            phase = _Phase(0.0, 1.0, steps)
        else:
            width = above.width / above.steps
            phase = _Phase(above.start + width * min(above.done, above.steps - 1), width, steps)
        self._open[name] = phase
        return self.share

    def step(self, name: str, step: int) -> float:
        """Complete step ``step`` (from 0) of phase ``name``, and return the share, 0 to 1."""
        phase = self._open.get(name)
        if phase is not None:
            phase.done = step + 1
            self._reach(phase.start + phase.width * min(1.0, phase.done / phase.steps))
        return self.share

    def finish(self, name: str) -> float:
        """End phase ``name``, and return the share of the build, 0 to 1."""
        phase = self._open.pop(name, None)
        if phase is not None:
            self._reach(phase.start + phase.width)
        return self.share

    def _reach(self, share: float) -> None:
        self.share = max(self.share, min(share, 1.0))


def build_monitor(
    module: ModuleType, advance: Callable[[int], None], stop: list[BaseException]
) -> trt.IProgressMonitor:
    """Make a TensorRT progress monitor that reports whole percents to ``advance``.

    TensorRT calls the monitor from C++ code in the building thread, where no exception may pass.
    An exception, Ctrl-C included, is appended to ``stop`` and cancels the build; the caller raises
    it.
    """
    phases = Phases()
    shown = 0

    def report(move: Callable[[], float]) -> None:
        nonlocal shown
        try:
            percent = int(move() * PERCENT)
            if percent > shown and not stop:
                advance(percent - shown)
                shown = percent
        except BaseException as error:  # Ctrl-C too, see the docstring
            stop.append(error)

    base: type[trt.IProgressMonitor] = module.IProgressMonitor

    class Monitor(base):  # type: ignore[misc] # the base class depends on the backend
        def __init__(self) -> None:
            base.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            report(lambda: phases.start(phase_name, parent_phase, num_steps))

        def phase_finish(self, phase_name: str) -> None:
            report(lambda: phases.finish(phase_name))

        def step_complete(self, phase_name: str, step: int) -> bool:
            report(lambda: phases.step(phase_name, step))
            return not stop

    return Monitor()
