"""Converts image crops and token ids to the inputs of graphs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from clipdeploy.core.buffers import Buffers
from clipdeploy.core.errors import GraphError
from clipdeploy.core.passport import Preprocess, TensorSpec
from exporters.preprocess_graph import scale_and_offset

__all__ = ["GraphSamples", "Samples", "TokenIds", "normalise", "stack_crops"]

# One batch is in use while the next is prepared.
_BUFFERS = Buffers(keep=2)


def normalise(
    crops: NDArray[np.uint8], spec: Preprocess, out: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """uint8 (B, S, S, 3) -> float32 (B, 3, S, S), ``(x / 255 - mean) / std`` per channel.

    The result is written to ``out`` if given, an array of its shape and type.
    """
    scale, offset = scale_and_offset(spec)
    count, height, width, channels = crops.shape
    planar = np.empty((count, channels, height, width), np.float32) if out is None else out
    # A few images at a time, so that they stay in the processor's cache between steps.
    step = max(1, (512 << 10) // max(1, height * width * channels))
    for start in range(0, count, step):
        part = planar[start : start + step]
        part[...] = crops[start : start + step].transpose(0, 3, 1, 2)
        part *= scale[:, None, None]
        part += offset[:, None, None]
    return planar


def stack_crops(crops: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Stack B crops, uint8 (S, S, 3) each, to (B, S, S, 3).

    Crops that are consecutive in one array, such as cached ones, are not copied.
    """
    base, size = crops[0].base, crops[0].nbytes
    if not isinstance(base, np.ndarray) or base.dtype != np.uint8 or base.ndim != 1:
        return np.ascontiguousarray(np.stack(crops))
    first = _address(crops[0])
    for number, crop in enumerate(crops):
        if (
            crop.base is not base
            or crop.shape != crops[0].shape
            or not crop.flags.c_contiguous
            or _address(crop) != first + number * size
        ):
            return np.ascontiguousarray(np.stack(crops))
    start = first - _address(base)
    return base[start : start + len(crops) * size].reshape(len(crops), *crops[0].shape)


def _address(array: NDArray[np.uint8]) -> int:
    return int(array.__array_interface__["data"][0])


class GraphSamples(Protocol):
    """Samples of a graph's input: images or texts."""

    def as_input(self, tensor: TensorSpec) -> NDArray[Any]:
        """Return the samples (B, ...) as the input ``tensor`` of a graph."""

    def of(self, count: int) -> Self:
        """Return the first ``count`` samples, repeated if there are fewer.

        Raises:
            GraphError: there are no samples.
        """


def _repeated(available: int, count: int, what: str) -> NDArray[np.intp]:
    """The indices of ``count`` of the available samples, from the first on."""
    if not available:
        raise GraphError(f"no {what} to check the graph with")
    return np.arange(count) % available


@dataclass(frozen=True)
class TokenIds:
    """The token ids of texts (B, 77), of any integer type."""

    ids: NDArray[np.integer]

    def as_input(self, tensor: TensorSpec) -> NDArray[Any]:
        """Return the input of a graph with the spec ``tensor``: int32 or int64."""
        return self.ids.astype(tensor.dtype, copy=False)

    def of(self, count: int) -> TokenIds:
        """See :class:`GraphSamples`."""
        return TokenIds(self.ids[_repeated(len(self.ids), count, "text")])


@dataclass(frozen=True)
class Samples:
    """Crops, uint8 (B, S, S, 3), and the preprocessing that makes them graph inputs."""

    crops: NDArray[np.uint8]
    spec: Preprocess

    @cached_property
    def pixels(self) -> NDArray[np.float32]:
        """The normalised crops, float32 (B, 3, S, S)."""
        count, height, width, channels = self.crops.shape
        out = _BUFFERS.empty((count, channels, height, width), np.float32)
        return normalise(self.crops, self.spec, out)

    def as_input(self, tensor: TensorSpec) -> NDArray[Any]:
        """Return the input of a graph with the spec ``tensor``: uint8, float16 or float32."""
        return (
            self.crops if tensor.dtype == "uint8" else self.pixels.astype(tensor.dtype, copy=False)
        )

    def feed(self, tensor: TensorSpec) -> NDArray[Any]:
        """Return :meth:`as_input`, repeated or cut to the graph's batch size if that is fixed."""
        batch = tensor.shape[0]
        return (self.of(batch) if isinstance(batch, int) else self).as_input(tensor)

    def concat(self, others: Samples) -> Samples:
        """Append ``others``, which have the same preprocessing."""
        return Samples(np.concatenate([self.crops, others.crops]), self.spec)

    def of(self, count: int) -> Samples:
        """See :class:`GraphSamples`."""
        return Samples(self.crops[_repeated(len(self.crops), count, "image")], self.spec)
