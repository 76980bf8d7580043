"""Measures rounds: every case runs once per round, in a new random order."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipdeploy.core.errors import ArtifactError
from clipdeploy.core.passport import TensorSpec
from clipdeploy.runners import Runner

__all__ = ["Case", "Clock", "measure", "random_images"]

# Returns seconds since a fixed point in time.
Clock = Callable[[], float]


@dataclass
class Case:
    """One artifact at one batch, and the duration of its runs.

    ``seconds`` are end to end, one per round; ``device`` are GPU times, None if no GPU runs it;
    ``warmup`` counts the runs before the first round.
    """

    path: Path
    label: str
    runner: Runner
    images: NDArray[Any]
    seconds: list[float] = field(default_factory=list)
    device: list[float] | None = None
    warmup: int = 0

    @property
    def batch(self) -> int:
        """The number of images per run."""
        return len(self.images)

    def warm_up(self, seconds: float, clock: Clock) -> None:
        """Run for ``seconds``, at least once, and check whether the runner reports GPU time.

        Raises:
            ClipdeployError: the artifact does not run.
        """
        end = clock() + seconds
        if self.runner.device_seconds(self.images) is not None:
            self.device = []
        while self.warmup == 0 or clock() < end:
            self.runner(self.images)
            self.warmup += 1

    def run(self, clock: Clock) -> None:
        """Run and time it once."""
        start = clock()
        self.runner(self.images)
        self.seconds.append(clock() - start)
        if self.device is not None and (own := self.runner.device_seconds(self.images)) is not None:
            self.device.append(own)


def random_images(spec: TensorSpec, batch: int, seed: int) -> NDArray[Any]:
    """Random images (batch, ...) in an input's dtype; their values do not affect a ViT's latency.

    uint8 inputs are uniform from 0 to 255, others standard normal, like normalised images.

    Raises:
        ArtifactError: an axis other than the batch has no fixed length.
    """
    free = [axis for axis in spec.shape[1:] if not isinstance(axis, int)]
    if free:
        raise ArtifactError(f"the length of the axis {free[0]!r} of {spec.name} is not fixed")
    generator = np.random.default_rng(seed)
    shape = (batch, *(int(axis) for axis in spec.shape[1:]))
    if spec.dtype == "uint8":
        return generator.integers(0, 256, shape, np.uint8)
    return generator.standard_normal(shape, np.float32).astype(spec.dtype)


def measure(
    cases: Sequence[Case],
    *,
    seconds: float | None,
    rounds: int | None,
    seed: int = 0,
    clock: Clock = time.perf_counter,
) -> int:
    """Run rounds up to ``seconds`` or ``rounds``, whichever comes first; return their number.

    At least one round runs, and every round is completed.  ``seed`` determines the order in each.
    """
    generator = np.random.default_rng(seed)
    end = float("inf") if seconds is None else clock() + seconds
    done = 0
    while done == 0 or (done != rounds and clock() < end):
        for index in generator.permutation(len(cases)):
            cases[index].run(clock)
        done += 1
    return done
