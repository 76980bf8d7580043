"""Defines the interface of runners, which compute logits from images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from clipdeploy.core.errors import ArtifactError, EngineError
from clipdeploy.core.passport import TensorSpec

__all__ = [
    "BatchRange",
    "Closing",
    "Images",
    "Logits",
    "Runner",
    "batch_ranges",
    "best_profile",
    "in_parts",
    "runs_at_once",
]

Images = NDArray[Any]
Logits = NDArray[np.float32]
# The smallest and largest batch that runs at once; None means no limit.
BatchRange = tuple[int, int | None]


class Runner(Protocol):
    """Images of the shape and dtype in ``input`` -> logits (B, classes) float32, for any B.

    ``batches`` are the smallest and largest batch that runs at once; None means no limit.
    ``profiles`` are the (smallest, optimal, largest) batches of an engine; a graph has none.  A
    larger batch runs in parts; a smaller one, and one between two profiles, is padded.
    """

    name: str
    input: TensorSpec
    batches: BatchRange
    profiles: tuple[tuple[int, int, int], ...]

    def __call__(self, images: Images) -> Logits:
        """Compute the logits of one batch."""

    def run_in(self, profile: int, images: Images) -> Logits:
        """Compute the logits of one batch in the optimization profile of this index."""

    def device_seconds(self, images: Images) -> float | None:
        """GPU time for one batch in seconds, without transfers; None if no GPU runs it."""

    def close(self) -> None:
        """Release memory and handles."""


class Closing:
    """Base of the runners: a context manager without profiles, GPU time or resources."""

    profiles: tuple[tuple[int, int, int], ...] = ()

    def run_in(self, profile: int, images: Images) -> Logits:
        """See :class:`Runner`.

        Raises:
            EngineError: the runner has no profiles.
        """
        raise EngineError(f"{type(self).__name__} has no profile {profile}: it runs no engine")

    def close(self) -> None:
        """Do nothing: there is nothing to release."""

    def device_seconds(self, images: Images) -> float | None:
        """See :class:`Runner`."""
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def batch_ranges(runner: Runner) -> tuple[BatchRange, ...]:
    """The ranges of batches that run at once: those of the profiles, else ``batches``."""
    return tuple((low, high) for low, _, high in runner.profiles) or (runner.batches,)


def _accepts(batches: BatchRange, size: int) -> bool:
    low, high = batches
    return low <= size and (high is None or size <= high)


def runs_at_once(runner: Runner, size: int) -> bool:
    """Whether ``size`` images run in one call, neither split nor padded."""
    return any(_accepts(each, size) for each in batch_ranges(runner))


def best_profile(profiles: Sequence[tuple[int, int, int]], batch: int) -> int:
    """The index of the profile that accepts ``batch`` and has the nearest optimal batch.

    Raises:
        EngineError: no profile accepts it.
    """
    accepting = [
        (abs(best - batch), index)
        for index, (low, best, high) in enumerate(profiles)
        if _accepts((low, high), batch)
    ]
    if not accepting:
        raise EngineError(
            f"no batch profile of the engine accepts {batch} images: {list(profiles)}",
            hint="build it with a --profile MIN,OPT,MAX that includes this batch",
        )
    return min(accepting)[1]


def _padded_size(size: int, ranges: Sequence[BatchRange]) -> int:
    """The smallest accepted batch of at least ``size`` images."""
    return min(max(low, size) for low, high in ranges if high is None or size <= high)


def _largest(ranges: Sequence[BatchRange]) -> int | None:
    bounded = [high for _, high in ranges if high is not None]
    return max(bounded) if len(bounded) == len(ranges) else None


def in_parts(
    run: Callable[[Images], Logits], images: Images, ranges: Sequence[BatchRange]
) -> Logits:
    """Images (B, ...) -> logits (B, classes) float32, at most the largest batch at once.

    ``ranges`` are the batches that ``run`` accepts.  A part of another size, such as 5 images for
    batches of 1 to 4 and 8 to 32, is padded to the next accepted one with copies of its first
    image, and the extra logits are dropped.

    Raises:
        ArtifactError: ``run`` returns more or fewer rows than images, so that rows cannot be
            matched to images.
    """
    step = _largest(ranges) or max(len(images), 1)
    parts = []
    for at in range(0, len(images), step):
        part = images[at : at + step]
        missing = _padded_size(len(part), ranges) - len(part)
        padded = np.concatenate([part, np.repeat(part[:1], missing, 0)]) if missing else part
        logits = run(np.ascontiguousarray(padded))
        if logits.ndim < 1 or len(logits) != len(padded):
            raise ArtifactError(
                f"the classifier gave logits of shape {logits.shape} for {len(padded)} images",
                hint="it must return one row per image, in order: export it again",
            )
        parts.append(logits[: len(part)].astype(np.float32, copy=False))
    return np.concatenate(parts)
