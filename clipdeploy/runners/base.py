"""Defines the interface of runners, which compute logits from images."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from clipdeploy.core.errors import ArtifactError, EngineError
from clipdeploy.core.passport import TensorSpec

__all__ = ["Closing", "Images", "Logits", "Runner", "in_parts"]

Images = NDArray[Any]
Logits = NDArray[np.float32]


class Runner(Protocol):
    """Images of the shape and dtype in ``input`` -> logits (B, classes) float32, for any B.

    ``batches`` are the smallest and largest batch that runs at once; None means no limit.  A larger
    batch runs in parts, a smaller one is padded.  ``profiles`` are the (smallest, optimal, largest)
    batches of an engine; a graph has none.
    """

    name: str
    input: TensorSpec
    batches: tuple[int, int | None]
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


def in_parts(
    run: Callable[[Images], Logits], images: Images, batches: tuple[int, int | None]
) -> Logits:
    """Images (B, ...) -> logits (B, classes) float32, at most the largest batch at once.

    A part below the smallest batch is padded with its first image, and the extra logits are
    dropped.

    Raises:
        ArtifactError: ``run`` returns more or fewer rows than images, so that rows cannot be
            matched to images.
    """
    smallest, largest = batches
    step = largest or max(len(images), 1)
    parts = []
    for at in range(0, len(images), step):
        part = images[at : at + step]
        missing = smallest - len(part)
        padded = np.concatenate([part, np.repeat(part[:1], missing, 0)]) if missing > 0 else part
        logits = run(np.ascontiguousarray(padded))
        if logits.ndim < 1 or len(logits) != len(padded):
            raise ArtifactError(
                f"the classifier gave logits of shape {logits.shape} for {len(padded)} images",
                hint="it must return one row per image, in order: export it again",
            )
        parts.append(logits[: len(part)].astype(np.float32, copy=False))
    return np.concatenate(parts)
