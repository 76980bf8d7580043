"""What runs images: one small interface, whatever computes the logits."""

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
    """Images as ``input`` says -> logits (B, classes) float32; any B.

    ``batches`` are the smallest and the largest batch that runs at once, None for no limit: a
    larger one runs in parts, a smaller one is filled up.  ``profiles`` are an engine's (smallest,
    optimal, largest) batches; a graph has none.
    """

    name: str
    input: TensorSpec
    batches: tuple[int, int | None]
    profiles: tuple[tuple[int, int, int], ...]

    def __call__(self, images: Images) -> Logits:
        """The logits of one batch."""

    def run_in(self, profile: int, images: Images) -> Logits:
        """The same in the profile with this number, which takes the batch."""

    def device_seconds(self, images: Images) -> float | None:
        """The GPU's own time for one batch, transfers left out; None where there is none."""

    def close(self) -> None:
        """Give back what it holds."""


class Closing:
    """A runner that is a context manager, without profiles, a GPU or anything to give back."""

    profiles: tuple[tuple[int, int, int], ...] = ()

    def run_in(self, profile: int, images: Images) -> Logits:
        """See :class:`Runner`.

        Raises:
            EngineError: there are no profiles.
        """
        raise EngineError(f"{type(self).__name__} has no profile {profile}: it is no engine")

    def close(self) -> None:
        """Nothing to give back."""

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

    A part below the smallest is filled up with its own first image, whose logits are dropped.

    Raises:
        ArtifactError: ``run`` gives more or fewer rows than it was given images: which row belongs
            to which image is then a guess.
    """
    smallest, largest = batches
    step = largest or max(len(images), 1)
    parts = []
    for at in range(0, len(images), step):
        part = images[at : at + step]
        missing = smallest - len(part)
        filled = np.concatenate([part, np.repeat(part[:1], missing, 0)]) if missing > 0 else part
        logits = run(np.ascontiguousarray(filled))
        if logits.ndim < 1 or len(logits) != len(filled):
            raise ArtifactError(
                f"the classifier gave logits of shape {logits.shape} for {len(filled)} images",
                hint="a row an image is needed, in their order: export it again",
            )
        parts.append(logits[: len(part)].astype(np.float32, copy=False))
    return np.concatenate(parts)
