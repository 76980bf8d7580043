"""A few images in every form that a graph may take them in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipdeploy.core.buffers import Buffers
from clipdeploy.core.errors import GraphError
from clipdeploy.core.passport import Preprocess, TensorSpec
from exporters.preprocess_graph import scale_and_offset

__all__ = ["Samples", "normalise", "stack_crops"]

# One batch is computed on while the next is prepared: more memory would wait for nothing.
_BUFFERS = Buffers(keep=2)


def normalise(
    crops: NDArray[np.uint8], spec: Preprocess, out: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """uint8 (B, S, S, 3) -> float32 (B, 3, S, S), ``(x / 255 - mean) / std`` per channel.

    ``out`` takes the result; it has its shape and type.
    """
    scale, offset = scale_and_offset(spec)
    count, height, width, channels = crops.shape
    planar = np.empty((count, channels, height, width), np.float32) if out is None else out
    # A few images at once, so that each step finds them in the processor's cache.
    step = max(1, (512 << 10) // max(1, height * width * channels))
    for start in range(0, count, step):
        part = planar[start : start + step]
        part[...] = crops[start : start + step].transpose(0, 3, 1, 2)
        part *= scale[:, None, None]
        part += offset[:, None, None]
    return planar


def stack_crops(crops: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """B crops, uint8 (S, S, 3) each -> (B, S, S, 3).

    Nothing is copied where they lie one behind the other in one array, as crops from the cache do.
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


@dataclass(frozen=True)
class Samples:
    """Crops, uint8 (B, S, S, 3), and what each kind of graph input makes of them."""

    crops: NDArray[np.uint8]
    spec: Preprocess

    @cached_property
    def pixels(self) -> NDArray[np.float32]:
        """Normalised, float32 (B, 3, S, S)."""
        count, height, width, channels = self.crops.shape
        out = _BUFFERS.empty((count, channels, height, width), np.float32)
        return normalise(self.crops, self.spec, out)

    def as_input(self, tensor: TensorSpec) -> NDArray[Any]:
        """What a graph with input ``tensor`` takes: uint8 crops, or float16 or float32 pixels."""
        return (
            self.crops if tensor.dtype == "uint8" else self.pixels.astype(tensor.dtype, copy=False)
        )

    def feed(self, tensor: TensorSpec) -> NDArray[Any]:
        """:meth:`as_input`, with as many images as a graph of a fixed batch takes."""
        batch = tensor.shape[0]
        return (self.of(batch) if isinstance(batch, int) else self).as_input(tensor)

    def and_those(self, others: Samples) -> Samples:
        """These images, then ``others`` of the same preprocessing."""
        return Samples(np.concatenate([self.crops, others.crops]), self.spec)

    def of(self, count: int) -> Samples:
        """``count`` images: the first ones, over again where there are fewer.

        Raises:
            GraphError: there is none.
        """
        if not len(self.crops):
            raise GraphError("no image to check the graph with")
        return Samples(self.crops[np.arange(count) % len(self.crops)], self.spec)
