"""The meter of a benchmark: every contender once a round, in a new order each time."""

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

__all__ = ["Clock", "Contender", "measure", "random_images"]

# Seconds from some fixed moment.
Clock = Callable[[], float]


@dataclass
class Contender:
    """One artifact at one batch, and what its runs took.

    ``seconds`` are end to end, one a round; ``device`` the GPU's own, None where it has no say;
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
        """Images at once."""
        return len(self.images)

    def warm_up(self, seconds: float, clock: Clock) -> None:
        """Run until ``seconds`` are over, but once at least; see whether a GPU keeps time.

        Raises:
            ClipdeployError: it does not run.
        """
        end = clock() + seconds
        if self.runner.device_seconds(self.images) is not None:
            self.device = []
        while self.warmup == 0 or clock() < end:
            self.runner(self.images)
            self.warmup += 1

    def run(self, clock: Clock) -> None:
        """Its part of one round."""
        start = clock()
        self.runner(self.images)
        self.seconds.append(clock() - start)
        if self.device is not None and (own := self.runner.device_seconds(self.images)) is not None:
            self.device.append(own)


def random_images(spec: TensorSpec, batch: int, seed: int) -> NDArray[Any]:
    """Random pixels of an input's dtype and shape, (batch, ...); their values cost a ViT no time.

    uint8 inputs get 0 to 255, others the standard normal numbers that normalised images resemble.

    Raises:
        ArtifactError: an axis beside the batch has no fixed length.
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
    contenders: Sequence[Contender],
    *,
    seconds: float | None,
    rounds: int | None,
    seed: int = 0,
    clock: Clock = time.perf_counter,
) -> int:
    """Run rounds until ``seconds`` or ``rounds`` are over, whichever is first; how many they were.

    There is one round at least, and none is cut.  ``seed`` decides the orders.
    """
    generator = np.random.default_rng(seed)
    end = float("inf") if seconds is None else clock() + seconds
    done = 0
    while done == 0 or (done != rounds and clock() < end):
        for index in generator.permutation(len(contenders)):
            contenders[index].run(clock)
        done += 1
    return done
